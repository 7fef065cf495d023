"""Metrics of text-to-image models: clip-score, pick-score, cmmd and fd-dinov2, against formulas and torchmetrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import CPU
from diffusers import DDIMScheduler
from support.encoders import save_clip, save_dinov2
from support.pipelines import PROMPTS, SD_BETAS, tiny_stable_diffusion
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.cli.app import main
from samplerbench.data import load_data
from samplerbench.data.grid import save_grid
from samplerbench.errors import UserError
from samplerbench.metrics import Batch, Context, Moments, Reference
from samplerbench.metrics.cmmd import biased_mmd
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.prompt_scores import ClipScore, PickScore
from samplerbench.sampling import Inputs

NOWHERE = Reference(Moments(4), {"name": "", "split": "", "n": 0, "sha256": ""}, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text-to-image model, a CLIP, a DINOv2 and real images."""
    made = tmp_path_factory.mktemp("text")
    tiny_stable_diffusion(made, DDIMScheduler(**SD_BETAS, clip_sample=False)).save_pretrained(made / "sd")
    save_clip(made / "clip")
    save_dinov2(made / "dinov2")
    (made / "real").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i, image in enumerate(torch.randint(0, 256, (9, 3, 16, 16), generator=generator, dtype=torch.uint8)):
        save_grid(image[None], made / "real" / f"{i}.png", least_side=1, gap=0)
    return made


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def model(folder: Path, prompts: list[str] = PROMPTS) -> Any:
    return samplerbench.load_model(folder / "sd", prompts=prompts)


def batch(images: Tensor, features: Tensor, prompts: tuple[str, ...], chosen: Tensor | None = None) -> Batch:
    inputs = None if chosen is None else Inputs(len(images), prompts=chosen)
    return Batch(images, features, None, torch.arange(len(images)), prompts=prompts, inputs=inputs)


def some_images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 28, 28), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


WORDS = ("a red cat", "two dogs", "the sea", "a b c", "nothing", "mountains at")


# --- CLIP score and PickScore ----------------------------------------------------------------------------------------


def test_the_scores_of_single_images_are_torchmetrics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size of the model, where nothing is resized: transformers' processors resize by several libraries."""
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    images = some_images(len(WORDS))
    clip = transformers.CLIPModel.from_pretrained(folder / "clip").eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder / "clip")
    for name in ("get_image_features", "get_text_features"):  # transformers 5 gives the features in an output
        features_of = getattr(clip, name)
        monkeypatch.setattr(clip, name, lambda *a, of=features_of, **k: getattr(r := of(*a, **k), "pooler_output", r))
    theirs, _ = _clip_score_update(list(images), list(WORDS), clip, processor)
    theirs = theirs.detach().double()
    assert float(theirs.min()) < 0 < float(theirs.max()), "no cosine is cut off"

    extractor = load_extractor(f"clip:{folder / 'clip'}", CPU)
    features = extractor(images)
    context = Context(NOWHERE, prompts=extractor.prompts)
    for i, word in enumerate(WORDS):
        accumulator = ClipScore().start(context)
        accumulator.update(batch(images[i : i + 1], features[i : i + 1], (word,)))
        assert accumulator.result() == {"value": pytest.approx(max(float(theirs[i]), 0), abs=2e-4)}
    whole = ClipScore().start(context)
    whole.update(batch(images, features, WORDS))
    entry = whole.result()
    scores = theirs.clamp(min=0)
    assert entry["value"] == pytest.approx(float(scores.mean()), abs=1e-4)
    assert entry["standard_error"] == pytest.approx(float(scores.std()) / math.sqrt(len(WORDS)), abs=1e-4)


