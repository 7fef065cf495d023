"""Restart, ER-SDE, RES, SA-Solver and the stochastic forms of DPM-Solver++ against independent formulas and diffusers.

The formulas are in NumPy, in x = x₀ + σ z, with the notation of the paper or of the software that has the method. Their
integrals are computed by SciPy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from support.denoising import denoiser
from test_solvers_agree import BATCH, LEVELS, difference, ours, prior, scheduler, step_noise, theirs

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.models.exact import ExactModel, exact
from samplerbench.testing.sampler import measure_order

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

Array = np.ndarray
D = Callable[[Array, float], Array]
Draw = Callable[[], Array]


@pytest.fixture(scope="module")
def model() -> ExactModel:
    return exact("mixture", shape="2x2x2")


PHI: dict[str, Callable[[float], float]] = {
    "ode": lambda s: s,
    "sde": lambda s: s**2,
    "er-4": lambda s: s**0.9 * math.log10(1 + 100 * s**1.5),
    "er-5": lambda s: s * (math.exp(s**0.3) + 10),
}


def er_sde(d: D, x: Array, levels: list[float], z: Draw, order: int, phi: str, exact_derivative: bool = False) -> Array:
    """Cui et al. 2023, algorithms 1-3, with ∫ dσ/φ and ∫ (σ-s)/φ dσ as in the authors' code."""
    f = PHI[phi]
    x0s: list[Array] = []
    slopes: list[Array] = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        x0s.append(d(x, s))
        if t == 0:
            return x0s[-1]
        r = f(t) / f(s)
        x = r * x + (1 - r) * x0s[-1]
        if order > 1 and i > 0:
            slopes.append((x0s[-1] - x0s[-2]) / (s - levels[i - 1]))
            slope = slopes[-1]
            if order > 2 and i > 1:
                bend = 2 * (slopes[-1] - slopes[-2]) / (s - levels[i - 2])
                if exact_derivative:
                    slope = slope + bend * (s - levels[i - 1]) / 2
                moment = quad(lambda u, s=s: (u - s) / f(u), t, s, epsabs=1e-13, epsrel=1e-12)[0]
                x = x + ((t - s) ** 2 / 2 + moment * f(t)) * bend
            x = x + (t - s + quad(lambda u: 1 / f(u), t, s, epsabs=1e-13, epsrel=1e-12)[0] * f(t)) * slope
        if phi != "ode":
            x = x + math.sqrt(t**2 - s**2 * r**2) * z()
    return x


def res(d: D, x: Array, levels: list[float], _: Draw, c: float | None = None) -> Array:
    """Zhang et al. 2023: `res_multistep` of ComfyUI; with c its `exp_heun_2_x0` (c = 1) and the paper's algorithm 1."""
    before: tuple[float, Array] | None = None
    for s, t in itertools.pairwise(levels):
        x0 = d(x, s)
        if t == 0:
            return x0
        h = math.log(s / t)
        phi1 = -math.expm1(-h) / h
        phi2 = (1 - phi1) / h
        if c is not None:
            shorter = math.exp(-c * h)
            second, c2 = d(shorter * x + (1 - shorter) * x0, s * shorter), c
        elif before is None:
            second, c2 = x0, 1.0
        else:
            second, c2 = before[1], -math.log(before[0] / s) / h
        x = t / s * x + h * ((phi1 - phi2 / c2) * x0 + phi2 / c2 * second)
        before = (s, x0)
    return x


def ancestral(s: float, t: float) -> tuple[float, float]:
    """(σ_down, σ_up) of k-diffusion for eta = 1."""
    up = min(t, (t**2 * (s**2 - t**2) / s**2) ** 0.5)
    return (t**2 - up**2) ** 0.5, up


def dpmpp_2s_ancestral(d: D, x: Array, levels: list[float], z: Draw) -> Array:
    """k-diffusion's: a step of 2S to σ_down, then noise."""
    for s, t in itertools.pairwise(levels):
        x0 = d(x, s)
        if t == 0:
            return x0
        down, up = ancestral(s, t)
        h = math.log(s / down)
        x2 = math.exp(-h / 2) * x - math.expm1(-h / 2) * x0
        x = math.exp(-h) * x - math.expm1(-h) * d(x2, s * math.exp(-h / 2)) + up * z()
    return x


def dpmpp_sde(d: D, x: Array, levels: list[float], z: Draw) -> Array:
    """k-diffusion's, with r = 1/2: both draws are increments of one Brownian motion in σ, of variance 1."""
    for s, t in itertools.pairwise(levels):
        x0 = d(x, s)
        if t == 0:
            return x0
        m = math.exp((math.log(s) + math.log(t)) / 2)
        to_middle, to_end = math.sqrt(s - m) * z(), math.sqrt(m - t) * z()
        down, up = ancestral(s, m)
        x2 = down / s * x + (1 - down / s) * x0 + up * to_middle / math.sqrt(s - m)
        down, up = ancestral(s, t)
        x = down / s * x + (1 - down / s) * d(x2, m) + up * (to_middle + to_end) / math.sqrt(s - t)
    return x


