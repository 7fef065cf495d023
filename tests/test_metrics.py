"""Moments, the Fréchet distance, feature extractors, the pixel rule and the reference files."""

import json
import math
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
import torch_fidelity.feature_extractor_inceptionv3 as inception
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric

from samplerbench import registry
from samplerbench.assets import asset
from samplerbench.bench.setup import embedded_reference
from samplerbench.data import load_data
from samplerbench.data.pixels import dequantise, quantise
from samplerbench.errors import UserError
from samplerbench.metrics import Moments, Reference
from samplerbench.metrics.extractors import Extractor, extractor_names, load_extractor
from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.metric import Batch, Context
from samplerbench.metrics.reference import load_reference, measure

CPU = torch.device("cpu")
INCEPTION = "inception-v3-compat"


def features(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated vectors (n, d) with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def diagonal(mean: list[float], variances: list[float]) -> Moments:
    return Moments.from_statistics(torch.tensor(mean).double(), torch.tensor(variances).double().diag(), 1000)


# --- Moments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[100], [1] * 100, [7] * 14 + [2], [1, 99], [0, 50, 0, 50, 0]])
def test_moments_do_not_depend_on_how_the_stream_was_cut(cuts: list[int]) -> None:
    data = features(100, 12, seed=0, shift=1000.0)  # a mean far above the spread: where naive sums lose digits
    moments = Moments(12)
    for part in data.split(cuts):
        moments.update(part)
    assert moments.n == 100
    np.testing.assert_allclose(moments.mean, data.numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(data.numpy(), rowvar=False), rtol=0, atol=1e-12)


def test_merged_streams_are_one_stream() -> None:
    data = features(90, 8, seed=1, shift=5.0)
    parts = [Moments.of(part) for part in data.split([40, 20, 30])]
    merged = Moments(8)
    for k in (2, 0, 1):
        merged.merge(parts[k])
    np.testing.assert_allclose(merged.covariance, np.cov(data.numpy(), rowvar=False), rtol=0, atol=1e-12)
    np.testing.assert_allclose(merged.mean, data.mean(dim=0), rtol=0, atol=1e-13)


def test_moments_are_float64_whatever_comes_in() -> None:
    data = features(500, 4, seed=2, shift=300.0).float()
    moments = Moments(4)
    for part in data.split(64):
        moments.update(part)
    assert moments.covariance.dtype == torch.float64
    np.testing.assert_allclose(moments.covariance, np.cov(data.double().numpy(), rowvar=False), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("n", "d", "rank"), [(50, 8, 8), (5, 8, 4), (9, 8, 8), (8, 8, 7)])
def test_factor_is_a_root_of_the_covariance_of_the_known_rank(n: int, d: int, rank: int) -> None:
    moments = Moments.of(features(n, d, seed=3))
    assert moments.rank == rank
    assert moments.factor.shape == (d, rank)
    torch.testing.assert_close(moments.factor @ moments.factor.T, moments.covariance, rtol=0, atol=1e-13)


def test_factor_follows_the_stream() -> None:
    moments = Moments.of(features(20, 3, seed=4))
    first = moments.factor
    moments.update(features(20, 3, seed=5, shift=2.0))
    assert not torch.equal(moments.factor, first)
    torch.testing.assert_close(moments.factor @ moments.factor.T, moments.covariance)


def test_one_vector_has_no_covariance() -> None:
    for n in (0, 1):
        with pytest.raises(UserError, match=f"at least 2 images; there are {n}"):
            _ = Moments.of(features(n, 3, seed=0)).covariance


# --- Fréchet distance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "n", "m"),
    [(64, 2000, 2000), (128, 60, 45), (64, 40, 500), (64, 500, 40), (16, 17, 17), (16, 16, 17)],
)
def test_agrees_with_torch_fidelity_on_the_same_features(d: int, n: int, m: int) -> None:
    """To 1e-6 relative; what is left is torch-fidelity's: square roots of rounding noise around zero eigenvalues."""
    sides = [features(n, d, seed=10), features(m, d, seed=11, shift=0.1)]
    statistics = [{"mu": x.numpy().mean(axis=0), "sigma": np.cov(x.numpy(), rowvar=False)} for x in sides]
    theirs = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_distance(*map(Moments.of, sides)) == pytest.approx(theirs, rel=1e-6)


