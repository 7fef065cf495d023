"""Every solver against diffusers' scheduler where that one is right, and against the paper's formula where it is not.

The network is the closed-form denoiser of a mixture, so it depends on x; the start and the noise are the same on both
sides. Ours are in x = x₀ + σz; theirs and the papers' in √ᾱ times that, so even the coordinates are independent.

Where diffusers departs from the paper:
- DDIM steps to ⌊T/N⌋ below the timestep. Under `linspace`, and under `trailing` where N does not divide T, that is
  not the next timestep of its grid.
- DDPM with `fixed_large` adds noise in its last step under `trailing`.
- DPM-Solver++ 3M takes half of the D'' term, which leaves it at order 2 (see test_orders for ours).
- UniPC with B1 gives NaN in the step to σ = 0: it multiplies h = ∞ by an empty sum.
- DEIS and, unless told otherwise, PNDM have no step to σ = 0: they end at the smallest level of training.
- `linspace` repeats a timestep at as many steps as timesteps, and the multistep schedulers divide 0 by 0.
- LMS and iPNDM extrapolate into the step to σ = 0, where ε has no limit to extrapolate to; ours is x ← D.
- iPNDM has a schedule of its own, √(1-ᾱ) = sin²(πt/2) from σ = ∞; given our levels its weights are ours.
Its tables are float32. That is worth up to 6e-5 here (DEIS-3), so both its own tables and float64 ones are compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from support.denoising import denoiser
from torch import Tensor

from samplerbench import registry
from samplerbench.models.exact import ExactModel, exact
from samplerbench.sampling import Denoiser, Noise, Prediction, Sampler, Sigma
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.process import VARIANCE_EXPLODING, VARIANCE_PRESERVING

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

BATCH, SEED, STEPS = 6, 3, 20
Array = np.ndarray


@pytest.fixture(scope="module")
def model() -> ExactModel:
    return exact("mixture", shape="2x2x2")


def prior(model: ExactModel) -> Tensor:
    return normal(SEED, Purpose.PRIOR, torch.arange(BATCH), 0, model.shape)


def step_noise(model: ExactModel) -> Noise:
    return Noise(SEED, torch.arange(BATCH), model.shape, torch.float64)


def ours(model: ExactModel, spec: str | Sampler, grid: Tensor, denoise: Denoiser | None = None) -> Tensor:
    """Our final state on a grid, whatever level it ends at."""
    x = model.prior(prior(model), float(grid[0]))
    sampler = registry.parse("sampler", spec)
    return drive(sampler, denoise or denoiser(model, None, BATCH), x, grid, step_noise(model))


def difference(a: Tensor | Array, b: Tensor | Array) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# --- Against diffusers ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["float32", "float64"])
def exact_tables(request: pytest.FixtureRequest) -> bool:
    """Whether diffusers' float32 tables are replaced by float64 ones."""
    return request.param == "float64"


def tolerance(exact_tables: bool) -> float:
    """The issue's; and with float64 tables that of a float32 state, to which some of them cast ours."""
    return 1e-5 if exact_tables else 1e-4


def schedule(model: ExactModel) -> Tensor:
    """ᾱ of the model's levels."""
    return 1 / (1 + model.levels**2)


def scheduler(model: ExactModel, name: str, steps: int = STEPS, exact_tables: bool = True, **config: Any) -> Any:
    """A scheduler with the model's β, its timesteps set."""
    bars = schedule(model)
    betas = 1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])
    made = getattr(diffusers, name)(num_train_timesteps=len(betas), trained_betas=betas.numpy(), **config)
    made.set_timesteps(steps)
    if exact_tables:
        made.alphas_cumprod = bars
        for constant in ("one", "final_alpha_cumprod"):
            if hasattr(made, constant):
                setattr(made, constant, torch.ones((), dtype=torch.float64))
        if name not in ("DDIMScheduler", "DDPMScheduler"):
            made.sigmas = made.sigmas.double()
    return made