def dpmpp_3m_sde(d: D, x: Array, levels: list[float], z: Draw, whole: float = 2.0, second: str = "midpoint") -> Array:
    """k-diffusion's has whole = 1, which is half of the D'' term, and its second step uses φ₂ in place of h/2."""
    x0s: list[Array] = []
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        x0s.append(d(x, s))
        if t == 0:
            return x0s[-1]
        h = math.log(s / t)
        eta_h = 2 * h
        phi2 = math.expm1(-eta_h) / eta_h + 1
        phi3 = phi2 / eta_h - 0.5
        x = math.exp(-eta_h) * x - math.expm1(-eta_h) * x0s[-1]
        if i == 1:
            slope = (x0s[-1] - x0s[-2]) / (math.log(levels[0] / s) / h)
            x = x + (phi2 if second == "phi" else -math.expm1(-eta_h) / 2) * slope
        elif i > 1:
            r0, r1 = math.log(levels[i - 1] / s) / h, math.log(levels[i - 2] / levels[i - 1]) / h
            late, early = (x0s[-1] - x0s[-2]) / r0, (x0s[-2] - x0s[-3]) / r1
            bend = (late - early) / (r0 + r1)
            x = x + phi2 * (late + bend * r0) - whole * phi3 * bend
        x = x + t * math.sqrt(-math.expm1(-2 * h)) * z()
    return x


def restart(d: D, x: Array, levels: list[float], z: Draw) -> Array:
    """Xu et al. 2023, algorithm 1, with the authors' restart {3, 2, 0.06, 0.3}."""

    def heun(x: Array, s: float, t: float) -> Array:
        slope = (x - d(x, s)) / s
        euler = x + (t - s) * slope
        return euler if t == 0 else x + (t - s) * (slope + (euler - d(euler, t)) / t) / 2

    nearest = int(np.argmin(np.abs(np.array(levels) - 0.06)))
    for i, (s, t) in enumerate(itertools.pairwise(levels)):
        x = heun(x, s, t)
        if i + 1 == nearest:
            again = [(0.3 ** (1 / 7) + j / 2 * (t ** (1 / 7) - 0.3 ** (1 / 7))) ** 7 for j in range(3)]
            for _ in range(2):
                x = x + math.sqrt(0.3**2 - t**2) * z()
                for a, b in itertools.pairwise(again):
                    x = heun(x, a, b)
    return x


def by(solver: Callable[..., Array], **arguments: Any) -> Callable[..., Array]:
    return lambda *given: solver(*given, **arguments)


FORMULAS: dict[str, Callable[..., Array]] = {
    **{f"er-sde:order={k}": by(er_sde, order=k, phi="er-5") for k in (1, 2, 3)},
    **{f"er-sde:phi={p}": by(er_sde, order=3, phi=p) for p in ("ode", "sde", "er-4")},
    "er-sde:derivatives=exact": by(er_sde, order=3, phi="er-5", exact_derivative=True),
    "res": res,
    "res:method=singlestep": by(res, c=0.5),
    "res:method=singlestep,c=1": by(res, c=1.0),
    "dpm++:method=singlestep,ancestral=true": dpmpp_2s_ancestral,
    "dpm++:method=singlestep,sde=true": dpmpp_sde,
    "dpm++:sde=true,order=3": dpmpp_3m_sde,
    "restart": restart,
}


def by_formula(model: ExactModel, solver: Callable[..., Array], levels: list[float]) -> Array:
    noise, inner = step_noise(model), denoiser(model, None, BATCH)
    x = model.prior(prior(model), levels[0]).numpy()
    return solver(lambda x, s: inner(torch.from_numpy(x), s).numpy(), x, levels, lambda: noise().numpy())


@pytest.mark.parametrize("spec", FORMULAS)
def test_same_as_the_formula(model: ExactModel, spec: str) -> None:
    expected = by_formula(model, FORMULAS[spec], LEVELS)
    result = ours(model, spec, torch.tensor(LEVELS, dtype=torch.float64))
    assert difference(result, expected) <= 1e-9
    assert difference(result, ours(model, "dpm++", torch.tensor(LEVELS, dtype=torch.float64))) > 1e-3


