"""`sample` in Python: labels, initial noise, floats, states and trajectories; wrong types; the `repr` of a model."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_cell
from support.denoising import labelled
from support.interface_plugins import FlowGaussian, Grey
from torch import Tensor

import samplerbench
from samplerbench import Trajectory, registry
from samplerbench.bench import generate
from samplerbench.data.pixels import quantise
from samplerbench.errors import ArgumentTypeError, UserError
from samplerbench.models import Model
from samplerbench.models.sample import bind, sample_states
from samplerbench.sampling import Sampler, Step, intervals
from samplerbench.sampling.trajectory import Recorder, join

CPU = torch.device("cpu")


@dataclass(frozen=True)
class InPlace(Sampler):
    """x ← x/2, in the memory of the state before (this work)."""

    def steps(self, denoise, x, sigmas, noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            denoise(x, s)
            yield Step(t, x.mul_(0.5))


@pytest.fixture(scope="module")
def mixture() -> Model:
    return samplerbench.load_model("exact:mixture,classes=3", device="cpu")


def sample(*arguments: Any, **options: Any) -> Any:
    return samplerbench.sample(*arguments, quiet=True, **options)


# --- Labels ----------------------------------------------------------------------------------------------------------


def test_each_image_has_its_own_label(mixture: Model) -> None:
    """Image i with label k is image i of a run in which every label is k, in batches of any size."""
    labels = [2, 0, 0, 1, 2]
    whole = sample("ddpm", 2, model=mixture, labels=labels)
    assert len(whole) == 5
    for k in range(3):
        rows = [i for i, label in enumerate(labels) if label == k]
        assert torch.equal(whole[rows], sample("ddpm", 2, n=5, model=mixture, labels=k)[rows])
    assert not torch.equal(whole, sample("ddpm", 2, n=5, model=mixture, labels=2))
    for given in (torch.tensor(labels), np.array(labels), tuple(labels)):
        assert torch.equal(whole, sample("ddpm", 2, n=5, model=mixture, labels=given, batch_size=2))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"labels": [0, 3]}, "labels=3: the model has the labels 0 to 2."),
        ({"labels": [-1, 0]}, "labels=-1: the model has the labels 0 to 2."),
        ({"labels": []}, "`labels` is empty; give one row for each image."),
        ({"labels": [0, 1], "n": 3}, "`labels` has 2 rows, but n=3; give one row for each image."),
        ({"labels": torch.zeros(2, 1, dtype=torch.int64)}, "`labels` has the shape (2, 1); give one label for each"),
        ({"labels": [0], "model": "exact:gaussian"}, '`labels`: the model has no classes; use labels="none".'),
        ({"x_T": torch.zeros(2, 1, 8, 7)}, "`x_T` has the shape (2, 1, 8, 7); it must have the shape (2, 1, 8, 8)."),
        ({"x_T": torch.full((1, 1, 8, 8), float("nan"))}, "`x_T` contains NaN or infinity; give finite numbers."),
        ({"x_T": torch.zeros(2, 1, 8, 8), "labels": [0]}, "`x_T` has 2 rows, but n=1; give one row for"),
        ({"output_type": "pil"}, 'output_type="pil": choose one of uint8, float, state.'),
    ],
)
def test_values_that_do_not_fit_are_one_line(given: dict[str, Any], reason: str, mixture: Model) -> None:
    with pytest.raises(UserError) as caught:
        sample("ddim", 1, **({"model": mixture} | given))
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, TypeError)


# --- Initial noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_noise_that_a_run_draws_gives_its_images(dtype: str) -> None:
    """Bit for bit, for a stochastic sampler, in batches of any size; the noise of the steps is that of the seed."""
    model = samplerbench.load_model("digits", device="cpu", dtype=dtype)
    given: dict[str, Any] = {"model": model, "output_type": "float", "seed": 5}
    z = samplerbench.initial_noise(3, model=model, seed=5)
    assert z.dtype == model.state_dtype
    drawn = sample("ddpm", 2, n=3, **given)
    assert torch.equal(drawn, sample("ddpm", 2, x_T=z, **given))
    one_by_one = {"batch_size": 1, "x_T": z, **given}
    assert torch.equal(sample("ddpm", 2, **one_by_one), sample("ddpm", 2, n=3, batch_size=1, **given))
    assert not torch.equal(drawn, sample("ddpm", 2, x_T=z.flip(0), **given))
    assert not torch.equal(drawn, sample("ddpm", 2, x_T=z, **(given | {"seed": 6})))


@pytest.mark.parametrize("source", ["vp", "flow"])
def test_the_noise_has_a_variance_of_one_for_every_process(source: str, mixture: Model) -> None:
    """The first state is √(1+σ²) z of a variance-preserving model, and (1+σ) z of a rectified flow."""
    model = mixture if source == "vp" else FlowGaussian().load(CPU, torch.float32)
    z = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, found = sample("ddim", 2, model=model, x_T=z, spacing="trailing", return_trajectory=True)
    sigma = float(found.sigmas[0])
    scale = (1 + sigma**2) ** 0.5 if source == "vp" else 1 + sigma
    assert found.x.dtype == model.state_dtype
    torch.testing.assert_close(found.x[0], (scale * z).to(model.state_dtype))
    assert sigma > 100


def test_initial_noise_depends_on_the_seed_and_the_row_alone(mixture: Model) -> None:
    z = samplerbench.initial_noise(4, model=mixture)
    assert torch.equal(z[:2], samplerbench.initial_noise(2, model="exact:mixture", device="cpu"))
    assert not torch.equal(z, samplerbench.initial_noise(4, model=mixture, seed=1))
    with pytest.raises(UserError, match="n=0: at least 1 image is needed"):
        samplerbench.initial_noise(0, model=mixture)


def test_it_is_what_diffusers_calls_latents(tmp_path: Path) -> None:
    """The same noise and the same prompts give the latents of a Stable Diffusion pipeline, and its images."""
    from diffusers import DDIMScheduler
    from test_pipelines import PROMPTS, SD_BETAS, tiny_stable_diffusion

    pipeline = tiny_stable_diffusion(tmp_path, DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS))
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    model = samplerbench.load_model(tmp_path / "model", prompts=PROMPTS, device="cpu")
    z = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
    told = {"prompt": [PROMPTS[2], PROMPTS[0]], "guidance_scale": 5.0, "num_inference_steps": 3}
    expected = pipeline(latents=z.clone(), output_type="latent", **told).images
    given = {"model": model, "guidance": "cfg:scale=5", "spacing": "leading:offset=1", "labels": [2, 0], "x_T": z}
    states = sample("ddim", 3, output_type="state", **given)
    assert states.shape == (2, *model.shape)
    torch.testing.assert_close(states, expected, atol=2e-4, rtol=2e-4)
    images = sample("ddim", 3, output_type="float", **given)
    torch.testing.assert_close(images, model.decode(states))
    assert images.shape[1:] == model.image_shape != model.shape


# --- Floats and states -----------------------------------------------------------------------------------------------


def test_floats_are_the_images_before_rounding_and_clamping(digits: Model) -> None:
    floats = sample("ddim", 2, n=3, model=digits, output_type="float", batch_size=2)
    assert floats.dtype == torch.float32
    assert torch.equal(quantise(floats), sample("ddim", 2, n=3, model=digits, batch_size=2))
    assert float(floats.max()) > 1
    assert torch.equal(floats, sample("ddim", 2, n=3, model=digits, output_type="state", batch_size=2))


# --- Trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 256])
def test_a_trajectory_has_every_state_of_the_run(batch_size: int, mixture: Model) -> None:
    """As a run through another function meets them, with the noise levels of its grid."""
    images, found = sample("ddpm", 3, n=5, model=mixture, labels=1, batch_size=batch_size, return_trajectory=True)
    assert torch.equal(images, sample("ddpm", 3, n=5, model=mixture, labels=1, batch_size=batch_size))
    cell, steps = make_cell(mixture, "ddpm", None, 3), []
    sample_states(
        mixture,
        bind(mixture, cell.sampler, cell.sigmas),
        cell.sigmas,
        torch.arange(5),
        labelled(torch.ones(5, dtype=torch.int64)),
        on_step=lambda _, step: steps.append(step),
    )
    assert torch.equal(found.sigmas, cell.sigmas)
    assert len(found) == 4
    torch.testing.assert_close(found.x[1:], torch.stack([step.x for step in steps]))
    torch.testing.assert_close(found.x0, torch.stack([step.x0 for step in steps]))
    torch.testing.assert_close(found.x[0], mixture.prior(samplerbench.initial_noise(5, model=mixture), cell.sigmas[0]))
    assert torch.equal(quantise(found.x[-1]), images)
    assert repr(found) == "Trajectory(4 states (5, 1, 8, 8), σ from 9.489 to 0)"


def test_a_trajectory_is_copied_from_a_sampler_that_reuses_its_memory(mixture: Model) -> None:
    _, found = sample(InPlace(), 3, n=2, model=mixture, return_trajectory=True)
    for before, after in zip(found.x[:-1], found.x[1:], strict=True):
        assert torch.equal(after, before / 2)
    assert found.x0 is None


def test_batches_that_chose_other_steps_have_no_common_trajectory(mixture: Model) -> None:
    adaptive = "pf-ode:solver=rk45,rtol=0.1,atol=0.1"
    _, found = sample(adaptive, n=3, model=mixture, return_trajectory=True)
    assert found.x.shape[:2] == (len(found.sigmas), 3)
    with pytest.raises(UserError, match=r"the sampler chose different steps for each batch.* use batch_size=3\."):
        sample(adaptive, n=3, model=mixture, batch_size=1, return_trajectory=True)


def test_x0_is_given_only_if_every_step_and_batch_has_it() -> None:
    x = torch.zeros(1, 1, 2, 2)
    recorder = Recorder(2.0, x)
    recorder.step(0, Step(1.0, x, x))
    complete = recorder.trajectory()
    recorder.step(1, Step(0.0, x))
    assert complete.x0 is not None
    assert recorder.trajectory().x0 is None
    assert join([complete, dataclasses.replace(complete, x0=None)]).x0 is None


def test_a_captured_run_is_not_replayed_for_a_trajectory_or_a_given_start(
    mixture: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph draws its own start and keeps only its last state."""
    captured: list[int] = []

    def replay(self: Any, rows: Tensor, *_: Any) -> None:
        captured.append(len(rows))

    monkeypatch.setattr(generate, "how_run", lambda network: type("How", (), {"graphs": True}))
    monkeypatch.setattr(generate.SamplerOnModel, "_replay", replay)
    z = samplerbench.initial_noise(2, model=mixture)
    sample("ddim", 1, model=mixture, x_T=z)
    sample("ddim", 1, n=2, model=mixture, return_trajectory=True)
    assert captured == []
    sample("ddim", 1, n=2, model=mixture)
    assert captured == [2]


