"""Acceptance: what the embedded model, its classifier and the FID are good for. The figures are those of `pytest -rP`.

| ddim, 50 steps, 898 images | FID 1.92 (random halves of the real digits: 3.5 to 5.7), labels 99.7% |
| labels, ddim, 10 steps, 600 images | unguided 99.8%, cfg:scale=2 100% |
| labels, ddpm:variance=large, 5 steps, 400 images | unguided 94.5%, cfg:scale=2 99.0% |
| labels, unconditional ddim, 10 steps, 300 images | unguided 9.0%, classifier 84.7% |
| FID of ddim, ddpm, ddpm:variance=large, 400 images | 5 steps: 7.6, 11.5, 80; 10 steps: 4.2, 6.7, 11.6 |
"""

from __future__ import annotations

from statistics import mean

import numpy as np
import pytest
import torch
from conftest import run_images
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

from samplerbench.data import load_data
from samplerbench.data.pixels import quantise
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.frechet import frechet_distance
from samplerbench.metrics.moments import Moments
from samplerbench.metrics.reference import Reference
from samplerbench.models import Model


class Judge:
    """A classifier that no part of the sampler has seen: a support vector machine on the pixels, 0 … 16."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.machine = SVC(gamma=0.001).fit(pixels, labels)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of uint8 images (n, 1, 8, 8) that are taken for their label."""
        found = self.machine.predict(images.flatten(1).numpy() * (16 / 255))
        return float((found == labels[: len(images)].numpy()).mean())


@pytest.fixture(scope="module")
def judge() -> Judge:
    digits = load_digits()
    return Judge(digits.data, digits.target)


@pytest.fixture(scope="module")
def at_50_steps(digits: Model, labels: Tensor) -> Tensor:
    """As many images as half of the real ones, by what `samplerbench run --sampler ddim --steps 50` does."""
    return quantise(run_images(digits, "ddim", None, 50, len(labels) // 2, labels))


def fid(images: Tensor, extractor: Extractor, reference: Reference) -> float:
    return frechet_distance(Moments.of(extractor(images)), reference.moments)


def test_the_judge_can_be_trusted() -> None:
    data = load_data("digits")
    assert data.labels is not None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    held_out, seen = order[: len(data) // 5], order[len(data) // 5 :]
    machine = Judge(data.images[seen].flatten(1).numpy() * (16 / 255), data.labels[seen].numpy())
    accuracy = machine.accuracy(data.images[held_out], data.labels[held_out])
    print(f"held out: {accuracy:.4f}")
    assert accuracy >= 0.98


@pytest.mark.slow
def test_50_ddim_steps_are_nearer_to_the_data_than_its_halves_to_each_other(
    at_50_steps: Tensor, extractor: Extractor, reference: Reference
) -> None:
    features = extractor(load_data("digits").images)
    drawn = Moments.of(extractor(at_50_steps))
    halves, equal = [], []
    for seed in range(5):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        one, other = (Moments.of(features[part]) for part in order.tensor_split(2))
        halves.append(frechet_distance(one, other))
        equal.append(frechet_distance(drawn, other))
    value = fid(at_50_steps, extractor, reference)
    print(f"FID {value:.3f}, halves {', '.join(f'{half:.2f}' for half in halves)}, mean {mean(halves):.2f}")
    print(f"against halves: {', '.join(f'{half:.2f}' for half in equal)}, mean {mean(equal):.2f}")
    assert value < min(halves) < mean(halves)
    assert mean(equal) < mean(halves)  # nor is it the number of real images that makes it small


@pytest.mark.slow
def test_50_ddim_steps_draw_the_intended_digits(at_50_steps: Tensor, labels: Tensor, judge: Judge) -> None:
    accuracy = judge.accuracy(at_50_steps, labels)
    print(f"labels {accuracy:.4f}")
    assert accuracy >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "steps", "n"), [("ddim", 10, 600), ("ddpm:variance=large", 5, 400)])
def test_classifier_free_guidance_raises_the_label_accuracy(
    digits: Model, labels: Tensor, judge: Judge, sampler: str, steps: int, n: int
) -> None:
    unguided, guided = (
        judge.accuracy(quantise(run_images(digits, sampler, None, steps, n, labels, guidance=spec)), labels)
        for spec in ("none", "cfg:scale=2")
    )
    print(f"labels, {sampler}, {steps} steps, {n} images: unguided {unguided:.4f}, cfg:scale=2 {guided:.4f}")
    assert unguided < guided


@pytest.mark.slow
def test_classifier_guidance_gives_labels_to_the_model_without_labels(
    digits: Model, labels: Tensor, judge: Judge
) -> None:
    without = judge.accuracy(quantise(run_images(digits, "ddim", None, 10, 300, None)), labels)
    guided = judge.accuracy(quantise(run_images(digits, "ddim", None, 10, 300, labels, guidance="classifier")), labels)
    print(f"labels, unconditional ddim, 10 steps: unguided {without:.4f}, classifier {guided:.4f}")
    assert without < 0.2
    assert guided > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 10])
def test_few_steps_have_the_shape_of_the_ddim_papers_table_1(
    digits: Model, labels: Tensor, extractor: Extractor, reference: Reference, steps: int
) -> None:
    """Song, Meng & Ermon 2021: η = 0 beats η = 1, which beats the large variance."""
    ddim, ddpm, large = (
        fid(quantise(run_images(digits, sampler, None, steps, 400, labels)), extractor, reference)
        for sampler in ("ddim", "ddpm", "ddpm:variance=large")
    )
    print(f"FID, {steps} steps: ddim {ddim:.2f}, ddpm {ddpm:.2f}, ddpm:variance=large {large:.2f}")
    assert ddim < ddpm < large
