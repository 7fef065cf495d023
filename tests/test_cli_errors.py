"""What a user can do wrong: one line, exit code 2, nothing lost. And what the help tells."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception
import typer
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from samplerbench import registry
from samplerbench.bench import engine
from samplerbench.cli import common
from samplerbench.cli.app import FIRST_COMMANDS, app, main
from samplerbench.errors import UserError
from samplerbench.metrics.extractors import _registry
from samplerbench.models import files, sample
from samplerbench.models.runner import PRECISIONS
from samplerbench.results.store import sound
from samplerbench.results.tensors import load_tensors, save_tensors
from samplerbench.sampling import driver

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
Refuse = Callable[..., str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run a command that must be refused; returns the line that says why."""

    def check(*arguments: str) -> str:
        capsys.readouterr()
        assert exit_code(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("samplerbench: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err.removeprefix("samplerbench: ").strip()

    return check


# --- The words of the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("-s ddmi", 'no sampler "ddmi". Did you mean "ddim"? Known: '),
        ("-s ddim:etta=1", 'sampler ddim has no parameter "etta". Did you mean "eta"? Parameters of ddim: eta: float'),
        ("-s ddim:eta=1.5", "sampler ddim: eta=1.5: it must be at most 1. Parameters of ddim: "),
        ("-s ddim:eta=x", "sampler ddim: eta=x: give a number. "),
        ("-s ddim:eta=0,eta=1", "sampler ddim: eta is given twice. Parameters of ddim: "),
        ("-s ddim:0,5", 'sampler ddim: "5" has no name; write parameter=value. Parameters of ddim: '),
        ("-s ddpm:variance=huge", "sampler ddpm: variance=huge: "),
        ("-s langevin:T=0", "sampler langevin: T=0: it must be at least 1. Parameters of lang"),
        ("-s ddim -s ddp", 'no sampler "ddp". Did you mean "ddpm"?'),
        ("-s ddim -g cgf", 'no guidance "cgf". Did you mean "cfg"? Known: '),
        ("-s ddim -g cfg:scale=-1", "guidance cfg: scale=-1: it must be at least 0."),
        ("-s ddim --spacing karas", 'no spacing "karas". Did you mean "karras"? Known: '),
        ("-s ddim --spacing karras:sigma_min=9,sigma_max=1", "spacing karras:sigma_min=9,sigma_max=1: sigma_min = 9 "),
        ("-s ddim --metric fidd", 'no metric "fidd". Did you mean "fid"? Known: '),
        ("-s ddim --steps 0", "--steps 0: at least 1 step is needed."),
        ("-s ddim --steps 10,-5", "--steps -5: at least 1 step is needed."),
        ("-s ddim --steps ten", '--steps ten: "ten" is not a whole number; write --steps 10,20,50.'),
        ("-s ddim --steps 10,2.5", '--steps 10,2.5: "2.5" is not a whole number'),
        ("-s ddim --steps --5", '--steps --5: "--5" is not a whole number'),
        ("-s ddim --steps ²", '--steps ²: "²" is not a whole number'),
        ("-s ddim --steps ,", "--steps is empty; write --steps 10,20,50."),
        ("-s ddim --steps 1001", "spacing leading cannot give 1001 steps: the model has 1000 timesteps; use fewer"),
        ("-s ddim --steps 10,2000 --spacing trailing", "spacing trailing cannot give 2000 steps: the model has 1000"),
        ("-s ddim --labels 10", "--labels 10: the model has the labels 0 to 9."),
        ("-s ddim --labels -1", "--labels -1: the model has the labels 0 to 9."),
        ("-s ddim --labels seven", '--labels seven: give "balanced", "none" or one label.'),
        ("-s ddim --labels --5", '--labels --5: give "balanced", "none" or one label.'),
        ("-s ddim --labels none -g cfg", "guidance cfg requires labels"),
        ("-s ddim --n 1", "--n 1: the metric fid needs at least 2 images."),
        ("-s ddim --n 0", "--n 0: it must be at least 1."),
        ("-s ddim --n many", "--n many: give a whole number."),
        ("-s ddim --batch-size 0", "--batch-size 0: at least 1 image is needed."),
        ("-s ddim --seed -1", "--seed -1: it must be at least 0."),
        (f"-s ddim --seed {2**64}", f"--seed {2**64}: it must be at most {2**64 - 1:,}."),
        ("-s ddim --dtype fp8", "--dtype fp8: choose one of fp32, tf32, bf16, fp16, fp64."),
        ("-s ddim --device gpu", "--device gpu: PyTorch has no such device; use auto, cpu, "),
        ("-s ddim --device cuda:99", "--device cuda:99: "),
        ("-s ddim --device meta", "--device meta: PyTorch cannot use this device on this machine; "),
        ("-s ddim --features digits-cn", 'no feature extractor "digits-cn". Did you mean "digits-cnn"? Known: '),
        ("-s ddim --features-weights absent", "the weights absent of the features digits-cnn do not exist."),
        (
            "-s ddim --data digts",
            'no data set "digts": it is neither a folder, a zip or an npz, nor one of ',
        ),
        ("-s ddim --data absent.safetensors", "absent.safetensors does not exist; create it with "),
        ("-s ddim --model digits:rounding=up", "model digits: rounding=up: "),
        ("-s ddim --model absent/folder/deep", 'no model "absent/folder/deep": it is neither a folder, nor a hub id'),
        ("-s ddim --model no-such-name", 'no model "no-such-name": it is neither a folder, nor a hub id'),
        (
            "-s ddim --model digit",
            'no model "digit": it is neither a folder, nor a hub id (owner/name), nor a name in `samplerbench list '
            'models`. Did you mean "digits"?',
        ),
        ("-s ddim --model exat:mixture", 'no model "exat:mixture": '),
        (
            "-s ddim --data minst:split=test",
            'no data set "minst:split=test": it is neither a folder, a zip or an npz, nor one of cifar10, cifar100, '
            'digits, fashion-mnist, hf, kmnist, mnist, svhn. Did you mean "mnist"?',
        ),
        ("-s ddim -g classifier:weights=absent", "no classifier in absent: diffusion_pytorch_model.safetensors does"),
        ("", "name a sampler with --sampler, or a suite file; `samplerbench list samplers` shows them."),
        ("-s ddim --stepz 5", 'no option "--stepz". Did you mean "--steps"?'),
    ],
)
def test_a_bad_run_is_one_line(refuse: Refuse, arguments: str, reason: str) -> None:
    assert refuse("run", *arguments.split()).startswith(reason)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("rnu", 'no command "rnu". Did you mean "run"? `samplerbench --help` shows the commands.'),
        ("list sampler", "KIND sampler: choose one of samplers, "),
        ("show dimd", 'no plugin is called "dimd". Did you mean "ddim"? `samplerbench list` lists the plugins.'),
        ("show digit", 'no plugin is called "digit". Did you mean "digits"? '),
        ("show exat:mixture", 'no plugin is called "exat:mixture". Did you mean "exact"? '),
        (
            "check ddmi",
            'no sampler, guidance, spacing, generator, task, metric or model is called "ddmi". Did you mean "ddim"?',
        ),
        ("sample grid.jpg -s ddim", "grid.jpg: the file must have the suffix .png, as in grid.png."),
        ("sample grid.png -s ddmi", 'no sampler "ddmi". Did you mean "ddim"?'),
        ("sample grid.png -s ddim --labels 10", "--labels 10: the model has the labels 0 to 9."),
        ("stats digits --out digits.npz", "digits.npz: the file must have the suffix .safetensors, as in digits.safe"),
        ("stats digts --features digits-cnn --out x.safetensors", 'no data set "digts": '),
        ("stats digits --features digits-cm --out x.safetensors", 'no feature extractor "digits-cm". Did you mean '),
    ],
)
def test_the_other_commands_say_it_in_one_line_too(refuse: Refuse, arguments: str, reason: str) -> None:
    assert refuse(*arguments.split()).startswith(reason)


