"""The checks of a sampler, on problems with a closed-form solution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from samplerbench.models.exact import ExactModel, MixtureDenoiser, _model, exact
from samplerbench.models.latent import Autoencoder
from samplerbench.models.legacy import LegacyDenoiser
from samplerbench.models.sample import bind, sample_states, start_batch, start_states
from samplerbench.sampling import ConditionalDenoiser, Denoiser, Guidance, Inputs, Noise, Prediction, Sampler, Sigma
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.process import SIGMA_INFINITY, flow_level, flow_time
from samplerbench.sampling.spacing import make_grid, pick_spacing
from samplerbench.testing.checks import NotApplicableError
from samplerbench.testing.common import (
    Checks,
    LeftHalf,
    check_documented,
    check_picklable,
    require,
    same,
    untouched_random_state,
)
from samplerbench.testing.posterior import check_sampler_full_observation, check_sampler_posterior


@cache
def _problem(name: str, shape: str = "1x2x2", process: str = "vp") -> ExactModel:
    if name == "point":
        # One point: D is that point, the state at level σ is point + σ z, and every sampler ends on it.
        channels, height, width = (int(p) for p in shape.split("x"))
        mean = torch.full((1, channels, height, width), 0.3)
        one = torch.ones(1)
        return _model(
            "point", mean, 0 * one, one, torch.zeros(1, dtype=torch.int64), torch.device("cpu"), torch.float64
        )
    return exact(name, shape=shape, process=process)


def _model_for(sampler: Sampler, name: str, shape: str = "1x2x2") -> ExactModel:
    """The problem, with a task if the sampler needs one: the left half of the image, without noise for a point."""
    model = _problem(name, shape)
    if not sampler.needs_task:
        return model
    return model.observed(LeftHalf(sigma=0.0 if name == "point" else 0.05), model.real(6)[0])


def _grid(sampler: Sampler, model: ExactModel, steps: int) -> Tensor:
    if not sampler.nfe(1):
        return torch.stack([model.levels[-1], model.levels.new_zeros(())])
    return make_grid(pick_spacing(sampler), model.levels, steps)


def _bind(sampler: Sampler, model: ExactModel, grid: Tensor) -> Sampler:
    """The sampler bound to the model. One of version 0.1 may need an autoencoder: the states then stand for latents."""
    if "autoencoder" in getattr(sampler, "needs", ()):
        model.autoencoder = Autoencoder(torch.nn.Identity(), model.shape, model.shape, 0.5)
    return bind(model, sampler, grid)


def _require_solver(sampler: Sampler) -> None:
    if sampler.nfe(1) == 0:
        raise NotApplicableError("it never asks the model (nfe is 0): it is a baseline, and solves nothing")


def _run(
    sampler: Sampler,
    model: ExactModel,
    steps: int,
    batch: int = 6,
    seed: int = 0,
    first: int = 0,
    dtype: torch.dtype = torch.float64,
    labels: Tensor | None = None,
    guidance: Guidance | None = None,
) -> Tensor:
    """The final states of samples first … first+batch-1."""
    grid = _grid(sampler, model, steps)
    index = torch.arange(first, first + batch)
    inputs = Inputs(batch, labels)
    return sample_states(
        model, _bind(sampler, model, grid), grid, index, inputs, guidance=guidance, seed=seed, dtype=dtype
    )


def _draws(sampler: Sampler, steps: int = 4) -> int:
    """How often the sampler draws noise: 0 for a deterministic one."""
    model = _model_for(sampler, "mixture")
    grid = _grid(sampler, model, steps)
    batch = start_batch(model, _bind(sampler, model, grid), grid, torch.arange(2))
    batch.states()
    return batch.noise.draws


def check_one_step(sampler: Sampler) -> str:
    """It works with one, two and three steps."""
    for steps in (1, 2, 3):
        final = _run(sampler, _model_for(sampler, "mixture"), steps)
        require(bool(final.isfinite().all()), f"{steps} steps give a state that is not finite")
    return "1, 2 and 3 steps are finite"


def check_all_timesteps(sampler: Sampler) -> str:
    """It works with as many steps as the model has timesteps."""
    model = _model_for(sampler, "gaussian")
    final = _run(sampler, model, len(model.levels), batch=2)
    require(bool(final.isfinite().all()), f"{len(model.levels)} steps give a state that is not finite")
    return f"{len(model.levels)} steps are finite"


def check_nfe(sampler: Sampler) -> str:
    """The counted network evaluations equal the value of nfe()."""
    model, counts = _model_for(sampler, "mixture"), []
    for steps in (1, 2, 5, 9):
        _bind(sampler, model, _grid(sampler, model, steps))  # what is estimated once is not counted
        with Meter(model.network) as meter:
            _run(sampler, model, steps, batch=3)
        said, counted = sampler.nfe(steps), meter.network / 3
        if said is None:
            return f"chooses its own steps; {counted:.1f} counted"
        require(counted == said, f"{steps} steps cost {counted:g} evaluations an image; nfe({steps}) says {said}")
        counts.append(f"{steps}→{said}")
    return ", ".join(counts)


def check_first_evaluation(sampler: Sampler) -> str:
    """The network is evaluated at the noise level of the state, for the first time at the start."""
    _require_solver(sampler)
    if sampler.own_grid:
        raise NotApplicableError("it uses its own grid")
    model = _model_for(sampler, "point", "1x32x32")
    mean, seen = 0.3, []

    inner = model.denoiser(model.inputs(torch.arange(2), Inputs(2)))

    class Watching(Denoiser):
        levels, process, observation = model.levels, model.process, inner.observation

        def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
            level = float(sigma) if not isinstance(sigma, Tensor) or sigma.ndim == 0 else float(sigma.max())
            seen.append((level, float((x - mean).square().mean().sqrt())))
            return inner.predict(x, sigma)

        def rows(self, index: Tensor) -> Denoiser:
            return self

    grid = _grid(sampler, model, 8)
    x = mean + float(grid[0]) * normal(0, Purpose.PRIOR, torch.arange(2), 0, model.shape)
    bound = _bind(sampler, model, grid)
    watched = LegacyDenoiser(Watching(), model, bound)
    run = bound.steps(watched, x, grid, Noise(0, torch.arange(2), model.shape, x.dtype))
    for number, _ in enumerate(run, 1):
        if number >= 3 and seen:
            break
    first = seen[0][0]
    if sampler.needs_task and first < float(grid[0]):
        level = min(grid.tolist(), key=lambda t: abs(t - first))
        require(abs(first / level - 1) < 1e-9, f"the first evaluation is at σ = {first:.4g}, which is not in the grid")
        return f"starts at σ = {first:.4g}, from a first guess"
    require(
        first >= float(grid[0]) * (1 - 1e-9), f"the first evaluation is at σ = {first:.4g}; the start is {grid[0]:.4g}"
    )
    if _draws(sampler) or sampler.nfe(1) is None:
        return "starts at the first level"
    # On a single point a deterministic method keeps x = point + σ z exactly, so the state tells its own level.
    worst = max(abs(found / level - seen[0][1] / first) for level, found in seen)
    require(worst < 0.05, f"an evaluation is made at a level that is {worst:.0%} off the state's own")
    return f"levels within {worst:.1e}"


def check_order(sampler: Sampler) -> str:
    """The order of convergence on the exact problems equals the claimed order within 0.2."""
    _require_solver(sampler)
    if sampler.needs_task:
        raise NotApplicableError("it samples a posterior: see posterior")
    if _draws(sampler):
        raise NotApplicableError("stochastic: see moments")
    if sampler.own_grid:
        raise NotApplicableError("it uses its own grid")
    claimed, found = sampler.convergence(), []
    if sampler.nfe(1) is None:
        return _adaptive_error(sampler)
    for name in ("gaussian", "mixture"):
        slope, margin = measure_order(sampler, name)
        found.append(f"{name} {slope:.2f} ± {margin:.2f}")
        if claimed is not None:
            require(
                abs(slope - claimed) <= 0.2,
                f"the order on the {name} is {slope:.2f} ± {margin:.2f}; it claims {claimed}",
            )
    return ", ".join(found) + (f" (claims {claimed})" if claimed is not None else " (claims none)")


SMALL_STARTS = (5.0, 2.0)
"""Noise levels of the size of the data, at which the first steps of a multistep method reduce its accuracy."""

Shape = Literal["even", "polynomial", "alternating"]
UNEVEN: tuple[Shape, ...] = ("polynomial", "alternating")


def check_order_from_small_noise(sampler: Sampler) -> str:
    """Started at a σ of the size of the data, the order is at least `convergence_from_any_start`."""
    claimed = _claim_to_measure(sampler, sampler.convergence_from_any_start())
    found = []
    for start in SMALL_STARTS:
        slope, _ = measure_order(sampler, "mixture", start, counts=_few(claimed))
        found.append(f"from σ = {start:g}: {slope:.2f}")
        require(
            slope >= claimed - 0.2,
            f"started at σ = {start:g}, the order on the mixture is {slope:.2f}; it claims {claimed} from any start "
            "(`convergence_from_any_start`)",
        )
    return ", ".join(found) + f" (claims {claimed})"


def check_order_from_infinity(sampler: Sampler) -> str:
    """The order also holds on a rectified flow, from t = 1, where σ is infinite."""
    claimed = _claim_to_measure(sampler, sampler.convergence_from_infinity())
    slopes = []
    for problem in ("gaussian", "mixture"):
        slope, _ = measure_order_from_infinity(sampler, problem)
        slopes.append(f"{problem} {slope:.2f}")
        require(
            slope >= claimed - 0.2,
            f"from t = 1 of a rectified flow, the order on the {problem} is {slope:.2f}; it claims {claimed} "
            "(`convergence_from_infinity`)",
        )
    return ", ".join(slopes) + f" (claims {claimed})"


def check_order_on_uneven_steps(sampler: Sampler) -> str:
    """The order also holds on uneven steps: on Karras' grid, and with alternating long and short steps."""
    claimed = _claim_to_measure(sampler, sampler.convergence())
    if sampler.uniform_steps_only:
        raise NotApplicableError("it claims its order on even steps only (uniform_steps_only)")
    found = []
    for shape in UNEVEN:
        slope, _ = measure_order(sampler, "mixture", shape=shape, counts=_few(claimed))
        found.append(f"{shape} {slope:.2f}")
        require(
            slope >= claimed - 0.2,
            f"on {shape} steps the order on the mixture is {slope:.2f}; it claims {claimed}. Use the actual step "
            "sizes, or set uniform_steps_only",
        )
    return ", ".join(found) + f" (claims {claimed})"


