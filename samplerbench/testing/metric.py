"""The checks of a metric, on the embedded digits. Some digits are the real images, others are good samples, and noise
images are bad samples."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from samplerbench.data import load_data
from samplerbench.data.pixels import dequantise, quantise
from samplerbench.errors import SamplerbenchError
from samplerbench.metrics import Accumulator, Batch, Context, FeatureStore, Layer, Metric, Moments, Reference
from samplerbench.metrics.extractors import DIGITS, Extractor, load_extractor
from samplerbench.metrics.memorisation import as_points
from samplerbench.metrics.neighbours import Neighbours
from samplerbench.models.exact import exact
from samplerbench.models.model import Model
from samplerbench.results.partial import Extent, Progress, load_partial, save_partial
from samplerbench.sampling import Chain, Denoiser, Inputs, Noise, Prediction, Sampler, Step, markov_variance
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.ode import Ode
from samplerbench.testing.checks import NotApplicableError
from samplerbench.testing.common import (
    Checks,
    LeftHalf,
    check_documented,
    check_picklable,
    require,
    untouched_random_state,
)

REAL = 300
"""Number of digits that are the real images. Samples are other digits."""
IMAGES = 60
"""Number of samples, if the metric does not require more."""
LIMIT = 700
"""Maximum number of samples. The digits must contain twice as many."""
TOLERANCE = 1e-6
"""Relative tolerance for rounding of float32 sums."""


# --- What is measured ----------------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """The digits in a fixed random order, and their labels."""
    data = load_data("digits")
    assert data.labels is not None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.images[order], data.labels[order]


@cache
def _extractor() -> Extractor:
    return load_extractor(DIGITS, torch.device("cpu"), metrics=get_args(Layer))


@cache
def _real() -> dict[str, Tensor]:
    return _extractor().all(_digits()[0][:REAL])


@cache
def _samples(good: bool, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    """n images, (n, 1, 8, 8) uint8, and their features in each layer: digits that are not the real ones, or noise."""
    images = _digits()[0][REAL : REAL + n]
    if not good:
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, images.shape, generator=generator, dtype=torch.uint8)
    return images, _extractor().all(images)


def _solve(index: Tensor, sampler: Sampler) -> Tensor:
    """A substitute for the converged solution: the good samples with an error of 0.01."""
    truth = dequantise(_digits()[0][REAL:][index])
    return truth + 0.01 * normal(0, Purpose.ESTIMATE, index, 0, tuple(truth.shape[1:])).float()


def _solve_images(index: Tensor, sampler: Sampler) -> Tensor:
    return quantise(_solve(index, sampler))


class _Prompts:
    """Prompts that are the names of digits. The embedding of a digit is the mean of its real images' features."""

    scale = 10.0

    def embed(self, prompts: Sequence[str]) -> Tensor:
        labels, features = _digits()[1][:REAL], _real()["fid"]
        means = {prompt: features[labels == int(prompt)].mean(dim=0) for prompt in set(prompts)}
        return torch.stack([means[prompt] for prompt in prompts])


class _RealSet:
    """The real images, as the data set that a metric names itself."""

    def neighbours(self, layer: Layer | None) -> Neighbours:
        return _neighbours(layer)


@cache
def _neighbours(layer: Layer | None) -> Neighbours:
    return Neighbours(as_points(_digits()[0][:REAL]) if layer is None else _real()[layer])


def _context(n: int, metric: Metric | None = None) -> Context:
    """What a metric is measured against. For a metric of the data, also a model, a sampler and its grid."""
    context = _context_of_samples(n)
    if metric is None or metric.of != "data":
        return context
    model = exact("gaussian", shape="1x8x8")
    images = metric.evaluated(model, LIMIT, 1)
    if images is not None and images.n < n:
        raise NotApplicableError(f"it evaluates {images.n} images, and {n} are measured here")

    def denoiser(inputs: Inputs) -> Denoiser:
        return model.denoiser(inputs)

    sigmas = torch.tensor([5.0, 1.0, 0.4, 0.1, 0.0], dtype=torch.float64)
    return replace(context, model=model, evaluated=images, denoiser=denoiser, sampler=EulerOrGaussian(), sigmas=sigmas)


