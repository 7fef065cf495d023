"""The checks of a guidance, on a mixture whose label posterior and posterior under a linear task are known."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from samplerbench.models.exact import ExactModel, exact
from samplerbench.models.sample import sample_states
from samplerbench.options import parameters_of
from samplerbench.sampling import Denoiser, Guidance, Inputs
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.testing.checks import NotApplicableError
from samplerbench.testing.common import (
    Checks,
    Euler,
    LeftHalf,
    check_documented,
    check_picklable,
    require,
    same,
    untouched_random_state,
)
from samplerbench.testing.posterior import check_guidance_full_observation, check_guidance_posterior

_LEVELS = (0.05, 0.5, 3.0, 40.0)


def _setting(guidance: Guidance, dtype: torch.dtype = torch.float64) -> tuple[ExactModel, Tensor, Tensor]:
    model = exact("mixture", shape="1x2x2", width=0.5)
    if guidance.needs_task:
        model = model.observed(LeftHalf(), model.real(6)[0])
    x = normal(1, Purpose.PRIOR, torch.arange(6), 0, model.shape).to(dtype)
    return model, x, torch.tensor([0, 1, 0, 1, 1, 0])


def _denoiser(model: ExactModel, labels: Tensor, guidance: Guidance | None = None, first: int = 0) -> Denoiser:
    """The denoiser of the samples from number `first` on."""
    inputs = model.inputs(torch.arange(first, first + len(labels)), Inputs(len(labels), labels))
    return model.denoiser(inputs, bind_guidance(guidance, model))


def _guided(
    guidance: Guidance, model: ExactModel, x: Tensor, labels: Tensor, sigma: float | Tensor, first: int = 0
) -> Tensor:
    with torch.no_grad():
        return _denoiser(model, labels, guidance, first)(x * (1 + sigma if isinstance(sigma, float) else 1), sigma)


def check_scale_one(guidance: Guidance) -> str:
    """Scale 1 gives the conditional model."""
    if not guidance.bayes:
        raise NotApplicableError("it says that its scale 1 is not Bayes' rule")
    if "scale" not in parameters_of(type(guidance)):
        raise NotApplicableError("it has no parameter called scale")
    changes = {"scale": 1.0} | ({"conditional": False} if "conditional" in guidance.parameters else {})
    one = dataclasses.replace(guidance, **changes)
    model, x, labels = _setting(guidance)
    worst = 0.0
    for sigma in _LEVELS:
        state = x * (1 + sigma)
        with torch.no_grad():
            plain = _denoiser(model, labels)(state, sigma)
            worst = max(worst, same(_denoiser(model, labels, one)(state, sigma), plain))
    require(worst <= 1e-8, f"scale 1 differs from the conditional model by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_steers(guidance: Guidance) -> str:
    """It increases the probability of the requested label, compared with the unconditional model."""
    if guidance.needs_task:
        raise NotApplicableError("it follows an observation, not a label: see observes")
    model, x, labels = _setting(guidance)
    rows = torch.arange(len(x))
    gains = []
    for sigma in (0.5, 3.0):
        state = x * (1 + sigma)
        small = torch.full((len(x),), 0.3, dtype=torch.float64)
        with torch.no_grad():
            guided = _denoiser(model, labels, guidance)(state, sigma)
            free = model.denoiser(Inputs(len(x)))(state, sigma)
            posterior = model.own_classifier().logits
            gains.append(float((posterior(guided, small) - posterior(free, small))[rows, labels].mean()))
    gain = min(gains)
    if guidance.parameters.get("scale") == 0:
        raise NotApplicableError("scale 0 disables guidance")
    require(gain > 0, f"log p(label) of the denoised images falls by {-gain:.3f}")
    return f"log p(label) rises by {gain:.2f} or more"


def check_observes(guidance: Guidance) -> str:
    """Along a trajectory of 200 steps, it brings A x closer to the observation y than the model alone."""
    if not guidance.needs_task:
        raise NotApplicableError("it does not require a task")
    model, _, _ = _setting(guidance)
    assert model.observation is not None
    index = torch.arange(6)
    y = model.inputs(index, Inputs(6)).tensors["observation"]
    sigmas = torch.cat([torch.logspace(1.5, -2, 200, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    distances = []
    for one in (bind_guidance(guidance, model), None):
        final = sample_states(model, Euler(), sigmas, index, guidance=one)
        distances.append(float((y - model.observation.operator.forward(final)).norm()))
    guided, free = distances
    require(guided < 0.8 * free, f"‖y - A x‖ is {guided:.3g}, and {free:.3g} without it")
    return f"‖y - A x‖ is {guided:.3g}, and {free:.3g} without it"


def check_prior(guidance: Guidance) -> str:
    """With σ_y = 10⁶ it is the model's own denoiser."""
    if not guidance.needs_task:
        raise NotApplicableError("it does not require a task")
    model, x, labels = _setting(guidance)
    assert model.observation is not None
    task = dataclasses.replace(model.observation.task, sigma=1e6)
    far = model.observed(task, model.observation.images)
    worst, ignored = 0.0, True
    for sigma in _LEVELS:
        state = x * (1 + sigma)
        with torch.no_grad():
            y = model.inputs(torch.arange(6), Inputs(6, labels))
            plain = model.denoiser(Inputs(6, labels))(state, sigma)
            near, out = (m.denoiser(y, bind_guidance(guidance, m))(state, sigma) for m in (model, far))
        worst, ignored = max(worst, same(out, plain)), ignored and torch.equal(near, out)
    if ignored:
        raise NotApplicableError("it does not use σ_y")
    require(worst <= 1e-6, f"with σ_y = 10⁶ it differs from the model by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_evaluations(guidance: Guidance) -> str:
    """The largest number of counted network evaluations per prediction equals `evaluations`."""
    model, x, labels = _setting(guidance)
    counts = []
    for sigma in (*_LEVELS, 1.0):
        with Meter(model.network) as meter:
            _guided(guidance, model, x, labels, sigma)
        counts.append(meter.network / len(x))
    low, high = min(counts), max(counts)
    require(high == guidance.evaluations, f"{high:g} evaluations counted; it says {guidance.evaluations}")
    return f"{high:g} per prediction" if low == high else f"{low:g} to {high:g} per prediction"


def check_batch_split(guidance: Guidance) -> str:
    """A prediction does not depend on the batch split, on one σ per sample, or on selecting rows."""
    model, x, labels = _setting(guidance)
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0, 20.0], dtype=torch.float64)
    together = _guided(guidance, model, x, labels, sigma)
    alone = torch.cat(
        [_guided(guidance, model, x[i : i + 1], labels[i : i + 1], sigma[i : i + 1], i) for i in range(6)]
    )
    part = torch.tensor([4, 1])
    with torch.no_grad():
        rows = _denoiser(model, labels, guidance).rows(part)(x[part], sigma[part])
    worst = max(same(together, alone), same(together[part], rows))
    require(worst <= 1e-9, f"a prediction changes by {worst:.1e} with the batch it is in")
    return f"differ by {worst:.1e}"