@pytest.mark.parametrize("given", [{"return_trajectory": True}, {"output_type": "state"}, {"x_T": True}])
def test_a_generator_has_no_states(given: dict[str, Any], digits: Model) -> None:
    if "x_T" in given:
        given = {"x_T": samplerbench.initial_noise(2, model=digits)}
    with pytest.raises(UserError, match="is a generator and has no noise levels; name a sampler"):
        sample(Grey(), n=2, model=digits, **given)
    assert sample(Grey(), n=2, model=digits, output_type="float").dtype == torch.float32


# --- Types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [samplerbench.sample, samplerbench.evaluate])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (42, "sampler=42: give a name"),
        (None, "`sampler` is of type NoneType: give a name"),
        (torch.nn.Linear(1, 1), "`sampler` is of type Linear: give a name"),
        ({"ddim": 1}, "`sampler` is of type dict: give a name"),
        (InPlace, "`sampler` is the class InPlace; give an instance of it, as in InPlace()."),
    ],
)
def test_what_is_no_sampler_is_a_type_error(function: Any, given: Any, reason: str) -> None:
    with pytest.raises(TypeError) as caught:
        function(given)
    assert isinstance(caught.value, UserError)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"steps": "20"}, 'steps="20": give a whole number'),
        ({"steps": [20]}, "`steps`: give a whole number"),
        ({"n": 2.0}, "n=2.0: give a whole number"),
        ({"seed": "0"}, 'seed="0": give a whole number'),
        ({"batch_size": "all"}, 'batch_size="all": give a whole number of at least 1, or "auto".'),
        ({"labels": 1.5}, 'labels=1.5: give "balanced", "none" or one label.'),
        ({"labels": [0, 0.5]}, "`labels`: label 1 is of type float; give whole numbers."),
        ({"labels": [0, True]}, "`labels`: label 1 is of type bool; give whole numbers."),
        ({"labels": iter([0])}, "`labels` is of type list_iterator; give a list of labels."),
        ({"guidance": 3}, "guidance=3: give a name"),
        ({"spacing": torch.zeros(3)}, "`spacing` is of type Tensor: give a name"),
        ({"sampler": registry.parse("spacing", "karras")}, "karras is a spacing, but a sampler is required here."),
        ({"model": 42}, "`model` is of type int; give the name of a model, a checkpoint folder, or what `load_model`"),
        ({"device": 0}, '`device` is of type int; give text, such as "cuda".'),
        ({"dtype": torch.float32}, "`dtype`: give text."),
        ({"x_T": [[0.0]]}, "`x_T` is of type list; give a tensor."),
        ({"x_T": 1.0}, "`x_T` is of type float; give a tensor."),
        ({"x_T": torch.zeros(1, 1, 8, 8, dtype=torch.int64)}, "`x_T` is a tensor of int64; give floating-point"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_type_error_of_one_line(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        sample(**({"sampler": "ddim", "model": "exact:mixture", "device": "cpu"} | given))
    assert isinstance(caught.value, TypeError)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{"steps": "ten"}, {"nfe": [1.5]}, {"metrics": 1}, {"guidances": 3}, {"blocks": "2"}])
