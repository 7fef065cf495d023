"""Any diffusers scheduler as a sampler: the same images as in its own loop, under our noise, meter and errors."""

from __future__ import annotations

import inspect
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support.denoising import denoiser
from torch import Tensor

from samplerbench import cli, registry
from samplerbench.errors import RunError, UserError
from samplerbench.models.exact import ExactModel, exact
from samplerbench.sampling import Denoiser, Noise, Prediction, Sigma
from samplerbench.sampling.driver import drive
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.process import VARIANCE_EXPLODING, VARIANCE_PRESERVING
from samplerbench.sampling.spacing import make_grid

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

BATCH, SEED, STEPS = 5, 2, 9
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDIMScheduler:timestep_spacing=linspace": {"timestep_spacing": "linspace"},
    "DDPMScheduler": {},
    "DDPMScheduler:variance_type=fixed_large": {"variance_type": "fixed_large"},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler:use_karras_sigmas=true,solver_order=3": {"use_karras_sigmas": True, "solver_order": 3},
    "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++": {"algorithm_type": "sde-dpmsolver++"},
    "EulerDiscreteScheduler": {},
    "EulerDiscreteScheduler:timestep_spacing=trailing": {"timestep_spacing": "trailing"},
    "EulerAncestralDiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "PNDMScheduler:skip_prk_steps=true": {"skip_prk_steps": True},
    "DEISMultistepScheduler": {},
}
STOCHASTIC = [name for name in SCHEDULERS if "DDPM" in name or "sde" in name or "Ancestral" in name]


@pytest.fixture(scope="module")
def model() -> ExactModel:
    return exact("mixture", shape="1x4x4")


def ours(
    model: ExactModel,
    spec: str,
    steps: int = STEPS,
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    denoise: Denoiser | None = None,
) -> tuple[Tensor, Noise]:
    index = torch.arange(BATCH) if index is None else index
    grid = make_grid(registry.parse("spacing", "trailing"), model.levels, steps)
    x = model.prior(normal(SEED, Purpose.PRIOR, index, 0, model.shape).to(dtype), float(grid[0]))
    noise = Noise(SEED, index, model.shape, dtype)
    sampler = registry.parse("sampler", f"diffusers/{spec}")
    return drive(sampler, denoise or denoiser(model, None, len(index)), x, grid, noise), noise


def direct(model: ExactModel, spec: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, int]:
    """diffusers' own loop, as its pipelines have it, and how many times it asked the network."""
    cls = getattr(diffusers, spec.partition(":")[0])
    clip = {"clip_sample": False} if "clip_sample" in inspect.signature(cls.__init__).parameters else {}
    bars = 1 / (1 + model.levels**2)
    betas = (1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])).numpy()
    made = cls(num_train_timesteps=1000, trained_betas=betas, **clip, **SCHEDULERS[spec])
    made.set_timesteps(STEPS)
    noise = Noise(SEED, torch.arange(BATCH), model.shape, torch.float32)
    module = sys.modules[type(made).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise())
    x = normal(SEED, Purpose.PRIOR, torch.arange(BATCH), 0, model.shape).float() * made.init_noise_sigma
    log_levels = model.levels.log()
    for t in made.timesteps:
        low = min(int(t), 998)
        sigma = float(torch.lerp(log_levels[low], log_levels[low + 1], float(t) - low).exp())
        state = made.scale_model_input(x, t) * (1 + sigma**2) ** 0.5  # scaled is √ᾱ times our state
        epsilon = (state - denoiser(model, None, BATCH)(state, sigma)) / sigma
        x = made.step(epsilon, t, x).prev_sample
    return x, len(made.timesteps)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


