"""What pipelines and options are refused with one line, and what is read of prompts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pipelines import PROMPTS, configure, load

from samplerbench import cli
from samplerbench.bench.suite import load_suite
from samplerbench.errors import UserError
from samplerbench.models.files import LoadOptions
from samplerbench.models.prompts import read_prompts

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")


@pytest.mark.parametrize(
    ("kind", "file", "change", "says"),
    [
        ("latent", "vqvae/diffusion_pytorch_model.safetensors", None, "incomplete: vqvae/diffusion_pytorch_model.saf"),
        ("latent", "vqvae/config.json", None, "is incomplete: vqvae/config.json does not exist"),
        (
            "latent",
            "unet/config.json",
            {"in_channels": 3, "out_channels": 3},
            "requires 3 channels, but the latents of",
        ),
        ("latent", "unet/config.json", {"out_channels": 8}, "8 output channels, but variance type fixed_small with 4"),
        (
            "latent",
            "model_index.json",
            {"vqvae": ["diffusers", "AutoencoderTiny"]},
            "with the vqvae AutoencoderTiny",
        ),
        ("latent", "model_index.json", {"unet": ["diffusers", "UNet1DModel"]}, "a LDMPipeline with the unet UNet1DMod"),
        ("latent", "model_index.json", {"_class_name": "OtherPipeline"}, "OtherPipeline is not supported; supported"),
        ("transformer", "transformer/config.json", {"out_channels": 5}, "has 5 output channels for 4 input channels; "),
        ("transformer", "vae/config.json", {"latent_channels": 8}, "requires 4 channels, but the latents of the au"),
        ("transformer", "transformer/diffusion_pytorch_model.safetensors", None, "is incomplete: transformer/diffusio"),
        (
            "text",
            "text_encoder/model.safetensors",
            None,
            "is incomplete: text_encoder/model.safetensors does not exist",
        ),
        ("text", "tokenizer/tokenizer.json", None, "is incomplete: tokenizer/vocab.json or tokenizer/merges.txt is mi"),
        ("text", "unet/config.json", {"in_channels": 9}, "the network requires 9 channels, but the latents of the "),
        ("text", "unet/config.json", {"cross_attention_dim": 8}, "cross_attention_dim of the network is 8, but the "),
        ("text", "unet/config.json", {"addition_embed_type": "text_time"}, "other than text are not supported .additi"),
        ("text", "model_index.json", {"text_encoder": ["x", "T5EncoderModel"]}, "with the text_encoder T5EncoderModel"),
        ("ve", "unet/config.json", {"out_channels": 6}, "6 output channels, but variance type fixed with 3 input"),
        ("ve", "unet/config.json", {"num_class_embeds": 6}, "a variance-exploding network with class labels is not su"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(
    saved_pipelines: Path, tmp_path: Path, kind: str, file: str, change: dict[str, Any] | None, says: str
) -> None:
    folder = shutil.copytree(saved_pipelines / kind, tmp_path / "model")
    (folder / file).unlink() if change is None else configure(folder / file, **change)
    with pytest.raises(UserError, match=says) as error:
        load(folder, show=True)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("latent", ["--prompts", "prompts.txt"], "--prompts requires a text-to-image model, but latent is not one"),
        (
            "transformer",
            ["--prompts", "prompts.txt"],
            "--prompts requires a text-to-image model, but transformer is not one",
        ),
        ("digits", ["--prompts", "prompts.txt"], "--prompts requires a text-to-image model, but digits is not one"),
        (
            "digits",
            ["--negative-prompt", "x"],
            "--negative-prompt requires a text-to-image model, but digits is not one",
        ),
        ("digits", ["--variant", "fp16"], "--variant fp16 applies only to checkpoints; the model digits is built in"),
        ("latent", ["--revision", "v1"], "--revision v1 requires a hub repository, but latent is a local folder"),
        (
            "text",
            [],
            "text is a text-to-image model; give a file with one prompt per line, --prompts FILE, or a prompt, "
            "--prompt TEXT.",
        ),
        (
            "text",
            ["--prompt", "a cat", "--prompts", "prompts.txt"],
            "--prompt and --prompts cannot be combined; use one of them.",
        ),
        ("text", ["--prompt", "a cat", "--prompt", "a\ndog"], "has several lines; write it on one line."),
        ("text", ["--prompt", "a cat", "--labels", "1"], "--labels 1: the model has the labels 0 to 0."),
        ("digits", ["--prompt", "a cat"], "--prompt requires a text-to-image model, but digits is not one"),
        ("latent", ["--prompt", "a cat"], "--prompt requires a text-to-image model, but latent is not one"),
        (
            "text",
            ["--labels", "balanced"],
            "text is a text-to-image model; give a file with one prompt per line, --prompts",
        ),
        (
            "text",
            ["--prompts", "empty.txt"],
            "--prompts empty.txt: the file contains no prompts; write one prompt per line.",
        ),
        ("text", ["--prompts", "absent.txt"], "--prompts absent.txt: the file cannot be read ("),
        ("text", ["--prompts", "prompts.txt", "--labels", "1"], "--labels 1: the model has the labels 0 to 0."),
        ("owner/absent", ["--offline"], 'the model "owner/absent" is not in the local cache and offline mode is on'),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["sample", "grid.png"]])
def test_options_that_do_not_fit_the_model_are_refused_in_one_line(
    saved_pipelines: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    kind: str,
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(saved_pipelines)
    Path("empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "-s", "ddim", "--steps", "2", "--model", kind, *options])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


def test_a_suite_names_prompts_and_variants_too(saved_pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved_pipelines)
    text = 'model = "text"\nprompts = "prompts.txt"\nnegative_prompt = "fog"\nvariant = "fp16"\nrevision = "v1"\n'
    Path("suite.toml").write_text(text + '[[grid]]\nsamplers = ["ddim"]\nsteps = [2]\n', encoding="utf-8")
    assert load_suite(Path("suite.toml")).load == LoadOptions("v1", "fp16", "prompts.txt", "fog")


def test_prompts_of_options_are_those_of_a_file(tmp_path: Path, prompt_file: str) -> None:
    """The same protocol, so a cell with the same prompts is not run again."""
    same = read_prompts([*PROMPTS[:-1], f" {PROMPTS[-1]} "])
    assert same == read_prompts(prompt_file)
    with pytest.raises(UserError, match=r'^prompt=" " is empty; write some text\.$'):
        read_prompts(["a cat", " "])


def test_prompts_are_given_by_options_and_override_those_of_a_suite(
    saved_pipelines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(saved_pipelines)
    Path("listed.toml").write_text(
        'model = "text"\nprompts = ["a cat", "a dog"]\n[[grid]]\nsamplers = ["ddim"]\nsteps = [2]\n', encoding="utf-8"
    )
    assert load_suite(Path("listed.toml")).load == LoadOptions(prompts=("a cat", "a dog"))
    Path("wrong.toml").write_text("prompts = [1]\n[[grid]]\nsamplers = []\nsteps = [2]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^wrong\.toml:1: prompts: give the name of a text file, or a list of prompts"):
        load_suite(Path("wrong.toml"))
    for given, labels in (([], 1), (["--prompt", "a fox", "--prompt", "fog", "--prompt", "x"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", "listed.toml", *given, "--labels", "9"])
        assert ended.value.code == 2
        assert f"the model has the labels 0 to {labels}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        (
            "latent",
            ["images│3x16x16", "latents│4x8x8", "prediction│epsilon", "autoencoder│AutoencoderKL"],
        ),
        ("transformer", ["classes│1000, and none", "learned variance│yes", "betas│0.00085 to 0.012"]),
        ("text", ["classes│prompts", "schedule│scaled_linear", "scaling factor│0.18215"]),
        ("ve", ["images│3x8x8", "prediction│score", "sigma_max│0.5", "its own sampler│pc:M=1,snr=0.15"]),
    ],
)
def test_show_tells_what_was_read(
    saved_pipelines: Path, capsys: pytest.CaptureFixture[str], kind: str, lines: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", str(saved_pipelines / kind)])
    assert not ended.value.code
    shown = capsys.readouterr().out.replace("│ ", "│").replace(" ", "")
    for line in lines:
        assert line.replace(" ", "") in shown


def test_text_is_sampled_from_the_command_line(
    saved_pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved_pipelines)
    arguments = ["--model", "text", "--prompts", "prompts.txt", "-s", "ddim", "-g", "cfg:scale=3", "--steps", "2"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["sample", str(tmp_path / "grid.png"), *arguments, "--n", "2", "--npz", str(tmp_path / "x.npz")])
    assert not ended.value.code
    found = np.load(tmp_path / "x.npz")
    assert found["images"].shape == (2, 16, 16, 3)
    assert found["labels"].tolist() == [0, 0]