def theirs(model: ExactModel, made: Any, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[Tensor, Tensor]:
    """diffusers' own loop: every state it reaches, in our coordinates, (N, B, C, H, W), and its levels (N+1,)."""
    over_sigma = hasattr(made, "sigmas")
    if over_sigma:
        levels = made.sigmas.double()
        made.set_begin_index(0)
    else:
        levels = torch.cat([model.levels[made.timesteps], torch.zeros(1, dtype=torch.float64)])
    noise, denoise = step_noise(model), denoiser(model, None, BATCH)
    module = sys.modules[type(made).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, dtype=torch.float64, **__: noise().to(dtype))
    scaled = float(made.init_noise_sigma) <= 1.01  # the state is √ᾱ x, and not x itself
    growth = (1 + levels**2).sqrt().tolist()
    x = prior(model) * (1 if scaled else growth[0])
    reached = []
    for i, t in enumerate(made.timesteps):
        level = float(levels[i])
        state = x * growth[i] if scaled else x
        x = made.step((state - denoise(state, level)) / level, t, x, **arguments).prev_sample
        reached.append((x * growth[i + 1] if scaled else x).double())
    return torch.stack(reached), levels


SIGMA_MIN = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
MULTISTEP, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
SAME: list[tuple[str, str, dict[str, Any]]] = [
    *(("dpm++", MULTISTEP, {"timestep_spacing": spacing}) for spacing in ("linspace", "trailing", "leading")),
    ("dpm++", MULTISTEP, {"use_karras_sigmas": True}),
    ("dpm++:order=1", MULTISTEP, {"solver_order": 1}),
    ("dpm++:sde=true", MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}),
    ("dpm++:sde=true,order=1", MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
    *((f"unipc:order={p}", UNIPC, {"solver_order": p, "timestep_spacing": "trailing"}) for p in (1, 2, 3)),
    *((f"unipc:order={p}", UNIPC, {"solver_order": p} | SIGMA_MIN) for p in (1, 2, 3)),
    *((f"unipc:order={p},variant=B1", UNIPC, {"solver_order": p, "solver_type": "bh1"} | SIGMA_MIN) for p in (1, 2, 3)),
    (
        "unipc:order=3,corrector=false",
        UNIPC,
        {"solver_order": 3, "disable_corrector": list(range(STEPS))} | SIGMA_MIN,
    ),
    *(
        (f"deis:order={order - 1},variable=log-sigma", DEIS, {"solver_order": order, "lower_order_final": False})
        for order in (1, 2, 3)
    ),
    ("ddim", "EulerDiscreteScheduler", {}),
    ("ddpm", "EulerAncestralDiscreteScheduler", {}),
    ("ddim:eta=1", "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
]


@pytest.mark.parametrize(("spec", "name", "config"), SAME, ids=[f"{s}-{n}-{'-'.join(c)}" for s, n, c in SAME])
def test_same_as_diffusers(
    model: ExactModel,
    monkeypatch: pytest.MonkeyPatch,
    exact_tables: bool,
    spec: str,
    name: str,
    config: dict[str, Any],
) -> None:
    made = scheduler(model, name, exact_tables=exact_tables, **config)
    reached, levels = theirs(model, made, monkeypatch)
    assert difference(ours(model, spec, levels), reached[-1]) <= tolerance(exact_tables)


def test_singlestep_dpmpp_is_diffusers_on_every_other_level(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, exact_tables: bool
) -> None:
    """Its orders are 1, 2, 1, 2, …, 1: on levels even in log σ each first one is at the middle of our step."""
    config = {"solver_order": 2, "lower_order_final": True, "use_exponential_sigmas": True}
    made = scheduler(model, "DPMSolverSinglestepScheduler", 2 * STEPS - 1, exact_tables, **config)
    reached, levels = theirs(model, made, monkeypatch)
    grid = torch.cat([levels[:-1:2], levels[-1:]])
    assert difference(ours(model, "dpm++:method=singlestep", grid), reached[-1]) <= tolerance(exact_tables)


def test_dpm_solver_2_is_diffusers_on_every_other_level(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, exact_tables: bool
) -> None:
    config = {"solver_order": 2, "algorithm_type": "dpmsolver", "use_exponential_sigmas": True}
    made = scheduler(model, "DPMSolverSinglestepScheduler", 2 * STEPS, exact_tables, **config, **SIGMA_MIN)
    reached, levels = theirs(model, made, monkeypatch)
    # Its last level is its last but one again; so the last step there is none, and we stop where the one before ends.
    grid = levels[: 2 * STEPS - 1 : 2]
    assert difference(ours(model, "dpm-solver", grid), reached[2 * STEPS - 3]) <= tolerance(exact_tables)


@pytest.mark.parametrize("config", [{"use_karras_sigmas": True}, {"timestep_spacing": "linspace"}], ids=str)
def test_heun_is_diffusers(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, exact_tables: bool, config: dict[str, Any]
) -> None:
    made = scheduler(model, "HeunDiscreteScheduler", STEPS, exact_tables, **config)
    reached, levels = theirs(model, made, monkeypatch)
    grid = torch.cat([levels[:1], levels[1:-1:2], levels[-1:]])  # each inner level stands there twice
    assert difference(ours(model, "heun", grid), reached[-1]) <= tolerance(exact_tables)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, exact_tables: bool, eta: float, spacing: str
) -> None:
    made = scheduler(model, "DDIMScheduler", STEPS, exact_tables, clip_sample=False, timestep_spacing=spacing)
    reached, levels = theirs(model, made, monkeypatch, eta=eta)
    assert difference(ours(model, f"ddim:eta={eta}", levels), reached[-1]) <= tolerance(exact_tables)


@pytest.mark.parametrize(
    ("variance", "spacing"),
    [("small", "leading"), ("small", "trailing"), ("small", "linspace"), ("large", "leading"), ("large", "linspace")],
)
def test_ddpm_is_diffusers(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, exact_tables: bool, variance: str, spacing: str
) -> None:
    config = {"clip_sample": False, "timestep_spacing": spacing, "variance_type": f"fixed_{variance}"}
    made = scheduler(model, "DDPMScheduler", STEPS, exact_tables, **config)
    reached, levels = theirs(model, made, monkeypatch)
    assert difference(ours(model, f"ddpm:variance={variance}", levels), reached[-1]) <= tolerance(exact_tables)


# --- Where diffusers departs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spacing", "steps", "apart"), [("linspace", 20, 0.03), ("trailing", 30, 5e-3)])
def test_diffusers_ddim_does_not_step_to_its_next_timestep(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, spacing: str, steps: int, apart: float
) -> None:
    """It goes from t to t - ⌊T/N⌋, and calls that the next timestep; which under linspace is (T-1)/(N-1) below."""
    made = scheduler(model, "DDIMScheduler", steps, clip_sample=False, timestep_spacing=spacing)
    reached, levels = theirs(model, made, monkeypatch)
    network, x, stride = Network(model), prior(model).numpy(), 1000 // steps
    for t in made.timesteps.tolist():
        s = float(model.levels[t])
        arrives = float(model.levels[t - stride]) if t >= stride else 0.0
        x = alpha(arrives) * network.data(x, s) + std(arrives) * network.noise(x, s)
    assert difference(x, reached[-1]) <= 1e-10
    assert difference(ours(model, "ddim", levels), reached[-1]) > apart


def test_diffusers_ddpm_with_large_variance_ends_with_noise_under_trailing(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Algorithm 2 of Ho et al. 2020 has z = 0 in the last step; diffusers asks for timestep > 0, and the last is 49."""
    config = {"clip_sample": False, "timestep_spacing": "trailing", "variance_type": "fixed_large"}
    made = scheduler(model, "DDPMScheduler", **config)
    reached, levels = theirs(model, made, monkeypatch)
    z = normal(SEED, Purpose.STEP, torch.arange(BATCH), STEPS - 1, model.shape)
    left = (1 - schedule(model)[int(made.timesteps[-1])]).sqrt() * z
    clean = ours(model, "ddpm:variance=large", levels)
    assert difference(clean, reached[-1] - left) <= 1e-10
    assert difference(clean, reached[-1]) > 0.3


def test_diffusers_dpmpp_3m_takes_half_of_the_second_derivative(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = scheduler(model, MULTISTEP, solver_order=3)
    reached, levels = theirs(model, made, monkeypatch)
    halved = dpmpp_multistep(Network(model), prior(model).numpy(), levels.tolist(), order=3, halve=True)
    assert difference(halved, reached[-1]) <= 1e-5
    assert difference(ours(model, "dpm++:order=3", levels), reached[-1]) > 5e-3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_unipc_with_b1_is_nan_at_sigma_zero(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    made = scheduler(model, UNIPC, solver_order=order, solver_type="bh1")
    reached, levels = theirs(model, made, monkeypatch)
    assert bool(reached[-2].isfinite().all())
    assert bool(reached[-1].isnan().all())
    assert bool(ours(model, f"unipc:order={order},variant=B1", levels).isfinite().all())


def test_diffusers_linspace_asks_for_a_timestep_twice_and_gets_nan(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many steps as timesteps, N+1 points from 0 to T-1 round to one timestep twice: h = 0 divides 0."""
    for name in (MULTISTEP, UNIPC, DEIS):
        made = scheduler(model, name, len(model.levels))
        assert len(set(made.timesteps.tolist())) == len(model.levels) - 1
        assert bool(theirs(model, made, monkeypatch)[0][-1].isnan().any())


@pytest.mark.parametrize("spec", [DEIS, "PNDMScheduler:skip_prk_steps=true"])
def test_diffusers_deis_and_pndm_end_at_the_smallest_trained_level(spec: str) -> None:
    """On a single point, where every method is exact, σ₀ z is left in their samples; 0.01 z on a DDPM's schedule."""
    point = exact("gaussian", shape="1x2x2", width=1e-9)
    left_at = float(point.levels[0])
    grid = registry.parse("spacing", "trailing").grid(point.levels, STEPS)
    mean = point.problem.means.reshape(point.shape)
    final = ours(point, f"diffusers/{spec}", grid)
    assert difference(final / alpha(left_at), mean + left_at * prior(point)) <= 1e-3
    assert difference(ours(point, "deis", grid), mean) <= 1e-8


@pytest.mark.parametrize(
    ("config", "apart"), [({"use_karras_sigmas": True}, 1e-4), ({"timestep_spacing": "trailing"}, 0.05)], ids=str
)
def test_diffusers_lms_is_rho_ab_3_until_the_step_to_zero(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, exact_tables: bool, config: dict[str, Any], apart: float
) -> None:
    """Its last step extrapolates ε to σ = 0: from 0.01 on Karras' grid, from 0.17 on the trailing one of 20 steps."""
    made = scheduler(model, "LMSDiscreteScheduler", STEPS, exact_tables, **config)
    reached, levels = theirs(model, made, monkeypatch)
    assert difference(ours(model, "deis:variable=sigma", levels[:-1]), reached[-2]) <= tolerance(exact_tables)
    assert difference(ours(model, "deis:variable=sigma", levels), reached[-1]) > apart


@pytest.mark.parametrize("exact_betas", [False, True])
def test_diffusers_ipndm_has_its_own_schedule_and_our_weights(model: ExactModel, exact_betas: bool) -> None:
    """Its β is the noise's standard deviation on the unit circle, so σ = β/√(1-β²), and its network predicts v."""
    made = diffusers.IPNDMScheduler()
    made.set_timesteps(STEPS)
    times = torch.arange(STEPS, 0, -1) / STEPS
    torch.testing.assert_close(made.betas[1:-1].asin(), (times[1:] * np.pi / 2).sin().square().asin())
    assert made.alphas[0] == 0  # σ = ∞: no start for any of our models

    levels = registry.parse("spacing", "karras").grid(model.levels, STEPS)
    deviations = levels / (1 + levels**2).sqrt()
    made = diffusers.IPNDMScheduler(trained_betas=deviations.numpy())
    made.set_timesteps(STEPS)
    made.set_begin_index(0)
    if exact_betas:
        made.betas, made.alphas = deviations, (1 - deviations**2).sqrt()
    network, x, reached = Network(model), prior(model), []
    for s, t in zip(levels.tolist(), made.timesteps, strict=False):
        velocity = alpha(s) * network.noise(x.numpy(), s) - std(s) * network.data(x.numpy(), s)
        x = made.step(torch.from_numpy(velocity), t, x).prev_sample
        reached.append(x)
    before_zero = ours(model, "ipndm", levels[:-1]) * alpha(float(levels[-2]))
    assert difference(before_zero, reached[-2]) <= tolerance(exact_betas)
    assert difference(ours(model, "ipndm", levels), reached[-1]) > 5e-4


# --- Against the papers, in float64 and their own coordinates --------------------------------------------------------

LEVELS = [155.0, 61.0, 30.0, 11.0, 7.3, 2.2, 1.1, 0.42, 0.25, 0.08, 0.02, 0.0]
"""Far from even in anything, so that no ratio of steps is 1."""


def alpha(sigma: float) -> float:
    """√ᾱ at noise level σ."""
    return 1 / np.sqrt(1 + sigma**2)


def std(sigma: float) -> float:
    """√(1-ᾱ)."""
    return sigma / np.sqrt(1 + sigma**2)


class Network:
    """What the papers call ε_θ, x_θ and s_θ, of a variance-preserving state in NumPy."""

    def __init__(self, model: ExactModel) -> None:
        self.denoise = denoiser(model, None, BATCH)

    def data(self, x: Array, sigma: float) -> Array:
        return self.denoise(torch.from_numpy(x / alpha(sigma)), sigma).numpy()

    def noise(self, x: Array, sigma: float) -> Array:
        return (x - alpha(sigma) * self.data(x, sigma)) / std(sigma)

    def score(self, x: Array, sigma: float) -> Array:
        return -self.noise(x, sigma) / std(sigma)


Draw = Callable[[], Array]
Solver = Callable[..., Array]


def pairs(levels: list[float]) -> list[tuple[float, float]]:
    return list(itertools.pairwise(levels))


def ddim(network: Network, x: Array, levels: list[float], z: Draw, eta: float) -> Array:
    """Song et al. 2021, eq. 12 and 16."""
    for s, t in pairs(levels):
        deviation = eta * np.sqrt(std(t) ** 2 / std(s) ** 2 * (1 - alpha(s) ** 2 / alpha(t) ** 2))
        direction = np.sqrt(std(t) ** 2 - deviation**2) * network.noise(x, s)
        x = alpha(t) * network.data(x, s) + direction + (deviation * z() if deviation > 0 else 0)
    return x


def ddpm(network: Network, x: Array, levels: list[float], z: Draw, variance: str) -> Array:
    """Ho et al. 2020, algorithm 2 line 4, with σ² = β̃ or β."""
    for s, t in pairs(levels):
        beta = 1 - alpha(s) ** 2 / alpha(t) ** 2
        x = (x - beta / std(s) * network.noise(x, s)) / np.sqrt(1 - beta)
        small = std(t) ** 2 / std(s) ** 2 * beta
        x = x + (np.sqrt(small if variance == "small" else beta) * z() if t > 0 else 0)
    return x


def analytic_dpm(network: Network, x: Array, levels: list[float], z: Draw, form: str) -> Array:
    """Bao et al. 2022, eq. 4 and theorem 1: λ² + (√(β̄_n/α_n) - √(β̄_{n-1} - λ²))² (1 - β̄_n Γ_n).

    Γ here is of the variance-preserving score, and such that κ = PSEUDO_KAPPA.
    """
    for s, t in pairs(levels):
        lam2 = 0.0 if form == "ddim" else std(t) ** 2 / std(s) ** 2 * (1 - alpha(s) ** 2 / alpha(t) ** 2)
        gamma = (1 - kappa(s) / s**2) / std(s) ** 2
        gap = std(s) * alpha(t) / alpha(s) - np.sqrt(std(t) ** 2 - lam2)
        mean = alpha(t) * network.data(x, s) + np.sqrt(std(t) ** 2 - lam2) * network.noise(x, s)
        x = mean + (np.sqrt(lam2 + gap**2 * (1 - std(s) ** 2 * gamma)) * z() if t > 0 else 0)
    return x


def kappa(sigma: float) -> float:
    """A made-up κ(σ), below σ²."""
    return 0.2 * sigma**2 / (0.3 + sigma**2)


def dpm_solver(network: Network, x: Array, levels: list[float], _: Draw, order: int) -> Array:
    """Lu et al. 2022a: eq. 3.7, and algorithms 1 and 2 with r₁ = 1/2, or 1/3 and 2/3."""
    for s, t in pairs(levels):
        if t == 0:
            return network.data(x, s)
        h = np.log(s / t)
        first = network.noise(x, s)
        if order == 1:
            x = alpha(t) / alpha(s) * x - std(t) * np.expm1(h) * first
        elif order == 2:
            m = s * np.exp(-h / 2)
            u = alpha(m) / alpha(s) * x - std(m) * np.expm1(h / 2) * first
            x = alpha(t) / alpha(s) * x - std(t) * np.expm1(h) * network.noise(u, m)
        else:
            r1, r2 = 1 / 3, 2 / 3
            s1, s2 = s * np.exp(-r1 * h), s * np.exp(-r2 * h)
            u1 = alpha(s1) / alpha(s) * x - std(s1) * np.expm1(r1 * h) * first
            d1 = network.noise(u1, s1) - first
            u2 = alpha(s2) / alpha(s) * x - std(s2) * np.expm1(r2 * h) * first
            u2 = u2 - std(s2) * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
            d2 = network.noise(u2, s2) - first
            x = alpha(t) / alpha(s) * x - std(t) * np.expm1(h) * first
            x = x - std(t) / r2 * (np.expm1(h) / h - 1) * d2
    return x


def dpmpp_singlestep(network: Network, x: Array, levels: list[float], _: Draw) -> Array:
    """Lu et al. 2022b, algorithm 1 with r = 1/2."""
    for s, t in pairs(levels):
        if t == 0:
            return network.data(x, s)
        h, r = np.log(s / t), 0.5
        m = s * np.exp(-r * h)
        now = network.data(x, s)
        u = std(m) / std(s) * x - alpha(m) * np.expm1(-r * h) * now
        blend = (1 - 1 / (2 * r)) * now + 1 / (2 * r) * network.data(u, m)
        x = std(t) / std(s) * x - alpha(t) * np.expm1(-h) * blend
    return x


def moments(h: float, n: int) -> Array:
    """∫₀ʰ e^{τ-h} τᵏ dτ for k < n."""
    return np.array([quad(lambda u, k=k: np.exp(u - h) * u**k, 0, h, epsabs=0, epsrel=1e-13)[0] for k in range(n)])


def curve(past: list[tuple[float, Array]]) -> Array:
    """Coefficients (n, …) of the polynomial in λ - λ₀ through the points (λ, D), the first of them λ₀."""
    at = np.array([level - past[0][0] for level, _ in past])
    return np.tensordot(np.linalg.inv(np.vander(at, increasing=True)), np.stack([d for _, d in past]), 1)


def dpmpp_multistep(
    network: Network, x: Array, levels: list[float], _: Draw | None = None, order: int = 2, halve: bool = False
) -> Array:
    """Lu et al. 2022b, eq. 3.3: x_t = σ_t/σ_s x + σ_t ∫ e^λ x_θ dλ, with Taylor's series of x_θ.

    2M is algorithm 2: D + (D - D₁)/(2r) for x_θ. 3M integrates the parabola through three D; `halve` takes half of
    its last coefficient.
    """
    past: list[tuple[float, Array]] = []
    for s, t in pairs(levels):
        past = [(-np.log(s), network.data(x, s)), *past[: order - 1]]
        if t == 0:
            return past[0][1]
        h = np.log(s / t)
        if len(past) == 2:
            r = (past[0][0] - past[1][0]) / h
            integral = -np.expm1(-h) * ((1 + 1 / (2 * r)) * past[0][1] - 1 / (2 * r) * past[1][1])
        else:
            coefficients = curve(past)
            if len(past) == 3 and halve:
                coefficients[2] /= 2
            integral = np.tensordot(moments(h, len(past)), coefficients, 1)
        x = std(t) / std(s) * x + alpha(t) * integral
    return x


def dpmpp_sde(network: Network, x: Array, levels: list[float], z: Draw, order: int) -> Array:
    """Lu et al. 2022b, SDE-DPM-Solver++ (1 and 2M)."""
    past: list[tuple[float, Array]] = []
    for s, t in pairs(levels):
        past = [(-np.log(s), network.data(x, s)), *past[: order - 1]]
        if t == 0:
            return past[0][1]
        h, data = np.log(s / t), past[0][1]
        if len(past) == 2:
            data = data + h / (2 * (past[0][0] - past[1][0])) * (past[0][1] - past[1][1])
        x = std(t) / std(s) * np.exp(-h) * x + alpha(t) * (1 - np.exp(-2 * h)) * data
        x = x + std(t) * np.sqrt(1 - np.exp(-2 * h)) * z()
    return x


def unipc(network: Network, x: Array, levels: list[float], _: Draw, order: int, variant: str, corrector: bool) -> Array:
    """Zhao et al. 2023, algorithms 5 and 6.

    With two or more unknowns eq. 11 makes the step exact for polynomials, so B cancels and the step is the integral
    of the polynomial through all points; with one unknown ρ = 1/2.
    """

    def step(x: Array, s: float, t: float, points: list[tuple[float, Array]]) -> Array:
        h, first = np.log(s / t), -np.expm1(-np.log(s / t)) * points[0][1]
        if len(points) == 1:
            integral = first
        elif len(points) == 2:
            r = (points[1][0] - points[0][0]) / h
            scale = -h if variant == "B1" else np.expm1(-h)
            integral = first - scale * 0.5 * (points[1][1] - points[0][1]) / r
        else:
            integral = np.tensordot(moments(h, len(points)), curve(points), 1)
        return std(t) / std(s) * x + alpha(t) * integral

    past: list[tuple[float, Array]] = []
    steps = pairs(levels)
    left, used, origin = x, 0, 0.0
    for i, (s, t) in enumerate(steps):
        data = network.data(x, s)
        if corrector and past:
            x = step(left, origin, s, [*past[:used], (-np.log(s), data)])
        past = [(-np.log(s), data), *past]
        used = min(order, i + 1, len(steps) - i)
        left, origin = x, s
        x = data if t == 0 else step(x, s, t, past[:used])
    return x


def adams(network: Network, x: Array, levels: list[float], _: Draw, order: int, place: Solver) -> Array:
    """Zhang & Chen 2023, eq. 14-15: x/√ᾱ moves by Σ ε_j ∫ ℓ_j dσ, ℓ_j Lagrange's polynomials in place(σ)."""
    past: list[tuple[float, Array]] = []
    for s, t in pairs(levels):
        past = [(s, network.noise(x, s)), *past[:order]]
        if t == 0:
            return network.data(x, s)
        knots = np.array([place(level) for level, _ in past])
        change = np.zeros_like(x)
        for j, (_level, noise) in enumerate(past):
            others = np.delete(knots, j)
            basis = np.poly1d(others, r=True) / np.prod(knots[j] - others)
            change = change + quad(lambda u, b=basis: b(place(u)), s, t, epsabs=0, epsrel=1e-11)[0] * noise
        x = alpha(t) * (x / alpha(s) + change)
    return x


def ipndm(network: Network, x: Array, levels: list[float], _: Draw, order: int) -> Array:
    """Liu et al. 2022, eq. 9, on ε in σ: the weights are Adams and Bashforth's, for even steps."""
    past: list[Array] = []
    for s, t in pairs(levels):
        past = [network.noise(x, s), *past[: order - 1]]
        if t == 0:
            return network.data(x, s)
        knots, slope = -np.arange(len(past)), np.zeros_like(x)
        for j, noise in enumerate(past):
            others = np.delete(knots, j)
            basis = np.poly1d(others, r=True) / np.prod(knots[j] - others)
            slope = slope + basis.integ()(1) * noise
        x = alpha(t) * (x / alpha(s) + (t - s) * slope)
    return x


def edm(
    network: Network, x: Array, levels: list[float], z: Draw, churn: float, low: float, high: float, noise: float
) -> Array:
    """Karras et al. 2022, algorithm 2, in its own coordinates."""
    x = x / alpha(levels[0])

    def slope(x: Array, t: float) -> Array:
        return (x - network.denoise(torch.from_numpy(x), t).numpy()) / t

    for s, t in pairs(levels):
        gamma = min(churn / (len(levels) - 1), np.sqrt(2) - 1) if low <= s <= high else 0.0
        raised = s + gamma * s
        x = x + (np.sqrt(raised**2 - s**2) * noise * z() if gamma > 0 else 0)
        d = slope(x, raised)
        euler = x + (t - raised) * d
        x = euler if t == 0 else x + (t - raised) * (d / 2 + slope(euler, t) / 2)
    return x


def score_sde(network: Network, x: Array, levels: list[float], z: Draw, predictor: str, corrections: int = 0) -> Array:
    """Song et al. 2021 (SDE), variance preserving: algorithm 3 (reverse diffusion), eq. 4 (ancestral), eq. 6 by
    Euler and Maruyama, eq. 13 exactly for a constant ε; then algorithm 5's corrector with r = 0.16.
    """
    following = [*levels[2:], 0.0]
    for (s, t), u in zip(pairs(levels), following, strict=True):
        if t == 0:
            return network.data(x, s)
        beta, score = 1 - alpha(s) ** 2 / alpha(t) ** 2, network.score(x, s)
        if predictor == "reverse-diffusion":
            x = (2 - np.sqrt(1 - beta)) * x + beta * score + np.sqrt(beta) * z()
        elif predictor == "euler-maruyama":
            whole = -np.log(1 - beta)  # ∫ β(t) dt over the step
            x = x + (x / 2 + score) * whole + np.sqrt(whole) * z()
        elif predictor == "ancestral":
            x = (x + beta * score) / np.sqrt(1 - beta) + np.sqrt(beta * std(t) ** 2 / std(s) ** 2) * z()
        else:
            noise = -score * std(s)
            x = alpha(t) / alpha(s) * (x - std(s) * noise) + std(t) * noise
        for _ in range(corrections):
            score, draw = network.score(x, t), z()
            norms = [np.sqrt((v.reshape(len(v), -1) ** 2).sum(1)) for v in (draw, score)]
            kept = alpha(t) ** 2 / alpha(u) ** 2  # α_i = 1 - β_i, of the forward step that ends at t
            step = (2 * kept * (0.16 * norms[0] / norms[1]) ** 2).reshape(-1, 1, 1, 1)
            x = x + step * score + np.sqrt(2 * step) * draw
    return x


def by(solver: Solver, **arguments: Any) -> Solver:
    return lambda *given: solver(*given, **arguments)


PAPERS: dict[str, Solver] = {
    **{f"ddim:eta={eta}": by(ddim, eta=eta) for eta in (0.0, 0.5, 1.0)},
    **{f"ddpm:variance={v}": by(ddpm, variance=v) for v in ("small", "large")},
    **{f"analytic-dpm:form={form},y=none": by(analytic_dpm, form=form) for form in ("ddpm", "ddim")},
    **{f"dpm-solver:order={k}": by(dpm_solver, order=k) for k in (1, 2, 3)},
    "dpm++:method=singlestep": dpmpp_singlestep,
    **{f"dpm++:order={k}": by(dpmpp_multistep, order=k) for k in (1, 2, 3)},
    **{f"dpm++:sde=true,order={k}": by(dpmpp_sde, order=k) for k in (1, 2)},
    **{
        f"unipc:order={p},variant={v},corrector={c}": by(unipc, order=p, variant=v, corrector=c)
        for p in (1, 2, 3)
        for v in ("B1", "B2")
        for c in (True, False)
    },
    **{f"deis:order={r},variable=sigma": by(adams, order=r, place=float) for r in (0, 1, 2, 3)},
    **{f"deis:order={r},variable=log-sigma": by(adams, order=r, place=np.log) for r in (1, 2, 3)},
    **{f"ipndm:order={k}": by(ipndm, order=k) for k in (1, 2, 3, 4)},
    "heun": by(edm, churn=0.0, low=0.0, high=np.inf, noise=1.0),
    "heun:S_churn=4": by(edm, churn=4.0, low=0.0, high=np.inf, noise=1.0),
    "heun:S_churn=80,S_min=0.1,S_max=30,S_noise=1.01": by(edm, churn=80.0, low=0.1, high=30.0, noise=1.01),
    "reverse-diffusion": by(score_sde, predictor="reverse-diffusion"),
    "euler-maruyama": by(score_sde, predictor="euler-maruyama"),
    **{
        f"pc:predictor={p},M={m}": by(score_sde, predictor=p, corrections=m)
        for p, m in (("reverse-diffusion", 1), ("ancestral", 2), ("probability-flow", 1))
    },
}


@pytest.mark.parametrize("spec", PAPERS)
def test_same_as_the_paper(model: ExactModel, spec: str) -> None:
    noise = step_noise(model)
    expected = PAPERS[spec](Network(model), prior(model).numpy(), LEVELS, lambda: noise().numpy())
    sampler = registry.parse("sampler", spec)
    sampler = sampler.with_state(variances={s: kappa(s) for s in LEVELS})  # what analytic-dpm is bound with, made up
    found = ours(model, sampler, torch.tensor(LEVELS, dtype=torch.float64))
    assert difference(found, expected) <= 1e-11


@pytest.mark.parametrize("power", [2.0, 7.0, 20.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_takes_the_time_from_the_models_levels(model: ExactModel, order: int, power: float) -> None:
    """Where the level at timestep i is (a + b i)^power, time is linear in the level's root."""

    class Timed(Denoiser):
        levels = torch.linspace(0.005 ** (1 / power), 160 ** (1 / power), 1000, dtype=torch.float64) ** power
        process = VARIANCE_PRESERVING

        def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
            return denoiser(model, None, BATCH).predict(x, sigma)

        def rows(self, index: Tensor) -> Denoiser:
            return self

    expected = adams(Network(model), prior(model).numpy(), LEVELS, None, order, lambda s: s ** (1 / power))
    found = ours(model, f"deis:order={order}", torch.tensor(LEVELS, dtype=torch.float64), Timed())
    assert difference(found, expected) <= 1e-5


@pytest.mark.parametrize("spec", ["reverse-diffusion", "euler-maruyama"])
def test_variance_exploding_sdes_are_the_papers(model: ExactModel, spec: str) -> None:
    """Song et al. 2021: algorithm 2, x + (s²-t²) score + √(s²-t²) z; and eq. 6 in the variable log σ."""
    exploding = dataclasses.replace(model, process=VARIANCE_EXPLODING)
    noise, x = step_noise(model), prior(model) * LEVELS[0]
    for s, t in pairs(LEVELS):
        score = (denoiser(model, None, BATCH)(x, s) - x) / s**2
        variance = s**2 - t**2 if spec == "reverse-diffusion" else 2 * s**2 * np.log(s / max(t, 1e-300))
        x = x + variance * score + np.sqrt(variance) * noise() if t > 0 else x + s**2 * score
    found = ours(exploding, spec, torch.tensor(LEVELS, dtype=torch.float64))
    assert difference(found, x) <= 1e-10
