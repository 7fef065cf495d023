"""A scheduler of diffusers is given what the model predicts, as in diffusers' own pipeline; what is no sampler is
refused."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import Any, cast

import diffusers
import pytest
import torch
from support.denoising import denoiser
from support.pipelines import tiny_stable_diffusion

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.models.exact import exact
from samplerbench.models.preconditioning import DISCRETE
from samplerbench.models.schedule import PREDICTIONS, alphas_cumprod, noise_levels
from samplerbench.models.stable_diffusion import StableDiffusion
from samplerbench.sampling import Noise
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.process import VARIANCE_PRESERVING
from samplerbench.sampling.spacing import make_grid

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers", "ignore::Warning:torch")

STEPS, BATCH, SEED, SCALE = 6, 2, 4, 3.0
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def signature(name: str) -> list[str]:
    return list(inspect.signature(getattr(diffusers, name).__init__).parameters)


def installed() -> list[str]:
    """Every scheduler of diffusers that is installed with its libraries."""
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    found = [name for name in names if type(getattr(diffusers, name)).__name__ != "DummyObject"]
    return [name for name in found if name != "SchedulerMixin"]


SAMPLERS = (
    *("CogVideoXDDIMScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler"),
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "PNDMScheduler:skip_prk_steps=true", "SASolverScheduler", "TCDScheduler"),
    "UniPCMultistepScheduler",
)
INVERSE = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")


# --- What is given --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = tiny_stable_diffusion(tmp_path_factory.mktemp("sd"), diffusers.DDIMScheduler(clip_sample=False, **BETAS))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def embeddings() -> torch.Tensor:
    return torch.randn(BATCH + 1, 16, 16, generator=torch.Generator().manual_seed(0))


class Rows:
    """Embeddings of prompts that the test makes up."""

    negative = None

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text

    def rows(self, index: list[int]) -> dict[str, torch.Tensor]:
        return {"text": self.text[index]}


def ours(pipeline: Any, embeddings: torch.Tensor, spec: str, prediction: Any, given: Any = None) -> torch.Tensor:
    """The latents of `diffusers/spec` on the pipeline's network; `given`: what the scheduler is to be given."""
    model = StableDiffusion(
        network=pipeline.unet,
        shape=(4, 8, 8),
        levels=noise_levels(alphas_cumprod(BETAS)),
        process=VARIANCE_PRESERVING,
        device=torch.device("cpu"),
        dtype=torch.float32,
        classes=BATCH,
        null=True,
        text=True,
        preconditioning=DISCRETE[prediction],
        embeddings=cast(Any, Rows(embeddings[1:])),
        null_embeddings={"text": embeddings[:1]},
    )
    index = torch.arange(BATCH)
    denoise = denoiser(model, index, BATCH, replace(registry.parse("guidance", "cfg"), scale=SCALE))
    if given is not None:
        denoise.prediction = given
    grid = make_grid(registry.parse("spacing", "trailing"), model.levels, STEPS)
    x = model.prior(normal(SEED, Purpose.PRIOR, index, 0, model.shape).float(), float(grid[0]))
    noise = Noise(SEED, index, model.shape, torch.float32)
    return drive(registry.parse("sampler", f"diffusers/{spec}"), denoise, x, grid, noise)