def test_pick_score_is_the_models_own_logit(folder: Path) -> None:
    """`logits_per_image` of transformers is exp(logit_scale) times the cosines."""
    images = some_images(len(WORDS))
    clip = transformers.CLIPModel.from_pretrained(folder / "clip").eval()
    processor = transformers.CLIPProcessor.from_pretrained(folder / "clip")
    inputs = processor(
        text=list(WORDS), images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=16
    )
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image.diagonal().double()
    extractor = load_extractor(f"clip:{folder / 'clip'}", CPU)
    accumulator = PickScore().start(Context(NOWHERE, prompts=extractor.prompts))
    accumulator.update(batch(images, extractor(images), WORDS))
    assert accumulator.result()["value"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert float(expected.min()) < 0, "PickScore is not cut off at 0"


def test_a_run_has_the_scores_of_its_own_images(folder: Path, tmp_path: Path) -> None:
    """By the formula, from the images that `sample` gives and the prompt of each of them."""
    clip = folder / "clip"
    metrics = [f"clip-score:model={clip}", f"pick-score:model={clip},processor="]
    how: dict[str, Any] = {"steps": 3, "n": 7, "batch_size": 3, "seed": 4}
    results = samplerbench.evaluate("ddim", model=model(folder), metrics=metrics, out=tmp_path, quiet=True, **how)
    (record,) = results.records
    pixels = samplerbench.sample("ddim", model=model(folder), quiet=True, **how)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(7)]
    extractor = load_extractor(f"clip:{clip}", CPU)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
    text = transformers.CLIPTextModelWithProjection.from_pretrained(clip)
    with torch.no_grad():
        tokens = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=16)
        embeddings = torch.nn.functional.normalize(text(**tokens).text_embeds.double(), dim=1)
    cosines = (torch.nn.functional.normalize(extractor(pixels).double(), dim=1) * embeddings).sum(dim=1)
    entries = record["metrics"]
    assert entries["clip-score"]["value"] == pytest.approx(float((100 * cosines).clamp(min=0).mean()), abs=1e-3)
    assert entries["pick-score"]["value"] == pytest.approx(math.exp(1.5) * float(cosines.mean()), abs=1e-4)
    assert entries["clip-score"]["features"] == "clip:clip"
    assert entries["clip-score"]["better"] == "higher"
    # Seven images of three prompts: the error is that within prompts.
    scores = (100 * cosines).clamp(min=0).numpy()
    variance = sum(len(s) * s.var(ddof=1) for s in (scores[k::3] for k in range(3))) / 49
    assert entries["clip-score"]["standard_error"] == pytest.approx(math.sqrt(variance), abs=1e-3)
    spaces = record["protocol_fields"]["feature spaces"]
    assert spaces[f"clip:{clip}"]["features"] == extractor.identity
    assert spaces[f"clip:{clip}"]["reference"] is None


def test_prompts_with_one_image_each_are_strata_together() -> None:
    """Two images of prompt 0, and one of prompts 1 and 2, which form one stratum."""
    features = torch.nn.functional.normalize(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), dim=1)

    class First:
        scale = 1.0

        def embed(self, prompts: tuple[str, ...]) -> Tensor:
            return torch.tensor([[1.0, 0, 0, 0]]).expand(len(prompts), -1)

    chosen = torch.tensor([0, 1, 0, 2])
    accumulator = PickScore().start(Context(NOWHERE, stratified=True, prompts=First()))
    accumulator.update(batch(some_images(4), features, ("x",) * 4, chosen))
    values = features[:, 0].double().numpy()
    variance = (2 * values[[0, 2]].var(ddof=1) + 2 * values[[1, 3]].var(ddof=1)) / 16
    assert accumulator.result()["standard_error"] == pytest.approx(math.sqrt(variance), rel=1e-6)


