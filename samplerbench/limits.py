"""Upper bounds of user input. They are far above useful values, and low enough to not exhaust the memory."""

from __future__ import annotations

MAX_STEPS = 1_000_000
"""Maximum number of steps of a sampler, and of network evaluations of a budget."""
MAX_EVALUATIONS = 10**15
"""Maximum number of network evaluations of a search, summed over images."""
MAX_TRAINING_STEPS = 1_000_000_000
"""Maximum number of optimiser steps."""
MAX_CELLS = 100_000
"""Maximum number of cells of a suite."""
MAX_IMAGES = 100_000_000
"""Maximum number of images of a run, over all blocks."""
MAX_BATCH = 1_000_000
"""Maximum batch size."""
MAX_REPEATS = 100_000
"""Maximum number of measured batches of one latency."""
MAX_SEED = 2**64 - 1
"""Maximum seed. Seeds are unsigned 64-bit integers, the key of the counter-based generator."""
MAX_CLASSES = 1_000_000
"""Maximum number of labels of a data set or a model."""
MAX_SIDE = 16_384
"""Maximum height and width of an image, in pixels."""
MAX_PIXELS = 2**26
"""Maximum number of pixels of an image: 8,192 x 8,192."""
MAX_TIMESTEPS = 1_000_000
"""Maximum number of noise levels of a discrete model."""
MAX_CHANNELS = 65_536
"""Maximum number of channels of an image, a latent or a layer."""
MAX_INTEGER = 2**63 - 1
"""Maximum of an integer parameter of a plugin without bounds: the largest integer that torch supports."""
MAX_RECORDED_TEXT = 20_000
"""Maximum length of a text in a result, in characters."""
MAX_RECORDED = 1e100
"""Maximum magnitude of a number in a result. The value of a metric may also be NaN or infinite."""
MAX_TOML = 256 * 1024
"""Maximum length of a TOML document, in characters."""
MAX_KEY_PARTS = 50
"""Maximum number of parts of a dotted TOML key. The parsing time grows with the square of this number."""
MAX_PICKLE_BYTES = 16 * 2**30
"""Maximum size of a pickle to convert, in bytes."""
MAX_PICKLE_OPCODES = 2_000_000
"""Maximum number of opcodes of a pickle. Each of them can create an object."""
