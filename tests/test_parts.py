"""Single files, bare network folders and other schedulers: the same network as from the whole pipeline."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_images
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from support.pipelines import (
    PROMPTS,
    SD_BETAS,
    STEPS,
    N,
    assert_same,
    configure,
    load,
    ours,
    start,
    theirs,
    tiny_autoencoder,
    tiny_stable_diffusion,
    tiny_transformer,
    tiny_unet,
)
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from samplerbench import cli
from samplerbench.errors import UserError
from samplerbench.models.single_file import contains, load_from_file

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")

# --- The names of the original code of latent diffusion ---------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    ("conv_in", "input_blocks.0.0"),
    ("down_blocks.0.resnets.0", "input_blocks.1.0"),
    ("down_blocks.0.attentions.0", "input_blocks.1.1"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    ("down_blocks.1.resnets.0", "input_blocks.3.0"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("up_blocks.0.resnets.0", "output_blocks.0.0"),
    ("up_blocks.0.resnets.1", "output_blocks.1.0"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv"),
    ("up_blocks.1.resnets.0", "output_blocks.2.0"),
    ("up_blocks.1.attentions.0", "output_blocks.2.1"),
    ("up_blocks.1.resnets.1", "output_blocks.3.0"),
    ("up_blocks.1.attentions.1", "output_blocks.3.1"),
]
"""The blocks of the network of `tiny_stable_diffusion`."""


def unet_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        own, old = next((own, old) for own, old in UNET if name.startswith(f"{own}."))
        rest = name.removeprefix(f"{own}.")
        if "resnets" in own:
            layer, _, kind = rest.partition(".")
            rest = f"{RESNET[layer]}.{kind}"
        found[f"model.diffusion_model.{old}.{rest}"] = value
    return found


def vae_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, value in weights.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out")
            name = re.sub(r"to_([qkv])", r"\1", name)
            value = value[:, :, None, None] if value.ndim == 2 else value
        found[f"first_stage_model.{name}"] = value
    return found


def clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline `own`; `other` with the same architecture and other weights; files with the weights of `own`."""
    root = tmp_path_factory.mktemp("parts")
    own = tiny_stable_diffusion(root, DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS))
    own.save_pretrained(root / "own")
    shutil.copytree(root / "own", root / "other")
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        file = root / "other" / part / f"{stem}.safetensors"
        torch.manual_seed(7)
        save_file({k: v + 0.1 * torch.randn_like(v) for k, v in load_file(file).items()}, file, {"format": "pt"})
    unet = unet_names(own.unet.state_dict())
    whole = unet | vae_names(own.vae.state_dict()) | clip_names(own.text_encoder.state_dict())
    save_file({k: v.contiguous() for k, v in unet.items()}, root / "unet.safetensors")
    save_file({k: v.contiguous() for k, v in whole.items()}, root / "whole.safetensors")
    shutil.copy(root / "own/unet/diffusion_pytorch_model.safetensors", root / "diffusers.safetensors")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def images(root: Path, model: str, **options: Any) -> tuple[Any, Tensor]:
    loaded = load(root / model, prompts=str(root / "prompts.txt"), **options)
    return loaded, ours(loaded, "ddim", "leading:offset=1", torch.arange(N), guidance="cfg:scale=5")


@pytest.mark.parametrize(
    "file",
    [
        "whole.safetensors",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("unet.safetensors", "diffusers.safetensors")),
    ],
)
def test_a_single_file_is_the_pipeline_it_was_made_of(pipelines: Path, file: str) -> None:
    """What a file does not contain is that of the pipeline of `config`."""
    base = "other" if file == "whole.safetensors" else "own"
    own, expected = images(pipelines, "own")
    found, made = images(pipelines, file, config=str(pipelines / base))
    assert torch.equal(made, expected)
    weights = own.network.inner.state_dict()
    for name, value in found.network.inner.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert found.identity["source"] == str(pipelines / file)
    assert found.identity["pipeline"] == "StableDiffusionPipeline"
    # The other parts are those of the file or of the pipeline, and so is their hash.
    other, _ = images(pipelines, file, config=str(pipelines / "other"))
    same = other.identity["autoencoder weights"] == found.identity["autoencoder weights"]
    assert same == (file == "whole.safetensors")


