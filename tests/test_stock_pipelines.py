"""`--model pipeline:SOURCE`: stock pipelines by their own call, against diffusers and our adapters; refusals."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from diffusers import DiffusionPipeline
from support.pipelines import configure, save_pipelines
from support.stock_pipelines import save_stock_pipelines
from torch import Tensor
from typer.testing import CliRunner

import samplerbench
from samplerbench.bench import engine, setup
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Request
from samplerbench.cli.app import app
from samplerbench.cli.common import grid as grid_of_options
from samplerbench.diffusers import StepScheduler
from samplerbench.errors import SamplerbenchError, Stopped, UserError
from samplerbench.models.files import LoadOptions
from samplerbench.sampling import Step
from samplerbench.sampling.noise import Purpose, normal

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

N, STEPS, SEED = 3, 4, 5
SIZE = "height=32,width=32"
CALL = {"height": 32, "width": 32, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stock")
    save_pipelines(root)
    return save_stock_pipelines(root)


@pytest.fixture(scope="module")
def images(folder: Path) -> Callable[..., Tensor]:
    """Images of samples by index, in [-1, 1]."""
    loaded: dict[Any, Any] = {}

    def make(model: str, sampler: str, batch_size: int = N, index: list[int] | None = None, **grid: Any) -> Tensor:
        guidance, spacing = grid.get("guidance"), grid.get("spacing")
        if model not in loaded:
            options = LoadOptions(prompts=None if "dit" in model or "transformer" in model else prompts(folder))
            loaded[model] = setup.load_model(model, CPU, "fp32", options)
        request = Request([grid_of_options([sampler], str(STEPS), None, guidance or [], spacing)], model=model)
        prepared = prepare(request, "cpu", loaded[model])
        wanted = torch.tensor(index or list(range(N)))
        inputs = prepared.inputs_of(8, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])).rows(wanted)
        (cell,) = prepared.cells
        batches = engine.generate(prepared.model, cell, wanted, inputs, SEED, batch_size)
        return torch.cat([batch.images for batch in batches])

    return make


def prompts(folder: Path) -> str:
    return str(folder / "prompts.txt")


def stock(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    row: int | None = None,
    **call: Any,
) -> Tensor:
    """What the pipeline itself makes of our noise with its own scheduler, in [-1, 1]. `row`: one image alone."""
    missing = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder / name, local_files_only=True, **missing)
    pipeline.set_progress_bar_config(disable=True)
    z = normal(SEED, Purpose.PRIOR, torch.arange(N), 0, shape).float()
    rows = slice(None) if row is None else slice(row, row + 1)
    if name == "dit":
        call["class_labels"] = [0, 1, 2][rows]
    else:
        call["prompt"] = (folder / "prompts.txt").read_text("utf-8").splitlines()[rows]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda *_, **__: z[rows].clone())
        made = pipeline(num_inference_steps=STEPS, output_type="np", **call).images
    return torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1


def assert_same(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    a = a.clamp(-1, 1)
    between = b.abs() < 0.999
    assert int(between.sum()) >= 100
    assert float(b[between].std()) > 0.05
    difference = float((a - b).abs().max())
    print(f"{difference:.1e}")
    assert difference <= tolerance


# --- The same images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "spacing", "tolerance"),
    [
        ("sdxl", (4, 16, 16), "trailing", 2e-5),
        ("dit", (4, 8, 8), "trailing", 2e-5),
        ("sd3", (4, 16, 16), None, 2e-5),
        ("flux", (4, 16, 16), None, 2e-5),
    ],
)
def test_ddim_makes_the_images_of_the_stock_pipeline(
    name: str,
    shape: tuple[int, ...],
    spacing: str | None,
    tolerance: float,
    folder: Path,
    images: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = "guidance_scale=3" if name == "dit" else f"{SIZE},guidance_scale=3"
    call: dict[str, Any] = {"guidance_scale": 3.0} if name == "dit" else dict(CALL)
    if name == "sd3":  # its default times are not those of a rectified flow with N steps
        call["sigmas"] = [1 - i / STEPS for i in range(STEPS)]
    ours = images(f"pipeline:{folder / name},{arguments}", "ddim", spacing=spacing)
    assert_same(ours, stock(folder, name, shape, monkeypatch, **call), tolerance)


def test_a_pipeline_without_an_adapter_makes_its_stock_images(
    folder: Path, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CogView4, prompt by prompt: in a batch, its tokenizer pads every prompt to the longest."""
    ours = images(f"pipeline:{folder / 'cogview4'},{SIZE},guidance_scale=3", "ddim")
    each = [stock(folder, "cogview4", (4, 16, 16), monkeypatch, row=row, **CALL) for row in range(N)]
    assert_same(ours, torch.cat(each), 2e-5)
    together = stock(folder, "cogview4", (4, 16, 16), monkeypatch, **CALL)
    assert float((torch.cat(each) - together).abs().max()) > 1e-3, "otherwise one by one would not be needed"


