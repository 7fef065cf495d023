"""Reference statistics of strangers: files whose statistics no set of images has are refused in one line."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samplerbench.errors import UserError
from samplerbench.metrics import Moments, Reference
from samplerbench.metrics.extractors import Extractor, load_extractor
from samplerbench.metrics.reference import load_published, load_reference

D = 64
DATA = {"name": "x", "split": "test", "n": 400, "sha256": "0" * 64}
FEATURES = {"name": "digits-cnn", "layer": "features", "weights": "f" * 64}


@pytest.fixture(scope="module")
def digits_cnn() -> Extractor:
    return load_extractor("digits-cnn", torch.device("cpu"))


def statistics(n: int = 400, d: int = D) -> tuple[np.ndarray, np.ndarray]:
    features = np.random.default_rng(0).normal(size=(n, d))
    return features.mean(0), np.cov(features, rowvar=False)


def write(
    file: Path, mean: Any = None, covariance: Any = None, data: Any = DATA, features: Any = FEATURES, **more: str
) -> Path:
    """A file as `Reference.save` writes it, with other content."""
    mu, sigma = statistics()
    mean, covariance = (
        torch.as_tensor(given if given is not None else own) for given, own in ((mean, mu), (covariance, sigma))
    )
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in {"data": data, "features": features}.items()}
    save_file({"mean": mean, "covariance": covariance}, file, texts | more)
    return file


def refused(file: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        load_reference(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(file))


def test_the_file_of_these_tests_is_accepted_when_nothing_is_wrong(tmp_path: Path) -> None:
    found = load_reference(write(tmp_path / "a.safetensors"))
    assert (found.data, found.features, found.shape) == (DATA, FEATURES, None)


@pytest.mark.parametrize(
    "data",
    [
        {k: v for k, v in DATA.items() if k != "n"},
        *({**DATA, "n": n} for n in (0, 1, -5, 2.5, "400", True, [4], 10**30, 10**400)),
    ],
)
def test_a_number_of_images_that_is_missing_or_impossible(tmp_path: Path, data: Any) -> None:
    refused(write(tmp_path / "a.safetensors", data=data), "its number of images is .*; it must be a whole number")


@pytest.mark.parametrize("n", ["NaN", "Infinity"])
def test_a_number_of_images_that_is_not_a_number(tmp_path: Path, n: str) -> None:
    text = json.dumps(DATA).replace("400", n)
    refused(write(tmp_path / "a.safetensors", data=text), "its number of images is (nan|inf)")


@pytest.mark.parametrize("data", [[], "text", 7, None, {}, {**DATA, "name": 3}, {**DATA, "sha256": None}])
def test_data_that_are_not_described(tmp_path: Path, data: Any) -> None:
    refused(write(tmp_path / "a.safetensors", data=json.dumps(data)), "its data lacks one of the strings")


@pytest.mark.parametrize("features", [[], None, {"name": "a"}, {"name": 1, "weights": "x"}])
def test_features_that_are_not_named(tmp_path: Path, features: Any) -> None:
    refused(write(tmp_path / "a.safetensors", features=json.dumps(features)), "its features lack one of the strings")


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "9" * 5_000])
def test_metadata_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    refused(write(tmp_path / "a.safetensors", data=text), "is not a reference file of")


@pytest.mark.parametrize("shape", ["[8, 8]", "8", "[1, 8, 0]", "[1, 8, true]", "[1.0, 8, 8]", '"1x8x8"', "{}"])
def test_a_shape_that_is_none(tmp_path: Path, shape: str) -> None:
    refused(write(tmp_path / "a.safetensors", shape=shape), r"its shape of the images is .*; it must be \[C, H, W\]")


def test_statistics_that_are_no_real_finite_numbers(tmp_path: Path) -> None:
    mu, sigma = statistics()
    file = tmp_path / "a.safetensors"
    refused(write(file, mean=mu.astype(np.complex64)), "the mean is complex64; statistics are real floating-point")
    refused(write(file, covariance=sigma.astype(np.complex64)), "the covariance is complex64")
    refused(write(file, covariance=np.eye(D, dtype=np.int64)), "the covariance is int64")
    for bad in (np.nan, np.inf):
        refused(write(file, mean=np.where(np.arange(D) == 3, bad, mu)), "the mean has values that are not finite")
        broken = sigma.copy()
        broken[2, 5] = broken[5, 2] = bad
        refused(write(file, covariance=broken), "the covariance has values that are not finite")


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for mean, covariance in (
        (np.zeros(D), np.eye(D - 1)),
        (np.zeros((D, 1)), np.eye(D)),
        (np.zeros(()), np.zeros(())),
        (np.zeros(0), np.zeros((0, 0))),
    ):
        refused(write(file, mean=mean, covariance=covariance), r"not \(d,\) and \(d, d\)")


def test_a_covariance_that_no_distribution_has(tmp_path: Path) -> None:
    _, sigma = statistics()
    file = tmp_path / "a.safetensors"
    refused(write(file, covariance=-sigma), "not positive semi-definite")
    indefinite = sigma.copy()
    indefinite[0, 1] = indefinite[1, 0] = 50.0
    refused(write(file, covariance=indefinite), r"not positive semi-definite \(an eigenvalue is -4")
    skew = sigma.copy()
    skew[0, 1] += 0.5
    refused(write(file, covariance=skew), "the covariance is not symmetric")
    refused(write(file, data={**DATA, "n": 20}), "the covariance has rank 64, which 20 images cannot have")


def test_rounding_is_no_defect(tmp_path: Path) -> None:
    """Statistics kept in float32, and those of fewer images than features, whose eigenvalues round around 0."""
    mu, sigma = statistics()
    file = tmp_path / "a.safetensors"
    found = load_reference(write(file, mu.astype(np.float32), sigma.astype(np.float32)))
    np.testing.assert_allclose(found.moments.covariance, sigma, rtol=0, atol=1e-6)
    few = torch.from_numpy(np.random.default_rng(1).normal(size=(20, D)))
    Reference(Moments.of(few), {**DATA, "n": 20}, FEATURES).save(file)
    torch.testing.assert_close(load_reference(file).moments.covariance, Moments.of(few).covariance, rtol=0, atol=1e-12)
    mu, sigma = few.numpy().mean(0), np.cov(few.numpy(), rowvar=False)
    load_reference(write(file, mu.astype(np.float32), sigma.astype(np.float32), {**DATA, "n": None}))


# --- npz files of mu and sigma -------------------------------------------------------------------------------------


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None, dtype: str = "<f8") -> bytes:
    """An array as an npy file; with a shape, one whose header promises another array."""
    if shape is None:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + array.tobytes()


def archive(file: Path, mu: bytes, sigma: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("mu.npy", mu)
        z.writestr("sigma.npy", sigma)
    return file


def published_refused(file: Path, extractor: Extractor, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        load_published(file, extractor)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(10**9, 10**9), (D, 10**6), (D, D - 1), (D, D, 2), (-1, D)])
def test_a_header_that_promises_another_array_is_refused_before_the_array_is_made(
    tmp_path: Path, digits_cnn: Extractor, shape: tuple[int, ...]
) -> None:
    mu, sigma = statistics()
    file = archive(tmp_path / "a.npz", npy(mu), npy(sigma, shape))
    published_refused(file, digits_cnn, "the header of sigma declares the shape")


def test_an_array_cut_short_of_objects_or_without_a_header(tmp_path: Path, digits_cnn: Extractor) -> None:
    mu, sigma = statistics()
    file = tmp_path / "a.npz"
    published_refused(archive(file, npy(mu), npy(sigma)[:-100]), digits_cnn, "the data have another size")
    published_refused(archive(file, npy(mu), npy(sigma, (D, D), "|O")), digits_cnn, "sigma is an array of objects")
    published_refused(archive(file, npy(mu), b"no array"), digits_cnn, "cannot be read as an npz file")
    published_refused(archive(file, b"", npy(sigma)), digits_cnn, "cannot be read as an npz file")


def test_damaged_encrypted_and_unsupported_members(tmp_path: Path, digits_cnn: Extractor) -> None:
    mu, sigma = statistics()
    whole = archive(tmp_path / "a.npz", npy(mu), npy(sigma)).read_bytes()
    file = tmp_path / "b.npz"
    for offset, value, reason in (
        (6, 0x01, "encrypted"),  # the flag "encrypted" in a local header
        (8, 99, "cannot be read as an npz"),  # a compression method that nobody has
    ):
        changed = bytearray(whole)
        local, central = changed.find(b"PK\x03\x04"), changed.find(b"PK\x01\x02")
        changed[local + offset], changed[central + offset + 2] = value, value
        file.write_bytes(bytes(changed))
        published_refused(file, digits_cnn, reason)
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1  # the checksum of the data tells it
    file.write_bytes(bytes(middle))
    published_refused(file, digits_cnn, "cannot be read as an npz file")
    file.write_bytes(whole[: len(whole) // 2])
    published_refused(file, digits_cnn, "cannot be read as an npz file")


def test_published_statistics_that_no_distribution_has(tmp_path: Path, digits_cnn: Extractor) -> None:
    mu, sigma = statistics()
    file = tmp_path / "a.npz"
    for wrong, reason in (
        ({"sigma": -sigma}, "not positive semi-definite"),
        ({"sigma": sigma * np.nan}, "not finite"),
        ({"mu": mu * 1j}, "the mean is complex128"),
        ({"sigma": np.triu(sigma + 1)}, "not symmetric"),
    ):
        np.savez(file, **({"mu": mu, "sigma": sigma} | wrong))
        published_refused(file, digits_cnn, reason)
