"""Image encoders of transformers as feature spaces: against transformers, Pillow, and the formulas of the sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import CPU
from PIL import Image
from support.encoders import LENGTH, MEAN, SIDE, STD, save_clip, save_dinov2, save_processor
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.metrics import encoders
from samplerbench.metrics.extractors import known_dimension, load_extractor

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("dinov2") / "tiny-dinov2")


def some_images(height: int, width: int, n: int = 3) -> Tensor:
    """Smooth images with noise, (n, 3, height, width) uint8."""
    generator = torch.Generator().manual_seed(height)
    waves = torch.sin(torch.linspace(0, 9, height))[:, None] * torch.cos(torch.linspace(0, 7, width))[None]
    noise = torch.randn(n, 3, height, width, generator=generator)
    return (127 + 80 * waves + 30 * noise).clamp(0, 255).to(torch.uint8)


def normalised(x: Tensor, mean: list[float], std: list[float]) -> Tensor:
    return (x - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


def cubic(a: float, distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel (1981, equation 4), whose free parameter is a."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def cubic_matrix(source: int, target: int, scale: float) -> Tensor:
    """(target, source) float64: bicubic interpolation along one axis, a = -0.75, the border repeated."""
    weights = np.zeros((target, source))
    for i in range(target):
        at = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(j, 0), source - 1)] += cubic(-0.75, np.array(at - j))
    return torch.from_numpy(weights)


# --- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(28, 28), (28, 40), (61, 47), (16, 33)])
def test_the_features_of_clip_are_those_of_transformers_with_its_processor(clip: Path, size: tuple[int, int]) -> None:
    images = some_images(*size)
    extractor = load_extractor(f"clip:{clip}", CPU)
    cls = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = cls.from_pretrained(clip)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    pixels = torch.as_tensor(np.stack(processor(pictures)["pixel_values"]))
    torch.testing.assert_close(extractor.module.preprocessing(images), pixels, rtol=0, atol=1e-6)
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(clip)
    with torch.no_grad():
        expected = model(pixel_values=pixels).image_embeds
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)


def test_the_embeddings_of_prompts_are_those_of_transformers(clip: Path) -> None:
    prompts = ["a red cat", "the sea at midnight and more", "two dogs"]
    encoder = load_extractor(f"clip:{clip}", CPU).prompts
    assert encoder is not None
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    model = transformers.CLIPTextModelWithProjection.from_pretrained(clip)
    for prompt in prompts:  # one at a time, without padding
        tokens = tokenizer([prompt], truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            expected = model(**tokens).text_embeds
        torch.testing.assert_close(encoder.embed([prompt]), expected, rtol=1e-4, atol=1e-5)
    assert encoder.truncated(prompts) == 1
    assert encoder.length == LENGTH
    assert encoder.scale == pytest.approx(np.exp(1.5))


def test_each_prompt_is_encoded_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_extractor(f"clip:{clip}", CPU).prompts
    assert encoder is not None
    passes: list[int] = []
    forward = encoder.model.text_model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(encoder.model.text_model, "forward", counted)
    first = encoder.embed(["a cat", "a dog", "a cat"])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(encoder.embed(["a dog", "a cat"]), first[[1, 0]])
    assert passes == [2]


@pytest.mark.parametrize("size", [(28, 28), (64, 48), (20, 35)])
def test_cmmd_resizes_without_antialiasing(clip: Path, size: tuple[int, int]) -> None:
    """Bicubic interpolation of the four nearest pixels along each axis, by its formula."""
    images = some_images(*size)
    preprocessing = load_extractor(f"cmmd:{clip}", CPU).module.preprocessing
    down, across = (cubic_matrix(s, SIDE, SIDE / s) for s in size)
    resized = (down @ (images.double() / 255) @ across.T).float()
    torch.testing.assert_close(preprocessing(images), normalised(resized, MEAN, STD), rtol=0, atol=2e-5)


def test_cmmd_with_antialiasing_is_another_space(clip: Path) -> None:
    images = some_images(64, 64)
    plain, smooth = (load_extractor(f"{kind}:{clip}", CPU) for kind in ("cmmd", "cmmd-antialiased"))
    expected = float_resize(images / 255, SIDE)
    torch.testing.assert_close(smooth.module.preprocessing(images), normalised(expected, MEAN, STD), rtol=0, atol=2e-5)
    assert float((plain(images) - smooth(images)).abs().max()) > 1e-2
    assert plain.identity["preprocessing"] != smooth.identity["preprocessing"]
    assert (plain.name, smooth.name) == ("cmmd:tiny-clip", "cmmd-antialiased:tiny-clip")


def float_resize(images: Tensor, side: int) -> Tensor:
    """Pillow's antialiased bicubic filter on float images, which it does not round."""
    resized = [
        [np.asarray(Image.fromarray(c.numpy(), "F").resize((side, side), Image.Resampling.BICUBIC)) for c in image]
        for image in images.float()
    ]
    return torch.from_numpy(np.array(resized))