SLOW = pytest.mark.slow


@pytest.mark.parametrize("sampler", [pytest.param("heun", marks=SLOW), "unipc", "dpm++:order=3", "ddpm"])
@pytest.mark.parametrize("name", ["transformer", "text"])
def test_our_own_adapters_make_the_same_images(name: str, sampler: str, folder: Path, images: Any) -> None:
    """Also with noise in the steps: sample i has the same noise in both."""
    native = images(str(folder / name), sampler, guidance=["cfg:scale=3"])
    by_call = images(f"pipeline:{folder / name},guidance_scale=3", sampler)
    assert_same(by_call, native.clamp(-1, 1), 5e-5)


@pytest.mark.parametrize("sampler", [pytest.param("dpm++", marks=SLOW), "ddpm"])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "dit", "cogview4", "flux"])
def test_an_image_does_not_depend_on_its_batch(name: str, sampler: str, folder: Path, images: Any) -> None:
    model = f"pipeline:{folder / name}" + ("" if name == "dit" else f",{SIZE}")
    together = images(model, sampler, 3)
    alone = images(model, sampler, 1)
    other = images(model, sampler, 2, index=[7, 2])
    assert float((together - alone).abs().max()) <= 2e-5
    assert float((other[1] - together[2]).abs().max()) <= 2e-5
    assert float((together[0] - together[1]).abs().max()) > 0.05


# --- A run ----------------------------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json")) if len(file.stem) == 20]


