"""What a metric needs is checked before anything is sampled, with its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from samplerbench.bench import generate
from samplerbench.cli.app import main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.fixture
def nothing_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(generate, "walk", refuse)


@pytest.mark.usefixtures("nothing_is_sampled")
@pytest.mark.parametrize("metric", ["kid", "precision", "recall"])
@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_metric_of_real_images_refuses_statistics_alone(
    metric: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"real.{kind}"
    if kind == "npz":
        np.savez(file, mu=np.zeros(64), sigma=np.eye(64))
    else:
        assert run("stats", "digits", "--features", "digits-cnn", "--out", str(file)) == 0
        capsys.readouterr()
    base = ["run", "-s", "ddim", "--steps", "1", "--n", "20", "--metric", "fid", "--metric", metric]
    assert run(*base, "--data", str(file), "--out", str(tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert f"the metric {metric} needs the real images" in err
    assert len(err.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.usefixtures("nothing_is_sampled")
@pytest.mark.parametrize(
    ("metric", "n"), [("fid", 1), ("kid", 1), ("isc", 9), ("precision", 4), ("recall:k=5", 6), ("fid-inf", 19)]
)
def test_a_metric_refuses_too_few_images(
    metric: str, n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["run", "-s", "ddim", "--steps", "1", "--n", str(n), "--metric", metric]
    assert run(*base, "--out", str(tmp_path / "out")) == 2
    assert f"the metric {metric.partition(':')[0]} needs at least" in capsys.readouterr().err
