"""Reference statistics: kept in the cache, imported from published files, in trained and in Inception features."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samplerbench.cli import main
from samplerbench.data import load_data
from samplerbench.errors import UserError
from samplerbench.metrics import reference as references
from samplerbench.metrics.extractors import Extractor, load_extractor
from samplerbench.metrics.feature_network import FeatureNetwork
from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.moments import Moments

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits_cnn() -> Extractor:
    return load_extractor("digits-cnn", CPU)


def images(folder: Path, n: int = 12, seed: int = 0, side: int = 8) -> Path:
    """A folder of n random grey PNGs."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


# --- The cache -----------------------------------------------------------------------------------------------------


def test_a_reference_is_measured_once(
    tmp_path: Path, cache: Path, digits_cnn: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(str(images(tmp_path / "set")))
    first = references.measure_once(data, digits_cnn)
    monkeypatch.setattr(references, "measure", lambda *_: pytest.fail("it was measured again"))
    again = references.measure_once(load_data(str(tmp_path / "set")), digits_cnn)
    assert (again.data, again.features) == (first.data, first.features)
    torch.testing.assert_close(again.moments.covariance, first.moments.covariance, rtol=1e-14, atol=0)


def test_other_images_or_a_damaged_file_are_measured_anew(tmp_path: Path, cache: Path, digits_cnn: Extractor) -> None:
    first = references.measure_once(load_data(str(images(tmp_path / "set"))), digits_cnn)
    (file,) = cache.glob("reference-*")
    file.write_bytes(b"damaged")
    again = references.measure_once(load_data(str(tmp_path / "set")), digits_cnn)
    assert torch.equal(again.moments.mean, first.moments.mean)
    Image.new("L", (8, 8)).save(tmp_path / "set" / "0.png")
    changed = references.measure_once(load_data(str(tmp_path / "set")), digits_cnn)
    assert changed.data["sha256"] != first.data["sha256"]
    assert not torch.equal(changed.moments.mean, first.moments.mean)


# --- Published statistics ------------------------------------------------------------------------------------------


def published(file: Path, d: int = 64, **more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, d)) @ rng.normal(size=(d, d)) / d
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    np.savez(file, mu=mu, sigma=sigma, **more)
    return mu, sigma