def check_dtype(guidance: Guidance) -> str:
    """It keeps the dtype of the state, and float32 and float64 agree."""
    model, x, labels = _setting(guidance)
    worst = 0.0
    for sigma in (0.5, 3.0):
        double = _guided(guidance, model, x, labels, sigma)
        single = _guided(guidance, model, x.float(), labels, sigma)
        require(single.dtype == torch.float32, f"a float32 state became {single.dtype}")
        worst = max(worst, same(double, single))
    require(worst <= 1e-3, f"float32 and float64 differ by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_no_writes(guidance: Guidance) -> str:
    """It does not modify the state, and does not return a gradient."""
    model, x, labels = _setting(guidance)
    copy = x.clone()
    with torch.no_grad():
        out = _denoiser(model, labels, guidance)(x, 1.0)
    require(torch.equal(x, copy), "the state was written into")
    require(not out.requires_grad and x.grad is None, "a gradient is left behind")
    return "unchanged"


def check_random_state(guidance: Guidance) -> str:
    """It does not use global random generators."""
    model, x, labels = _setting(guidance)
    with untouched_random_state():
        _guided(guidance, model, x, labels, 1.0)
    return "untouched"


CHECKS: Checks = [
    ("documented", check_documented),
    ("picklable", check_picklable),
    ("scale-one", check_scale_one),
    ("steers", check_steers),
    ("observes", check_observes),
    ("prior", check_prior),
    ("posterior", check_guidance_posterior),
    ("full-observation", check_guidance_full_observation),
    ("evaluations", check_evaluations),
    ("batch-split", check_batch_split),
    ("dtype", check_dtype),
    ("no-writes", check_no_writes),
    ("random-state", check_random_state),
]