@dataclass(frozen=True)
class EulerOrGaussian(Sampler):
    """Euler's method for the probability-flow ODE, and beside it the Gaussian kernel of DDPM (Ho et al. 2020, eq. 7).

    A metric of the data can take what it needs: the solver in both directions, or the kernel.
    """

    reversible = True

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        ode = Ode(denoise)
        for s, t in pairwise(sigmas.tolist()):
            x = x + (t - s) * ode.slope(x, s)
            yield Step(t, x)

    def transition(self, x: Tensor, prediction: Prediction, s: float, t: float, chain: Chain) -> tuple[Tensor, float]:
        mean = prediction.x0 + (t / s) ** 2 * (x - prediction.x0)
        return mean, markov_variance(s, t) if t > 0 else s**2


@cache
def _observed_digits() -> Model:
    """A model with a task whose real images are the good samples, for metrics that need the truth."""
    return exact("gaussian").observed(LeftHalf(), dequantise(_digits()[0][REAL:]))


def _context_of_samples(n: int) -> Context:
    real = {layer: features.clone() for layer, features in _real().items()}  # a metric may write into them
    described = {"name": "digits", "split": "a part", "n": REAL, "sha256": ""}
    reference = Reference(Moments.of(real["fid"]), described, _extractor().identity)
    return Context(
        reference,
        lambda layer: real[layer],
        _solve,
        n,
        real_set=_RealSet(),
        prompts=_Prompts(),
        solve_images=_solve_images,
        model=_observed_digits(),
    )


def _size(metric: Metric) -> int:
    n = max(IMAGES, metric.min_images)
    if n > LIMIT:
        raise NotApplicableError(f"it needs {n} images, and at most {LIMIT} are measured here")
    return n


def _batch(metric: Metric, n: int, good: bool = True) -> Batch:
    """The samples 0 … n-1 as one batch, in tensors of its own. For a metric of the data, the images of the model."""
    images, features = _samples(good, n)
    if metric.of == "data":
        evaluated = _context(n, metric).evaluated
        states = dequantise(images).double() if evaluated is None else evaluated.states(torch.arange(n))
        found = features[metric.layer].clone()
        return Batch(quantise(states), found, None, torch.arange(n), states, inputs=Inputs(n))
    labels = _digits()[1][REAL : REAL + n].clone()
    return Batch(
        images.clone(),
        features[metric.layer].clone(),
        labels,
        torch.arange(n),
        dequantise(images),
        prompts=tuple(str(label) for label in labels.tolist()),
        inputs=_observed_digits().inputs(torch.arange(n), Inputs(n)) if metric.needs_truth else None,
    )