def _claim_to_measure(sampler: Sampler, claimed: int | None) -> int:
    """The claimed order. Raises NotApplicableError if there is none to measure."""
    _require_solver(sampler)
    if sampler.needs_task:
        raise NotApplicableError("it samples a posterior: see posterior")
    if claimed is None or sampler.nfe(1) is None:
        raise NotApplicableError("it claims no order" if claimed is None else "it chooses its own steps")
    if sampler.own_grid:
        raise NotApplicableError("it uses its own grid")
    if _draws(sampler):
        raise NotApplicableError("stochastic: see moments")
    return claimed


def _few(claimed: int) -> tuple[int, ...]:
    """Numbers of steps for a quick measurement: a method of order 1 shows its order soon."""
    return (16, 32, 64, 128) if claimed == 1 else (32, 64, 128, 256, 512)


def measure_order(
    sampler: Sampler,
    problem: str,
    start: float | None = None,
    shape: Shape = "even",
    counts: Sequence[int] | None = None,
) -> tuple[float, float]:
    """The order of convergence of a deterministic sampler on an exact problem, and its 95% margin.

    The order is minus the slope of log error over log N, over the last four N. Errors near rounding are left out.

    Args:
        sampler: a sampler that draws no noise and takes the grid it is given.
        problem: "gaussian" or "mixture".
        start: as in `order_errors`.
        shape: as in `order_errors`.
        counts: as in `order_errors`.
    """
    return _order(order_errors(sampler, problem, start, shape, counts))


