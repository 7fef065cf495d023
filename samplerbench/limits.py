"""Upper bounds of the numbers a user gives. They are far above what is useful, and below what exhausts the memory."""

from __future__ import annotations

MAX_STEPS = 1_000_000
"""Steps of a sampler, and network evaluations of a budget."""
MAX_TRAINING_STEPS = 1_000_000_000
"""Optimiser steps of a training."""
MAX_CELLS = 100_000
"""Cells of a suite."""
MAX_IMAGES = 100_000_000
"""Images of a run, over all its blocks."""
MAX_BATCH = 1_000_000
"""Images at a time."""
MAX_SEED = 2**64 - 1
"""Seeds are unsigned 64-bit numbers: the key of the counter-based generator."""
MAX_CLASSES = 1_000_000
"""Labels of a data set or a model."""
MAX_SIDE = 16_384
"""Pixels of an image's side."""
MAX_PIXELS = 2**26
"""Pixels of one image: 8,192 x 8,192."""
MAX_TIMESTEPS = 1_000_000
"""Noise levels of a discrete model."""
MAX_CHANNELS = 65_536
"""Channels of an image, a latent or a network's layer."""
MAX_INTEGER = 2**63 - 1
"""What a plugin's integer parameter may be where the plugin states no bound: the largest that torch takes."""
MAX_RECORDED_TEXT = 20_000
"""Characters that a text in a result may have."""
MAX_RECORDED = 1e100
"""The magnitude that a number in a result may have; a metric's value may also be NaN or infinite."""
MAX_TOML = 256 * 1024
"""Characters of a TOML document."""
MAX_KEY_PARTS = 50
"""Parts of a dotted key in a TOML document: the time to parse one grows with their square."""
