"""Text-to-image pipelines: the same images as diffusers' own pipelines, independent of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines import PROMPTS, configure, load
from support.text_pipelines import (
    TOLERANCE,
    check_batches,
    ddim,
    difference,
    our_images,
    pipeline_images,
    pixart,
    start,
    xl,
)

from samplerbench.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")


@pytest.mark.parametrize(
    ("negative", "force_zeros", "size"),
    [
        (None, True, None),
        pytest.param(None, False, None, marks=pytest.mark.slow),
        ("a dog", True, (16, 24)),
    ],
)
def test_stable_diffusion_xl_equals_its_pipeline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    negative: str | None,
    force_zeros: bool,
    size: tuple[int, int] | None,
) -> None:
    pipeline = xl(tmp_path, ddim(), force_zeros_for_empty_prompt=force_zeros)
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS), negative_prompt=negative, image_size=size)
    height, width = size or (16, 16)
    assert (model.shape, model.image_shape) == ((4, height // 2, width // 2), (3, height, width))
    call: dict[str, Any] = {"guidance_scale": 5.0, "height": height, "width": width}
    call |= {} if negative is None else {"negative_prompt": [negative] * 3}
    expected = pipeline_images(pipeline, start(model), monkeypatch, **call)
    ours = our_images(model, "ddim", "leading:offset=1", guidance="cfg:scale=5")
    assert difference(ours, expected) <= TOLERANCE
    if negative is None:
        empty = load(tmp_path / "model", prompts=tuple(PROMPTS), negative_prompt="", image_size=size)
        assert (empty.identity == model.identity) == (not force_zeros)
        assert float(empty.null_embeddings["pooled"].abs().max()) > 0  # type: ignore[attr-defined]
        zeros = float(model.null_embeddings["pooled"].abs().max()) == 0  # type: ignore[attr-defined]
        assert zeros == force_zeros
        check_batches(model, "ddim", "leading:offset=1", guidance="cfg:scale=5")


def test_a_refiner_is_refused(tmp_path: Path) -> None:
    xl(tmp_path, ddim()).save_pretrained(tmp_path / "model")
    configure(tmp_path / "model/model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(UserError, match=r"has no text_encoder: it is a refiner, .* not supported; use the base model"):
        load(tmp_path / "model", prompts=tuple(PROMPTS))


@pytest.mark.parametrize(
    ("cls", "sample_size", "size"),
    [
        pytest.param("PixArtAlphaPipeline", 8, None, marks=pytest.mark.slow),
        pytest.param("PixArtAlphaPipeline", 128, (16, 24), marks=pytest.mark.slow),
        ("PixArtSigmaPipeline", 8, None),
    ],
)
def test_pixart_equals_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: str, sample_size: int, size: tuple[int, int] | None
) -> None:
    pipeline = pixart(cls, sample_size)
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS), negative_prompt="fog", image_size=size)
    assert model.sized == (sample_size == 128)  # type: ignore[attr-defined]
    assert (model.doubled, model.learned_variance) == (True, False)
    height, width = size or (16, 16)
    call: dict[str, Any] = {"guidance_scale": 4.5, "height": height, "width": width, "negative_prompt": ["fog"] * 3}
    expected = pipeline_images(pipeline, start(model), monkeypatch, use_resolution_binning=False, **call)
    ours = our_images(model, "ddim", "leading:offset=1", guidance="cfg:scale=4.5")
    assert difference(ours, expected) <= TOLERANCE
    check_batches(model, "ddim", "leading:offset=1", guidance="cfg:scale=4.5")


def test_padding_tokens_have_no_effect(tmp_path: Path) -> None:
    """The embeddings of T5 are padded to the maximum length; the mask excludes the padding."""
    pixart("PixArtAlphaPipeline").save_pretrained(tmp_path / "model")
    model: Any = load(tmp_path / "model", prompts=tuple(PROMPTS))
    before = our_images(model, "ddim", None)
    for tensors in model.embeddings._kept.values():
        tensors["text"][tensors["mask"] == 0] = 7.0
    assert float((our_images(model, "ddim", None) - before).abs().max()) <= 1e-6
    for tensors in model.embeddings._kept.values():
        tensors["text"][tensors["mask"] == 1] += 1.0
    assert float((our_images(model, "ddim", None) - before).abs().max()) > 1e-3
    assert torch.equal(model.embeddings.rows([1])["mask"][0], model.embeddings._kept[1]["mask"])