def _order(errors: list[tuple[int, float]]) -> tuple[float, float]:
    """Minus the slope of log error over log N, over the last four N, and its 95% margin."""
    kept = [(n, e) for n, e in errors if e > 1e-10]  # below it the reference solution is no better
    kept = kept[-4:] if len(kept) >= 3 else errors[:3]
    logs = np.log(np.array(kept))
    (slope, _), *_ = np.polyfit(logs[:, 0], logs[:, 1], 1, full=True)
    local = np.diff(logs[:, 1]) / np.diff(logs[:, 0])
    from scipy.stats import t

    margin = t.ppf(0.975, len(local) - 1) * local.std(ddof=1) / math.sqrt(len(local)) if len(local) > 1 else math.nan
    return -float(slope), float(margin)


def measure_order_from_infinity(sampler: Sampler, problem: str) -> tuple[float, float]:
    """The order of convergence on a rectified flow from t = 1 on a grid even in t, and its 95% margin.

    Args:
        sampler: a sampler that draws no noise and takes the grid it is given.
        problem: "gaussian" or "mixture".
    """
    return _order(flow_errors(sampler, problem))


def flow_errors(
    sampler: Sampler, problem: str, counts: Sequence[int] = (128, 256, 512, 1024)
) -> list[tuple[int, float]]:
    """(N, root mean square error against the exact solution) on a rectified flow, from t = 1 to σ = 0.1.

    Args:
        sampler: a sampler that draws no noise and takes the grid it is given.
        problem: "gaussian" or "mixture".
        counts: the N.
    """
    model = _problem(problem, process="flow")
    end = flow_time(0.1)
    truth = _truth(problem, SIGMA_INFINITY, 0.1, "flow")
    errors = []
    for n in counts:
        times = [1 + (end - 1) * i / n for i in range(n + 1)]
        grid = torch.tensor([flow_level(t) for t in times], dtype=torch.float64)
        grid[-1] = 0.1
        final = sample_states(model, sampler, grid, torch.arange(4))
        errors.append((n, float((final - truth).square().mean().sqrt())))
    return errors


