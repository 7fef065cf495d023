"""Samplers as diffusers schedulers: the same images as our own loop, and every refusal."""

from __future__ import annotations

import copy
import gc
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import CPU, run_images
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    HeunDiscreteScheduler,
    LDMPipeline,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from support.pipelines import (
    PROMPTS,
    SD_BETAS,
    SEED,
    STEPS,
    N,
    theirs,
    tiny_autoencoder,
    tiny_stable_diffusion,
    tiny_transformer,
    tiny_unet,
)
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.bench import setup
from samplerbench.diffusers import SamplerScheduler, as_scheduler
from samplerbench.errors import UserError
from samplerbench.models import Model
from samplerbench.models.files import LoadOptions
from samplerbench.models.timesteps import timestep_at
from samplerbench.sampling import Denoiser, Noise, Prediction, Sampler, Sigma, Step, intervals
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.process import VARIANCE_PRESERVING

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

TOLERANCE = 1e-4  # in pixels of [-1, 1], before they are quantised
SPECS = ["ddim", "ddim:eta=0.5", "ddpm", "dpm++:order=3", "heun", "unipc", "dpm-solver:order=3"]


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float, spec: str) -> None:
    assert ours.shape == theirs.shape
    between = theirs.abs() < 0.999
    assert int(between.sum()) >= 20, "all is clipped, so there is nothing to compare"
    difference = float((ours - theirs).abs().max())
    print(f"{spec}: {difference:.1e}")
    assert difference <= tolerance


# --- The same images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[DDPMPipeline, Model]]:
    """A tiny pipeline of pixels, and the same checkpoint loaded as a model, in one dtype."""

    def make(dtype: str = "fp32", out: int | None = None, **scheduler: Any) -> tuple[DDPMPipeline, Model]:
        folder = tmp_path_factory.mktemp("pixel")
        pipeline = DDPMPipeline(tiny_unet(3, out), DDPMScheduler(**scheduler))
        pipeline.save_pretrained(folder)
        pipeline.to({"fp32": torch.float32, "fp64": torch.float64}[dtype])
        return pipeline, setup.load_model(str(folder), CPU, dtype)

    return make


@pytest.fixture(scope="module")
def clipped(pixel: Any) -> tuple[DDPMPipeline, Model]:
    return pixel(clip_sample=True, **SD_BETAS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    folder = tmp_path_factory.mktemp("text")
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS)
    pipeline = tiny_stable_diffusion(folder, scheduler)
    pipeline.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    options = LoadOptions(prompts=str(folder / "prompts.txt"))
    return pipeline, setup.load_model(str(folder / "model"), CPU, "fp32", options)


def start(model: Model) -> Tensor:
    """The z that our run of sample 0 … N-1 begins with."""
    return normal(SEED, Purpose.PRIOR, torch.arange(N), 0, model.shape).to(model.dtype)


