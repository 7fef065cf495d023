"""The checks of a model: the properties of a denoiser D(x, σ) for x = x₀ + σ z."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.data import load_data
from samplerbench.data.pixels import quantise
from samplerbench.errors import UserError, message_of
from samplerbench.metrics.memorisation import as_points
from samplerbench.metrics.neighbours import Neighbours
from samplerbench.models import Model, ModelSource
from samplerbench.models.model import Bound
from samplerbench.models.sample import sample_states, start_states
from samplerbench.sampling import Inputs, Sigma
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.spacing import make_grid, pick_spacing
from samplerbench.testing.checks import NotApplicableError, WarningError
from samplerbench.testing.common import (
    Checks,
    Euler,
    check_documented,
    check_picklable,
    require,
    same,
    untouched_random_state,
)

ROUNDING = 1e-4
"""Tolerance for float32 differences of D between batches, relative to √(1+σ²), the size of the state."""
_MODAL = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
"""Layers that behave differently in training mode."""
SLACK = 1.1
"""Tolerance factor for D compared with a trivial prediction, where the trivial one is nearly optimal."""


# --- The model and what it is asked --------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _load(source: ModelSource) -> Model | Exception:
    try:
        return source.load(torch.device("cpu"), torch.float32)
    except Exception as error:
        return error


def _model(source: ModelSource) -> Model:
    model = _load(source)
    if not isinstance(model, Model):
        raise NotApplicableError("it cannot be loaded: see loads")
    return model


def _some(model: Model, parts: tuple[float, ...] = (0.0, 0.3, 0.6, 1.0)) -> list[float]:
    """Some of the model's noise levels, from the smallest to the largest."""
    return [float(model.levels[round(part * (len(model.levels) - 1))]) for part in parts]


def _state(model: Model, sigma: float, n: int, first: int = 0) -> Tensor:
    """The start states of samples first … first+n-1 at level sigma, (n, C, H, W) float32."""
    return start_states(model, sigma, torch.arange(first, first + n), dtype=torch.float32)


def _labels(model: Model, n: int) -> Tensor | None:
    return None if model.classes is None else torch.arange(n) % model.classes


def _inputs(model: Model, labels: Tensor | None, n: int) -> Inputs:
    """The inputs of n samples with these labels or prompts, completed by the model."""
    given = Inputs(n, prompts=labels) if model.text else Inputs(n, labels=labels)
    return model.inputs(torch.arange(n), given)


@torch.no_grad()
def _denoise(model: Model, x: Tensor, sigma: Sigma, labels: Tensor | None) -> Tensor:
    return model.denoiser(_inputs(model, labels, len(x)))(x, sigma)


def _allowed(sigma: float) -> float:
    return ROUNDING * math.sqrt(1 + sigma**2)


def _real(model: Model, n: int) -> tuple[Tensor, Tensor | None]:
    """n real images as float32 states, and their labels."""
    try:
        x0, labels = model.real(n)
    except UserError as error:
        raise NotApplicableError(message_of(error)) from None
    given = labels if model.classes is not None else None
    if model.classes is not None and not model.null and given is None:
        raise NotApplicableError("its real images come without the labels it needs")
    return x0.float(), given