@pytest.mark.parametrize(
    "arguments",
    [
        "run -s ddim --out FILE/results",
        "sample FILE/grid.png -s ddim --steps 1 --n 1",
        "stats digits --features digits-cnn --out FILE/x.safetensors",
    ],
)
def test_a_place_that_cannot_be_written_to_is_one_line(refuse: Refuse, tmp_path: Path, arguments: str) -> None:
    (tmp_path / "FILE").write_text("not a folder")
    assert refuse(*arguments.split()).startswith("cannot write FILE")


def test_debug_gives_the_traceback() -> None:
    with pytest.raises(UserError, match="no sampler"):
        main(["--debug", "run", "-s", "ddmi"])


def test_no_arguments_show_three_commands_to_try_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code() == 2
    out, err = capsys.readouterr()
    assert out.startswith("Usage: samplerbench [OPTIONS] COMMAND [ARGS]...")
    assert "`samplerbench --help` lists all commands." in out
    assert err == ""
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("number", range(3))
def test_the_commands_to_try_first_are_accepted(capsys: pytest.CaptureFixture[str], number: int) -> None:
    """Their arguments are parsed: with an unknown sampler, the command is refused because of the sampler only."""
    commands = [line for line in FIRST_COMMANDS.splitlines() if line.startswith("  samplerbench ")]
    assert len(commands) == 3
    words = commands[number].strip().partition("  ")[0].split()[1:]
    if "ddim" not in words:
        assert exit_code(*words) == 0
        assert "ddim" in capsys.readouterr().out
    else:
        assert exit_code(*[word.replace("ddim", "no-such-sampler") for word in words]) == 2
        assert capsys.readouterr().err.startswith('samplerbench: no sampler "no-such-sampler".')