def test_published_statistics_are_what_the_file_says(tmp_path: Path, digits_cnn: Extractor) -> None:
    mu, sigma = published(tmp_path / "cifar.npz")
    found = references.load_published(tmp_path / "cifar.npz", digits_cnn)
    assert found is not None
    assert (found.label, found.data["n"]) == ("cifar (published statistics)", None)
    assert np.array_equal(found.moments.mean, mu)
    np.testing.assert_allclose(found.moments.covariance, sigma, rtol=1e-13)
    other = Moments.of(torch.randn(150, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    exact = Moments.from_statistics(torch.from_numpy(mu), torch.from_numpy(sigma), 200)
    assert frechet_distance(other, found.moments) == pytest.approx(frechet_distance(other, exact), rel=1e-12)


def test_statistics_of_other_features_are_refused(tmp_path: Path, digits_cnn: Extractor) -> None:
    published(tmp_path / "a.npz", d=16)
    with pytest.raises(UserError, match="statistics of 16 features, but digits-cnn has 64; select the feature space"):
        references.load_published(tmp_path / "a.npz", digits_cnn)
    np.savez(tmp_path / "b.npz", mu=np.zeros(3), sigma=np.zeros((3, 2)))
    with pytest.raises(UserError, match=r"mu is \(3,\) and sigma \(3, 2\)"):
        references.load_published(tmp_path / "b.npz", digits_cnn)
    (tmp_path / "c.npz").write_text("x")
    with pytest.raises(UserError, match="cannot be read as an npz"):
        references.load_published(tmp_path / "c.npz", digits_cnn)


def test_a_run_measures_against_published_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    published(tmp_path / "cifar.npz")
    arguments = ["run", "-s", "ddim", "--steps", "2", "--n", "70", "--device", "cpu", "--json"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--data", str(tmp_path / "cifar.npz"), "--out", str(tmp_path / "out")])
    (record,) = json.loads(capsys.readouterr().out)
    assert record["metrics"]["fid"]["reference"] == "cifar (published statistics)"
    imported = tmp_path / "cifar.safetensors"
    with pytest.raises(SystemExit, match="0"):
        main(["stats", str(tmp_path / "cifar.npz"), "--features", "digits-cnn", "--out", str(imported)])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--data", str(imported), "--out", str(tmp_path / "out2")])
    (again,) = json.loads(capsys.readouterr().out)
    assert again["metrics"]["fid"]["value"] == pytest.approx(record["metrics"]["fid"]["value"], rel=1e-12)


def test_a_reference_batch_has_both_statistics_and_images(tmp_path: Path, digits_cnn: Extractor) -> None:
    """guided-diffusion's files: `arr_0` are the images, `mu` and `sigma` their statistics."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    mu, _ = published(tmp_path / "batch.npz", arr_0=pixels)
    found = references.load_published(tmp_path / "batch.npz", digits_cnn)
    assert found is not None
    assert np.array_equal(found.moments.mean, mu)
    assert len(load_data(str(tmp_path / "batch.npz"))) == 9


# --- Trained feature spaces ----------------------------------------------------------------------------------------


def features_folder(folder: Path, what: str = "features") -> Path:
    FeatureNetwork(1, 10, (8,), 5).save_pretrained(folder)
    (folder / "samplerbench.json").write_text(json.dumps({"what": what, "data": {"name": "mnist"}}))
    return folder


def test_a_trained_folder_is_a_feature_space_named_after_its_data(tmp_path: Path) -> None:
    found = load_extractor(str(features_folder(tmp_path / "runs")), CPU)
    assert found.name == found.identity["name"] == "mnist-cnn"
    assert found(torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).shape == (3, 5)


def test_a_folder_of_something_else_is_no_feature_space(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains a unet, not a feature network"):
        load_extractor(str(features_folder(tmp_path / "unet", "unet")), CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="`samplerbench train features` makes one"):
        load_extractor(str(tmp_path / "empty"), CPU)


# --- Inception -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fid_through_inception_equals_torch_fidelitys_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """The extractor with a weights file made here, through `--features-weights`, on the PNGs that `sample` wrote."""
    n, weights = 8, tmp_path / "inception.pth"
    write_random_inception(weights, monkeypatch)
    real = images(tmp_path / "real", n)
    spec = ["-s", "ddim", "--steps", "2", "--n", str(n), "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        main(["sample", str(tmp_path / "g.png"), *spec, "--png-dir", str(tmp_path / "fake")])
    chosen = ["--features", "inception-v3-compat", "--features-weights", str(weights), "--data", str(real)]
    with pytest.raises(SystemExit, match="0"):
        main(["run", *spec, *chosen, "--out", str(tmp_path / "out")])
    (file,) = (tmp_path / "out").glob("*.json")
    ours = json.loads(file.read_text("utf-8"))["metrics"]["fid"]["value"]
    command = [sys.executable, "-m", "torch_fidelity.fidelity", "--fid", "--cpu", "--json", "--silent", "--no-cache"]
    command += ["--input1", str(tmp_path / "fake"), "--input2", str(real)]
    done = subprocess.run(
        [*command, "--feature-extractor-weights-path", str(weights)], capture_output=True, encoding="utf-8", check=True
    )
    theirs = json.loads(done.stdout)["frechet_inception_distance"]
    assert theirs > 0.1
    assert ours == pytest.approx(theirs, rel=1e-5)


def write_random_inception(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weights file of torch-fidelity's Inception-v3 with random convolutions that keep the size of what they see."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), file)