def order_errors(
    sampler: Sampler,
    problem: str,
    start: float | None = None,
    shape: Shape = "even",
    counts: Sequence[int] | None = None,
) -> list[tuple[int, float]]:
    """(N, root mean square error against the exact solution) at several N.

    Args:
        sampler: a sampler that draws no noise and takes the grid it is given.
        problem: "gaussian" or "mixture".
        start: the first noise level; None: 157, or 20 where the sampler's `even_in` is "sigma". The last is 0.1, or 1;
            from a start below 5 on a grid even in σ, 0.2.
        shape: "even" in the sampler's `even_in`; "alternating" there, each long step followed by one half as long; or
            "polynomial", that of Karras et al. 2022 with ρ = 7.
        counts: the N, even numbers; None: 32 ... 1024, or 256 ... 4096 on a grid even in σ.
    """
    model, in_sigma = _problem(problem), sampler.even_in == "sigma"
    first = start or (20.0 if in_sigma else 157.0)
    end = (0.2 if first < 5 else 1.0) if in_sigma else 0.1
    index = torch.arange(4)
    truth = _truth(problem, first, end)
    found = []
    # On a grid even in σ the small levels are met late, and so is the asymptotic regime.
    for n in counts or ((256, 512, 1024, 2048, 4096) if in_sigma else (32, 64, 128, 256, 512, 1024)):
        grid = _measuring_grid(first, end, n, shape, in_sigma)
        final = sample_states(model, sampler, grid, index)
        found.append((n, float((final - truth).square().mean().sqrt())))
    return found


def _measuring_grid(start: float, end: float, n: int, shape: Shape, in_sigma: bool) -> Tensor:
    """(n+1,) float64 from start to end, both above 0."""
    lengths = torch.ones(n, dtype=torch.float64)
    if shape == "alternating":
        lengths[::2] = 2
    share = torch.cat([lengths.new_zeros(1), lengths.cumsum(0) / lengths.sum()])
    if shape == "polynomial":
        grid = (start ** (1 / 7) + share * (end ** (1 / 7) - start ** (1 / 7))) ** 7
    elif in_sigma:
        grid = start + share * (end - start)
    else:
        grid = (math.log(start) + share * (math.log(end) - math.log(start))).exp()
    grid[0], grid[-1] = start, end
    return grid


@cache
def _truth(problem: str, start: float, end: float, process: str = "vp") -> Tensor:
    model = _problem(problem, process=process)
    return model.solve(start_states(model, start, torch.arange(4)), start, end)


def _adaptive_error(sampler: Sampler) -> str:
    """For a solver that chooses its own steps: the error at the model's smallest level, then x ← D."""
    worst = 0.0
    for name in ("gaussian", "mixture"):
        model = _problem(name)
        low, high = float(model.levels[0]), float(model.levels[-1])
        end = _truth(name, high, low)
        truth = model.denoiser(Inputs(4))(end, low)
        worst = max(worst, same(_run(sampler, model, 1, batch=4), truth))
    allowed = 50 * max(sampler.parameters.get("rtol", 1e-4), sampler.parameters.get("atol", 1e-4))
    require(worst <= allowed, f"the error is {worst:.1e}; 50 times the tolerance is {allowed:.1e}")
    return f"own steps; error {worst:.1e}, tolerance {allowed / 50:.0e}"