# --- Models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny pipelines as diffusers saves them: `plain`, without labels, and `labelled`, without a null label."""
    root = tmp_path_factory.mktemp("models")
    for name, classes in (("plain", None), ("labelled", 10)):
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            num_class_embeds=classes,
        )
        unet.save_pretrained(root / name / "unet")
        DDPMScheduler().save_pretrained(root / name / "scheduler")
        index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
        index["scheduler"] = ["diffusers", "DDPMScheduler"]
        (root / name / "model_index.json").write_text(json.dumps(index))
    return root


def run_model(folder: Path, *more: str) -> list[str]:
    return ["run", "-s", "ddim", "--steps", "1", "--n", "2", "--model", str(folder), *more]


def test_the_tiny_pipelines_are_sound(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plain", "labelled"):
        known = ["--data", "digits", "--features", "digits-cnn", "--json"]
        assert exit_code(*run_model(saved / name, *known)) == 0
        (record,) = json.loads(capsys.readouterr().out)
        assert record["metrics"]["fid"]["value"] > 0


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("model_index.json", "is not a diffusers pipeline: model/model_index.json does not exist."),
        ("unet", "is incomplete: unet/config.json does not exist."),
        ("unet/config.json", "is incomplete: unet/config.json does not exist."),
        ("scheduler", "is incomplete: scheduler/scheduler_config.json does not exist."),
        (WEIGHTS, "is incomplete: unet/diffusion_pytorch_model.safetensors does not exist ("),
    ],
)
def test_an_incomplete_model_folder_is_refused(
    refuse: Refuse, saved: Path, tmp_path: Path, missing: str, reason: str
) -> None:
    folder = shutil.copytree(saved / "plain", tmp_path / "model")
    gone = folder / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert refuse(*run_model(folder)).startswith(f"{folder} {reason}")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model_index.json", b"{", "is not a diffusers pipeline: model/model_index.json cannot be read ("),
        ("unet/config.json", b"", "is incomplete: unet/config.json cannot be read ("),
        (WEIGHTS, b"", "cannot be loaded as a UNet2DModel: "),
        (WEIGHTS, None, "cannot be loaded as a UNet2DModel: "),
    ],
)
def test_a_damaged_model_folder_is_refused(
    refuse: Refuse, saved: Path, tmp_path: Path, file: str, content: bytes | None, reason: str
) -> None:
    folder = shutil.copytree(saved / "plain", tmp_path / "model")
    path = folder / file
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    assert refuse(*run_model(folder)).startswith(f"{folder} {reason}")


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        (
            "model_index.json",
            {"unet": ["diffusers", "UNet2DConditionModel"]},
            "DDPMPipeline with the network UNet2DCond",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps is 0; it must be "),
        ("model_index.json", {"scheduler": ["diffusers", "FlowMatchNewScheduler"]}, "with the scheduler FlowMatchNew"),
        ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "has the scheduler EDMEulerScheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "predicts flow; supported are epsilon, "),
        ("scheduler/scheduler_config.json", {"beta_schedule": "other"}, 'the beta schedule "other" is not supported'),
        ("scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "has 1 output channels, but variance"),
        ("unet/config.json", {"sample_size": None}, "unet/config.json has no sample_size; it must be a whole number"),
        ("unet/config.json", {"block_out_channels": [16, 16]}, "cannot be loaded as a UNet2DModel: "),
    ],
)
def test_an_unsupported_model_is_refused(
    refuse: Refuse, saved: Path, tmp_path: Path, file: str, change: dict[str, Any], reason: str
) -> None:
    folder = shutil.copytree(saved / "plain", tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text("utf-8")) | change))
    assert reason in refuse(*run_model(folder))


