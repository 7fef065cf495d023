"""Samplers as schedulers of flow-matching pipelines: the latents of diffusers and of our own loop, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from support.flow_pipelines import PIPELINES, SIDE, N, tiny_flux, tiny_sd3
from torch import Tensor

from samplerbench import registry
from samplerbench.diffusers import FlowSamplerScheduler, SamplerScheduler, as_scheduler
from samplerbench.errors import UserError
from samplerbench.sampling import SIGMA_INFINITY, Denoiser, Noise, Prediction, Sampler, Sigma
from samplerbench.sampling.driver import drive
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.process import RECTIFIED_FLOW, flow_level, flow_time

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

STEPS, SEED = 5, 7
UNIFORM = [1 - i / STEPS for i in range(STEPS)]


def latents(pipeline: Any, scheduler: Any, **call: Any) -> Tensor:
    """What the pipeline makes of the noise of a fixed generator, before decoding."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler
    settings: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**(settings | {"generator": generator} | call)).images


# --- Against diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_ddim_is_the_euler_method_of_diffusers(name: str) -> None:
    """Whatever the pipeline's convention: packed latents, 1 - t, -v, lists, a time before the shift."""
    pipeline, call = PIPELINES[name]()
    stock = pipeline.scheduler
    # CogView4 has its own times. The default times of FlowMatchEulerDiscreteScheduler end at 1/1000, not at 1/N.
    given = call | ({} if name == "cogview4" else {"sigmas": UNIFORM})
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0) if name == "sana" else stock
    expected = latents(pipeline, euler, **given)
    ours = latents(pipeline, as_scheduler("ddim", stock), **given)
    difference = float((ours - expected).abs().max())
    print(f"{name}: {difference:.1e}")
    assert float(expected.std()) > 0.5
    assert difference <= 1e-5
    assert float((latents(pipeline, as_scheduler("heun", stock), **given) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    ],
)
def test_the_times_are_those_of_diffusers(settings: dict[str, Any]) -> None:
    stock = FlowMatchEulerDiscreteScheduler(**settings)
    ours = as_scheduler("ddim", stock)
    for sigmas in (UNIFORM, [0.9, 0.5, 0.2]):
        for scheduler in (stock, ours):
            scheduler.set_timesteps(sigmas=sigmas, mu=0.7)
        torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-6, atol=1e-7)
        assert ours.timesteps.dtype == torch.float32
    for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift", "use_dynamic_shifting", "shift"):
        assert ours.config[key] == stock.config[key]


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image_starts_where_diffusers_starts(strength: float) -> None:
    pipeline, call = tiny_flux()
    made = FluxImg2ImgPipeline(**pipeline.components)
    image = torch.linspace(-1, 1, 3 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE)
    given = call | {"image": image, "strength": strength, "sigmas": UNIFORM}
    expected = latents(made, pipeline.scheduler, **given)
    ours = latents(made, as_scheduler("ddim", pipeline.scheduler), **given)
    assert float((ours - expected).abs().max()) <= 1e-5