@pytest.mark.slow
def test_a_single_file_gives_the_images_of_from_single_file(pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = StableDiffusionPipeline.from_single_file(
        str(pipelines / "whole.safetensors"),
        config=str(pipelines / "other"),
        local_files_only=True,
        safety_checker=None,
    )
    model, made = images(pipelines, "whole.safetensors", config=str(pipelines / "other"))
    expected = theirs(pipeline, start(model), monkeypatch, latents=start(model), prompt=PROMPTS, guidance_scale=5.0)
    assert_same(made, expected)
    assert float((made - expected).abs().max()) <= 1e-4


def test_a_single_file_of_stable_diffusion_3_with_and_without_t5(tmp_path: Path) -> None:
    """Files of Stable Diffusion 3 are published with the two CLIPs alone, and with T5 as well."""
    config = T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=11)
    encoder = T5EncoderModel(config)
    encoder.save_pretrained(tmp_path / "t5")
    clips = {f"text_encoders.clip_{size}.transformer.text_model.weight": torch.zeros(1) for size in "lg"}
    names = {"text_encoders.t5xxl.transformer.encoder.embed_tokens.weight": encoder.shared.weight.detach().clone()}
    t5 = {f"text_encoders.t5xxl.transformer.{k}": v.clone() for k, v in encoder.state_dict().items()} | names
    save_file(clips, tmp_path / "clips.safetensors")
    save_file(clips | t5, tmp_path / "all.safetensors")
    parts = [("text_encoder", "CLIPTextModelWithProjection"), ("text_encoder_2", "CLIPTextModelWithProjection")]
    for file, has_t5 in ((tmp_path / "clips.safetensors", False), (tmp_path / "all.safetensors", True)):
        assert all(contains(file, part, "transformer", kind) for part, kind in parts)
        assert contains(file, "text_encoder_3", "transformer", "T5EncoderModel") == has_t5
        assert not contains(file, "vae", "transformer", "AutoencoderKL")
    # In FLUX's files T5 is the second text encoder.
    assert not contains(tmp_path / "clips.safetensors", "text_encoder_2", "transformer", "T5EncoderModel")
    part = load_from_file(
        "all", tmp_path / "all.safetensors", "text_encoder_3", T5EncoderModel, tmp_path / "t5", torch.float32
    )
    tokens = torch.tensor([[1, 5, 2]])
    assert torch.equal(part.eval()(tokens).last_hidden_state, encoder.eval()(tokens).last_hidden_state)


def test_the_configuration_of_a_single_file_is_in_its_identity(pipelines: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelines / "own", tmp_path / "own")
    first = load(pipelines / "unet.safetensors", show=True, config=str(pipelines / "own")).identity
    assert load(pipelines / "unet.safetensors", show=True, config=str(tmp_path / "own")).identity == first
    configure(tmp_path / "own/unet/config.json", attention_head_dim=2)
    changed = load(pipelines / "unet.safetensors", show=True, config=str(tmp_path / "own")).identity
    assert {key for key in first if first[key] != changed[key]} == {"weights"}


@pytest.mark.slow
def test_a_bare_network_with_a_pipeline(pipelines: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelines / "own/unet", tmp_path / "unet")
    own, expected = images(pipelines, "own")
    shutil.copytree(pipelines / "own", tmp_path / "own")
    (tmp_path / "own/unet/diffusion_pytorch_model.safetensors").unlink()
    found = load(tmp_path / "unet", prompts=str(pipelines / "prompts.txt"), config=str(tmp_path / "own"))
    made = ours(found, "ddim", "leading:offset=1", torch.arange(N), guidance="cfg:scale=5")
    assert torch.equal(made, expected)
    assert found.identity == own.identity | {"source": str(tmp_path / "unet")}


def test_a_bare_transformer_with_a_pipeline(tmp_path: Path) -> None:
    pipeline = DiTPipeline(tiny_transformer(), tiny_autoencoder(), DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "dit")
    other = tiny_transformer()
    nn.init.constant_(other.proj_out_2.bias, 0.5)
    other.save_pretrained(tmp_path / "transformer")
    found = load(tmp_path / "transformer", config=str(tmp_path / "dit"))
    assert torch.equal(found.network.inner.proj_out_2.bias, other.proj_out_2.bias)
    assert found.identity["weights"] != load(tmp_path / "dit").identity["weights"]
    with pytest.raises(UserError, match=r"is a DiTTransformer2DModel without the other parts of its pipeline; give"):
        load(tmp_path / "transformer")
    (tmp_path / "unet").mkdir()
    tiny_unet(1).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match=r"is a UNet2DModel, but the transformer of .*dit is a DiTTransformer2DModel"):
        load(tmp_path / "unet", config=str(tmp_path / "dit"))