@pytest.mark.parametrize("name", ["StableCascadeDecoderPipeline", "KolorsPipeline", "HunyuanDiTPipeline"])
@pytest.mark.parametrize("more", [(), ("--prompt", "a cat")])
def test_a_pipeline_that_is_not_supported_is_named_with_those_that_are(
    refuse: Refuse, tmp_path: Path, name: str, more: tuple[str, ...]
) -> None:
    """The folder has only an index: the class is checked before the parts and the prompts."""
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"_class_name": name, "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert refuse(*run_model(folder, *more)) == (
        f"{folder}: {name} is not supported; supported pipelines: DDPMPipeline, DDIMPipeline, PNDMPipeline, "
        "ScoreSdeVePipeline, LDMPipeline, LatentDiffusionUncondPipeline, ConsistencyModelPipeline, DiTPipeline, "
        "LatentConsistencyModelPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline, "
        "FluxPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, SanaPipeline, Lumina2Pipeline, AuraFlowPipeline, "
        f"QwenImagePipeline and ZImagePipeline. --model pipeline:{folder} runs other pipelines of diffusers by their "
        "own call."
    )


def test_a_pipeline_on_the_hub_is_refused_before_its_weights_are_downloaded(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(_: str, __: Any, patterns: list[str]) -> Path:
        fetched.append(patterns)
        return tmp_path

    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    monkeypatch.setattr(files, "_fetch", fetch)
    refused = refuse("run", "-s", "ddim", "--steps", "1", "--n", "2", "--model", "owner/flux")
    assert refused.startswith("owner/flux: KolorsPipeline is not supported; ")
    assert fetched == [["*.json", "*.txt", "*.model"]]


def test_an_index_without_a_class_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert refuse(*run_model(tmp_path)).startswith(f"{tmp_path}: model_index.json does not name its pipeline in _class")


@pytest.mark.parametrize("content", ["{}", '{"_class_name": "DDPMScheduler", "_diffusers_version": "0.35.0"}'])
def test_an_empty_scheduler_configuration_is_refused(refuse: Refuse, saved: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(saved / "plain", tmp_path / "model")
    (folder / "scheduler/scheduler_config.json").write_text(content)
    assert refuse(*run_model(folder)) == (
        f"{folder} is incomplete: scheduler/scheduler_config.json is empty; write it with save_pretrained of diffusers."
    )


def test_weights_in_a_pickle_are_not_loaded(refuse: Refuse, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "plain", tmp_path / "model")
    torch.save(load_file(folder / WEIGHTS), folder / "unet/diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert "pickle files (.bin) are not supported" in refuse(*run_model(folder))


def test_weights_of_another_shape_are_refused(refuse: Refuse, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "plain", tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    weights["conv_in.weight"] = weights["conv_in.weight"][:4].clone()
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    assert "cannot be loaded as a UNet2DModel: " in refuse(*run_model(folder))


def test_a_file_is_no_model(refuse: Refuse, saved: Path) -> None:
    file = saved / "plain" / "model_index.json"
    assert refuse(*run_model(file)).startswith(f'no model "{file}": it is neither a folder, nor a hub id')


@pytest.mark.parametrize(
    ("model", "guidance", "reason"),
    [
        ("plain", "cfg", "guidance cfg requires "),
        ("plain", "classifier", "the model includes no classifier; give its folder with weights=FOLDER"),
        ("labelled", "cfg", "guidance cfg requires a class-conditional model with an unconditional prediction"),
        (
            "labelled",
            "classifier",
            "classifier guidance requires an unconditional prediction, which this model does not",
        ),
    ],
)
def test_guidance_on_a_model_that_cannot_be_guided_is_refused_before_anything_is_fetched(
    refuse: Refuse, saved: Path, model: str, guidance: str, reason: str
) -> None:
    """No card says what the features are, so they would be Inception's."""
    assert refuse(*run_model(saved / model, "-g", guidance, "--data", "digits")).startswith(reason)


def test_labels_on_a_model_without_and_none_on_a_model_that_needs_them(refuse: Refuse, saved: Path) -> None:
    assert refuse(*run_model(saved / "plain", "--labels", "3")).startswith("--labels 3: the model has no classes; use ")
    unlabelled = refuse(*run_model(saved / "labelled", "--labels", "none"))
    assert unlabelled.startswith("the model is class-conditional and has no unconditional prediction; it does not")


def test_a_model_that_does_not_say_its_data_needs_some(refuse: Refuse, saved: Path) -> None:
    assert refuse(*run_model(saved / "plain")).endswith("name the real images with --data.")


def test_features_that_cannot_be_fetched_are_one_line(
    refuse: Refuse, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    message = refuse(*run_model(saved / "plain", "--data", "digits"))
    assert message.startswith(
        "the weights of inception-v3-compat are not in the cache and cannot be downloaded (URLError)"
    )


def test_statistics_of_other_features_are_refused(refuse: Refuse, tmp_path: Path) -> None:
    assert exit_code("stats", "digits", "--features", "digits-cnn", "--out", "real.safetensors") == 0
    file = tmp_path / "real.safetensors"
    found = load_tensors(file)
    renamed = {name: text.replace("digits-cnn", "digits-mlp") for name, text in found.metadata.items()}
    save_tensors(file, found.tensors, renamed)
    message = refuse("run", "-s", "ddim", "--data", "real.safetensors")
    assert message.startswith("real.safetensors holds features of digits-mlp (weights ")


# --- While it runs -------------------------------------------------------------------------------------------------


def test_no_memory_says_which_batch_size_to_try_and_the_other_cells_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = sample.walk

    def hungry(sampler: Any, *rest: Any, **more: Any) -> driver.Walk:
        if sampler.label() == "ddpm":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return walk(sampler, *rest, **more)

    monkeypatch.setattr(sample, "walk", hungry)
    assert exit_code("run", "-s", "ddpm", "-s", "ddim", "--steps", "1", "--n", "6", "-b", "4", "--json") == 2
    out, err = capsys.readouterr()
    first, second = json.loads(out)
    assert first["error"] == "the device has not enough memory for a batch of 4; try --batch-size 2."
    assert first["error"] in err
    assert second["metrics"]["fid"]["value"] > 0


def test_ctrl_c_keeps_the_cells_that_are_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_cell = engine.run_cell

    def stopped(session: engine.Session, cell: engine.Cell, *rest: Any) -> engine.Outcome:
        if cell.steps == 2:
            raise KeyboardInterrupt
        return run_cell(session, cell, *rest)

    monkeypatch.setattr(engine, "run_cell", stopped)
    assert exit_code("run", "-s", "ddim", "--steps", "1,2,3", "--n", "4", "--out", "kept", "--json") == 130
    out, err = capsys.readouterr()
    (record,) = json.loads(out)
    assert record["steps"] == 1
    assert err.splitlines()[-1] == (
        "samplerbench: stopped; 1 of 3 cells are done and kept in kept/. Run the same command to go on."
    )
    (file,) = (tmp_path / "kept").glob("*.json")
    assert sound(json.loads(file.read_text("utf-8")))


# --- What there is to read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ddim", ["sampler", "eta", "float", "≥ 0, ≤ 1", "0 is deterministic, 1 is ancestral", "Song, Meng & Ermon"]),
        ("langevin", ["T", "int", "≥ 1", "> 0, < 1", "0.1", "Default spacing: geometric"]),
        ("pf-ode", ["euler | heun | rk4 | rk45", "0.0001"]),
        ("karras", ["float or none", "none", "rho", "> 0"]),
        ("classifier", ["bool", "false", "Dhariwal & Nichol 2021"]),
        ("fid", ["metric", "features", "str", "feature space of this metric"]),
        ("euler-maruyama", ["sampler", "No parameters."]),
    ],
)
def test_show_tells_parameters_with_bounds_and_the_paper(
    capsys: pytest.CaptureFixture[str], name: str, words: list[str]
) -> None:
    assert exit_code("show", name) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}  ")
    assert "samplerbench 0." in said
    for word in words:
        assert word in said


def test_show_takes_a_checkpoint_folder(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    assert exit_code("show", str(saved / "labelled")) == 0
    said = capsys.readouterr().out
    assert "1x8x8" in said
    assert "1000, σ from 0.01 to 157.4" in said


def complete(words: str, shell: str = "complete_bash") -> str:
    env = os.environ | {"_SAMPLERBENCH_COMPLETE": shell, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    command = [sys.executable, "-m", "samplerbench"]
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_shell_completes_what_is_registered() -> None:
    assert {"ddim", "ddpm"} <= set(complete("samplerbench run --sampler dd").split())
    assert complete("samplerbench run --sampler autoenc").split() == ["autoencoder-prior"]
    assert complete("samplerbench run --spacing kar").split() == ["karras"]
    assert complete("samplerbench run --guidance cf").split() == ["cfg", "cfg-norm", "cfg-rescale"]
    assert "run" in complete("samplerbench r").split()


@pytest.mark.parametrize(
    ("command", "parameter", "start", "words"),
    [
        ("show", "name", "kar", ["karras"]),
        ("show", "name", "mni", ["mnist"]),
        ("check", "spec", "cf", ["cfg", "cfg-norm", "cfg-rescale"]),
        ("check", "spec", "mni", ["mnist"]),
        ("run", "features", "dinov2-vit-b", ["dinov2-vit-b-14"]),
        ("run", "data", "mn", ["mnist"]),
        ("run", "dtype", "fp", ["fp16", "fp32", "fp64"]),
        ("run", "model", "dig", ["digits", "digits-flow", "digits-learned-variance"]),
        ("run", "metric", "incep", ["inception-score"]),
        ("sample", "spacing", "kar", ["karras"]),
        ("sample", "dtype", "b", ["bf16"]),
        ("figure nearest", "data", "mn", ["mnist"]),
        ("figure steps", "spacing", "kar", ["karras"]),
        ("train unet", "data", "mn", ["mnist"]),
        ("stats", "data", "mn", ["mnist"]),
        ("stats", "features", "digits", ["digits-cnn"]),
        ("compare", "metric", "incep", ["inception-score"]),
        ("report", "metric", "incep", ["inception-score"]),
    ],
)
def test_an_option_is_completed(command: str, parameter: str, start: str, words: list[str]) -> None:
    found: Any = typer.main.get_command(app)
    for word in command.split():
        found = found.commands[word]
    (option,) = (p for p in found.params if p.name == parameter)
    items = option.shell_complete(found.make_context("x", [], resilient_parsing=True), start)
    assert sorted(item.value for item in items) == words


def test_the_completed_words_are_those_of_the_library() -> None:
    assert set(common.DTYPES) == PRECISIONS.keys()
    assert set(common.FEATURES) >= _registry().keys()


def test_the_list_shows_feature_spaces_and_schedulers(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["list", *arguments])
        assert not ended.value.code
        return capsys.readouterr().out

    everything = listed()
    assert all(name in everything for name in common.FEATURES)
    assert "`samplerbench list schedulers` lists them" in everything
    assert listed("features").startswith("features\n clip, clip-rn101, ")
    names = [line.split()[0] for line in listed("schedulers").splitlines()]
    assert "diffusers/FlowMatchEulerDiscreteScheduler" in names
    assert {"diffusers/DDIMScheduler", "diffusers/DPMSolverMultistepScheduler"} <= set(names)
    for name in names:  # each can be named as a sampler
        registry.parse("sampler", name)
    assert "diffusers/DDIMInverseScheduler" not in names  # it is no sampler
    assert listed("generators").startswith("generators")


def test_completion_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys; from samplerbench.cli import app, common\n"
        "assert common.complete('sampler')('ddp') == ['ddpm'] and common.choices(common.FEATURES)('vgg')\n"
        "sys.exit(bool({'torch', 'diffusers', 'torch_fidelity', 'samplerbench_plugins'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_completion_script(shell: str) -> None:
    script = complete("samplerbench", f"source_{shell}")
    assert f"_SAMPLERBENCH_COMPLETE=complete_{shell}" in script