def test_so_it_is_for_evaluate(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        samplerbench.evaluate("ddim", **given)


def test_a_bad_value_of_the_right_type_is_no_type_error() -> None:
    for given in ({"steps": 0}, {"seed": -1}, {"guidance": "cfgg"}, {"dtype": "fp8"}):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - of any message
            sample("ddim", **given)
        assert not isinstance(caught.value, TypeError)


# --- What a model looks like -----------------------------------------------------------------------------------------


def test_a_model_is_shown_in_five_lines(digits: Model) -> None:
    assert repr(digits).splitlines() == [
        "DiffusersUNet: digits, 702,753 parameters",
        "  state: (1, 8, 8), float32 on cpu",
        "  noise levels: 1,000, σ from 0.01 to 157.4, variance preserving",
        "  conditions: 10 labels, with an unconditional prediction",
        "  training data: digits:split=train; feature space: digits-cnn",
    ]


def test_a_model_of_a_plugin_is_shown_in_five_lines_too() -> None:
    """Although `@dataclass` writes a __repr__ of its own. What a stranger named is one line, and printable."""
    model = FlowGaussian().load(CPU, torch.float32)
    model.identity["source"] = "a\nb\x1b[31m\u202e" + "c" * 500
    lines = repr(model).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("FlowModel: a\\nb\\x1b[31m\\u202ec")
    assert all(len(line) <= 120 for line in lines)
    assert not any(unicodedata.category(c) in ("Cc", "Cf") for line in lines for c in line)
    assert "rectified flow" in lines[2]
    assert lines[3] == "  conditions: none"


def test_a_model_with_a_repr_of_its_own_keeps_it() -> None:
    @dataclass
    class Named(type(FlowGaussian().load(CPU, torch.float32))):  # type: ignore[misc]
        def __repr__(self) -> str:
            return "mine"

    @dataclass
    class Inherits(Named):
        pass

    model = FlowGaussian().load(CPU, torch.float32)
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    assert repr(Inherits(**fields)) == "mine"


def test_a_trajectory_is_a_public_name() -> None:
    assert {"Trajectory", "initial_noise"} <= set(samplerbench.__all__)
    assert Trajectory is samplerbench.Trajectory


@pytest.mark.parametrize("labels", [{3, 1}, frozenset({3, 1}), {3: 1}, {3: 1}.keys()])
def test_labels_without_an_order_are_refused(labels: Any) -> None:
    """Row i of the labels belongs to image i."""
    with pytest.raises(TypeError, match="which has no order; give a list"):
        samplerbench.sample("ddim", steps=1, labels=labels, quiet=True)