def _noised(model: Model) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """Real images, their labels, noise of their shape, and the images' standard deviation about their mean."""
    d = math.prod(model.shape)
    n = min(1000, max(32, 8192 // d))  # enough numbers for a standard deviation to 1 in 100
    x0, labels = _real(model, n)
    z = normal(0, Purpose.ESTIMATE, torch.arange(len(x0)), 0, model.shape).float()
    return x0, labels, z, _rms(x0 - x0.mean(dim=0))


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# --- The checks ----------------------------------------------------------------------------------------------------


def check_loads(source: ModelSource) -> str:
    """It loads on the CPU as a Model with a valid shape, and its network is in evaluation mode."""
    model = _load(source)
    if isinstance(model, Exception):
        raise model
    require(isinstance(model, Model), f"load() gives a {type(model).__name__}, not a samplerbench.models.Model")
    shape = model.shape
    sound = isinstance(shape, tuple) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape)
    require(sound, f"shape is {shape!r}; it is (C, H, W)")
    require(isinstance(model.network, nn.Module), f"network is a {type(model.network).__name__}, not a torch.nn.Module")
    require(isinstance(model.device, torch.device) and model.device.type == "cpu", f"device is {model.device!r}")
    allowed = (torch.float32, torch.float64)
    require(model.dtype in allowed, f"dtype is {model.dtype}; torch.float32 was asked for")
    training = [
        name for name, module in model.network.named_modules() if module.training and isinstance(module, _MODAL)
    ]
    require(not training, f"{', '.join(training[:3])}: in training mode; call .eval() on the network")
    classes = model.classes
    require(classes is None or classes >= 1, f"classes is {classes}; it is a number of labels, or None")
    return f"{'x'.join(map(str, shape))}, " + ("no labels" if classes is None else f"{classes} labels")


def check_levels(source: ModelSource) -> str:
    """The noise levels are float64 on the CPU, positive and increasing."""
    levels: Any = _model(source).levels
    require(isinstance(levels, Tensor), f"levels is a {type(levels).__name__}, not a tensor")
    require(levels.ndim == 1 and len(levels) >= 2, f"levels has the shape {tuple(levels.shape)}; it is (T,), T ≥ 2")
    require(levels.dtype == torch.float64, f"levels is {levels.dtype}, not torch.float64")
    require(levels.device.type == "cpu", f"levels is on {levels.device}, not on the CPU")
    require(bool(levels.isfinite().all()) and float(levels[0]) > 0, "a level is not finite, or not above 0")
    falls = (levels[1:] <= levels[:-1]).nonzero()
    require(not len(falls), f"levels does not increase at {int(falls[0]) if len(falls) else 0}")
    return f"{len(levels)}, σ from {float(levels[0]):.4g} to {float(levels[-1]):.4g}"


def check_identity(source: ModelSource) -> str:
    """The identity for the protocol has the source and a hash of the weights."""
    identity = _model(source).identity
    try:
        json.dumps(identity, allow_nan=False)
    except (TypeError, ValueError) as error:
        require(False, f"the identity cannot be written as JSON: {error}")
    name, weights = identity.get("source"), identity.get("weights")
    require(isinstance(name, str) and bool(name), 'identity has no "source": what the model is called')
    is_hash = isinstance(weights, str) and re.fullmatch(r"[0-9a-f]{16,}", weights) is not None
    require(is_hash, f'identity["weights"] is {weights!r}; it is a hexadecimal hash of the weights, such as a sha256')
    return f"{name}, weights {str(weights)[:8]}"


def check_reload(source: ModelSource) -> str:
    """Loading it again gives the same identity, noise levels and D."""
    model, again = _model(source), source.load(torch.device("cpu"), torch.float32)
    require(model.identity == again.identity, "loaded again it has another identity")
    require(torch.equal(model.levels, again.levels), "loaded again it has other levels")
    sigma = _some(model)[2]
    x, labels = _state(model, sigma, 2), _labels(model, 2)
    worst = same(_denoise(model, x, sigma, labels), _denoise(again, x, sigma, labels))
    require(worst == 0, f"loaded again its D differs by {worst:.1e}")
    return "bit for bit"


def check_shape(source: ModelSource) -> str:
    """D has the shape and the dtype of the state."""
    model, shapes = _model(source), []
    for n in (1, 3):
        for sigma in _some(model, (0.0, 1.0)):
            x = _state(model, sigma, n)
            out = _denoise(model, x, sigma, _labels(model, n))
            require(out.shape == x.shape, f"D of {tuple(x.shape)} is {tuple(out.shape)}")
            require(out.dtype == x.dtype, f"D of a {x.dtype} state is {out.dtype}")
        shapes.append(str(tuple(x.shape)))
    return f"float32, {' and '.join(shapes)}"


def check_finite(source: ModelSource) -> str:
    """D is finite at the noise levels and between them."""
    model, count = _model(source), 0
    last = len(model.levels) - 1
    for i in sorted({round(part * last / 8) for part in range(9)}):
        level, after = float(model.levels[i]), float(model.levels[min(i + 1, last)])
        for sigma in dict.fromkeys((level, math.sqrt(level * after))):
            out = _denoise(model, _state(model, sigma, 2), sigma, _labels(model, 2))
            require(bool(out.isfinite().all()), f"D at σ = {sigma:.4g} is not finite")
            count += 1
    return f"{count} levels are finite"


def check_batch_split(source: ModelSource) -> str:
    """D of a row does not depend on the other rows of the batch."""
    model, worst, n = _model(source), 0.0, 4
    labels, part = _labels(model, n), torch.tensor([3, 1])
    for sigma in _some(model):
        x = _state(model, sigma, n)
        together = _denoise(model, x, sigma, labels)
        alone = [_denoise(model, x[i : i + 1], sigma, None if labels is None else labels[i : i + 1]) for i in range(n)]
        with torch.no_grad():
            rows = model.denoiser(_inputs(model, labels, n)).rows(part)(x[part], sigma)
        difference = max(same(together, torch.cat(alone)), same(together[part], rows))
        require(
            difference <= _allowed(sigma), f"D at σ = {sigma:.4g} changes by {difference:.1e} with the batch it is in"
        )
        worst = max(worst, difference / math.sqrt(1 + sigma**2))
    return f"differ by {worst:.1e} of the state"


def check_sigma(source: ModelSource) -> str:
    """D is the same for σ as a number, as a tensor, or as one value per row."""
    model, worst = _model(source), 0.0
    levels = _some(model)
    n = len(levels)
    labels = _labels(model, n)
    mixed = torch.cat([_state(model, sigma, 1, first=i) for i, sigma in enumerate(levels)])
    each = _denoise(model, mixed, torch.tensor(levels, dtype=torch.float64), labels)
    for i, sigma in enumerate(levels):
        x = _state(model, sigma, n)
        out = _denoise(model, x, sigma, labels)
        others = (torch.tensor(sigma, dtype=torch.float64), torch.full((n,), sigma, dtype=torch.float64))
        difference = max(same(out, _denoise(model, x, other, labels)) for other in others)
        row = _denoise(model, mixed[i : i + 1], sigma, None if labels is None else labels[i : i + 1])
        difference = max(difference, same(row, each[i : i + 1]))
        require(
            difference <= _allowed(sigma),
            f"D at σ = {sigma:.4g} changes by {difference:.1e} where σ is given as a tensor, or to each row",
        )
        worst = max(worst, difference / math.sqrt(1 + sigma**2))
    return f"differ by {worst:.1e} of the state"


def check_deterministic(source: ModelSource) -> str:
    """Repeated calls give the same D, and do not use global random generators."""
    model = _model(source)
    with untouched_random_state():
        for sigma in _some(model):
            x, labels = _state(model, sigma, 2), _labels(model, 2)
            difference = same(_denoise(model, x, sigma, labels), _denoise(model, x, sigma, labels))
            require(difference == 0, f"asked twice at σ = {sigma:.4g}, D differs by {difference:.1e}")
    return "bit for bit"


def check_no_writes(source: ModelSource) -> str:
    """It never modifies the state, the levels or the labels."""
    model = _model(source)
    sigmas = torch.tensor(_some(model), dtype=torch.float64)
    n, labels = len(sigmas), _labels(model, len(sigmas))
    z = normal(0, Purpose.PRIOR, torch.arange(n), 0, model.shape).float()
    given = {"the noise": z, "the levels": sigmas, "the labels": labels, "the model's levels": model.levels}
    copies = {name: t.clone() for name, t in given.items() if t is not None}
    given["the state"] = x = model.prior(z, float(sigmas[-1]))
    copies["the state"] = x.clone()
    _denoise(model, x, sigmas, labels)
    _denoise(model, x, float(sigmas[-1]), labels)
    changed = [name for name, kept in copies.items() if not torch.equal(kept, _tensor(given[name]))]
    require(not changed, f"it writes into {', '.join(changed)}")
    return f"{len(copies)} tensors unchanged"


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def check_gradients(source: ModelSource) -> str:
    """It does not track gradients if they are disabled."""
    model = _model(source)
    sigma = _some(model)[2]
    leaf = _state(model, sigma, 2).requires_grad_()
    out = _denoise(model, leaf, sigma, _labels(model, 2))
    require(not out.requires_grad, "D tracks gradients where they are off, so a run would keep every step in memory")
    return "none"


def check_nfe(source: ModelSource) -> str:
    """Each D counts as one network evaluation per image; conditional and unconditional D together count as two."""
    model, n = _model(source), 3
    sigma, labels = _some(model)[2], _labels(model, 3)
    x = _state(model, sigma, n)
    for name, at in (("", sigma), (" with a level for each row", torch.full((n,), sigma, dtype=torch.float64))):
        with Meter(model.network) as meter:
            _denoise(model, x, at, labels)
        counted = meter.network / n
        require(counted == 1, f"{counted:g} evaluations an image are counted for one D{name}, at `network`")
    if not model.null:
        return "1 for each D"
    with Meter(model.network) as meter, torch.no_grad():
        Bound(model, _inputs(model, labels, n)).both(x, sigma)
    require(meter.network == 2 * n, f"{meter.network / n:g} evaluations an image are counted for both at once, not 2")
    return "1 for each D, 2 for both"


def check_prior(source: ModelSource) -> str:
    """The prior has the variance of the model's process (1+σ² for VP, σ² for VE), or that of x₀ + σ z."""
    model = _model(source)
    near = float(model.levels[int(model.levels.log().abs().argmin())])
    z = normal(0, Purpose.PRIOR, torch.arange(2), 0, model.shape)
    expected: dict[str, float] = {}
    with suppress(NotApplicableError):  # a model need not say what it was trained on
        expected["of x₀ + σ z"] = _noised(model)[3] ** 2
    for sigma in (near, float(model.levels[-1])):
        expected[f"the process is {model.process.name}"] = model.process.prior_scale(sigma) ** 2 - sigma**2
        for dtype in (torch.float32, torch.float64):
            start = model.prior(z.to(dtype), sigma)
            require(start.shape == z.shape, f"the start from z {tuple(z.shape)} is {tuple(start.shape)}")
            require(start.dtype == dtype, f"the start from a z of {dtype} is {start.dtype}")
        mean = model.prior(torch.zeros_like(z), sigma)
        scale = model.prior(torch.ones_like(z), sigma) - mean
        bent = same(model.prior(z, sigma), mean + scale * z) / sigma
        require(bent <= 1e-5, f"at σ = {sigma:.4g} the start is not Gaussian: not linear in z, by {bent:.1e} of σ")
        more = float(scale.square().mean()) - sigma**2
        # At a large σ only the whole can be told: what is left of the difference is rounding.
        fits = [abs(more - e) <= 0.15 * e + 1e-5 * (1 + sigma**2) for e in expected.values()]
        choices = " or ".join(f"σ² + {e:.3g} ({why})" for why, e in expected.items())
        require(any(fits), f"at σ = {sigma:.4g} the start has the variance σ² + {more:.3g}; it should be {choices}")
        shift = _rms(mean) / math.sqrt(1 + sigma**2)
        require(shift <= 1, f"at σ = {sigma:.4g} the start's mean is {_rms(mean):.3g}")
        if sigma == near:
            figure = f"σ² + {more:.3g} at σ = {near:.3g}"
    return figure


def check_clean(source: ModelSource) -> str:
    """At small σ, D(x₀ + σ z, σ) is no further from the real image x₀ than the state is."""
    model = _model(source)
    x0, labels, z, deviation = _noised(model)
    small = [s for s in _some(model, (0.0, 0.02, 0.05, 0.1, 0.2)) if s < deviation / 4]
    if not small:
        raise NotApplicableError(f"its smallest level, {float(model.levels[0]):.3g}, is no small one")
    worst, smallest = 0.0, _rms(_denoise(model, x0 + small[0] * z, small[0], labels) - x0)
    for sigma in small:
        error = _rms(_denoise(model, x0 + sigma * z, sigma, labels) - x0) / sigma
        require(error <= SLACK, f"at σ = {sigma:.3g} D is {error:.3g} σ from the real image; the state is 1 σ from it")
        worst = max(worst, error)
    return f"{smallest:.2g} from it at σ = {small[0]:.2g}; {worst:.2f} σ at most"


def check_denoises(source: ModelSource) -> str:
    """At medium σ, D is closer to the real image than the state and the mean image are."""
    model = _model(source)
    x0, labels, z, deviation = _noised(model)
    levels = model.levels.tolist()
    wanted = (deviation / 4, deviation / 2, deviation, 2 * deviation, 5 * deviation, 10 * deviation)
    sigmas = [min(levels, key=lambda s, w=w: abs(math.log(s / w))) for w in wanted]  # type: ignore[misc]
    ratios = []
    for sigma in dict.fromkeys(s for s in sigmas if s <= 12 * deviation):
        error = _rms(_denoise(model, x0 + sigma * z, sigma, labels) - x0)
        trivial = min(sigma, deviation)
        text = f"at σ = {sigma:.3g} D is {error:.3g} from the real image, the state or the mean {trivial:.3g}"
        require(error <= SLACK * trivial, text)
        ratios.append((error / trivial, sigma))
    ratio, sigma = min(ratios)
    return f"{ratio:.2f} of the better of the two at σ = {sigma:.2g}"


def check_top(source: ModelSource) -> str:
    """At the largest σ, D hardly depends on the noise, and is close to the mean image."""
    model, n = _model(source), 32
    sigma = float(model.levels[-1])
    label = None if model.classes is None else torch.zeros(n, dtype=torch.int64)
    out = _denoise(model, _state(model, sigma, n), sigma, label)
    spread = _rms(out - out.mean(dim=0))
    allowed = 1 + 0.02 * sigma  # the data's own scale, and a network's error of 2 in 100 in ε
    require(spread <= allowed, f"at σ = {sigma:.4g} D varies by {spread:.3g} with the noise; {allowed:.3g} is allowed")
    return f"varies by {spread:.2g} where the state varies by {sigma:.3g}"


def check_posterior_mean(source: ModelSource) -> str:
    """D = E[x₀ | x]: over samples of its own distribution, the error x₀ - D is orthogonal to functions of x."""
    model, n = _model(source), 2000
    if not model.draws:
        raise NotApplicableError("it does not say (draws) that its real images are draws from its own distribution")
    x0, labels = _real(model, n)
    z = normal(1, Purpose.ESTIMATE, torch.arange(n), 0, model.shape).float()
    deviation, worst = _rms(x0 - x0.mean(dim=0)), 0.0
    for sigma in (deviation / 3, deviation, 3 * deviation):
        x = x0 + sigma * z
        for given in (None, labels) if model.null and labels is not None else (labels,):
            error = (x0 - _denoise(model, x, sigma, given)).double().flatten(1)
            flat = x.double().flatten(1) / math.sqrt(deviation**2 + sigma**2)
            for function in (torch.ones_like(flat), flat, flat.tanh(), flat.square()):
                terms = error * function
                # In each pixel, and summed over them: where D is right, standard scores.
                each = terms.mean(dim=0) / (terms.std(dim=0) + 1e-12) * math.sqrt(n)
                total = terms.sum(dim=1)
                score = float(torch.cat([each, total.mean(0, True) / (total.std() + 1e-12) * math.sqrt(n)]).abs().max())
                require(
                    score <= 5,
                    f"at σ = {sigma:.3g} x₀ - D goes with x: by {score:.1f} standard errors over {n} draws",
                )
                worst = max(worst, score)
    return f"within {worst:.1f} standard errors over {n} draws"


def check_labels(source: ModelSource) -> str:
    """A label changes D only in its own row, and an unknown label raises an error."""
    model = _model(source)
    if model.classes is None:
        raise NotApplicableError("it has no labels")
    beyond = torch.tensor([model.classes])
    try:
        model.check_inputs(_inputs(model, beyond, 1))
    except UserError:
        pass
    else:
        require(False, f"the label {model.classes} is not refused, though the last one is {model.classes - 1}")
    if model.classes == 1:
        raise NotApplicableError("it has a single label")
    most = 0.0
    for sigma in _some(model):
        x = _state(model, sigma, 1).repeat(2, 1, 1, 1)
        both = _denoise(model, x, sigma, torch.tensor([0, 1]))
        swapped = _denoise(model, x, sigma, torch.tensor([1, 0]))
        wrong = same(both, swapped.flip(0))
        require(wrong <= _allowed(sigma), f"at σ = {sigma:.4g} a label changes the D of another row by {wrong:.1e}")
        most = max(most, same(both[0], both[1]) / _allowed(sigma))
    require(most > 1, "the labels change nothing")
    return "they change D, each its own row"


def check_null(source: ModelSource) -> str:
    """Without a label it gives the unconditional D, also when both are requested at once."""
    model = _model(source)
    if model.classes is None:
        raise NotApplicableError("it has no labels")
    if not model.null:
        try:
            model.check_inputs(_inputs(model, None, 1))
        except UserError:
            return "it has none, and says so"
        require(False, "null is false, and yet to be asked without a label is not refused")
    n, most = 3, 0.0
    labels = _labels(model, n)
    for sigma in _some(model):
        x = _state(model, sigma, n)
        denoiser = Bound(model, _inputs(model, labels, n))  # what a guidance is given: not clipped yet
        with torch.no_grad():
            free, given = (prediction.x0 for prediction in denoiser.both(x, sigma))
            alone = denoiser.unconditional(x, sigma).x0, denoiser.conditional(x, sigma).x0
            without = Bound(model, _inputs(model, None, n))(x, sigma)
        worst = max(same(free, alone[0]), same(given, alone[1]), same(free, without))
        require(worst <= _allowed(sigma), f"at σ = {sigma:.4g} both at once differ from each alone by {worst:.1e}")
        most = max(most, same(free, given) / _allowed(sigma))
    require(most > 1, "without a label D is as with one")
    return "asked alone and with a label the same"


def check_images(source: ModelSource) -> str:
    """Its real images have its shape and valid labels, and can be decoded."""
    model, n = _model(source), 4
    x0, labels = _real(model, n)
    require(x0.shape == (n, *model.shape), f"{n} real images are {tuple(x0.shape)}, not {(n, *model.shape)}")
    require(bool(x0.isfinite().all()), "a real image is not finite")
    if labels is not None:
        require(labels.shape == (n,), f"the labels of {n} real images are {tuple(labels.shape)}")
        model.check_inputs(_inputs(model, labels, n))
    with torch.no_grad():
        images = model.decode(x0)
    wanted = (n, *model.image_shape)
    require(images.shape == wanted, f"{n} states are decoded to {tuple(images.shape)}, not {wanted}")
    require(bool(images.isfinite().all()), "a decoded image is not finite")
    return f"{'x'.join(map(str, wanted[1:]))}, from {float(images.min()):.2f} to {float(images.max()):.2f}"


COPYING = 0.35
"""Authenticity below which a model is said to copy its training images; images that are not copies reach about 0.5."""
SAMPLED = 200
"""Images that are sampled for it."""
MOST_VALUES = 3 * 64 * 64
"""Values of one image above which sampling is left to `samplerbench run --metric authenticity`."""


def check_memorisation(source: ModelSource) -> str:
    """Samples are no copies of the training images: their authenticity in pixels is not far below one half."""
    model = _model(source)
    if not model.data:
        raise NotApplicableError("it does not say what it was trained on")
    if math.prod(model.image_shape) > MOST_VALUES:
        raise NotApplicableError("its images are large: measure it with the metric authenticity")
    try:
        training = load_data(model.data)
    except UserError as error:
        raise NotApplicableError(f"its training images are not available: {error}") from None
    real = Neighbours(as_points(training.images))
    sigmas = make_grid(pick_spacing(Euler), model.levels, 25)
    inputs = _inputs(model, _labels(model, SAMPLED), SAMPLED)
    images = model.decode(sample_states(model, Euler(), sigmas, torch.arange(SAMPLED), inputs))
    distances, index = real.nearest(as_points(quantise(images)), 1)
    share = float((distances[:, 0] > real.own[index[:, 0]]).double().mean())
    if share < COPYING:
        raise WarningError(
            f"authenticity {share:.0%} of {SAMPLED} samples: most of them are nearer to a training image than that "
            "is to any other. The model copies its training data; its FID against them says little about new images"
        )
    return f"authenticity {share:.0%} of {SAMPLED} samples"


CHECKS: Checks = [
    ("documented", check_documented),
    ("picklable", check_picklable),
    ("loads", check_loads),
    ("levels", check_levels),
    ("identity", check_identity),
    ("reload", check_reload),
    ("shape", check_shape),
    ("finite", check_finite),
    ("batch-split", check_batch_split),
    ("sigma", check_sigma),
    ("deterministic", check_deterministic),
    ("no-writes", check_no_writes),
    ("gradients", check_gradients),
    ("nfe", check_nfe),
    ("prior", check_prior),
    ("clean", check_clean),
    ("denoises", check_denoises),
    ("top", check_top),
    ("posterior-mean", check_posterior_mean),
    ("labels", check_labels),
    ("null", check_null),
    ("images", check_images),
    ("memorisation", check_memorisation),
]