@pytest.mark.parametrize(
    ("name", "arguments", "calls"),
    [
        ("cogview4", f"{SIZE},guidance_scale=3", 2),
        pytest.param("sd3", f"{SIZE},guidance_scale=1", 1, marks=SLOW),
        pytest.param("sdxl", SIZE, 2, marks=SLOW),
        pytest.param("dit", "guidance_scale=2", 2, marks=SLOW),
    ],
)
def test_a_run_counts_the_evaluations_and_records_the_pipeline(
    name: str, arguments: str, calls: int, folder: Path, tmp_path: Path
) -> None:
    given = [] if name == "dit" else ["--prompts", prompts(folder), "--negative-prompt", "a dog"]
    model = f"pipeline:{folder / name},{arguments}"
    command = ["run", "-m", model, "-s", "ddim", "-s", "heun", "--steps", "3", "--n", "20", "-b", "8", *given]
    measure = ["--metric", "inception-score", "--features", "digits-cnn", "--out", str(tmp_path), "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, *measure])
    assert done.exit_code == 0, done.output
    found = {record["sampler"]: record for record in records(tmp_path)}
    assert {sampler: record["nfe"] for sampler, record in found.items()} == {"ddim": 3 * calls, "heun": 5 * calls}
    protocol = found["heun"]["protocol_fields"]
    identity = protocol["model"]
    assert identity["source"] == model
    assert identity["by its own call"] is True
    assert identity["arguments"].replace("=", "") == ", ".join(sorted(_floats(arguments))).replace("=", "")
    assert re.fullmatch("[0-9a-f]{64}", identity["weights"])
    assert re.fullmatch("[0-9a-f]{64}", identity["vae weights"])
    if name != "dit":
        assert identity["negative prompt"] == "a dog"
        assert identity["number of prompts"] == 3
        assert re.fullmatch("[0-9a-f]{64}", identity["prompts"])
    assert len(protocol["sigmas"]) == 4
    assert "guidance" not in (found["heun"]["guidance"] or "")


def _floats(arguments: str) -> list[str]:
    return [part if part.startswith(("height", "width")) else f"{part}.0" for part in arguments.split(",")]


def test_the_noise_levels_are_those_that_the_pipeline_chooses(folder: Path) -> None:
    """CogView4: integer times, and a linear dynamic shift of its number of tokens."""
    options = LoadOptions(prompts=prompts(folder))
    model = setup.load_model(f"pipeline:{folder / 'cogview4'},{SIZE}", CPU, "fp32", options)
    own = DiffusionPipeline.from_pretrained(folder / "cogview4", local_files_only=True)
    times: list[float] = []

    def remember(pipeline: Any, step: int, sigma: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        times.append(float(sigma))
        return state

    own(prompt="a", num_inference_steps=STEPS, height=32, width=32, output_type="latent", callback_on_step_end=remember)
    request = Request([grid_of_options(["ddim"], str(STEPS), None, [], None)], model="pipeline:x")
    (cell,) = prepare(request, "cpu", model).cells
    found = cell.sigmas / (1 + cell.sigmas)
    assert found[:-1].tolist() == pytest.approx(times, abs=1e-6)
    (chosen,) = prepare(
        Request([grid_of_options(["ddim"], "2", None, [], "flow:shift=3")], model="pipeline:x"), "cpu", model
    ).cells
    assert chosen.sigmas[1:].tolist() == [3, 0]


def test_a_budget_includes_the_guidance_of_the_pipeline(folder: Path) -> None:
    for scale, steps in ((1, 9), (3, 4)):
        model = setup.load_model(f"pipeline:{folder / 'dit'},guidance_scale={scale}", CPU, "fp32", LoadOptions())
        request = Request([grid_of_options(["ddim"], None, "9", [], None)], model="pipeline:x")
        assert [cell.steps for cell in prepare(request, "cpu", model).cells] == [steps]


def test_a_stop_ends_a_call_of_the_pipeline(folder: Path) -> None:
    model = setup.load_model(f"pipeline:{folder / 'dit'}", CPU, "fp32", LoadOptions())
    prepared = prepare(Request([grid_of_options(["heun"], "4", None, [], None)], model="pipeline:x"), "cpu", model)
    seen: list[int] = []

    def stop(number: int, step: Step) -> None:
        seen.append(number)
        if number == 2:
            raise Stopped

    for interrupted in (False, True):
        seen.clear()
        batches = engine.generate(
            model,
            prepared.cells[0],
            torch.arange(2),
            prepared.inputs(2),
            SEED,
            2,
            stop if interrupted else seen_by(seen),
        )
        if interrupted:
            with pytest.raises(Stopped):
                next(batches)
            assert seen == [0, 1, 2]
        else:
            next(batches)
            assert seen == [0, 1, 2, 3]


def seen_by(numbers: list[int]) -> Callable[[int, Step], None]:
    return lambda number, step: numbers.append(number)


def test_a_hub_id_is_checked_before_its_weights_are_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[list[str]] = []

    def fetch(source: str, options: LoadOptions, patterns: list[str]) -> Path:
        requested.append(patterns)
        return folder / source.partition("/")[2]

    monkeypatch.setattr("samplerbench.models.files._fetch", fetch)
    model = setup.load_model("pipeline:owner/dit,guidance_scale=2", CPU, "fp32", LoadOptions(revision="main"))
    assert model.identity["revision"] == "dit"
    assert not any("safetensors" in pattern for pattern in requested[0])
    assert "transformer/diffusion_pytorch_model.safetensors" in requested[1]
    configured = folder / "video"
    configured.mkdir()
    (configured / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    requested.clear()
    with pytest.raises(UserError, match="owner/video: WanPipeline makes videos"):
        setup.load_model("pipeline:owner/video", CPU, "fp32", LoadOptions(prompts=("a",)))
    assert len(requested) == 1


def test_it_is_shown(folder: Path) -> None:
    done = CliRunner().invoke(app, ["show", f"pipeline:{folder / 'sd3'},{SIZE}"])
    assert done.exit_code == 0, done.output
    for text in ("StableDiffusion3Pipeline", "3x32x32", "height=32, width=32", "2 of the transformer", "4x16x16"):
        assert text in done.output


def test_it_is_sampled_in_python(folder: Path) -> None:
    model = samplerbench.load_model(f"pipeline:{folder / 'dit'}", device="cpu")
    made = samplerbench.sample("ddim", 2, n=2, model=model, labels=[1, 2], quiet=True)
    assert made.shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="initial noise and trajectories are not supported"):
        samplerbench.sample("ddim", 2, n=2, model=model, labels=[1, 2], quiet=True, x_T=torch.zeros(2, 3, 16, 16))


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more", "options", "says"),
    [
        ("sd3", "", {}, "is a text-to-image model; give a file with one prompt per line, prompts="),
        (
            "sd3",
            "guidence_scale=3",
            {"prompts": ("a",)},
            "no argument 'guidence_scale' to set here. Did you mean \"gui",
        ),
        ("sd3", "prompt=cat", {"prompts": ("a",)}, "prompt is set with `prompts`, not in the spec"),
        ("sd3", "latents=cat", {"prompts": ("a",)}, "latents is set with `seed`, not in the spec"),
        ("sd3", "output_type=pil", {"prompts": ("a",)}, "has no argument 'output_type' to set here"),
        ("sd3", "height=tall", {"prompts": ("a",)}, "height=tall must be a whole number"),
        ("sd3", "guidance_scale=[1]", {"prompts": ("a",)}, "guidance_scale=[1] must be a number"),
        ("sd3", "height", {"prompts": ("a",)}, "'height' is no argument; write pipeline:SOURCE,argument=value"),
        ("sd3", "height=32,height=64", {"prompts": ("a",)}, "the argument height is given twice"),
        ("sd3", "height=31", {"prompts": ("a",)}, "the call of StableDiffusion3Pipeline failed: "),
        ("sd3", SIZE, {"prompts": ("a",), "compile": True}, "`compile` is not supported for a pipeline that is run by"),
        ("dit", "", {"prompts": ("a",)}, "`prompt` requires a text-to-image model, but pipeline:"),
        ("dit", "", {"variant": "fp16"}, "has no variant fp16; available variants: none"),
    ],
)
def test_a_wrong_call_is_refused(name: str, more: str, options: dict[str, Any], says: str, folder: Path) -> None:
    spec = f"pipeline:{folder / name}" + (f",{more}" if more else "")
    with pytest.raises(UserError) as error:
        setup.load_model(spec, CPU, "fp32", LoadOptions(**options))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WanPipeline", "WanPipeline makes videos"),
        ("LTXPipeline", "LTXPipeline makes videos"),
        ("StableVideoDiffusionPipeline", "StableVideoDiffusionPipeline makes videos"),
        ("AudioLDM2Pipeline", "AudioLDM2Pipeline makes audio"),
        ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline requires an input image"),
        ("FluxFillPipeline", "FluxFillPipeline requires an input image"),
        ("FluxControlNetPipeline", "FluxControlNetPipeline requires a control image"),
        ("KandinskyPipeline", "KandinskyPipeline requires image_embeds and negative_image_embeds"),
        ("DDPMPipeline", "DDPMPipeline takes neither prompts nor class labels"),
        ("MinePipeline", "names MinePipeline, which is no pipeline of diffusers"),
        ("DiffusionPipeline", "DiffusionPipeline"),
        ("DDIMScheduler", "names DDIMScheduler, which is no pipeline of diffusers"),
        (["mine", "MinePipeline"], "names ['mine', 'MinePipeline'], which is no pipeline of diffusers"),
        (None, "names no class, which is no pipeline of diffusers"),
    ],
)
def test_a_pipeline_of_another_task_is_refused_before_its_weights(name: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({} if name is None else {"_class_name": name}))
    with pytest.raises(UserError) as error:
        setup.load_model(f"pipeline:{tmp_path}", CPU, "fp32", LoadOptions(prompts=("a",)))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def _library(root: Path) -> None:
    configure(root / "model_index.json", vae=["evil", "AutoencoderKL"])