def check_terminal(sampler: Sampler) -> str:
    """The last step removes all noise: if the data is a single point, every sample is that point."""
    _require_solver(sampler)
    model = _model_for(sampler, "point", "1x8x8")
    worst = max(same(_run(sampler, model, steps), torch.tensor(0.3)) for steps in (1, 4, 20))
    allowed = 2e-3 if sampler.own_grid else 1e-6  # a scheduler may use float32 tables
    require(
        worst <= allowed, f"a sample of a single point is {worst:.2g} away from it: noise is left after the last step"
    )
    return f"{worst:.1e} from the point"


class ConsistencyFunction(torch.nn.Module):
    """The consistency function of a Gaussian, the end of its ODE: f(x, σ) = μ + √(v/(v+σ²)) (x - μ)."""

    def __init__(self, problem: MixtureDenoiser) -> None:
        super().__init__()
        self.problem = problem

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        mean, variance = (part.reshape(1, *x.shape[1:]) for part in (self.problem.means, self.problem.variances))
        level = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        return (mean + (variance / (variance + level**2)).sqrt() * (x - mean)).to(x.dtype)


def check_moments(sampler: Sampler) -> str:
    """For stochastic samplers, the final mean and variance converge to the closed form."""
    _require_solver(sampler)
    if sampler.needs_task:
        raise NotApplicableError("it samples a posterior: see posterior")
    if not _draws(sampler):
        raise NotApplicableError("deterministic: see order")
    model = _problem("gaussian", "1x8x8")
    if (kind := sampler.exact_for()) is None:
        raise NotApplicableError("it claims no distribution (exact_for)")
    if kind == "consistency function":
        model = replace(model, network=ConsistencyFunction(model.problem))
    mean, variance = model.problem.means.reshape(model.shape), model.problem.variances.reshape(model.shape)
    batch, found = 1000, []
    for steps in (25, 400):
        final = _run(sampler, model, steps, batch=batch)
        bias = float(((final.mean(0) - mean) / variance.sqrt()).abs().max())
        ratio = float((final.var(0) / variance).mean())
        found.append((steps, bias, ratio))
    # Standard errors: of a mean 1/√n in units of the deviation; of the mean variance ratio √(2/(n d)).
    d = math.prod(model.shape)
    noise_mean, noise_ratio = 4.5 / math.sqrt(batch), 4.5 * math.sqrt(2 / (batch * d))
    (_, _, r0), (last, b1, r1) = found
    text = ", ".join(f"{n} steps: variance x {r:.3f}, mean off {b:.3f} sd" for n, b, r in found)
    require(b1 <= noise_mean + 0.05, f"the mean at {last} steps is off: {text}")
    require(abs(r1 - 1) <= noise_ratio + 0.1, f"the variance at {last} steps is off: {text}")
    require(abs(r1 - 1) <= max(abs(r0 - 1) * 0.7, noise_ratio), f"the bias does not shrink with the steps: {text}")
    return text


def check_batch_split(sampler: Sampler) -> str:
    """An image does not depend on how the batch is split."""
    model = _model_for(sampler, "mixture")
    whole = _run(sampler, model, 6)
    split = torch.cat([_run(sampler, model, 6, batch=n, first=first) for first, n in ((0, 1), (1, 2), (3, 3))])
    worst = same(whole, split)
    require(worst <= 1e-9, f"a sample changes by {worst:.1e} with the batch it is in")
    return f"differ by {worst:.1e}"


def check_same_seed(sampler: Sampler) -> str:
    """The same seed gives the same image, and another seed gives another image."""
    model = _model_for(sampler, "mixture")
    one, two, other = (_run(sampler, model, 6, seed=seed) for seed in (3, 3, 4))
    require(torch.equal(one, two), f"two runs with one seed differ by {same(one, two):.1e}")
    require(same(one, other) > 1e-3, "another seed gives the same image")
    return "bit for bit"