def test_where_3m_sde_differs_from_k_diffusion(model: ExactModel) -> None:
    """Half of the D'' term, and the second step, which matters from a small noise level."""
    for levels, arguments in ((LEVELS, {"whole": 1.0}), (LEVELS[3:], {"second": "phi"})):
        result = ours(model, "dpm++:sde=true,order=3", torch.tensor(levels, dtype=torch.float64))
        assert difference(result, by_formula(model, dpmpp_3m_sde, levels)) <= 1e-9
        assert difference(result, by_formula(model, by(dpmpp_3m_sde, **arguments), levels)) > 1e-3


def test_er_sde_of_order_1_for_the_ode_is_ddim(model: ExactModel) -> None:
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    assert difference(ours(model, "er-sde:phi=ode,order=1", levels), ours(model, "ddim", levels)) <= 1e-10


def test_er_sde_of_order_1_for_the_sde_is_ddpm(model: ExactModel) -> None:
    """r = t²/s² is the ancestral step."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    assert difference(ours(model, "er-sde:phi=sde,order=1", levels), ours(model, "ddpm", levels)) <= 1e-10


@pytest.mark.parametrize(("p", "q", "tau"), [(1, 2, 1), (2, 2, 0), (2, 2, 1), (3, 3, 0.6), (2, 4, 1)])
def test_sa_solver_is_that_of_diffusers(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, p: int, q: int, tau: float
) -> None:
    """diffusers ends at the smallest level of training, and has no step to σ = 0."""
    config = {"predictor_order": p, "corrector_order": q, "lower_order_final": False, "tau_func": lambda t: tau}
    made = scheduler(model, "SASolverScheduler", use_karras_sigmas=True, **config)
    reached, levels = theirs(model, made, monkeypatch)
    assert levels[-1] == pytest.approx(levels[-2])  # its last step stays at the smallest level
    levels, expected = levels[:-1], reached[-2]
    result = ours(model, f"sa-solver:predictor={p},corrector={q},tau={tau}", levels)
    assert difference(result, expected) <= 1e-5
    if 2 in (p, q):
        other = ours(model, f"sa-solver:predictor={p},corrector={q},tau={tau},weights=exact", levels)
        assert difference(other, expected) > 1e-4


def test_sa_solver_without_noise_and_corrector_is_res(model: ExactModel) -> None:
    """Both interpolate D linearly in λ and integrate exactly."""
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    adams = ours(model, "sa-solver:tau=0,corrector=0,weights=exact", levels)
    assert difference(adams, ours(model, "res", levels)) <= 1e-11


def test_noise_is_added_between_two_levels_only(model: ExactModel) -> None:
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    quiet = ours(model, "sa-solver:tau=0", levels)
    assert torch.equal(ours(model, "sa-solver:low=200", levels), quiet)
    assert difference(ours(model, "sa-solver:low=0.05,high=1", levels), quiet) > 1e-2


ORDERS = {
    **{f"er-sde:phi=ode,order={k}": k for k in (1, 2)},
    "er-sde:phi=ode": 2,
    "er-sde:phi=ode,derivatives=exact": 3,
    **{f"res:method={m}": 2 for m in ("multistep", "singlestep", "singlestep,c=1")},
    "restart:K=0": 2,
    **{f"sa-solver:tau=0,predictor={p},corrector=0": p for p in (1, 2, 3)},
    "sa-solver:tau=0": 2,
    "sa-solver:tau=0,predictor=3,corrector=4": 4,
}


QUICK = ("er-sde:phi=ode,derivatives=exact", "res:method=multistep", "sa-solver:tau=0")
"""Those of the README's command; CI measures all of them."""


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        pytest.param(spec, problem, marks=[] if spec in QUICK and problem == "mixture" else pytest.mark.slow)
        for spec in ORDERS
        for problem in ("gaussian", "mixture")
    ],
)
def test_measured_order(spec: str, problem: str) -> None:
    sampler = registry.parse("sampler", spec)
    assert sampler.convergence() == ORDERS[spec]
    slope, _ = measure_order(sampler, problem, counts=(64, 128, 256, 512) if ORDERS[spec] > 1 else (16, 32, 64, 128))
    assert slope == pytest.approx(ORDERS[spec], abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "order"), [("weights=exact", 2), ("predictor=3,corrector=3", 3)])
def test_sa_solver_reaches_its_order_on_finer_grids(spec: str, order: int) -> None:
    """On coarse grids the errors of the predictor and of the corrector cancel in part."""
    sampler = registry.parse("sampler", f"sa-solver:tau=0,{spec}")
    assert sampler.convergence() == order
    slope, _ = measure_order(sampler, "mixture", counts=(256, 512, 1024, 2048))
    assert slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("dpm++:ancestral=true", "requires method=singlestep and order=2"),
        ("dpm++:sde=true,order=3,start=singlestep", "cannot be combined"),
        ("sa-solver:low=2,high=2", "low = 2 is not below high = 2"),
    ],
)
def test_wrong_parameters(spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        registry.parse("sampler", spec)
