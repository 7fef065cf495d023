"""LoRA: the merged weights against W + scale · (α/r) B A by hand, and the images against diffusers' own pipeline."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_images
from diffusers import DDIMPipeline, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from support.pipelines import (
    PROMPTS,
    SD_BETAS,
    SEED,
    STEPS,
    N,
    assert_same,
    load,
    start,
    theirs,
    tiny_stable_diffusion,
    tiny_unet,
)
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models import lora

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers", "ignore::Warning:peft")

RANK = 2
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
LAYERS = (ATTENTION, "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in", "conv_out")
"""Layers of every kind: linear, 3x3 and 1x1 convolutions."""
SEQUENCE = {"scheduler": DDIMScheduler(clip_sample=False, steps_offset=1, **SD_BETAS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    tiny_stable_diffusion(root, SEQUENCE["scheduler"]).save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def factors(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """B (out, r, …) and A (r, in, …) of each layer."""
    torch.manual_seed(1)
    made = {}
    for layer in LAYERS:
        out, into, *kernel = weights[f"{layer}.weight"].shape
        made[layer] = (torch.randn(out, RANK, *[1] * len(kernel)), torch.randn(RANK, into, *kernel))
    return made


def product(b: Tensor, a: Tensor) -> Tensor:
    """B A as a weight: for a convolution, A is the k x k kernel and B is 1 x 1."""
    return torch.einsum("or,ri...->oi...", b.flatten(1), a)


def save(file: Path, factors: dict[str, tuple[Tensor, Tensor]], prefix: str = "unet.", **metadata: str) -> Path:
    tensors = {}
    for layer, (b, a) in factors.items():
        tensors |= {f"{prefix}{layer}.lora_A.weight": a, f"{prefix}{layer}.lora_B.weight": b}
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, {"format": "pt", **metadata})
    return file


def merged(folder: Path, *files: str) -> dict[str, Tensor]:
    network = load(folder, show=True, lora=files).network
    return network.inner.state_dict()


def assert_merged(found: dict[str, Tensor], weights: dict[str, Tensor], update: dict[str, Tensor]) -> None:
    assert found.keys() == weights.keys(), "no layer of peft is left"
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if layer in update and name.endswith(".weight"):
            assert float(update[layer].abs().max()) > 0.1
            weight = weight + update[layer]
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25, -1.5])
def test_the_weights_are_w_plus_scale_times_b_a(
    folder: Path, weights: dict[str, Tensor], factors: Any, tmp_path: Path, scale: float
) -> None:
    file = save(tmp_path / "style.safetensors", factors)
    given = str(file) if scale == 1 else f"{file}:{scale}"
    update = {layer: scale * product(b, a) for layer, (b, a) in factors.items()}
    assert_merged(merged(folder, given), weights, update)


def test_several_files_are_added(folder: Path, weights: dict[str, Tensor], factors: Any, tmp_path: Path) -> None:
    one = save(tmp_path / "one.safetensors", {ATTENTION: factors[ATTENTION]})
    two = save(tmp_path / "two.safetensors", factors)
    update = {layer: 2 * product(b, a) for layer, (b, a) in factors.items()}
    update[ATTENTION] = update[ATTENTION] + 0.5 * product(*factors[ATTENTION])
    assert_merged(merged(folder, f"{one}:0.5", f"{two}:2"), weights, update)


def test_alpha_of_kohya_s_format_is_divided_by_the_rank(
    folder: Path, weights: dict[str, Tensor], factors: Any, tmp_path: Path
) -> None:
    b, a = factors[ATTENTION]
    name = f"lora_unet_{ATTENTION.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(5.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    update = {ATTENTION: 5.0 / RANK * product(b, a)}
    assert_merged(merged(folder, str(tmp_path / "kohya.safetensors")), weights, update)


def test_alpha_of_the_metadata_is_divided_by_the_rank(
    folder: Path, weights: dict[str, Tensor], factors: Any, tmp_path: Path
) -> None:
    settings = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.alpha_pattern": {ATTENTION: 1}}
    # A setting with which peft would import a module by its name.
    settings |= {"unet.megatron_core": "antigravity", "unet.megatron_config": {"a": 1}}
    file = save(tmp_path / "style.safetensors", factors, lora_adapter_metadata=json.dumps(settings))
    update = {layer: (1 if layer == ATTENTION else 6) / RANK * product(b, a) for layer, (b, a) in factors.items()}
    assert_merged(merged(folder, str(file)), weights, update)
    assert "antigravity" not in sys.modules


def test_images_are_those_of_the_pipeline_with_the_lora(
    folder: Path, factors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt_file: str
) -> None:
    small = {layer: (0.3 * b, 0.3 * a) for layer, (b, a) in factors.items()}
    file = save(tmp_path / "style.safetensors", small)
    plain = load(folder, prompts=prompt_file)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="style")
    pipeline.set_adapters("style", 0.7)
    model = load(folder, prompts=prompt_file, lora=(f"{file}:0.7",))
    made = theirs(pipeline, start(model), monkeypatch, latents=start(model), prompt=PROMPTS, guidance_scale=5.0)

    def images(of: Any) -> Tensor:
        spacing, guidance = "leading:offset=1", "cfg:scale=5"
        return run_images(of, "ddim", spacing, STEPS, N, torch.arange(N), seed=SEED, guidance=guidance).clamp(-1, 1)

    assert_same(images(model), made)
    assert float((images(plain) - made).abs().max()) > 0.05
    # Scale 0 is the network without the LoRA, bit for bit, with another identity.
    none = load(folder, prompts=prompt_file, lora=(f"{file}:0",))
    assert torch.equal(images(none), images(plain))


def test_file_and_scale_are_in_the_identity(folder: Path, factors: Any, tmp_path: Path) -> None:
    one, two = save(tmp_path / "one.safetensors", factors), tmp_path / "two.safetensors"
    two.write_bytes(one.read_bytes())

    def identity(*files: str) -> dict[str, Any]:
        return load(folder, show=True, lora=files).identity

    plain, first = identity(), identity(str(one))
    assert "lora" not in plain
    assert identity(f"{one}:1.0") == first
    others = [plain, identity(f"{one}:0.5"), identity(str(one), str(one))]
    # Estimates are cached by the weights alone.
    assert len({first["weights"], *(other["weights"] for other in others)}) == 4
    assert first["lora"] == [f"{lora.read_lora(str(one)).sha256}:1.0"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("absent.safetensors", "the file does not exist; write FILE.safetensors or FILE:scale"),
        ("style.bin", "pickle files are not supported; convert the file to safetensors"),
        ("style.safetensors:nan", "the scale must be a number from -100 to 100"),
        ("style.safetensors:1.2.3", "the scale 1.2.3 is not a number; write FILE:0.8"),
        ("config.json", "the file must be a safetensors file"),
        ("broken.safetensors", "the file is damaged or not a safetensors file"),
        ("weights.safetensors", "the file contains no LoRA"),
        (
            "encoder.safetensors",
            "it also changes the text encoder, which is not supported; use a LoRA of the unet only",
        ),
        ("elsewhere.safetensors", "2 of its 4 tensors do not belong to the unet, a UNet2DConditionModel; the first is"),
        ("shape.safetensors", "it cannot be merged into the UNet2DConditionModel"),
        ("half.safetensors", "it cannot be merged into the UNet2DConditionModel: 1 tensors do not match the network"),
        ("dora.safetensors", "DoRA, LoKr and LoHa are not supported; only LoRA is"),
        ("magnitude.safetensors", "DoRA and biases are not supported; only LoRA layers A and B are"),
        ("pattern.safetensors", r"the metadata of the file \(lora_adapter_metadata\) is invalid"),
        ("prefix.safetensors", "it has a tensor other; the tensors of a LoRA for this network begin with unet"),
        ("nothing.safetensors", "it cannot be merged into the UNet2DConditionModel"),
    ],
)
def test_what_is_refused(
    folder: Path, factors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    b, a = factors[ATTENTION]
    one = {ATTENTION: (b, a)}
    save(tmp_path / "style.safetensors", one)
    (tmp_path / "style.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "broken.safetensors").write_bytes(b"not a header")
    save_file({"conv_in.weight": a}, "weights.safetensors")
    tensors = load_file("style.safetensors")
    moved = {key.replace("unet.", "text_encoder."): value.clone() for key, value in tensors.items()}
    save_file(tensors | moved, "encoder.safetensors")
    save(Path("elsewhere.safetensors"), {**one, "down_blocks.9.to_q": (b.clone(), a.clone())})
    save(Path("shape.safetensors"), {ATTENTION: (b, torch.zeros(RANK, 3))})
    save_file({f"unet.{ATTENTION}.lora_B.weight": b}, "half.safetensors")
    save_file(tensors | {f"unet.{ATTENTION}.dora_scale": b.clone()}, "dora.safetensors")
    save_file(tensors | {f"unet.{ATTENTION}.lora_magnitude_vector": b[:, 0].clone()}, "magnitude.safetensors")
    metadata = json.dumps({"unet.r": RANK, "unet.alpha_pattern": {"(a+)+$": 3}})
    save(Path("pattern.safetensors"), one, lora_adapter_metadata=metadata)
    save(Path("prefix.safetensors"), one, prefix="other.")
    save(Path("nothing.safetensors"), {ATTENTION: (b * float("nan"), a)})
    with pytest.raises(UserError, match=says) as error:
        load(folder, show=True, lora=(given,))
    assert "\n" not in str(error.value)
    assert f'lora="{given}"' in str(error.value)


def test_a_network_without_lora_and_a_missing_peft_are_one_line(
    folder: Path, factors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(save(tmp_path / "style.safetensors", factors))
    DDIMPipeline(tiny_unet(1), DDIMScheduler()).save_pretrained(tmp_path / "pixel")
    with pytest.raises(UserError, match=r"requires a text-to-image pipeline of diffusers, but .*pixel is not one"):
        load(tmp_path / "pixel", lora=(file,))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"`lora` requires the package peft; install it with `pip install 'samplerbench"
    ):
        load(folder, show=True, lora=(file,))


@pytest.mark.parametrize("text", ["a:b.safetensors", "C:/style.safetensors"])
def test_a_colon_in_a_name_is_not_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(lora, "is_file", lambda file: True)
    monkeypatch.setattr(lora, "hash_files", lambda files: "0")
    read: Callable[[str], Any] = lora.read_lora
    assert (str(read(text).file), read(text).scale) == (text, 1.0)
    assert (str(read(f"{text}:-2e-1").file), read(f"{text}:-2e-1").scale) == (text, -0.2)