def test_closed_form_of_diagonal_covariances() -> None:
    """‖μ₁-μ₂‖² + Σ (√a - √b)², for covariances that commute."""
    a, b = diagonal([1, 2, 3], [4, 9, 0.25]), diagonal([1, 0, 5], [1, 16, 0.25])
    assert frechet_distance(a, b) == pytest.approx(0 + 4 + 4 + 1 + 1 + 0, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(10, abs=1e-12)


def test_closed_form_of_commuting_covariances() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    a, b = torch.tensor([[1.0, 2, 3, 4, 5, 6], [7.0, 1, 0.5, 4, 2, 9]]).double()
    zero = torch.zeros(6)
    sides = [Moments.from_statistics(zero, basis @ v.diag() @ basis.T, 10_000) for v in (a, b)]
    assert frechet_distance(*sides) == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-12)


def test_closed_form_of_two_by_two_covariances_that_do_not_commute() -> None:
    """tr √M = √(tr M + 2 √det M) for a 2x2 matrix M."""
    a, b = torch.tensor([[2.0, 1], [1, 3]]).double(), torch.tensor([[1.0, -0.5], [-0.5, 4]]).double()
    product = a @ b
    root = math.sqrt(float(product.trace() + 2 * product.det().sqrt()))
    sides = [Moments.from_statistics(torch.zeros(2), v, 1000) for v in (a, b)]
    assert frechet_distance(*sides) == pytest.approx(float(a.trace() + b.trace()) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("n", [200, 20])
def test_a_shift_alone_is_its_square(n: int) -> None:
    data = features(n, 32, seed=6)
    shift = torch.linspace(-1, 1, 32).double()
    distance = frechet_distance(Moments.of(data + shift), Moments.of(data))
    assert distance == pytest.approx(float(shift @ shift), rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(500, 32), (20, 32), (2, 5)])
def test_distance_to_itself_is_zero(n: int, d: int) -> None:
    moments = Moments.of(features(n, d, seed=7, shift=3.0))
    assert abs(frechet_distance(moments, moments)) < 1e-10


def test_a_constant_feature_does_no_harm() -> None:
    data = features(300, 8, seed=8)
    data[:, 3] = 2.5
    other = features(300, 8, seed=9)
    other[:, 3] = 2.5
    keep = [0, 1, 2, 4, 5, 6, 7]
    without = frechet_distance(Moments.of(data[:, keep]), Moments.of(other[:, keep]))
    assert frechet_distance(Moments.of(data), Moments.of(other)) == pytest.approx(without, rel=1e-10)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_vectors_have_no_distance(n: int) -> None:
    few, many = Moments.of(features(n, 3, seed=0)), Moments.of(features(9, 3, seed=1))
    for sides in ((few, many), (many, few)):
        with pytest.raises(UserError, match="at least 2 images"):
            frechet_distance(*sides)


# --- Pixels --------------------------------------------------------------------------------------------------------


def test_quantisation_is_the_designs_rule() -> None:
    """round(clamp(x, -1, 1)·127.5 + 127.5)."""
    x = torch.tensor([-1, 1, -1.7, 9, -math.inf, math.inf, 1 / 127.5, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5])
    assert quantise(x).tolist() == [0, 255, 0, 255, 0, 255, 128, 0, 1]
    assert quantise(x).dtype == torch.uint8


def test_halves_are_rounded_to_even() -> None:
    """0.4·127.5 + 127.5 = 178.5, and so on."""
    x = torch.tensor([0.0, 0.4, -0.4, 0.8, -0.8])
    assert (x * 127.5 + 127.5).tolist() == [127.5, 178.5, 76.5, 229.5, 25.5]
    assert quantise(x).tolist() == [128, 178, 76, 230, 26]