def _scheduler_library(root: Path) -> None:
    configure(root / "model_index.json", scheduler=["evil", "Scheduler"])


def _unused_library(root: Path) -> None:
    configure(root / "model_index.json", safety_checker=["evil", "Checker"])


def _pickle(root: Path) -> None:
    (root / "vae/diffusion_pytorch_model.safetensors").rename(root / "vae/diffusion_pytorch_model.bin")


def _remote_attention(root: Path) -> None:
    configure(root / "transformer/config.json", _attn_implementation="owner/kernel")


def _two_networks(root: Path) -> None:
    configure(root / "model_index.json", transformer_2=["diffusers", "DiTTransformer2DModel"])


def _other_scheduler(root: Path) -> None:
    configure(root / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_library, "the part vae is ['evil', 'AutoencoderKL'], which is no class of diffusers or transformers"),
        (_scheduler_library, "has the scheduler Scheduler; supported are"),
        (_unused_library, "the part safety_checker is ['evil', 'Checker'], which is no class of diffusers or transf"),
        (_pickle, "vae/diffusion_pytorch_model.safetensors does not exist (pickle files (.bin) are not supported"),
        (_remote_attention, "its config.json refers to code on the hub"),
        (_two_networks, "must have one denoising network, a transformer or a unet; it has transformer, transformer_2"),
        (_other_scheduler, "has the scheduler EDMEulerScheduler; supported are the discrete variance-preserving sche"),
    ],
)
def test_a_spoilt_folder_is_refused(
    spoil: Callable[[Path], None], says: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(folder / "dit", tmp_path / "model")
    spoil(root)
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    (root / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as error:
        setup.load_model(f"pipeline:{root}", CPU, "fp32", LoadOptions())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "more", "says"),
    [
        (
            "ddim",
            ["-g", "cfg:scale=2"],
            "--guidance cfg is not supported: a pipeline that is run by its own call applies",
        ),
        (
            "ddim",
            ["--metric", "gap"],
            "the metric gap needs the denoiser of the model, but a pipeline that is run by i",
        ),
        (
            "ddim",
            ["--dry-run"],
            "(the metric gap, figures of steps, dry runs, an automatic batch size) is not supported",
        ),
        (
            "ddim",
            ["-b", "auto"],
            "(the metric gap, figures of steps, dry runs, an automatic batch size) is not supported",
        ),
        ("ddim", ["--negative-prompt", "x"], "--negative-prompt requires a text-to-image model, but pipeline:"),
        ("ddim", ["--spacing", "flow"], "spacing flow is for rectified flows, and this model is none"),
        ("analytic-dpm", [], "sampler analytic-dpm cannot be a diffusers scheduler: it requires more from the model"),
        ("pf-ode:solver=rk45", [], "sampler pf-ode cannot be a diffusers scheduler: it chooses its noise levels from"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(
    sampler: str, more: list[str], says: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from samplerbench.cli.app import main

    command = ["run", "-m", f"pipeline:{folder / 'dit'}", "-s", sampler, "--steps", "2", "--n", "20", "--device", "cpu"]
    measure = [] if "gap" in more else ["--metric", "inception-score", "--features", "digits-cnn"]
    with pytest.raises(SystemExit) as end:
        main([*command, *measure, *more, "--out", str(tmp_path)])
    assert end.value.code in (1, 2)
    assert says in " ".join(capsys.readouterr().err.split())
    assert records(tmp_path) == []


def test_a_method_that_the_pipeline_disturbs_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline that changes the state between the steps."""
    model = setup.load_model(f"pipeline:{folder / 'dit'}", CPU, "fp32", LoadOptions())
    request = Request([grid_of_options(["dpm++", "ddim"], str(STEPS), None, [], None)], model="pipeline:x")
    prepared = prepare(request, "cpu", model)
    monkeypatch.setattr(StepScheduler, "scale_model_input", lambda self, sample, timestep=None: sample + 0.01)

    def sampled(cell: Any) -> Tensor:
        return next(engine.generate(model, cell, torch.arange(2), prepared.inputs(2), SEED, 2)).images

    with pytest.raises(
        SamplerbenchError, match=r"changed the state at entry 1 of the timesteps, which sampler dpm\+\+"
    ):
        sampled(prepared.cells[0])
    assert sampled(prepared.cells[1]).isfinite().all()  # a method without history continues from the changed state