@pytest.mark.slow
def test_long_prompts_are_announced_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cat\nthe sea at midnight and the sky\nmountains under the clouds\n")
    base = ["run", "-m", str(folder / "sd"), "--prompts", str(file), "-s", "ddim", "--steps", "2,3", "--n", "3"]
    clip = folder / "clip"
    metrics = ["--metric", f"clip-score:model={clip}", "--metric", f"pick-score:model={clip},processor="]
    assert run([*base, *metrics, "--out", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    line = "note: 2 of 3 prompts are longer than the 16 tokens of clip:clip; the scores are of the first tokens."
    assert " ".join(error.split()).count(line) == 1


def test_a_model_without_prompts_is_refused(folder: Path, tmp_path: Path) -> None:
    for spec in (f"clip-score:model={folder / 'clip'}", f"pick-score:model={folder / 'clip'},processor="):
        with pytest.raises(UserError, match=r"the metric (clip|pick)-score needs prompts: use a text-to-image model"):
            samplerbench.evaluate("ddim", steps=2, n=4, model="digits", metrics=[spec], out=tmp_path, quiet=True)


def test_a_metric_names_its_model_in_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'the metric clip-score: no encoder "nowhere"'):
        samplerbench.evaluate(
            "ddim", steps=2, n=3, model=model(folder), metrics=["clip-score:model=nowhere"], out=tmp_path, quiet=True
        )


# --- CMMD ------------------------------------------------------------------------------------------------------------


def test_cmmd_is_the_mean_over_all_pairs() -> None:
    """1000 (mean k(x,x') + mean k(y,y') - 2 mean k(x,y)), with the pairs of a row with itself, pair by pair."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(7, 6, generator=generator), torch.randn(9, 6, generator=generator) + 1
    a, b = (rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True) for rows in (x.double(), y.double()))

    def mean(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.mean([math.exp(-sum((u - v) ** 2) / (2 * 10**2)) for u in p for v in q]))

    value, error = biased_mmd(x, y)
    assert value == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-9)
    assert 0 < error < value
    assert biased_mmd(x, x)[0] == pytest.approx(0, abs=1e-9)


def test_the_error_of_cmmd_is_the_spread_of_repeated_values() -> None:
    generator = torch.Generator().manual_seed(6)
    values, errors = [], []
    for _ in range(200):
        x = torch.randn(60, 5, generator=generator)
        y = torch.randn(80, 5, generator=generator) + torch.tensor([1.5, 0, 0, 0, 0])
        value, error = biased_mmd(x, y)
        values.append(value)
        errors.append(error)
    assert float(np.mean(errors)) == pytest.approx(float(np.std(values, ddof=1)), rel=0.2)


@pytest.mark.slow
def test_cmmd_and_fd_dinov2_of_a_run(folder: Path, tmp_path: Path) -> None:
    specs = [
        f"cmmd:model={folder / 'clip'}",
        f"fd-dinov2:model={folder / 'dinov2'}",
        f"fid:features=clip:{folder}/clip",
    ]
    how: dict[str, Any] = {"steps": 3, "n": 6, "seed": 2}
    results = samplerbench.evaluate(
        "ddim",
        model=model(folder),
        metrics=specs,
        data=str(folder / "real"),
        out=tmp_path,
        quiet=True,
        batch_size=4,
        **how,
    )
    (record,) = results.records
    pixels = samplerbench.sample("ddim", model=model(folder), quiet=True, **how)
    real = load_data(str(folder / "real")).images
    entries = record["metrics"]
    cmmd = load_extractor(f"cmmd:{folder / 'clip'}", CPU)
    assert entries["cmmd"]["value"] == pytest.approx(biased_mmd(cmmd(pixels), cmmd(real))[0], rel=1e-3)
    for name, space in (("fd-dinov2", f"dinov2:{folder / 'dinov2'}"), ("fid", f"clip:{folder / 'clip'}")):
        extractor = load_extractor(space, CPU)
        expected = frechet_distance(*(Moments.of(extractor(part)) for part in (pixels, real)))
        assert entries[name]["value"] == pytest.approx(expected, rel=1e-3)
        assert entries[name]["features"] == extractor.name


@pytest.mark.slow
def test_statistics_of_an_encoder_are_a_reference(folder: Path, tmp_path: Path) -> None:
    file, space = tmp_path / "real.safetensors", f"dinov2:{folder / 'dinov2'}"
    assert run(["stats", str(folder / "real"), "--features", space, "--out", str(file)]) == 0
    how: dict[str, Any] = {"steps": 2, "n": 4, "metrics": [f"fd-dinov2:model={folder / 'dinov2'}"], "quiet": True}
    values = []
    for data in (file, folder / "real"):
        results = samplerbench.evaluate("ddim", model=model(folder), data=str(data), out=tmp_path / data.stem, **how)
        values.append(results.records[0]["metrics"]["fd-dinov2"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.slow
def test_few_images_for_fd_dinov2_are_announced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "-m", str(folder / "sd"), "--prompt", "a cat", "-s", "ddim", "--steps", "2", "--n", "5"]
    metric = ["--metric", f"fd-dinov2:model={folder / 'dinov2'}", "--data", str(folder / "real")]
    assert run([*base, *metric, "--out", str(tmp_path)]) == 0
    assert "5 images for 16 features" in " ".join(capsys.readouterr().err.split())


def test_the_default_models_are_those_of_the_sources() -> None:
    spaces = {name: registry.parse("metric", name).feature_space for name in ("clip-score", "cmmd", "fd-dinov2")}
    assert spaces == {
        "clip-score": "clip:openai/clip-vit-large-patch14",
        "cmmd": "cmmd:openai/clip-vit-large-patch14-336",
        "fd-dinov2": "dinov2:facebook/dinov2-large",
    }
    assert registry.parse("metric", "pick-score").feature_space == (
        "clip:yuvalkirstain/PickScore_v1+laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    )