def test_every_pixel_value_comes_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(dequantise(pixels)), pixels)
    assert dequantise(pixels)[[0, 255]].tolist() == [-1, 1]
    assert torch.equal(quantise(dequantise(pixels).double()), pixels)


# --- Extractors ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_cnn() -> Extractor:
    return load_extractor("digits-cnn", CPU)


def test_the_digits_extractor_stands_beside_torch_fidelitys(digits_cnn: Extractor) -> None:
    assert {"digits-cnn", INCEPTION, "dinov2-vit-b-14", "clip-vit-b-32"} <= set(extractor_names())
    assert digits_cnn.identity == {"name": "digits-cnn", "layer": "features", "weights": digits_cnn.sha256}
    assert len(digits_cnn.sha256) == 64


def test_features_do_not_depend_on_the_batch_nor_on_grey_given_as_three_channels(digits_cnn: Extractor) -> None:
    images = load_data("digits").images[:100]
    whole = digits_cnn(images)
    assert whole.ndim == 2
    assert not whole.requires_grad
    parts = torch.cat([digits_cnn(part) for part in images.split(37)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(digits_cnn(images.repeat(1, 3, 1, 1)), whole, rtol=0, atol=1e-5)


def test_torch_fidelity_measures_the_same_fid_with_the_digits_extractor(digits_cnn: Extractor, tmp_path: Path) -> None:
    """On a folder of PNGs: its reading, its extraction, its FID. It keeps the means in float32, hence 1e-5."""
    sides = load_data("digits").images[:300].split(150)
    for side, images in zip("ab", sides, strict=True):
        (tmp_path / side).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image[0].numpy()).save(tmp_path / side / f"{i:03d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "a"),
        input2=str(tmp_path / "b"),
        feature_extractor="digits-cnn",
        fid=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = frechet_distance(*(Moments.of(digits_cnn(images)) for images in sides))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours > 1


@pytest.mark.parametrize(("name", "meant"), [("digits-cn", "digits-cnn"), ("inception-v3", INCEPTION)])
def test_an_unknown_extractor_gets_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f'no feature extractor "{name}". Did you mean "{meant}"\\? Known: .*vgg16'):
        load_extractor(name, CPU)


def test_missing_inception_weights_without_network_are_one_line_with_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    with pytest.raises(UserError) as caught:
        load_extractor(INCEPTION, CPU)
    message = str(caught.value)
    assert "put weights-inception-2015-12-05-6726825d.pth (from https://github.com/toshas/torch-fidelity/" in message
    assert str(Path(torch.hub.get_dir()) / "checkpoints") in message
    assert "`features_weights`" in message
    assert "\n" not in message


def test_a_file_of_inception_weights_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        empty = inception.FeatureExtractorInceptionV3(INCEPTION, ["2048"])

    def averaging(key: str, like: Tensor) -> Tensor:
        # One number per tensor, expanded, so that the file is small: every layer averages its input.
        fan = math.prod(like.shape[1:]) if like.ndim > 1 else 1
        value = 1 / fan if key.endswith("weight") else float("var" in key)
        return torch.tensor(value).to(like.dtype).expand(like.shape)

    file = tmp_path / "inception.pth"
    torch.save({key: averaging(key, like) for key, like in empty.state_dict().items()}, file)
    extractor = load_extractor(INCEPTION, CPU, str(file))
    found = extractor(torch.full((1, 1, 32, 32), 255, dtype=torch.uint8))
    assert found.shape == (1, 2048)
    assert extractor.layer == "2048"
    # Averages of a constant are the constant, (255 - 128)/128 for white, but for the padding with zeros.
    assert float(found.min()) > 0.5
    assert float(found.max()) < 1
    assert not any(parameter.requires_grad for parameter in extractor.module.parameters())


@pytest.mark.parametrize("name", [INCEPTION, "digits-cnn"])
def test_weights_that_are_absent_or_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the weights .*absent.* of the features {name} do not exist"):
        load_extractor(name, CPU, str(tmp_path / "absent"))
    file = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"do not fit|no feature network in"):
        load_extractor(name, CPU, str(file))