def theirs(
    pipeline: Any, embeddings: torch.Tensor, spec: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The latents of the pipeline itself with that scheduler, configured with the model's prediction type."""
    name, _, rest = spec.partition(":")
    neutral = {"clip_sample": False, "snr_shift_scale": 1.0}
    config = {key: value for key, value in neutral.items() if key in signature(name)}
    more: dict[str, Any] = {"skip_prk_steps": True} if rest else {}
    if name == "CogVideoXDDIMScheduler":
        more["rescale_betas_zero_snr"] = False
    made = getattr(diffusers, name)(prediction_type=prediction, **BETAS, **config, **more)
    noise = Noise(SEED, torch.arange(BATCH), (4, 8, 8), torch.float32)
    module = sys.modules[type(made).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise())
    monkeypatch.setattr(pipeline, "scheduler", made)
    return pipeline(
        prompt_embeds=embeddings[1:],
        negative_prompt_embeds=embeddings[:1].expand(BATCH, -1, -1),
        guidance_scale=SCALE,
        latents=normal(SEED, Purpose.PRIOR, torch.arange(BATCH), 0, (4, 8, 8)).float(),
        num_inference_steps=STEPS,
        output_type="latent",
        eta=0.3 if name == "TCDScheduler" else 0.0,  # its own default, which the pipeline overrules
    ).images


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


REFUSED = {
    ("PNDMScheduler", "sample"),
    ("PNDMScheduler:skip_prk_steps=true", "sample"),
    *((name, "sample") for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")),
    ("EulerAncestralDiscreteScheduler", "sample"),
}
"""What diffusers' schedulers do not take: they are given ε, of the same D."""


QUICK = {
    *(("PNDMScheduler:skip_prk_steps=true", prediction) for prediction in PREDICTIONS),
    *((name, "v_prediction") for name in ("DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler")),
    ("DPMSolverMultistepScheduler", "sample"),
}
CASES = [
    pytest.param(spec, prediction, marks=() if (spec, prediction) in QUICK else pytest.mark.slow)
    for spec in SAMPLERS
    for prediction in PREDICTIONS
    # This random network amplifies Heun's rounding in float32 to 1.1e-3; in float64 the test below has 5e-15.
    if (spec, prediction) != ("HeunDiscreteScheduler", "sample")
]


@pytest.mark.parametrize(("spec", "prediction"), CASES)
def test_latents_are_those_of_the_stock_pipeline(
    pipeline: Any, embeddings: torch.Tensor, monkeypatch: pytest.MonkeyPatch, spec: str, prediction: str
) -> None:
    found = ours(pipeline, embeddings, spec, prediction)
    if (spec, prediction) in REFUSED:
        with pytest.raises((NotImplementedError, ValueError), match="prediction"):
            theirs(pipeline, embeddings, spec, prediction, monkeypatch)
        assert torch.equal(found, ours(pipeline, embeddings, spec, prediction, "epsilon"))
    else:
        assert apart(found, theirs(pipeline, embeddings, spec, prediction, monkeypatch)) <= 1e-3


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_heun_is_the_schedulers_own_loop_in_float64(prediction: Any) -> None:
    """The loop of diffusers' Heun written out, with the network's output made of the exact D."""
    model, index = exact("mixture", shape="1x4x4"), torch.arange(3)
    grid = make_grid(registry.parse("spacing", "trailing"), model.levels, STEPS)
    z = normal(0, Purpose.PRIOR, index, 0, model.shape)
    denoise = denoiser(model, None, len(index))
    denoise.prediction = prediction
    noise = Noise(0, index, model.shape, torch.float64)
    sampler = registry.parse("sampler", "diffusers/HeunDiscreteScheduler")
    found = drive(sampler, denoise, model.prior(z, float(grid[0])), grid, noise)

    bars = 1 / (1 + model.levels**2)
    betas = 1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])
    made = diffusers.HeunDiscreteScheduler(trained_betas=betas.numpy(), prediction_type=prediction)
    made.set_timesteps(STEPS)
    state = z * float(made.init_noise_sigma)
    for t in made.timesteps:
        below = int(t)
        share = float(t) - below
        above = min(below + 1, len(model.levels) - 1)
        level = float(((1 - share) * model.levels[below].log() + share * model.levels[above].log()).exp())
        x = made.scale_model_input(state, t) * (1 + level**2) ** 0.5
        x0 = denoise(x, level)
        epsilon = (x - x0) / level
        output = {"epsilon": epsilon, "sample": x0, "v_prediction": (epsilon - level * x0) / (1 + level**2) ** 0.5}
        state = made.step(output[prediction], t, state).prev_sample
    assert apart(found, state) <= 1e-13


def test_for_pndm_it_matters_what_is_given(pipeline: Any, embeddings: torch.Tensor) -> None:
    """It averages the network's outputs of several timesteps, and an average of v is not one of ε."""
    given = [ours(pipeline, embeddings, "PNDMScheduler", "v_prediction", kind) for kind in ("v_prediction", "epsilon")]
    assert apart(*given) > 0.05


# --- What is no sampler ---------------------------------------------------------------------------------------------


def test_every_scheduler_of_diffusers_is_a_sampler_or_refused_in_one_line() -> None:
    answers = {name: refusal(name) for name in installed()}
    flows = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
    assert {name for name, says in answers.items() if not says} == flows | {spec.partition(":")[0] for spec in SAMPLERS}
    for name, says in answers.items():
        assert "\n" not in says
        assert not says or says.startswith(f"diffusers/{name} ")


def refusal(name: str) -> str:
    """What is said of a scheduler that is refused; empty where it is a sampler."""
    try:
        registry.parse("sampler", f"diffusers/{name}")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, "is not a sampler: its timesteps increase, so it converts images to noise") for name in INVERSE),
        ("CogVideoXDPMScheduler", "its step requires old_pred_original_sample and timestep_back"),
        ("UnCLIPScheduler", "its constructor lacks trained_betas"),
    ],
)
def test_what_is_no_sampler_is_refused(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        registry.parse("sampler", f"diffusers/{name}")


def test_noise_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DPMSolverSDEScheduler's, which needs torchsde: a sample would depend on its batch."""

    class OwnNoiseScheduler(diffusers.DDIMScheduler):
        def __init__(self, trained_betas: Any = None, prediction_type: str = "epsilon", noise_sampler_seed: Any = None):
            super().__init__()

    monkeypatch.setattr(diffusers, "OwnNoiseScheduler", OwnNoiseScheduler, raising=False)
    with pytest.raises(UserError, match="draws its own noise"):
        registry.parse("sampler", "diffusers/OwnNoiseScheduler")


def test_parameters_that_allow_few_steps_are_no_reason_to_refuse() -> None:
    assert registry.parse("sampler", "diffusers/LCMScheduler:original_inference_steps=5").nfe(4) == 4


def test_shifted_noise_levels_are_the_models_again() -> None:
    """CogVideoX' scheduler multiplies the signal-to-noise ratio by 3 unless told otherwise."""
    model = exact("gaussian", shape="1x2x2", width=1e-9)
    grid = make_grid(registry.parse("spacing", "trailing"), model.levels, 10)
    x = model.prior(normal(SEED, Purpose.PRIOR, torch.arange(BATCH), 0, model.shape), float(grid[0]))
    runs = []
    for spec in ("CogVideoXDDIMScheduler:timestep_spacing=trailing", "DDIMScheduler:timestep_spacing=trailing"):
        noise = Noise(SEED, torch.arange(BATCH), model.shape, torch.float64)
        sampler = registry.parse("sampler", f"diffusers/{spec}")
        runs.append([step.x for step in sampler.steps(denoiser(model, None, BATCH), x, grid, noise)])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