def test_scale_noise_is_the_forward_process_of_diffusers() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=2.0)
    ours = as_scheduler("ddim", stock)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(sigmas=UNIFORM)
    x0, z = torch.randn(2, STEPS, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = stock.scale_noise(x0, stock.timesteps, z)
    torch.testing.assert_close(ours.scale_noise(x0, stock.timesteps, z), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.add_noise(x0, z, stock.timesteps), expected, rtol=1e-5, atol=1e-6)
    assert [ours.index_for_timestep(t) for t in ours.timesteps] == list(range(STEPS))
    with pytest.raises(UserError, match="3 is not one of the timesteps of this run"):
        ours.index_for_timestep(3.0)


# --- Against our own loop -------------------------------------------------------------------------------------------


class Sd3(Denoiser):
    """The transformer of a tiny SD3 pipeline with its guidance, called as our own adapters call networks."""

    process = RECTIFIED_FLOW
    levels = torch.arange(1, 1000, dtype=torch.float64) / torch.arange(999, 0, -1, dtype=torch.float64)

    def __init__(self, transformer: Any, call: dict[str, Any]) -> None:
        self.transformer, self.call = transformer, call

    def velocity(self, y: Tensor, t: float, kind: str = "") -> Tensor:
        return self.transformer(
            hidden_states=y,
            timestep=torch.full((len(y),), 1000 * t, dtype=torch.float32),
            encoder_hidden_states=self.call[f"{kind}prompt_embeds"],
            pooled_projections=self.call["negative_pooled_prompt_embeds" if kind else "pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        t = flow_time(float(sigma))
        y = x / (1 + float(sigma))
        negative = self.velocity(y, t, "negative_")
        return Prediction(y - t * (negative + self.call["guidance_scale"] * (self.velocity(y, t) - negative)))

    def rows(self, index: Tensor) -> Denoiser:
        raise NotImplementedError


@pytest.mark.parametrize(
    "spec", ["ddim", "heun", "dpm++", "dpm++:order=3", "unipc", "ddpm", "dpm++:sde=true", "deis", "pf-ode:solver=rk4"]
)
def test_a_pipeline_makes_the_latents_of_our_own_loop(spec: str) -> None:
    """In float64, so that only the float32 of the timesteps is left, which both have."""
    pipeline, call = tiny_sd3()
    pipeline.to(torch.float64)
    call = {name: value.double() if isinstance(value, Tensor) else value for name, value in call.items()}
    ours = latents(pipeline, as_scheduler(spec, pipeline.scheduler, seed=SEED), **call)
    z = torch.randn(N, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = Noise(SEED, torch.arange(N), z.shape[1:], z.dtype)
    sigmas = FlowSchedule(shift=3.0).grid(STEPS)
    with torch.no_grad():
        expected = drive(
            registry.parse("sampler", spec), Sd3(pipeline.transformer, call), z * SIGMA_INFINITY, sigmas, noise
        )
    assert float((ours - expected).abs().max()) <= 1e-9


class Formula(Denoiser):
    """A velocity that is a formula: not linear in y, and another function at each t."""

    process = RECTIFIED_FLOW
    levels = Sd3.levels

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        t = flow_time(float(sigma))
        y = x / (1 + float(sigma))
        return Prediction(y - t * velocity(y, 1000 * t))

    def rows(self, index: Tensor) -> Denoiser:
        raise NotImplementedError


def velocity(y: Tensor, timestep: float) -> Tensor:
    return torch.tanh(1.3 * y - 0.4 + torch.tensor(timestep, dtype=torch.float32).double() / 1000)


def loop(made: FlowSamplerScheduler, y: Tensor, first: int = 0) -> Tensor:
    for t in made.timesteps[first:]:
        y = made.step(velocity(y, float(t)), t, y, return_dict=False)[0]
    return y


def noise_at_start() -> Tensor:
    return torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def driven(sampler: str | Sampler, y: Tensor, sigmas: Tensor) -> Tensor:
    noise = Noise(SEED, torch.arange(len(y)), y.shape[1:], y.dtype)
    return drive(registry.parse("sampler", sampler), Formula(), y * (1 + sigmas[0]), sigmas, noise)


def prepared(sampler: str | Sampler, steps: int = STEPS, **more: Any) -> FlowSamplerScheduler:
    made = as_scheduler(sampler, FlowMatchEulerDiscreteScheduler(shift=3.0), seed=SEED, **more)
    assert isinstance(made, FlowSamplerScheduler)
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize(
    ("spec", "order"),
    [
        *(("ddim:eta=0.5", 1), ("heun", 2), ("dpm-solver:order=3", 3), ("unipc", 1), ("ipndm", 1)),
        *(("dpm++:method=singlestep", 2), ("euler-maruyama", 1), ("langevin", 5), ("dpm++:order=3", 1)),
    ],
)
def test_one_entry_for_each_evaluation(spec: str, order: int) -> None:
    made = prepared(spec)
    grid = made._plan.sigmas  # type: ignore[union-attr]
    assert len(made.timesteps) == made.sampler.nfe(STEPS)
    assert made.order == order
    torch.testing.assert_close(loop(made, noise_at_start()), driven(spec, noise_at_start(), grid), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("spec", "first", "interval"), [("dpm++:order=3", 2, 2), ("heun", 4, 2)])
def test_a_run_may_start_at_a_lower_level(spec: str, first: int, interval: int) -> None:
    made = prepared(spec)
    grid = made._plan.sigmas  # type: ignore[union-attr]
    made.set_begin_index(first)
    assert made.begin_index == first
    expected = driven(spec, noise_at_start(), grid[interval:])
    torch.testing.assert_close(loop(made, noise_at_start(), first), expected, rtol=0, atol=1e-9)


# --- Which time steps -----------------------------------------------------------------------------------------------


def times(made: FlowSamplerScheduler, **given: Any) -> list[float]:
    made.set_timesteps(**given)
    return [round(float(t) / 1000, 5) for t in made.timesteps]


def test_the_pipelines_times_are_used_unless_the_user_chose_a_spacing() -> None:
    stock = FlowMatchEulerDiscreteScheduler()
    own, chosen = as_scheduler("ddim", stock), as_scheduler("ddim", stock, spacing="flow:shift=3")
    assert times(own, num_inference_steps=4) == [1, 0.75, 0.5, 0.25]
    assert times(own, sigmas=[1.0, 0.4]) == [1, 0.4]
    assert times(chosen, num_inference_steps=4) == times(chosen, sigmas=[1, 0.9, 0.8, 0.7]) == [1, 0.9, 0.75, 0.5]
    assert times(as_scheduler("ddim", stock, spacing="karras"), sigmas=[1.0, 0.5])[0] == 0.999
    # A sampler that keeps its own spacing also does in a run.
    assert times(as_scheduler("langevin", stock), sigmas=[1.0, 0.5])[0] < 1


def test_mu_is_the_dynamic_shift_and_has_no_other_effect() -> None:
    static, dynamic = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert times(as_scheduler("ddim", static), num_inference_steps=2, mu=1.0) == [1, 0.5]
    made = as_scheduler("ddim", dynamic)
    assert times(made, num_inference_steps=2, mu=1.0) == [1, round(torch.e / (1 + torch.e), 5)]
    with pytest.raises(UserError, match="depends on the size of the image, so set_timesteps requires mu; pass it"):
        made.set_timesteps(2)
    assert times(as_scheduler("ddim", dynamic, spacing="flow:shift=3"), num_inference_steps=2) == [1, 0.75]


def test_times_before_the_shift_are_given_to_the_network_if_the_pipeline_names_them() -> None:
    """CogView4: σ is shifted, the network's time is not."""
    made = as_scheduler("heun", FlowMatchEulerDiscreteScheduler(shift=3.0))
    made.set_timesteps(timesteps=[1000.0, 500.0], sigmas=[1.0, 0.5])
    assert made.timesteps.tolist() == [1000, 500, 500]
    assert made.sigmas.tolist() == [1, 0.75, 0.75, 0]
    x0, z = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    assert float(made.scale_noise(x0, 500.0, z)) == 0.75
    assert flow_level(0.75) == 3


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "set_timesteps requires num_inference_steps, or sigmas"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "sigmas has 2 values, but num_inference_steps is 3"),
        ({"sigmas": [0.5, 1.0]}, "sigmas must be decreasing times above 0 and at most 1"),
        ({"sigmas": [1.5, 1.0]}, "sigmas must be decreasing times above 0 and at most 1"),
        ({"num_inference_steps": 2, "timesteps": [900, 500]}, "supports timesteps only together with sigmas of the sa"),
        ({"sigmas": [1.0, 0.5], "timesteps": [900, 500]}, "supports timesteps only together with sigmas of the same "),
        ({"sigmas": []}, "sigmas must be decreasing times above 0 and at most 1"),
        ({"num_inference_steps": 0}, "at least 1 step is needed"),
    ],
)
def test_time_steps_that_cannot_be_used_are_refused(given: dict[str, Any], says: str) -> None:
    made = as_scheduler("ddim", FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError) as error:
        made.set_timesteps(**given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "more", "says"),
    [
        ("pf-ode:solver=rk45", FlowMatchEulerDiscreteScheduler(), {}, "it chooses its noise levels from the image"),
        ("analytic-dpm", FlowMatchEulerDiscreteScheduler(), {}, "it requires more from the model than D"),
        ("ddpm:variance=learned", FlowMatchEulerDiscreteScheduler(), {}, "the model learned no variance"),
        ("ddim", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "the pipeline has invert_sigmas set"),
        ("ddim", DDPMScheduler(), {"spacing": "flow"}, "spacing flow is for rectified flows, and this model is none"),
        (
            "ddim",
            {"_class_name": "EDMEulerScheduler", "prediction_type": "flow_prediction"},
            {},
            "the configuration is a rectified flow with the scheduler EDMEulerScheduler; supported are FlowMatchEuler",
        ),
    ],
)
def test_what_cannot_be_a_scheduler_of_a_flow_is_refused(
    sampler: str, scheduler: Any, more: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as error:
        as_scheduler(sampler, scheduler, **more)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_changed_state_is_refused_by_a_method_with_memory() -> None:
    made, y = prepared("dpm++"), noise_at_start()
    for t in made.timesteps[:2]:
        y = made.step(velocity(y, float(t)), t, y).prev_sample
    with pytest.raises(UserError, match=r"changed the state at entry 2 of the timesteps, which sampler dpm\+\+ does"):
        made.step(velocity(y, float(made.timesteps[2])), made.timesteps[2], y + 0.05)


# --- Configurations -------------------------------------------------------------------------------------------------


def test_a_flow_pipeline_is_saved_and_loaded_with_it(tmp_path: Path) -> None:
    pipeline, call = tiny_flux()
    made = as_scheduler("dpm++:order=3", pipeline.scheduler, seed=SEED)
    expected = latents(pipeline, made, **call)
    pipeline.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(
        tmp_path, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    )
    assert isinstance(loaded.scheduler, FlowSamplerScheduler)
    assert torch.equal(latents(loaded, loaded.scheduler, **call), expected)
    parameters = [name for name in made.config if not name.startswith("_")]
    assert "use_dynamic_shifting" in parameters
    for source in (made, tmp_path, {"_class_name": "FlowSamplerScheduler"} | dict(made.config)):
        again = as_scheduler("dpm++:order=3", source, seed=SEED)
        assert {name: again.config[name] for name in parameters} == {name: made.config[name] for name in parameters}
    back = FlowMatchEulerDiscreteScheduler.from_config(made.config)
    assert back.config.use_dynamic_shifting is True
    with pytest.raises(UserError, match="this is the configuration of another scheduler; use"):
        FlowSamplerScheduler.from_config(FlowMatchEulerDiscreteScheduler().config)
    assert not isinstance(made, SamplerScheduler)