def test_other_weights_are_another_identity(digits_cnn: Extractor, tmp_path: Path) -> None:
    module: Any = digits_cnn.module
    module.network.save_pretrained(tmp_path / "same")
    assert load_extractor("digits-cnn", CPU, str(tmp_path / "same")).identity == digits_cnn.identity
    other = type(module.network)(**{**module.network.config, "features": 8})
    other.save_pretrained(tmp_path / "other")
    found = load_extractor("digits-cnn", CPU, str(tmp_path / "other"))
    assert found.sha256 != digits_cnn.sha256
    assert found(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 8)


# --- The metric and its reference ----------------------------------------------------------------------------------


def test_fid_of_batches_is_the_frechet_distance_of_all(digits_cnn: Extractor) -> None:
    real, fake = features(80, 6, seed=20), features(50, 6, seed=21, shift=0.5)
    reference = Reference(Moments.of(real), {"name": "x", "split": "all", "n": 80}, {})
    accumulator = registry.parse("metric", "fid").start(Context(reference))
    for part in fake.split(16):
        accumulator.update(Batch(torch.zeros(len(part), 1, 2, 2, dtype=torch.uint8), part, None))
    assert accumulator.result()["value"] == pytest.approx(
        frechet_distance(Moments.of(fake), Moments.of(real)), rel=1e-12
    )


def test_fid_of_nothing_is_refused() -> None:
    reference = Reference(Moments.of(features(80, 6, seed=20)), {"name": "x", "split": "all", "n": 80}, {})
    with pytest.raises(UserError, match="at least 2 images"):
        registry.parse("metric", "fid").start(Context(reference)).result()


def test_a_reference_comes_back_as_it_was_written(tmp_path: Path) -> None:
    moments = Moments.of(features(40, 5, seed=22))
    data = {"name": "x", "split": "test", "n": 40, "sha256": "0" * 64}
    identity = {"name": "digits-cnn", "layer": "features", "weights": "f" * 64}
    file = tmp_path / "x.safetensors"
    Reference(moments, data, identity).save(file)
    found = load_reference(file)
    assert (found.data, found.features, found.label) == (data, identity, "x (test, 40)")
    assert found.moments.n == 40
    assert torch.equal(found.moments.mean, moments.mean)
    torch.testing.assert_close(found.moments.covariance, moments.covariance, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("split", "n"), [("all", 1797), ("train", 1442), ("held-out", 355)])
def test_the_embedded_references_are_of_the_embedded_features_and_data(
    digits_cnn: Extractor, split: str, n: int
) -> None:
    embedded, measured = (
        load_reference(asset(f"references/digits-{split}.safetensors")),
        measure(load_data(f"digits:split={split}"), digits_cnn),
    )
    assert embedded_reference(f"digits:split={split}", digits_cnn) is not None
    assert embedded.features == digits_cnn.identity
    assert embedded.data == measured.data
    assert embedded.moments.n == n
    assert abs(frechet_distance(measured.moments, embedded.moments)) < 1e-6


def test_a_file_that_is_no_reference_is_refused(tmp_path: Path) -> None:
    absent, text, bare = (tmp_path / name for name in ("absent.safetensors", "text.safetensors", "bare.safetensors"))
    text.write_text("not a tensor in sight")
    save_file({"mean": torch.zeros(2), "covariance": torch.eye(2)}, bare)
    garbled = tmp_path / "garbled.safetensors"
    save_file({"mean": torch.zeros(2), "covariance": torch.eye(2)}, garbled, {"data": "{", "features": json.dumps({})})
    for file in (absent, text, bare, garbled):
        with pytest.raises(UserError, match=rf"{file.stem}.* is not a reference file of `samplerbench stats`"):
            load_reference(file)
