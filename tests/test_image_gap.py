"""psnr-gap and lpips-gap: against torchmetrics, closed forms, and the images of the converged solution itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from support.lpips_weights import reference, save
from support.pipelines import PROMPTS, SD_BETAS, tiny_stable_diffusion
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.metrics import Batch, Context, Moments, Reference
from samplerbench.metrics.guarded import Guarded

NOWHERE = Reference(Moments(1), {"name": "", "split": "", "n": 0, "sha256": ""}, {})


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def measured(spec: str, images: Tensor, converged: Tensor, cut: int = 0) -> dict[str, Any]:
    """The result for these images, in two batches that are merged if `cut` is not 0."""
    context = Context(NOWHERE, n=len(images), solve_images=lambda index, _: converged[index])
    whole = Guarded(registry.parse("metric", spec), context)
    for rows in torch.arange(len(images)).split(cut or len(images)):
        part = Guarded(whole.metric, context)
        part.update(Batch(images[rows], torch.empty(len(rows), 0), None, rows))
        whole.merge(part.state())
    return whole.result()


def pictures(n: int, side: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


# --- PSNR ------------------------------------------------------------------------------------------------------------


def test_the_psnr_is_the_mean_of_single_images_with_the_range_255() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    x, y = pictures(5, 12), pictures(5, 12, seed=1)
    y[2] = (x[2].int() + 3).clamp(max=255).to(torch.uint8)
    each = [float(peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0)) for a, b in zip(x, y, strict=True)]
    entry = measured("psnr-gap", x, y)
    assert entry["value"] == pytest.approx(sum(each) / 5, rel=1e-6)  # its logarithm is in float32
    assert entry["standard_error"] == pytest.approx(float(torch.tensor(each).double().std()) / math.sqrt(5), rel=1e-6)
    assert entry["equal"] == 0
    assert measured("psnr-gap", x, y, cut=2) == {k: pytest.approx(v, rel=1e-12) for k, v in entry.items()}


def test_equal_images_count_60_db() -> None:
    """One level in one of 768 values is 10 log10(255² · 768) = 77 dB, and limited too; one level everywhere is not."""
    x = pictures(4, 16).clamp(max=250)
    y = x.clone()
    y[1, 0, 0, 0] += 1
    y[2] += 1
    y[3] += 2
    expected = [60, 60, 10 * math.log10(255**2), 10 * math.log10(255**2 / 4)]
    entry = measured("psnr-gap", x, y)
    assert entry["value"] == pytest.approx(sum(expected) / 4, rel=1e-12)
    assert entry["equal"] == 0.25


def test_the_psnr_rises_with_the_steps_and_is_60_for_the_solution_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "-m", "exact:mixture", "--n", "24", "--metric", "psnr-gap", "--json", "--out", str(tmp_path)]
    assert run(*base, "-s", "ddim", "-s", "heun", "--steps", "10,40") == 0
    ddim10, ddim40, heun10, heun40 = (r["metrics"]["psnr-gap"]["value"] for r in json.loads(capsys.readouterr().out))
    assert 10 < ddim10 < ddim40 < heun40
    assert ddim10 < heun10
    assert run(*base, "-s", "pf-ode:solver=rk45,rtol=1e-5,atol=1e-5") == 0
    (same,) = json.loads(capsys.readouterr().out)
    assert (same["metrics"]["psnr-gap"]["value"], same["metrics"]["psnr-gap"]["equal"]) == (60, 1)


@pytest.mark.slow
def test_a_latent_models_images_are_compared_after_decoding(tmp_path: Path) -> None:
    """Against the images that `sample` gives for the sampler and for the converged solver; a part of each block."""
    tiny_stable_diffusion(tmp_path, DDIMScheduler(**SD_BETAS, clip_sample=False)).save_pretrained(tmp_path / "sd")
    model = samplerbench.load_model(tmp_path / "sd", prompts=PROMPTS)
    how: dict[str, Any] = {"n": 3, "seed": 3, "quiet": True, "model": model}
    spec = "psnr-gap:images=2,tol=0.01"
    results = samplerbench.evaluate("ddim", steps=3, metrics=[spec], out=tmp_path / "out", batch_size=2, **how)
    entry = results.records[0]["metrics"]["psnr-gap"]
    x = samplerbench.sample("ddim", 3, **how)[:2]
    y = samplerbench.sample("pf-ode:solver=rk45,rtol=0.01,atol=0.01", **how)[:2]
    error = (x.double() - y.double()).square().flatten(1).mean(dim=1)
    each = (10 * torch.log10(255**2 / error)).clamp(max=60)
    assert float(each.max()) < 60
    # An adaptive solver chooses its steps for a batch, so that its last digits depend on the batch.
    assert entry["value"] == pytest.approx(float(each.mean()), abs=0.3)
    assert (entry["features"], entry["reference"]) == ("", "")


def test_a_sampler_that_draws_noise_has_no_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--metric", "psnr-gap:tol=0.01", "--json", "--out", str(tmp_path)]
    assert run("run", "-m", "exact:mixture", "-s", "ddpm", "--steps", "3", "--n", "4", *out) == 0
    assert json.loads(capsys.readouterr().out)[0]["metrics"] == {}


def test_one_solution_serves_all_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from samplerbench.bench import cell_run

    solved: list[int] = []
    generate = cell_run.generate

    def counted(model: Any, cell: Any, index: Tensor, *more: Any, **options: Any) -> Any:
        solved.append(len(index))
        return generate(model, cell, index, *more, **options)

    monkeypatch.setattr(cell_run, "generate", counted)
    metrics = ["gap:tol=0.01", "psnr-gap:tol=0.01"]
    samplerbench.evaluate("ddim", steps=[2, 3], n=4, model="exact:mixture", metrics=metrics, out=tmp_path, quiet=True)
    assert solved == [4]


# --- LPIPS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(reference("alex"), tmp_path_factory.mktemp("lpips") / "alex.safetensors")


@pytest.mark.parametrize(
    ("net", "side", "channels"),
    [("alex", 31, 3), ("alex", 64, 1), pytest.param("vgg", 33, 3, marks=pytest.mark.slow)],
)
def test_lpips_is_torchmetrics_with_the_same_weights(tmp_path: Path, net: str, side: int, channels: int) -> None:
    network = reference(net)
    file = save(network, tmp_path / "weights.safetensors")
    x, y = pictures(3, side, channels), pictures(3, side, channels, seed=1)
    a, b = ((images.expand(-1, 3, -1, -1) / 127.5 - 1) for images in (x, y))
    with torch.no_grad():
        expected = network(a, b).flatten().double()
    entry = measured(f"lpips-gap:weights={file}", x, y)
    assert entry["value"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert entry["standard_error"] == pytest.approx(float(expected.std()) / math.sqrt(3), rel=1e-2)
    assert measured(f"lpips-gap:weights={file}", x, y, cut=2)["value"] == pytest.approx(entry["value"], rel=1e-6)
    assert measured(f"lpips-gap:weights={file}", x, x) == {"value": 0, "equal": 1, "standard_error": 0}


def test_lpips_of_a_run_records_the_hash_of_its_weights(alex: Path, tmp_path: Path) -> None:
    import hashlib

    spec = f"lpips-gap:weights={alex},tol=0.01"
    how: dict[str, Any] = {"steps": 3, "n": 2, "model": "exact:mixture,shape=3x32x32", "quiet": True}
    results = samplerbench.evaluate("ddim", metrics=[spec], out=tmp_path, **how)
    (record,) = results.records
    sha256 = hashlib.sha256(alex.read_bytes()).hexdigest()
    assert list(record["protocol_fields"]["metric sources"].values()) == [f"lpips-alex {sha256}"]
    assert record["metrics"]["lpips-gap"]["value"] > 0


def test_lpips_needs_its_weights(alex: Path, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking.safetensors"
    save_file({"net.slice1.0.weight": torch.zeros(64, 3, 11, 11)}, lacking)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    for spec, says in (
        ("lpips-gap", "the metric lpips-gap needs weights: lpips-gap:weights=FILE.safetensors"),
        (f"lpips-gap:weights={tmp_path}/none.safetensors", "do not exist"),
        (f"lpips-gap:weights={broken}", "are not a safetensors file"),
        (f"lpips-gap:weights={lacking}", "has no tensor net.slice1.0.bias; write it from the state dict"),
        (f"lpips-gap:weights={alex}", "needs images of at least 31 pixels a side, and the model's have 8"),
    ):
        with pytest.raises(UserError) as caught:
            samplerbench.evaluate("ddim", steps=2, n=2, model="digits", metrics=[spec], out=tmp_path, quiet=True)
        assert says in str(caught.value), spec
        assert "\n" not in str(caught.value)