def _rows(batch: Batch, rows: Tensor) -> Batch:
    cut = {f.name: getattr(batch, f.name)[rows] for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    prompts = None if batch.prompts is None else tuple(batch.prompts[i] for i in rows.tolist())
    inputs = None if batch.inputs is None else batch.inputs.rows(rows)
    return replace(batch, **cut, prompts=prompts, inputs=inputs)


def _cut(batch: Batch, at: Iterable[int]) -> list[Batch]:
    """The batch in pieces that begin at 0 and at each of `at`."""
    n = len(batch.index)
    edges = [0, *(a for a in at if 0 < a < n), n]
    return [_rows(batch, torch.arange(a, b)) for a, b in pairwise(edges)]


def _fed(metric: Metric, batches: Sequence[Batch], context: Context) -> Accumulator:
    accumulator = metric.start(context)
    for batch in batches:
        accumulator.update(batch)
    return accumulator


def _merged(metric: Metric, states: Iterable[dict[str, Tensor]], context: Context) -> Accumulator:
    accumulator = metric.start(context)
    for state in states:
        accumulator.merge(state)
    return accumulator


def _value(accumulator: Accumulator) -> float:
    """The value of the result, a finite number. Raises NotApplicableError where there is none for these images."""
    result = accumulator.result()
    require(isinstance(result, dict), f"the result is a {type(result).__name__}, not a dict")
    if not result:
        raise NotApplicableError("it has no value for these images: the result is {}")
    require("value" in result, f'the result has no "value": it has {", ".join(map(str, result))}')
    value = result["value"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(number, f"the value is a {type(value).__name__}, not a float")
    require(math.isfinite(value), f"the value is {value}")
    return float(value)


def _measure(metric: Metric, batches: Sequence[Batch], context: Context) -> float:
    return _value(_fed(metric, batches, context))


@dataclass(frozen=True)
class _Whole:
    """The samples as one batch, the value, and the scale on which another value is near to it."""

    batch: Batch
    context: Context
    value: float
    scale: float

    def require_same(self, values: Iterable[float], what: str) -> str:
        worst = max((abs(value - self.value) / self.scale for value in values), default=0.0)
        require(worst <= TOLERANCE, f"{what} changes the value by {worst:.1e} of it")
        return f"differ by {worst:.1e} of the value"


def _images(n: int) -> str:
    return "1 image" if n == 1 else f"{n} images"


def _whole(metric: Metric) -> _Whole:
    n = _size(metric)
    context = _context(n, metric)
    value = _measure(metric, [_batch(metric, n)], context)
    bad = value if metric.of == "data" else _measure(metric, [_batch(metric, n, good=False)], context)
    # Near 0 the value of good samples is a difference of larger numbers, whose rounding it has.
    return _Whole(_batch(metric, n), context, value, max(abs(value), abs(bad) / 100, 1e-30))


# --- The checks ----------------------------------------------------------------------------------------------------


def check_declared(metric: Metric) -> str:
    """It declares the direction of better values, the layer of its features, and its minimum number of images."""
    require(metric.better in ("lower", "higher"), f'better is "{metric.better}"; it is "lower" or "higher"')
    known = get_args(Layer)
    require(metric.layer in known, f'layer is "{metric.layer}"; it is one of {", ".join(known)}')
    min_images = metric.min_images
    sound = isinstance(min_images, int) and not isinstance(min_images, bool) and min_images >= 1
    require(sound, f"min_images is {min_images!r}; it is a number of images, at least 1")
    return f"{metric.better} is better; layer {metric.layer}; at least {_images(min_images)}"


def check_result(metric: Metric) -> str:
    """The result has a finite value and can be written as JSON."""
    n = _size(metric)
    accumulator = _fed(metric, [_batch(metric, n)], _context(n, metric))
    value = _value(accumulator)
    result = accumulator.result()
    try:
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError) as error:
        require(False, f"the result cannot be written as JSON: {error}")
    return ", ".join([f"value {value:.4g}", *(f"{k}" for k in result if k != "value")])


def check_better(metric: Metric) -> str:
    """Real images are better than noise, in the declared direction."""
    if not metric.prefers_real_images:
        raise NotApplicableError("it says that real images need not be better than noise (prefers_real_images)")
    if metric.of == "data":
        raise NotApplicableError("it is of the data, and real images are compared with nothing")
    n = _size(metric)
    good, bad = (_measure(metric, [_batch(metric, n, good=g)], _context(n, metric)) for g in (True, False))
    text = f"real images {good:.4g}, noise {bad:.4g}"
    right = good < bad if metric.better == "lower" else good > bad
    require(right, f"it says that {metric.better} is better: {text}")
    return text


def check_batch_cut(metric: Metric) -> str:
    """The value does not depend on how the images are split into batches."""
    whole = _whole(metric)
    cuts = ((1,), (20, 40), (1, 3, 7, 50), range(1, len(whole.batch.index), 9))
    values = [_measure(metric, _cut(whole.batch, cut), whole.context) for cut in cuts]
    return whole.require_same(values, "another cut into batches")


def check_merge(metric: Metric) -> str:
    """Parts that are measured separately and merged, including empty parts, give the same value."""
    whole = _whole(metric)
    context = whole.context

    def empty() -> dict[str, Tensor]:
        return metric.start(context).state()

    values = []
    for cut in ((30,), (1,), (7, 8, 40)):
        states = [_fed(metric, [part], context).state() for part in _cut(whole.batch, cut)]
        values.append(_value(_merged(metric, states, context)))
        values.append(_value(_merged(metric, [empty(), *states, empty()], context)))
        first, *rest = _cut(whole.batch, cut)
        grown = _fed(metric, [first], context)  # into one that has seen images itself
        for part in rest:
            grown.merge(_fed(metric, [part], context).state())
        values.append(_value(grown))
    return whole.require_same(values, "merging")


def check_order(metric: Metric) -> str:
    """The value does not depend on the order of images, batches and merges."""
    if metric.ordered:
        raise NotApplicableError("it says that its value is of the images in their order")
    whole = _whole(metric)
    shuffled = torch.randperm(len(whole.batch.index), generator=torch.Generator().manual_seed(2))
    parts = _cut(whole.batch, (10, 25, 45))
    states = [_fed(metric, [part], whole.context).state() for part in parts]
    values = [
        _measure(metric, parts[::-1], whole.context),
        _measure(metric, [_rows(whole.batch, shuffled)], whole.context),
        _value(_merged(metric, states[::-1], whole.context)),
    ]
    return whole.require_same(values, "another order")


def check_snapshot(metric: Metric) -> str:
    """The state is a snapshot: reading it has no effect, and later images do not change it."""
    whole = _whole(metric)
    first, second = _cut(whole.batch, (25,))
    accumulator = _fed(metric, [first], whole.context)
    given = accumulator.state()
    kept = copy.deepcopy(given)
    accumulator.update(second)
    value = _value(accumulator)
    receiver = _merged(metric, [given], whole.context)
    receiver.update(second)
    changed = [name for name in kept if not torch.equal(kept[name], given[name])]
    require(not changed, f"of a state taken before, {', '.join(changed)} changed when more images came")
    return whole.require_same([value, _value(receiver)], "taking the state")


def check_checkpoint(metric: Metric) -> str:
    """The state consists of tensors, and a run that resumes from a checkpoint gives the same value."""
    whole = _whole(metric)
    first, second = _cut(whole.batch, (25,))
    names: set[str] = set()
    values = []
    for states in ([first], []):  # the second is a checkpoint at the beginning of a block
        state = _fed(metric, states, whole.context).state()
        wrong = [k for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
        require(not wrong, f"the state's {wrong[0] if wrong else ''} is no tensor under a name")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "cell.safetensors"
            save_partial(file, "", Progress(), [state], torch.zeros(0, 1, 1, 1, dtype=torch.uint8))
            loaded = load_partial(file, "", Extent(1, 1, 1, (1, 1, 1), 0))
        require(loaded is not None, "the checkpoint cannot be read again")
        assert loaded is not None
        after = _merged(metric, [s for s in loaded.states if s], whole.context)
        after.update(second) if states else after.update(whole.batch)
        values.append(_value(after))
        names |= state.keys()
    figure = whole.require_same(values, "a checkpoint")
    return f"{figure}; the state is {', '.join(sorted(names))}"


def check_min_images(metric: Metric) -> str:
    """It has a value for its declared minimum number of images."""
    n = metric.min_images
    _size(metric)
    value = _measure(metric, [_batch(metric, n)], _context(n, metric))
    return f"{_images(n)}: {value:.4g}"


def check_memory(metric: Metric) -> str:
    """The state does not grow with the number of images, unless the accumulator is a FeatureStore."""
    n = _size(metric)

    def size(images: int) -> int:
        state = _fed(metric, [_batch(metric, images)], _context(images, metric)).state()
        return sum(t.numel() * t.element_size() for t in state.values())

    one, two = size(n), size(2 * n)
    if isinstance(metric.start(_context(n, metric)), FeatureStore):
        require(two <= 2.1 * one, f"twice the images are {two / max(one, 1):.1f} times the state")
        return f"keeps what it sees: {(two - one) / n:.0f} bytes an image"
    require(
        two <= one,
        f"the state grows by {(two - one) / n:.0f} bytes an image; an accumulator that keeps what it sees is a "
        "subclass of FeatureStore",
    )
    return f"{one} bytes for {n} images and for {2 * n}"


def check_no_state(metric: Metric) -> str:
    """It keeps no state between runs: interleaved accumulators give the same values."""
    n = _size(metric)
    context, before = _context(n, metric), dict(vars(metric))
    streams = [_cut(_batch(metric, n, good=good), (20, 40)) for good in (True, False)]
    alone = [_measure(metric, stream, context) for stream in streams]
    pair = [metric.start(context), metric.start(context)]
    for batches in zip(*streams, strict=True):
        for accumulator, batch in zip(pair, batches, strict=True):
            accumulator.update(batch)
    mixed = [_value(accumulator) for accumulator in pair]
    require(mixed == alone, f"in turns with another the value is {mixed[0]:.6g}; alone it is {alone[0]:.6g}")
    require(dict(vars(metric)) == before, "its attributes changed in a run")
    return "in turns with another the same, bit for bit"


def check_lacking(metric: Metric) -> str:
    """Without labels, prompts, real images or a solver it works, or raises a one-line error."""
    n = _size(metric)
    batch, needs = _batch(metric, n), []
    cases: list[tuple[str, Callable[[], float]]] = [
        ("labels", lambda: _measure(metric, [replace(batch, labels=None)], _context(n, metric))),
        ("prompts", lambda: _measure(metric, [replace(batch, prompts=None)], _context(n, metric))),
        ("real images", lambda: _measure(metric, [batch], replace(_context(n, metric), real=None))),
        ("a solver", lambda: _measure(metric, [batch], replace(_context(n, metric), solve=None, solve_images=None))),
        ("determinism", lambda: _measure(metric, [replace(batch, stochastic=True)], _context(n, metric))),
    ]
    if metric.of == "data":
        cases.append(("a run of a sampler", lambda: _measure(metric, [batch], _context(n))))
    for what, measured in cases:
        try:
            measured()
        except NotApplicableError:
            needs.append(what)
        except SamplerbenchError as error:
            line = str(error).strip()
            require(bool(line) and "\n" not in line, f"without {what} its error is not one line: {line!r}")
            needs.append(what)
        except AssertionError:
            raise
        except Exception as error:
            require(False, f"without {what} it raises {type(error).__name__}: {error}")
    return f"needs {', '.join(needs)}" if needs else "needs none of them"


def check_no_writes(metric: Metric) -> str:
    """It never modifies its images, features and reference."""
    n = _size(metric)
    batch, context = _batch(metric, n), _context(n, metric)
    given = {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), Tensor)}
    given |= {f"the real images' {layer}": context.real_features(layer) for layer in get_args(Layer)}
    moments = context.reference.moments
    given |= {"the reference's mean": moments.mean, "the reference's scatter": moments.scatter}
    copies = {name: tensor.clone() for name, tensor in given.items()}
    _measure(metric, [batch], context)
    changed = [name for name, tensor in given.items() if not torch.equal(tensor, copies[name])]
    require(not changed, f"it writes into {', '.join(changed)}")
    return f"{len(given)} tensors unchanged"


def check_random_state(metric: Metric) -> str:
    """It does not use global random generators, and repeated measurements are equal."""
    n = _size(metric)
    with untouched_random_state():
        values = [_measure(metric, [_batch(metric, n)], _context(n, metric)) for _ in range(2)]
    require(values[0] == values[1], f"measured twice it is {values[0]:.6g} and {values[1]:.6g}")
    return "untouched"


CHECKS: Checks = [
    ("documented", check_documented),
    ("picklable", check_picklable),
    ("declared", check_declared),
    ("result", check_result),
    ("better", check_better),
    ("batch-cut", check_batch_cut),
    ("merge", check_merge),
    ("order", check_order),
    ("snapshot", check_snapshot),
    ("checkpoint", check_checkpoint),
    ("min-images", check_min_images),
    ("memory", check_memory),
    ("no-state", check_no_state),
    ("lacking", check_lacking),
    ("no-writes", check_no_writes),
    ("random-state", check_random_state),
]