# --- The same as its own loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SCHEDULERS)
def test_images_are_those_of_its_own_loop(model: ExactModel, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    with Meter(model.network) as meter:
        found, _ = ours(model, spec)
    with monkeypatch.context() as patch:
        expected, evaluations = direct(model, spec, patch)
    assert found.dtype == torch.float32
    assert difference(found, expected) <= 1e-5
    assert meter.network == BATCH * evaluations
    assert registry.parse("sampler", f"diffusers/{spec}").nfe(STEPS) == evaluations


def test_the_network_is_asked_at_the_scheduler_s_own_timesteps(model: ExactModel) -> None:
    asked: list[float] = []

    class Watching(Denoiser):
        levels, process = model.levels, VARIANCE_PRESERVING

        def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
            asked.append(float(sigma))
            return denoiser(model, None, BATCH).predict(x, sigma)

        def rows(self, index: Tensor) -> Denoiser:
            return self

    ours(model, "UniPCMultistepScheduler", denoise=Watching())
    made = diffusers.UniPCMultistepScheduler()
    made.set_timesteps(STEPS)
    assert asked == pytest.approx(model.levels[made.timesteps].tolist(), rel=1e-12)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_each_state_is_told_in_our_coordinates_with_its_level(name: str) -> None:
    """Whether a scheduler keeps √ᾱx or x: of a single point, x₀ + σz with one z on the whole way."""
    point = exact("gaussian", shape="1x4x4", width=1e-9)
    mean = point.problem.means.reshape(point.shape)
    grid = make_grid(registry.parse("spacing", "trailing"), point.levels, 10)
    x = point.prior(normal(SEED, Purpose.PRIOR, torch.arange(BATCH), 0, point.shape), float(grid[0]))
    noise = Noise(SEED, torch.arange(BATCH), point.shape, torch.float64)
    sampler = registry.parse("sampler", f"diffusers/{name}:timestep_spacing=trailing")
    steps = list(sampler.steps(denoiser(point, None, BATCH), x, grid, noise))
    assert [step.sigma for step in steps] == pytest.approx(grid[1:].tolist(), rel=1e-12)
    z = (steps[0].x - mean) / steps[0].sigma
    assert difference(z, x / grid[0]) <= 0.01  # the start is √ᾱx₀ short of it
    for step in steps:
        assert difference(step.x, mean + step.sigma * z) <= 1e-4


def test_float64_states_stay_float64(model: ExactModel) -> None:
    for spec in ("DDIMScheduler", "DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++"):
        single, double = (ours(model, spec, dtype=dtype)[0] for dtype in (torch.float32, torch.float64))
        assert double.dtype == torch.float64
        assert difference(single, double) <= 1e-4


def test_its_defaults_are_its_own_but_for_clipping(model: ExactModel) -> None:
    """diffusers clips DDPM and DDIM by default; whether D is clipped is the model's to say."""
    plain = ours(model, "DDIMScheduler")[0]
    assert torch.equal(plain, ours(model, "DDIMScheduler:clip_sample=false")[0])
    assert difference(plain, ours(model, "DDIMScheduler:clip_sample=true,clip_sample_range=0.5")[0]) > 1e-3


# --- Our noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", STOCHASTIC)
def test_a_sample_does_not_depend_on_its_batch(model: ExactModel, spec: str) -> None:
    before = torch.get_rng_state()
    whole, noise = ours(model, spec)
    assert noise.draws >= STEPS - 1
    parts = [
        ours(model, spec, index=index)[0] for index in (torch.tensor([0]), torch.tensor([1, 2]), torch.arange(3, 5))
    ]
    assert difference(whole, torch.cat(parts)) <= 1e-6
    assert torch.equal(torch.get_rng_state(), before)


def test_deterministic_schedulers_draw_nothing(model: ExactModel) -> None:
    for spec in set(SCHEDULERS) - set(STOCHASTIC):
        assert ours(model, spec)[1].draws == 0


def randn_of(name: str) -> Callable[..., Tensor]:
    return sys.modules[getattr(diffusers, name).__module__].randn_tensor


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_diffusers_has_its_own_noise_back_afterwards(
    model: ExactModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = name + (":algorithm_type=sde-dpmsolver++" if "Multistep" in name else "")
    own = randn_of(name)
    ours(model, spec)
    assert randn_of(name) is own

    def failing(*_: Any, **__: Any) -> None:
        assert randn_of(name) is not own
        raise ValueError("in the middle of a step")

    monkeypatch.setattr(getattr(diffusers, name), "step", failing)
    with pytest.raises(RunError, match="raised ValueError in step 1: in the middle of a step"):
        ours(model, spec)
    assert randn_of(name) is own


def test_two_runs_at_once_have_each_their_own_noise(model: ExactModel) -> None:
    """Between two steps the scheduler's noise is diffusers' own, so runs may be interleaved."""
    sampler = registry.parse("sampler", "diffusers/DDPMScheduler")
    grid = make_grid(registry.parse("spacing", "trailing"), model.levels, STEPS)

    def start(first: int) -> Any:
        index = torch.arange(first, first + 2)
        x = model.prior(normal(SEED, Purpose.PRIOR, index, 0, model.shape), float(grid[0]))
        return sampler.steps(denoiser(model, None, 2), x, grid, Noise(SEED, index, model.shape, torch.float64))

    alone = [[step.x for step in start(first)] for first in (0, 2)]
    together = list(zip(*itertools.zip_longest(start(0), start(2)), strict=True))
    for run, steps in zip(alone, together, strict=True):
        assert all(torch.equal(a, b.x) for a, b in zip(run, steps, strict=True))


# --- What it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("NoSuchScheduler", 'diffusers has no scheduler "NoSuchScheduler".'),
        ("DDIMSheduler", 'diffusers has no scheduler "DDIMSheduler". Did you mean "DDIMScheduler"'),
        ("DDIMScheduler:eta=1", 'diffusers/DDIMScheduler has no parameter "eta" to set here; it takes clip_sample,'),
        ("DDIMScheduler:prediction_type=sample", 'no parameter "prediction_type" to set here'),
        ("DDIMScheduler:beta_schedule=scaled_linear", 'no parameter "beta_schedule" to set here'),
        ("DDIMScheduler:rescale_betas_zero_snr=true", 'no parameter "rescale_betas_zero_snr" to set here'),
        ("UniPCMultistepScheduler:use_flow_sigmas=true", 'no parameter "use_flow_sigmas" to set here'),
        ("DPMSolverMultistepScheduler:algorithm_type=dpm", "dpm is not implemented for"),
        ("DPMSolverMultistepScheduler:algorithm_type=dpmsolver", "Please choose `sigma_min` instead"),
        (
            "UnCLIPScheduler",
            "cannot sample this kind of model: it has no β schedule or no ε-prediction",
        ),
        ("EDMEulerScheduler", "cannot sample this kind of model"),
        ("IPNDMScheduler", r"cannot sample this kind of model: .*lacks prediction_type\)"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(spec: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=says):
        registry.parse("sampler", f"diffusers/{spec}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "-s", f"diffusers/{spec}", "--steps", "2"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers has a stand-in for a scheduler whose library is missing."""
    dummy = type("NeedsMuchScheduler", (), {"_backends": ["torch", "nonesuch"]})
    monkeypatch.setattr(diffusers, "NeedsMuchScheduler", dummy, raising=False)
    with pytest.raises(UserError, match="diffusers/NeedsMuchScheduler requires nonesuch, which is not installed"):
        registry.parse("sampler", "diffusers/NeedsMuchScheduler")


def test_a_variance_exploding_model_is_refused(model: ExactModel) -> None:
    class Exploding(Denoiser):
        levels, process = model.levels, VARIANCE_EXPLODING

        def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
            raise AssertionError

        def rows(self, index: Tensor) -> Denoiser:
            return self

    with pytest.raises(UserError, match="diffusers/DDIMScheduler needs a variance-preserving model"):
        ours(model, "DDIMScheduler", denoise=Exploding())


def test_steps_that_it_cannot_make_are_its_own_failure_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PNDM's Runge-Kutta start takes four steps and twelve evaluations; LCM has 50 steps to give."""
    assert [registry.parse("sampler", "diffusers/PNDMScheduler").nfe(n) for n in (1, 4, 5)] == [13, 13, 14]
    samplers = ("-s", "diffusers/PNDMScheduler", "-s", "diffusers/LCMScheduler", "-s", "ddim")
    arguments = ("--n", "4", "--model", "exact:mixture,shape=1x8x8", "--out", str(tmp_path), "--json")

    def records(*more: str) -> tuple[Any, list[dict[str, Any]]]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", *samplers, *arguments, *more])
        return ended.value.code, json.loads(capsys.readouterr().out)

    code, (pndm, lcm, ddim) = records("--steps", "3")
    assert code == 2
    assert pndm["error"].startswith("diffusers/PNDMScheduler does not support 3 steps: ")
    assert (lcm["nfe"], ddim["nfe"]) == (3, 3)
    code, (pndm, lcm, ddim) = records("--steps", "60")
    assert lcm["error"].startswith("diffusers/LCMScheduler does not support 60 steps: ")
    assert (pndm["nfe"], ddim["nfe"]) == (69, 60)
    code, found = records("--nfe", "5,14")
    assert code == 0
    told = {(r["sampler"], r["budget"]): r.get("nfe", r.get("unmet")) for r in found}
    assert told["diffusers/PNDMScheduler", 5] == "a budget of 5 evaluations is too small: one step costs 13"
    assert told["diffusers/PNDMScheduler", 14] == 14
    assert told["ddim", 5] == 5
