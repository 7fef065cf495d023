"""KID, inception score, precision, recall, FID∞, label accuracy and gap: against torch-fidelity and closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity import calculate_metrics
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from samplerbench.bench.generate import SamplerOnModel
from samplerbench.cli.app import main
from samplerbench.data import load_data
from samplerbench.data.grid import save_grid
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.fid_infinity import extrapolate
from samplerbench.metrics.inception_score import inception_scores
from samplerbench.metrics.kernel import squared_mmd
from samplerbench.metrics.manifold import coverage
from samplerbench.metrics.moments import Moments


def draws(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_kid_is_torch_fidelitys_on_one_subset_of_everything() -> None:
    x, y = draws(150, 8, 0, 0.3), draws(150, 8, 1)
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=150, kid_degree=3, verbose=False)
    assert squared_mmd(x, y)[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


@pytest.mark.slow
def test_kid_is_unbiased_and_its_error_is_the_spread_over_repeats() -> None:
    pairs = [squared_mmd(draws(100, 4, 2 * i, 0.4), draws(140, 4, 2 * i + 1)) for i in range(300)]
    values, errors = np.array(pairs).T
    far = squared_mmd(draws(6000, 4, 1000, 0.4), draws(6000, 4, 1001))
    assert abs(values.mean() - far[0]) <= 4 * math.hypot(values.std() / math.sqrt(300), far[1])
    # The standard deviation of 300 values is known to 4%.
    assert np.median(errors) == pytest.approx(values.std(), rel=0.2)
    same = [squared_mmd(draws(60, 4, 3 * i), draws(60, 4, 3 * i + 1))[0] for i in range(300)]
    assert abs(np.mean(same)) <= 4 * np.std(same) / math.sqrt(300)


def test_the_inception_score_is_torch_fidelitys() -> None:
    logits = draws(203, 10, 0) * 3
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    ours = inception_scores(logits, 10)
    assert float(ours.mean()) == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert float(ours.std(correction=0)) == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    generated, real = draws(300, 5, 0, 0.5), draws(260, 5, 1)
    precision, recall = calculate_precision_recall_full(generated, real, 3)
    assert coverage(generated, real, 3, chunk=64) == pytest.approx(precision, abs=1e-6)
    assert coverage(real, generated, 3, chunk=64) == pytest.approx(recall, abs=1e-6)


def test_fid_infinity_removes_the_bias_of_few_images() -> None:
    """Features of the reference's own distribution: FID is biased upwards by the sample size, FID∞ is about 0."""
    reference = Moments.of(draws(200_000, 4, 0))
    found = [extrapolate(draws(1500, 4, seed), reference, 15) for seed in range(1, 13)]
    plain = [float(v) for v in (fid_of(draws(1500, 4, seed), reference) for seed in range(1, 13))]
    values = np.array([value for value, _ in found])
    assert abs(values.mean()) < np.mean(plain) / 3
    assert all(error > 0 for _, error in found)


def fid_of(features: Tensor, reference: Moments) -> float:
    from samplerbench.metrics.frechet import frechet_distance

    return frechet_distance(Moments.of(features), reference)


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_the_run_gives_what_torch_fidelity_gives_on_the_same_pngs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tolerance 1e-4 relative: torch-fidelity takes float32 means and, for KID, float32 kernels."""
    n = 150
    cell = ["-s", "ddim", "--steps", "5", "--n", str(n), "--labels", "3"]  # of one label: independent draws
    metrics = [
        f"--metric={m}" for m in ("fid", "kid", "inception-score:splits=1", "precision", "recall", "label-accuracy")
    ]
    assert (
        run(["run", *cell, *metrics, "--data", write_digits(tmp_path / "real", n), "--json", "--out", str(tmp_path)])
        == 0
    )
    (record,) = json.loads(capsys.readouterr().out)
    ours = {name: entry["value"] for name, entry in record["metrics"].items()}
    assert (
        run(
            [
                "sample",
                str(tmp_path / "g.png"),
                "-s",
                "ddim",
                "--steps",
                "5",
                "--labels",
                "3",
                "--n",
                str(n),
                "--png-dir",
                str(tmp_path / "fake"),
            ]
        )
        == 0
    )
    load_extractor("digits-cnn", torch.device("cpu"))
    theirs: dict[str, Any] = calculate_metrics(
        input1=str(tmp_path / "fake"),
        input2=str(tmp_path / "real"),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        isc_splits=1,
        kid_subsets=1,
        kid_subset_size=n,
        feature_extractor="digits-cnn",
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=50,
    )
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4, abs=1e-3)
    assert ours["inception-score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1.5 / n)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1.5 / n)
    assert 0.9 < ours["label-accuracy"] <= 1


def write_digits(folder: Path, n: int) -> str:
    folder.mkdir()
    for i, image in enumerate(load_data("digits").images[:n]):
        save_grid(image[None], folder / f"{i:04d}.png", least_side=1, gap=0)
    return str(folder)


def test_the_gap_falls_with_the_steps_and_is_nothing_for_the_solution_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "-m", "exact:mixture", "--n", "24", "--metric", "gap", "--json", "--out", str(tmp_path)]
    assert run([*base, "-s", "ddim", "-s", "heun", "--steps", "10,40", "--spacing", "karras"]) == 0
    ddim10, ddim40, heun10, heun40 = (r["metrics"]["gap"]["value"] for r in json.loads(capsys.readouterr().out))
    # A squared distance of a method of order p falls by 4^(2p), here with N = 10 hardly in the asymptotic regime.
    assert ddim40 < ddim10 / 6
    assert heun40 < heun10 / 30
    assert heun40 < ddim40
    assert run([*base, "-s", "pf-ode:solver=rk45,rtol=1e-5,atol=1e-5"]) == 0
    (same,) = json.loads(capsys.readouterr().out)
    assert same["metrics"]["gap"]["value"] == 0


def test_the_gap_of_a_part_is_that_parts_and_a_stochastic_sampler_goes_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "-m", "exact:mixture", "--json", "--steps", "10", "-b", "7", "--spacing", "karras"]
    part = ["-s", "ddim", "-s", "ddim:eta=1", "--n", "24", "--blocks", "2", "--metric", "gap:images=10"]
    assert run([*base, *part, "--out", str(tmp_path / "part")]) == 0
    deterministic, stochastic = json.loads(capsys.readouterr().out)
    assert stochastic["metrics"] == {}
    assert run([*base, "-s", "ddim", "--n", "10", "--metric", "gap", "--out", str(tmp_path / "ten")]) == 0
    (first_ten,) = json.loads(capsys.readouterr().out)
    assert deterministic["metrics"]["gap"]["blocks"][0] == pytest.approx(first_ten["metrics"]["gap"]["value"], rel=1e-5)


def test_the_converged_solution_is_found_once_for_all_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    solved: list[str] = []
    real = SamplerOnModel.generate

    def generate(self: SamplerOnModel, *given: object, **more: object) -> object:
        solved.append(self.cell.sampler.spec)
        return real(self, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(SamplerOnModel, "generate", generate)
    base = ["run", "-m", "exact:mixture", "--n", "8", "--metric", "gap", "--out", str(tmp_path)]
    assert run([*base, "-s", "ddim", "-s", "heun", "--steps", "3,5"]) == 0
    assert sum(spec.startswith("pf-ode") for spec in solved) == 1
    assert len(solved) == 5