def pixels(pipeline: Any, model: Model, spec: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Tensor:
    pipeline.scheduler = as_scheduler(spec, pipeline.scheduler, seed=SEED, **more)
    return theirs(pipeline, start(model), monkeypatch, batch_size=N)


@pytest.mark.parametrize("spec", SPECS)
def test_a_pixel_pipeline_makes_our_images(spec: str, clipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, model = clipped
    ours = run_images(model, spec, None, STEPS, N, None, seed=SEED).clamp(-1, 1)
    assert_same(ours, pixels(pipeline, model, spec, monkeypatch), TOLERANCE, spec)


@pytest.mark.parametrize(
    ("spec", "out", "scheduler"),
    [
        ("dpm++:order=3", None, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
        ("dpm-solver:order=3", None, {"prediction_type": "sample", "clip_sample": False}),
        ("ddpm:variance=learned", 6, {"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"}),
        ("heun:S_churn=20,S_max=3", 6, {"variance_type": "learned"}),
        ("unipc", None, {"trained_betas": [0.01 * 1.03**i for i in range(100)]}),
    ],
)
def test_in_float64_nothing_but_rounding_is_left(
    spec: str, out: int | None, scheduler: dict[str, Any], pixel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, model = pixel("fp64", out, **scheduler)
    ours = run_images(model, spec, None, STEPS, N, None, seed=SEED).clamp(-1, 1)
    assert_same(ours, pixels(pipeline, model, spec, monkeypatch), 1e-9, spec)


@pytest.mark.parametrize("spec", SPECS)
def test_stable_diffusion_with_guidance_makes_our_images(spec: str, text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, model = text
    pipeline.scheduler = as_scheduler(spec, pipeline.scheduler, seed=SEED)
    found = theirs(pipeline, start(model), monkeypatch, prompt=PROMPTS, guidance_scale=5.0, latents=start(model))
    ours = run_images(model, spec, None, STEPS, N, torch.arange(N), guidance="cfg:scale=5", seed=SEED).clamp(-1, 1)
    assert_same(ours, found, TOLERANCE, spec)


@pytest.mark.parametrize("kind", ["latents", "transformer"])
def test_latent_pipelines_make_our_images(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer's pipeline leaves its variance out itself, so the output has the state's channels."""
    labels, guidance, call = None, "none", {}
    scheduler = DDIMScheduler(clip_sample=False, **SD_BETAS)
    if kind == "latents":
        pipeline: Any = LDMPipeline(tiny_autoencoder(), tiny_unet(), scheduler)
        call = {"batch_size": N}
    else:
        pipeline = DiTPipeline(tiny_transformer(), tiny_autoencoder(), scheduler)
        labels, guidance = torch.tensor([7, 999, 0]), "cfg:scale=3"
        call = {"class_labels": labels.tolist(), "guidance_scale": 3.0}
    pipeline.save_pretrained(tmp_path)
    model = setup.load_model(str(tmp_path), CPU, "fp32")
    ours = run_images(model, "unipc", None, STEPS, N, labels, guidance=guidance, seed=SEED).clamp(-1, 1)
    pipeline.scheduler = as_scheduler("unipc", scheduler)
    assert_same(ours, theirs(pipeline, start(model), monkeypatch, **call), TOLERANCE, kind)


def test_a_ddim_pipeline_takes_it_where_it_is_put_in_afterwards(monkeypatch: pytest.MonkeyPatch, clipped: Any) -> None:
    made, model = clipped
    pipeline = DDIMPipeline(made.unet, DDIMScheduler(**SD_BETAS))
    found = pixels(pipeline, model, "dpm++", monkeypatch)
    assert_same(run_images(model, "dpm++", None, STEPS, N, None, seed=SEED).clamp(-1, 1), found, TOLERANCE, "dpm++")
    with pytest.raises(UserError, match="eta and use_clipped_model_output are not supported"):
        pipeline(eta=0.5, num_inference_steps=2)


# --- Against diffusers' own schedulers ------------------------------------------------------------------------------


def test_without_a_seed_the_noise_is_the_generator_s(clipped: Any) -> None:
    """DDPMScheduler draws the same noise from the same generator, one draw a step."""
    pipeline, _ = clipped

    def images(scheduler: Any, seed: int | list[int]) -> Tensor:
        pipeline.scheduler = scheduler
        single = [torch.Generator().manual_seed(s) for s in ([seed] if isinstance(seed, int) else seed)]
        generator = single[0] if isinstance(seed, int) else single
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(2, generator=generator, num_inference_steps=STEPS, output_type="pt")
        return made.images * 2 - 1

    stock = DDPMScheduler()
    ours = as_scheduler("ddpm", stock)
    # diffusers keeps its tables in float32.
    assert_same(images(ours, 3), images(stock, 3), 2e-4, "DDPMScheduler")
    assert_same(images(ours, [3, 4]), images(stock, [3, 4]), 2e-4, "DDPMScheduler, a generator for each image")
    assert float((images(ours, 3) - images(ours, 5)).abs().max()) > 0.1


@pytest.mark.parametrize("task", ["image to image", "inpainting"])
def test_images_to_begin_with_and_masks_are_as_with_diffusers_own_schedulers(task: str, text: Any) -> None:
    """An image to begin with begins further down; a mask changes the state after every step."""
    pipeline, _ = text
    parts = {"image_encoder": None} | pipeline.components
    parts["scheduler"] = DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS)
    image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    call: dict[str, Any] = {"prompt": "a cat", "image": image, "strength": 0.7, "num_inference_steps": STEPS}
    if task == "inpainting":
        made: Any = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., 8:] = 1
        call |= {"mask_image": mask, "height": 16, "width": 16}
    else:
        made = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)

    def images(scheduler: Any) -> Tensor:
        made.scheduler = scheduler
        return made(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images * 2 - 1

    stock = made.scheduler
    expected = images(stock)
    assert_same(images(as_scheduler("ddim", stock, spacing="leading:offset=1")), expected, 2e-4, task)
    # With two evaluations a step, the pipeline must begin at the first of a step, and masks the state between them.
    heun = as_scheduler("heun", stock, spacing="leading:offset=1")
    if task == "inpainting":
        with pytest.raises(
            UserError, match="changed the state at entry 5 of the timesteps, within a step of sampler h"
        ):
            images(heun)
        with pytest.raises(
            UserError, match="the pipeline changed the state at entry 3 of the timesteps, which sampler"
        ):
            images(as_scheduler("dpm++", stock))
    else:
        own = HeunDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SD_BETAS)
        assert_same(images(heun), images(own), 2e-4, "image to image, heun")


@pytest.mark.parametrize("config", [{}, {"beta_schedule": "scaled_linear", "num_train_timesteps": 100}])
def test_add_noise_is_the_forward_process(config: dict[str, Any]) -> None:
    stock = DDPMScheduler(**config)
    made = as_scheduler("ddim", stock)
    x0, z = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (torch.tensor([0, 41, 99]), torch.tensor([7])):
        torch.testing.assert_close(made.add_noise(x0, z, t), stock.add_noise(x0, z, t), rtol=1e-5, atol=1e-5)
    assert len(made) == len(stock)
    torch.testing.assert_close(made.alphas_cumprod, stock.alphas_cumprod)


# --- A network that is a formula ------------------------------------------------------------------------------------


def network(x: Tensor, t: float) -> Tensor:
    """ε of nothing in particular: not linear in x, and another function at each t."""
    return torch.tanh(1.3 * x - 0.4 + torch.tensor(t, dtype=torch.float32).double() / 1000).to(x.dtype)


class Formula(Denoiser):
    """The same as a denoiser."""

    process = VARIANCE_PRESERVING

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        s = float(sigma)
        return Prediction(x - s * network(x / math.sqrt(1 + s**2), timestep_at(self.levels.tolist(), s)))

    def rows(self, index: Tensor) -> Denoiser:
        raise NotImplementedError


def noise_at_start(n: int = 3) -> Tensor:
    return torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:n]


def loop(made: SamplerScheduler, x: Tensor, first: int = 0, until: int | None = None) -> Tensor:
    """What a pipeline does, over the entries first … until-1."""
    for t in made.timesteps[first:until]:
        x = made.step(network(x, float(t)), t, x).prev_sample
    return x


def driven(sampler: str | Sampler, x: Tensor, sigmas: Tensor, levels: Tensor, noise: Noise | None = None) -> Tensor:
    z = x * math.sqrt(1 + float(sigmas[0]) ** 2)
    noise = noise or Noise(SEED, torch.arange(len(x)), x.shape[1:], x.dtype)
    return drive(registry.parse("sampler", sampler), Formula(levels), z, sigmas, noise)


def prepared(sampler: str | Sampler, steps: int = STEPS, spacing: str = "logsnr", **more: Any) -> SamplerScheduler:
    made = as_scheduler(sampler, DDPMScheduler(clip_sample=False), spacing=spacing, seed=SEED, **more)
    made.set_timesteps(steps)
    return made


def grid(made: SamplerScheduler) -> Tensor:
    assert made.num_inference_steps is not None
    return made.spacing.grid(made.levels, made.num_inference_steps)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("sampler ")]


@pytest.mark.parametrize(
    ("spec", "order"),
    [
        *(("ddpm", 1), ("dpm++:sde=true", 1), ("dpm++:method=singlestep", 2), ("heun", 2), ("pc", 2), ("pc:M=3", 4)),
        *(("langevin", 5), ("pf-ode:solver=rk4", 4), ("deis", 1), ("ipndm", 1), ("dpm-solver:order=3", 3)),
        *(("reverse-diffusion", 1), ("euler-maruyama", 1), ("unipc:order=1", 1)),
    ],
)
def test_one_entry_for_each_evaluation(spec: str, order: int) -> None:
    made = prepared(spec)
    assert len(made.timesteps) == made.sampler.nfe(STEPS)
    assert made.order == order
    torch.testing.assert_close(
        loop(made, noise_at_start()), driven(spec, noise_at_start(), grid(made), made.levels), rtol=0, atol=1e-9
    )
    assert threads() == []


def test_the_timesteps_are_whole_numbers_where_the_grid_is_the_model_s() -> None:
    assert prepared("ddim", 4, "trailing").timesteps.tolist() == [999, 749, 499, 249]
    assert prepared("ddim", 4, "trailing").timesteps.dtype == torch.int64
    assert prepared("dpm-solver", 4, "trailing").timesteps.dtype == torch.float32
    assert prepared("heun", 3, "trailing").timesteps.tolist() == [999, 666, 666, 332, 332]


@pytest.mark.parametrize(("spec", "first", "interval"), [("dpm++:order=3", 2, 2), ("heun", 4, 2), ("dpm-solver", 6, 3)])
@pytest.mark.parametrize("announced", [True, False])
def test_a_run_may_begin_further_down(spec: str, first: int, interval: int, announced: bool) -> None:
    made = prepared(spec)
    if announced:
        made.set_begin_index(first)
    found = loop(made, noise_at_start(), first)
    expected = driven(spec, noise_at_start(), grid(made)[interval:], made.levels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    made.set_begin_index(1)
    if spec != "dpm++:order=3":
        with pytest.raises(
            UserError, match=r"cannot start at entry 1 of 1[01] timesteps: no interval of its grid star"
        ):
            loop(made, noise_at_start(), 1)


def test_one_scheduler_serves_run_after_run_and_batches_of_any_size() -> None:
    made, x = prepared("ddim:eta=0.5"), noise_at_start(5)
    whole = loop(made, x)
    torch.testing.assert_close(loop(made, x[:2]), whole[:2], rtol=0, atol=1e-12)
    made.set_timesteps(3)
    assert float((loop(made, x) - whole).abs().max()) > 1e-3
    made.set_timesteps(STEPS)
    assert torch.equal(loop(made, x), whole)


def test_a_run_that_nobody_ends_leaves_no_thread() -> None:
    made = prepared("dpm++")
    loop(made, noise_at_start(), until=3)
    assert threads() == ["sampler dpm++"]
    made.set_timesteps(STEPS)
    assert threads() == []
    expected = driven("dpm++", noise_at_start(), grid(made), made.levels)
    torch.testing.assert_close(loop(made, noise_at_start()), expected, rtol=0, atol=1e-9)
    loop(made, noise_at_start(), until=3)
    del made
    gc.collect()
    assert threads() == []


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_the_sampler_works_in_the_pipeline_s_mode(mode: Any) -> None:
    sampler = Writing()
    made = prepared(sampler)
    with mode():
        x = noise_at_start().requires_grad_(mode is torch.enable_grad)
        found = loop(made, x)
        t = made.timesteps[0]
        first = made.step(network(x, float(t)), t, x)
    assert not found.requires_grad
    assert not first.pred_original_sample.requires_grad
    assert found.is_inference() == (mode is torch.inference_mode)
    expected = driven(sampler, noise_at_start(), grid(made), made.levels)
    torch.testing.assert_close(found.clone(), expected, rtol=0, atol=1e-9)


def test_a_half_precision_pipeline_is_given_its_own_dtype_and_the_sampler_float32() -> None:
    made, x = prepared("dpm++:order=3"), noise_at_start().bfloat16()
    t = made.timesteps[0]
    following, x0 = made.step(network(x, float(t)), t, x, return_dict=False)
    assert following.dtype == x0.dtype == torch.bfloat16
    found = loop(made, following, 1)
    assert found.dtype == torch.bfloat16
    # Were the state itself kept in bfloat16, each step would add an error of this size.
    exact = driven("dpm++:order=3", x.double(), grid(made), made.levels)
    assert float((found.double() - exact).abs().max()) < 2**-7 * float(exact.abs().max())


# --- States that a pipeline changes ---------------------------------------------------------------------------------


def nudge(x: Tensor) -> Tensor:
    return x + 0.05


def write(x: Tensor) -> Tensor:
    return x.add_(0.05)


@pytest.mark.parametrize("change", [nudge, write])
@pytest.mark.parametrize(("spec", "entry", "interval"), [("ddim:eta=0.5", 3, 3), ("heun", 4, 2), ("pc", 4, 2)])
def test_a_changed_state_is_taken_up_by_a_method_without_memory(
    change: Callable[[Tensor], Tensor], spec: str, entry: int, interval: int
) -> None:
    made = prepared(spec)
    sigmas = grid(made)
    x = change(loop(made, noise_at_start(), until=entry))
    changed = x.clone()
    found = loop(made, x, entry)
    # The noise goes on where it was: what the sampler drew on the way is drawn first.
    noise = Noise(SEED, torch.arange(3), (1, 4, 4), torch.float64)
    taken = {"ddim:eta=0.5": interval, "heun": 0, "pc": 2 * interval}[spec]
    for _ in range(taken):
        noise()
    torch.testing.assert_close(found, driven(spec, changed, sigmas[interval:], made.levels, noise), rtol=0, atol=1e-9)


def test_a_copy_of_the_state_is_no_change() -> None:
    made = prepared("dpm++:order=3")
    x = loop(made, noise_at_start(), until=3).clone()
    expected = driven("dpm++:order=3", noise_at_start(), grid(made), made.levels)
    torch.testing.assert_close(loop(made, x, 3), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("change", [nudge, write])
@pytest.mark.parametrize(
    ("spec", "entry", "says"),
    [
        (
            "dpm++",
            3,
            "changed the state at entry 3 of the timesteps, which sampler dpm.. does not support: its steps u",
        ),
        (
            "unipc",
            1,
            "changed the state at entry 1 of the timesteps, which sampler unipc does not support: its steps u",
        ),
        ("heun:S_churn=1,S_max=1", 2, "sampler heun does not support: its steps use earlier states. Use a sampler "),
        ("heun", 3, "changed the state at entry 3 of the timesteps, within a step of sampler heun, which is not s"),
    ],
)
def test_a_changed_state_is_refused_by_a_method_with_memory(
    change: Callable[[Tensor], Tensor], spec: str, entry: int, says: str
) -> None:
    made = prepared(spec)
    x = change(loop(made, noise_at_start(), until=entry))
    with pytest.raises(UserError, match=says):
        loop(made, x, entry)
    assert threads() == []


def test_a_grid_that_is_another_further_down_is_refused() -> None:
    """Churn is spread over the number of steps, so the rest of a run is no run of fewer steps."""
    made = prepared("heun:S_churn=1,S_max=1")
    with pytest.raises(
        UserError, match="sampler heun cannot be a diffusers scheduler: it evaluates at other noise lev"
    ):
        loop(made, noise_at_start(), 2)


# --- What is refused ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method, to be spoilt."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, self.level(x, s))
            x = x0 + (t / s) * (x - x0)
            self.spoil(denoise, x, s)
            yield Step(t, x, x0)

    def level(self, x: Tensor, s: float) -> Sigma:
        return s

    def spoil(self, denoise: Denoiser, x: Tensor, s: float) -> None:
        pass


@dataclass(frozen=True)
class Data(Euler):
    """Asks at a level that depends on the image."""

    def level(self, x: Tensor, s: float) -> Sigma:
        return s * (1 + 1e-3 * float(x.std()))


@dataclass(frozen=True)
class Each(Euler):
    """Asks at one level per image."""

    def level(self, x: Tensor, s: float) -> Sigma:
        return torch.full((len(x),), s)


@dataclass(frozen=True)
class Guided(Euler):
    """Asks for more than D."""

    def spoil(self, denoise: Denoiser, x: Tensor, s: float) -> None:
        denoise.unconditional(x, s)


@dataclass(frozen=True)
class Crowded(Euler):
    """Asks once more where there are four images."""

    def spoil(self, denoise: Denoiser, x: Tensor, s: float) -> None:
        if len(x) == 4:
            denoise(x, s)


@dataclass(frozen=True)
class Failing(Euler):
    """Fails in the third step where there are three images."""

    def spoil(self, denoise: Denoiser, x: Tensor, s: float) -> None:
        if len(x) == 3 and s < 1:
            raise ZeroDivisionError("mine")


@dataclass(frozen=True)
class Writing(Euler):
    """Writes into the D it was given, which is nobody else's."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x0 = denoise(x, s)
            yield Step(t, (t / s) * x + x0.mul_(1 - t / s))


@dataclass(frozen=True)
class Idle(Euler):
    """Yields nothing."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        return iter(())


@dataclass(frozen=True)
class Older(Euler):
    """Says what it needs as samplers of version 0.1 did."""

    needs: ClassVar[frozenset[str]] = frozenset({"posterior variance"})


@pytest.mark.parametrize(
    ("sampler", "says"),
    [
        ("pf-ode:solver=rk45", "sampler pf-ode cannot be a diffusers scheduler: it chooses its noise levels from"),
        ("analytic-dpm", "it requires more from the model than D, and a scheduler has only the network's output"),
        (Older(), "it requires more from the model than D, and a scheduler has only the network's output"),
        (
            "heun:S_churn=10",
            "it changes the state before its first evaluation, and a pipeline evaluates the network first",
        ),
        ("ddpm:variance=learned", "sampler ddpm: the model learned no variance; use variance=small or variance=large"),
        (Data(), "sampler Data cannot be a diffusers scheduler: its noise levels depend on the image"),
        (Each(), "it evaluates each image at its own noise level, and a pipeline has one timestep for the"),
        (Guided(), "it requires more from the model than D, and a scheduler has only the network's output"),
        (Idle(), "sampler Idle cannot be a diffusers scheduler: it yielded no step"),
        ("ddmi", 'no sampler "ddmi". Did you mean "ddim"?'),
    ],
)
def test_a_sampler_that_cannot_be_called_step_by_step_is_refused_at_once(sampler: str | Sampler, says: str) -> None:
    with pytest.raises(UserError) as error:
        as_scheduler(sampler, DDPMScheduler())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_levels_that_turn_out_to_depend_on_the_batch_are_refused_on_the_way() -> None:
    made = prepared(Crowded())
    assert loop(made, noise_at_start(5)).shape == (5, 1, 4, 4)
    with pytest.raises(UserError, match="sampler Crowded cannot be a diffusers scheduler: its noise levels"):
        loop(made, noise_at_start(4))
    assert threads() == []


def test_an_error_of_the_sampler_comes_out_of_step_as_it_is() -> None:
    made = prepared(Failing())
    with pytest.raises(ZeroDivisionError, match=r"^mine$") as error:
        loop(made, noise_at_start(3))
    assert error.traceback[-1].name == "spoil"
    assert threads() == []
    with pytest.raises(UserError, match="call set_timesteps"):
        loop(made, noise_at_start(2))
    made.set_timesteps(STEPS)
    assert loop(made, noise_at_start(2)).isfinite().all()


def test_steps_out_of_order_are_refused() -> None:
    made, x = as_scheduler("ddim", DDPMScheduler(clip_sample=False)), noise_at_start()
    with pytest.raises(UserError, match=r"call set_timesteps\(num_inference_steps\) before step"):
        made.step(x, 999, x)
    made.set_timesteps(4)
    with pytest.raises(UserError, match="step was called with timestep 3, but the next one of this run is 750"):
        made.step(x, 3, x)
    x = loop(made, x, until=1)
    for wrong in (made.timesteps[0], 250, made.timesteps[2]):
        with pytest.raises(
            UserError, match=r"timestep \d+, but the next one of this run is 500; call set_timesteps to st"
        ):
            made.step(x, wrong, x)
    with pytest.raises(UserError, match="step requires one timestep for the whole batch, but got 3"):
        made.step(x, torch.tensor([500, 500, 500]), x)
    with pytest.raises(UserError, match=r"states of shape \(3, 1, 4, 4\), but got \(2, 1, 4, 4\)"):
        made.step(x[:2], 500, x[:2])
    with pytest.raises(
        UserError, match=r"output has shape \(3, 2, 4, 4\), but the state has \(3, 1, 4, 4\); twice the c"
    ):
        made.step(torch.cat([x, x], 1), 500, x)
    # None of these moved it.
    expected = driven("ddim", noise_at_start(), grid(made), made.levels)
    torch.testing.assert_close(loop(made, x, 1), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (DDPMScheduler(thresholding=True), "the pipeline uses dynamic thresholding, which is not supported"),
        ({"beta_schedule": "linear"}, "the configuration does not name the scheduler's class"),
        ({"_class_name": "EDMEulerScheduler"}, "the configuration has the scheduler EDMEulerScheduler; supported are"),
        (".", ". has no scheduler: scheduler/scheduler_config.json does not exist"),
        ("no/such-thing", 'no scheduler "no/such-thing": there is no such folder, and it is not on the Hub'),
        (3, "the pipeline has the scheduler int; supported are the discrete variance-preserving schedulers"),
    ],
)
def test_a_noise_schedule_that_cannot_be_read_is_refused(
    scheduler: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host\nsecond line")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DDPMScheduler, "load_config", unreachable)
    with pytest.raises(UserError) as error:
        as_scheduler("ddim", scheduler)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match='no spacing "traling"'):
        as_scheduler("ddim", DDPMScheduler(), spacing="traling")
    with pytest.raises(UserError, match="the seed -1 is not between"):
        as_scheduler("ddim", DDPMScheduler(), seed=-1)
    with pytest.raises(UserError, match="spacing leading cannot give 2000 steps"):
        as_scheduler("ddim", DDPMScheduler()).set_timesteps(2000)


# --- Configurations -------------------------------------------------------------------------------------------------


def test_the_noise_schedule_is_read_from_whatever_knows_it(tmp_path: Path) -> None:
    """Heun's own betas are others than everyone else's, and PNDM does not clip."""
    for stock in (HeunDiscreteScheduler(), PNDMScheduler(), DDIMScheduler(clip_sample_range=2.0)):
        folder = tmp_path / type(stock).__name__
        stock.save_pretrained(folder / "scheduler")
        first = as_scheduler("unipc", stock, spacing="karras", seed=3)
        torch.testing.assert_close(first.alphas_cumprod, stock.alphas_cumprod)
        assert first.config.clip_sample == isinstance(stock, DDIMScheduler)
        named = {"_class_name": type(stock).__name__} | dict(stock.config)
        for source in (first, named, folder, str(folder / "scheduler")):
            again = as_scheduler("unipc", source, spacing="karras", seed=3)
            assert dict(again.config) == dict(first.config)
        back = DDPMScheduler.from_config(first.config)
        torch.testing.assert_close(back.alphas_cumprod, stock.alphas_cumprod)


def test_a_pipeline_is_saved_and_loaded_with_it(tmp_path: Path, clipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, model = clipped
    made = DDPMPipeline(pipeline.unet, as_scheduler("dpm++:order=3", DDPMScheduler(), spacing="karras", seed=SEED))
    made.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, SamplerScheduler)
    assert loaded.scheduler.sampler == registry.parse("sampler", "dpm++:order=3")
    assert loaded.scheduler.spacing == registry.parse("spacing", "karras")
    z = start(model)
    found = theirs(loaded, z, monkeypatch, batch_size=N)
    assert torch.equal(found, theirs(made, z, monkeypatch, batch_size=N))
    changed = SamplerScheduler.from_config(loaded.scheduler.config, sampler="ddim", seed=None)
    assert (changed.config.sampler, changed.config.seed) == ("ddim", None)
    with pytest.raises(UserError, match="this is the configuration of another scheduler; use"):
        SamplerScheduler.from_config(DDPMScheduler().config)


def test_a_copy_has_no_part_in_a_run() -> None:
    made, x = prepared("dpm++"), noise_at_start()
    unused = copy.deepcopy(made)
    half = loop(made, x, until=2)
    copied = copy.deepcopy(made)
    with pytest.raises(UserError, match="call set_timesteps"):
        loop(copied, half, 2)
    copied.set_timesteps(STEPS)
    expected = loop(made, half, 2)
    assert torch.equal(loop(copied, x), expected)
    assert torch.equal(loop(unused, x), expected)


def test_the_module_is_imported_when_it_is_asked_for() -> None:
    assert samplerbench.diffusers.as_scheduler is as_scheduler