def test_the_features_do_not_depend_on_the_batch(clip: Path, dinov2: Path) -> None:
    images = some_images(40, 40, n=5)
    for name in (f"clip:{clip}", f"cmmd:{clip}", f"dinov2:{dinov2}"):
        extractor = load_extractor(name, CPU)
        parts = torch.cat([extractor(images[:2]), extractor(images[2:])])
        torch.testing.assert_close(extractor(images), parts, rtol=1e-5, atol=1e-6)


def test_grey_images_are_repeated(clip: Path) -> None:
    images = some_images(40, 40)[:, :1]
    extractor = load_extractor(f"clip:{clip}", CPU)
    assert torch.equal(extractor(images), extractor(images.expand(-1, 3, -1, -1)))


# --- DINOv2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "size"), [(5, (64, 64)), (5, (300, 260)), (4, (224, 224)), (9, (32, 48))])
def test_the_features_of_dinov2_are_those_of_the_authors_formula(
    tmp_path: Path, grid: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resized by Pillow's filter in float; position embeddings interpolated with the scale (4 + 0.1)/grid."""
    folder = save_dinov2(tmp_path / "dinov2", grid)
    images = some_images(*size)
    features = load_extractor(f"dinov2:{folder}", CPU)(images)

    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    positions = model.embeddings.position_embeddings.detach().double()
    patches = positions[0, 1:].reshape(grid, grid, -1)
    if grid != 4:
        matrix = cubic_matrix(grid, 4, (4 + 0.1) / grid)
        patches = torch.einsum("ij,kl,jlc->ikc", matrix, matrix, patches)
    expected_positions = torch.cat([positions[0, :1], patches.reshape(16, -1)])[None].float()
    pixels = normalised(float_resize(images / 255, 224), IMAGENET_MEAN, IMAGENET_STD)
    monkeypatch.setattr(model.embeddings, "interpolate_pos_encoding", lambda *_: expected_positions)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_transformers_own_interpolation_would_give_other_features(dinov2: Path) -> None:
    images = some_images(224, 224)
    pixels = normalised(images / 255, IMAGENET_MEAN, IMAGENET_STD)
    model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
    with torch.no_grad():
        theirs = model(pixel_values=pixels).pooler_output
    assert float((load_extractor(f"dinov2:{dinov2}", CPU)(images) - theirs).abs().max()) > 1e-3


# --- Names, identity and errors --------------------------------------------------------------------------------------


def test_the_identity_has_the_model_the_rule_and_the_hash_of_the_files(clip: Path, tmp_path: Path) -> None:
    identity = load_extractor(f"clip:{clip}", CPU).identity
    assert identity["name"] == "clip:tiny-clip"
    assert identity["layer"] == "image_embeds"
    assert identity["preprocessing"] == (
        "shorter side 28, Pillow's bicubic; centre crop 28x28; mean 0.48 0.46 0.41; std 0.27 0.26 0.28"
    )
    assert len(identity["weights"]) == 64
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(clip, same)
    save_clip(other, seed=7)
    assert load_extractor(f"clip:{same}", CPU).identity["weights"] == identity["weights"]
    assert load_extractor(f"clip:{other}", CPU).identity["weights"] != identity["weights"]


def test_the_processor_may_be_in_another_folder(clip: Path, tmp_path: Path) -> None:
    bare, processor = save_clip(tmp_path / "bare", processor=False), tmp_path / "processor"
    processor.mkdir()
    save_processor(processor)
    name = f"clip:{bare}+{processor}"
    extractor = load_extractor(name, CPU)
    images = some_images(50, 40)
    torch.testing.assert_close(extractor(images), load_extractor(f"clip:{clip}", CPU)(images))
    assert extractor.name == "clip:bare+processor"
    assert known_dimension(name) == 4
    with pytest.raises(UserError, match="preprocessor_config"):
        load_extractor(f"clip:{bare}", CPU)


def test_the_number_of_features_is_known_without_the_weights(clip: Path, dinov2: Path) -> None:
    for name, size in ((f"clip:{clip}", 4), (f"cmmd:{clip}", 4), (f"dinov2:{dinov2}", 16)):
        assert known_dimension(name) == size == load_extractor(name, CPU)(some_images(30, 30)).shape[1]
    assert known_dimension("clip:owner/name") is None
    assert encoders.parse_space("dinov2-vit-l-14") is None


def test_no_classifier(clip: Path) -> None:
    with pytest.raises(UserError, match="clip:tiny-clip have no classifier"):
        load_extractor(f"clip:{clip}", CPU, metrics=["isc"])


def damage(folder: Path, what: str) -> None:
    if what == "no weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif what == "truncated":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:500])
    elif what == "tensors":
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        tensors.pop(next(name for name in tensors if "visual_projection" in name))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    elif what == "no tokenizer":
        (folder / "vocab.json").unlink()
    else:
        file, key, value = json.loads(what)
        content = json.loads((folder / file).read_text())
        content[key] = value
        (folder / file).write_text(json.dumps(content))


PROCESSOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no weights", "model.safetensors does not exist (pickle files, .bin, are not supported)"),
        ("truncated", "cannot be used as a CLIP model"),
        ("tensors", "1 tensors are missing from its weights, the first is visual_projection.weight"),
        ("no tokenizer", "has no tokenizer"),
        (
            json.dumps(["config.json", "model_type", "bert"]),
            'model_type in its config.json is "bert"; it must be "clip"',
        ),
        (json.dumps(["config.json", "attn_implementation", "owner/kernel"]), "refers to code on the hub"),
        (json.dumps([PROCESSOR, "resample", 9]), "resample is 9; it must be a whole number from 0 to 5"),
        (json.dumps([PROCESSOR, "image_mean", [0.1, 0.2]]), "image_mean is [0.1, 0.2]"),
        (json.dumps([PROCESSOR, "crop_size", 14]), "gives images of 14x14 pixels, but the encoder requires 28x28"),
        (json.dumps(["tokenizer_config.json", "model_max_length", 0]), "model_max_length in tokenizer_config.json"),
    ],
)
def test_a_damaged_folder_is_one_line(clip: Path, tmp_path: Path, what: str, says: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(clip, folder)
    damage(folder, what)
    with pytest.raises(UserError) as caught:
        load_extractor(f"clip:{folder}", CPU)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip:", 'the feature space "clip:" names no model; write clip:FOLDER or clip:OWNER/NAME'),
        ("clip:a/b+", "names no model"),
        ("dinov2:no-such-folder", 'no encoder "no-such-folder": it is neither a folder nor a hub id'),
        ("cmmd:/no/such/folder", "neither a folder nor a hub id"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, says: str) -> None:
    for use in (lambda: known_dimension(name), lambda: load_extractor(name, CPU)):
        with pytest.raises(UserError) as caught:
            use()
        assert says in str(caught.value)


def test_a_repository_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r'the model "facebook/dinov2-large" is not in the local cache and offline'):
        load_extractor("dinov2", CPU)


def test_a_dinov2_is_no_clip(dinov2: Path, clip: Path) -> None:
    with pytest.raises(UserError, match=r'model_type in its config.json is "dinov2"; it must be "clip"'):
        known_dimension(f"cmmd:{dinov2}")
    with pytest.raises(UserError, match=r'cannot be used as a DINOv2: .* is "clip"; it must be "dinov2"'):
        load_extractor(f"dinov2:{clip}", CPU)