@pytest.mark.parametrize("given", ["folder", "file", "pipeline"])
def test_a_bare_unet_with_a_scheduler(tmp_path: Path, given: str) -> None:
    scheduler = DDIMScheduler(beta_end=0.01, prediction_type="v_prediction", clip_sample=False)
    DDIMPipeline(tiny_unet(1), scheduler).save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/unet", tmp_path / "bare")
    places = {"folder": "whole/scheduler", "file": "whole/scheduler/scheduler_config.json", "pipeline": "whole"}
    found = load(tmp_path / "bare", scheduler=str(tmp_path / places[given]))
    whole = load(tmp_path / "whole")
    assert torch.equal(ours(found, "ddim", "leading"), ours(whole, "ddim", "leading"))
    changed = {key for key in whole.identity if whole.identity[key] != found.identity[key]}
    assert changed == {"source", "pipeline"}


def test_a_bare_consistency_model_with_its_scheduler(tmp_path: Path) -> None:
    tiny_unet(3).save_pretrained(tmp_path / "unet")
    CMStochasticIterativeScheduler().save_pretrained(tmp_path / "scheduler")
    model = load(tmp_path / "unet", scheduler=str(tmp_path / "scheduler"))
    assert (model.identity["prediction"], len(model.levels)) == ("consistency", 40)
    assert run_images(model, "consistency", None, 2, 2, None).isfinite().all()


def test_another_scheduler_replaces_that_of_a_pipeline(pipelines: Path, tmp_path: Path) -> None:
    """As for LCM-LoRA on a stock checkpoint."""
    LCMScheduler(timestep_scaling=3.0).save_pretrained(tmp_path)
    found = load(pipelines / "own", show=True, scheduler=str(tmp_path / "scheduler_config.json"))
    assert found.identity["timestep scaling"] == 3
    assert "timestep scaling" not in load(pipelines / "own", show=True).identity


def test_what_is_refused(pipelines: Path, tmp_path: Path) -> None:
    tiny_unet(1).save_pretrained(tmp_path / "bare")
    (tmp_path / "model.ckpt").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    (tmp_path / "empty").mkdir()
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"beta_end": 0.02}))
    tensors = load_file(pipelines / "unet.safetensors")
    first = next(name for name in tensors if "emb_layers" in name)
    save_file({k: v for k, v in tensors.items() if k != first}, tmp_path / "incomplete.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "strange.safetensors")
    own = str(pipelines / "own")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "bare", {}, "is a UNet2DModel without a noise schedule; give the configuration of its scheduler"),
        (pipelines / "own/unet", {}, r"own/unet is the network of the pipeline .*own; use model=\".*own\"\.$"),
        (tmp_path / "model.ckpt", {}, r"model.ckpt: pickle files are not supported; convert the file to safetensors"),
        (pipelines / "unet.safetensors", {}, "is a single file without a configuration; give a pipeline with the same"),
        (tmp_path / "broken.safetensors", {"config": own}, "broken.safetensors is damaged or not a safetensors file"),
        (tmp_path / "strange.safetensors", {"config": own}, "cannot be loaded as a UNet2DConditionModel with the"),
        (tmp_path / "incomplete.safetensors", {"config": own}, "cannot be loaded as a UNet2DConditionModel with the"),
        (
            pipelines / "own",
            {"config": own},
            "applies only to a single file or the folder of a network, but .* is a whole",
        ),
        (tmp_path / "bare", {"scheduler": "absent"}, "there is no scheduler_config.json; give its path, or the folder"),
        (tmp_path / "bare", {"scheduler": str(tmp_path / "empty")}, "there is no scheduler_config.json; give its path"),
        (tmp_path / "bare", {"scheduler": str(tmp_path)}, "does not name the class of the scheduler in _class_name"),
        (pipelines / "unet.safetensors", {"config": str(tmp_path / "empty")}, "is not a diffusers pipeline"),
    ]
    for source, options, says in cases:
        with pytest.raises(UserError, match=says) as error:
            load(source, show=True, **options)
        assert "\n" not in str(error.value)


def test_the_command_line_takes_them(pipelines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_unet(1).save_pretrained(tmp_path / "bare")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    sample = ["sample", str(tmp_path / "grid.png"), "-s", "ddim", "--steps", str(STEPS), "--n", "2"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*sample, "--model", str(tmp_path / "bare"), "--scheduler", str(tmp_path / "scheduler")])
    assert not ended.value.code, capsys.readouterr().err
    assert (tmp_path / "grid.png").exists()
    file, own = str(pipelines / "whole.safetensors"), str(pipelines / "own")
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", file, "--config", own])
    out = capsys.readouterr().out
    assert not ended.value.code
    assert "StableDiffusionPipeline" in out