def check_no_state(sampler: Sampler) -> str:
    """It keeps no state between runs: interleaved runs give the same result."""
    model = _model_for(sampler, "mixture")
    grid = _grid(sampler, model, 6)
    sampler = _bind(sampler, model, grid)
    before = dict(vars(sampler))

    def start(first: int) -> Iterator[Tensor]:
        return (step.x for step in start_batch(model, sampler, grid, torch.arange(first, first + 2)).steps())

    with torch.no_grad():
        alone = [list(start(0)), list(start(2))]
        a, b = start(0), start(2)
        mixed: list[list[Tensor]] = [[], []]
        for left in range(len(alone[0]) + len(alone[1])):
            run = left % 2
            step = next((a, b)[run], None)
            if step is not None:
                mixed[run].append(step)
    worst = max(same(x, y) for one, two in zip(alone, mixed, strict=True) for x, y in zip(one, two, strict=False))
    require(worst == 0, f"interleaved with another run, a run changes by {worst:.1e}")
    require(dict(vars(sampler)) == before, "its attributes changed in a run")
    return "interleaved runs are bit for bit the same"


def check_dtype(sampler: Sampler) -> str:
    """It keeps the dtype of the state, and float32 and float64 agree."""
    model = _model_for(sampler, "gaussian")
    double, single = (_run(sampler, model, 8, dtype=dtype) for dtype in (torch.float64, torch.float32))
    require(single.dtype == torch.float32, f"a float32 state became {single.dtype}")
    require(double.dtype == torch.float64, f"a float64 state became {double.dtype}")
    worst, allowed = same(single, double), 2e-3 if sampler.nfe(1) is None else 2e-4
    require(worst <= allowed, f"float32 and float64 differ by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_guided(sampler: Sampler) -> str:
    """It works with guidance: scale 1 gives the conditional model, and labels have an effect."""
    _require_solver(sampler)
    model, labels = _model_for(sampler, "mixture"), torch.tensor([0, 1, 0, 1, 0, 1])
    plain = _run(sampler, model, 6, labels=labels)
    guided = _run(sampler, model, 6, labels=labels, guidance=_Sum())
    worst = same(plain, guided)
    require(worst <= 1e-6, f"guidance of scale 1 differs from the conditional model by {worst:.1e}")
    require(same(plain, _run(sampler, model, 6)) > 1e-6, "the labels change nothing")
    return f"differ by {worst:.1e}"


@dataclass(frozen=True)
class _Sum(Guidance):
    """D_u + 1·(D_c - D_u): a guidance that should change nothing, evaluated as one batch of 2B."""

    name: ClassVar[str] = "scale 1"

    def predict(self, denoise: ConditionalDenoiser, x: Tensor, sigma: Sigma) -> Prediction:
        free, given = denoise.both(x, sigma)
        return Prediction(free.x0 + (given.x0 - free.x0))


def check_no_writes(sampler: Sampler) -> str:
    """It never modifies tensors that it was given or has yielded."""
    model = _model_for(sampler, "mixture")
    grid = _grid(sampler, model, 6)
    batch = start_batch(model, _bind(sampler, model, grid), grid, torch.arange(3))
    kept, copies = [batch.x, grid], [batch.x.clone(), grid.clone()]
    with torch.no_grad():
        for step in batch.steps():
            tensors = [step.x] if step.x0 is None else [step.x, step.x0]
            kept += tensors
            copies += [t.clone() for t in tensors]
    changed = sum(not torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    require(changed == 0, f"{changed} tensors changed after they were given or yielded")
    return f"{len(kept)} tensors unchanged"


def check_random_state(sampler: Sampler) -> str:
    """It does not use global random generators."""
    with untouched_random_state():
        _run(sampler, _model_for(sampler, "mixture"), 5)
    return "untouched"


CHECKS: Checks = [
    ("documented", check_documented),
    ("picklable", check_picklable),
    ("one-step", check_one_step),
    ("all-timesteps", check_all_timesteps),
    ("nfe", check_nfe),
    ("levels", check_first_evaluation),
    ("order", check_order),
    ("order-start", check_order_from_small_noise),
    ("order-from-infinity", check_order_from_infinity),
    ("order-uneven", check_order_on_uneven_steps),
    ("moments", check_moments),
    ("posterior", check_sampler_posterior),
    ("full-observation", check_sampler_full_observation),
    ("terminal", check_terminal),
    ("batch-split", check_batch_split),
    ("same-seed", check_same_seed),
    ("no-state", check_no_state),
    ("dtype", check_dtype),
    ("guided", check_guided),
    ("no-writes", check_no_writes),
    ("random-state", check_random_state),
]
