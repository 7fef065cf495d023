"""Early stopping on held-out images, and the augmentation of training images."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from torch import Tensor, nn

from samplerbench.cli.app import main
from samplerbench.data import ImageSet, load_data
from samplerbench.errors import UserError
from samplerbench.models.schedule import alphas_cumprod
from samplerbench.training.augment import random_shift
from samplerbench.training.classifier import ClassifierTask
from samplerbench.training.loop import StepRandom, TrainSettings, fit
from samplerbench.training.unet import UNetSettings, UNetTask

CPU = torch.device("cpu")
TINY = UNetSettings(channels=(8, 8), groups=4, head_dim=4, dropout=0.1)
SHORT = TrainSettings(steps=24, batch_size=8, warmup=4, checkpoint_every=7, ema_decay=0.9, cpu=True, evaluate_every=5)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return load_data("digits:split=train")


@pytest.fixture(scope="module")
def held_out() -> ImageSet:
    return load_data("digits:split=held-out").subset(torch.arange(20), "held-out")


class Curve(UNetTask):
    """A task whose values on held-out images are given. After `at` evaluations, Ctrl-C."""

    def __init__(self, data: ImageSet, values: list[float], at: int = 0) -> None:
        torch.manual_seed(0)
        super().__init__(data, TINY)
        self.values, self.at, self.seen = values, at, 0
        self.weights: list[dict[str, Tensor]] = []

    def evaluate(self, network: nn.Module, data: ImageSet) -> float:
        assert not network.training
        self.seen += 1
        self.weights.append({k: v.clone() for k, v in network.state_dict().items()})
        return self.values[len(self.weights) - 1]

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        if self.at and self.seen == self.at:
            raise KeyboardInterrupt
        return super().loss(network, images, labels, random)


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "samplerbench.json").read_text("utf-8"))


@pytest.mark.slow
def test_the_weights_with_the_lowest_bound_are_saved(data: ImageSet, held_out: ImageSet, tmp_path: Path) -> None:
    values = [5.0, 3.0, 4.0, 3.5, 3.25]
    task = Curve(data, values)
    assert fit(task, data, SHORT, tmp_path, held_out=held_out).complete
    assert all(torch.equal(value, task.weights[1][name]) for name, value in saved(tmp_path).items())
    noted = card(tmp_path)["held_out"]
    assert (noted["bound"], noted["step"]) == (3.0, 10)
    assert noted["curve"] == [[5, 5.0], [10, 3.0], [15, 4.0], [20, 3.5], [24, 3.25]]
    assert (noted["data"]["images"], noted["data"]["sha256"]) == (20, held_out.sha256)


def test_training_stops_after_evaluations_without_a_lower_bound(
    data: ImageSet, held_out: ImageSet, tmp_path: Path
) -> None:
    task = Curve(data, [5.0, 3.0, 4.0, 3.5])
    settings = replace(SHORT, patience=2)
    result = fit(task, data, settings, tmp_path, held_out=held_out)
    assert (result.steps, result.complete) == (20, True)
    assert all(torch.equal(value, task.weights[1][name]) for name, value in saved(tmp_path).items())
    (tmp_path / WEIGHTS).unlink()
    again = fit(Curve(data, []), data, settings, tmp_path, held_out=held_out)  # nothing is left to train
    assert (again.steps, again.complete) == (20, True)
    assert all(torch.equal(value, task.weights[1][name]) for name, value in saved(tmp_path).items())


def test_a_run_that_was_stopped_and_resumed_saves_the_same_weights(
    data: ImageSet, held_out: ImageSet, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = replace(SHORT, evaluate_every=8)
    fit(Curve(data, [3.0, 4.0, 5.0]), data, settings, whole, held_out=held_out)
    with pytest.raises(KeyboardInterrupt):  # in step 17; the last checkpoint is at 14
        fit(Curve(data, [3.0, 4.0, 5.0], at=2), data, settings, stopped, held_out=held_out)
    assert fit(Curve(data, [4.0, 5.0]), data, settings, stopped, held_out=held_out).resumed
    assert (whole / WEIGHTS).read_bytes() == (stopped / WEIGHTS).read_bytes()
    assert card(whole)["held_out"] == card(stopped)["held_out"]


@pytest.mark.slow
def test_a_training_does_not_resume_with_or_without_held_out_images_if_it_began_otherwise(
    data: ImageSet, held_out: ImageSet, tmp_path: Path
) -> None:
    with_images, without = tmp_path / "with", tmp_path / "without"
    fit(Curve(data, [1.0] * 5), data, SHORT, with_images, held_out=held_out)
    fit(Curve(data, []), data, SHORT, without)
    with pytest.raises(UserError, match=r"was made with held_out digits \w+; use the same settings"):
        fit(Curve(data, []), data, SHORT, with_images)
    with pytest.raises(UserError, match="was made with held_out none; use the same settings"):
        fit(Curve(data, [1.0]), data, SHORT, without, held_out=held_out)


def test_held_out_images_that_cannot_be_evaluated_are_refused_before_training(
    data: ImageSet, held_out: ImageSet, tmp_path: Path
) -> None:
    unlabelled = replace(held_out, labels=None, classes=None)
    with pytest.raises(UserError, match="a network with 10 classes requires held-out images with labels"):
        fit(Curve(data, []), data, SHORT, tmp_path, held_out=unlabelled)
    assert not list(tmp_path.iterdir())
    classifier = ClassifierTask(data, (8, 8))
    with pytest.raises(UserError, match="cannot be used for the kind of network classifier"):
        fit(classifier, data, SHORT, tmp_path, held_out=held_out)


class Zero(nn.Module):
    """Predicts no noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, noisy: Tensor, t: Tensor, class_labels: Tensor | None) -> SimpleNamespace:
        assert class_labels is not None
        return SimpleNamespace(sample=torch.zeros_like(noisy))


def test_the_bound_of_a_network_without_a_prediction_is_the_closed_form() -> None:
    """With ε̂ = 0, x̂₀ = x₀ + σ z, and each divergence is ½ (w₀ σ z)²/β̃ in the mean over z."""
    data = load_data("digits:split=held-out")
    timesteps = 20
    task = UNetTask(data, replace(TINY, timesteps=timesteps))
    found = task.evaluate(Zero(), data)
    bars = alphas_cumprod(task.scheduler_config).numpy()
    before = np.concatenate([[1.0], bars[:-1]])
    betas = 1 - bars / before
    posterior = betas * (1 - before) / (1 - bars)
    posterior[0] = posterior[1]
    weight = np.sqrt(before) * betas / (1 - bars)
    sigma = np.sqrt((1 - bars) / bars)
    nats = sum(0.5 * (weight[t] * sigma[t]) ** 2 / posterior[t] for t in range(1, timesteps))
    x0 = data.images.numpy().astype(np.float64).ravel() / 127.5 - 1
    z = np.random.default_rng(0).standard_normal((16, len(x0)))
    mean, deviation = x0 + sigma[0] * z, math.sqrt(posterior[0])  # at t = 0 the mean of the step is x̂₀
    upper = np.where(x0 > 0.999, 1.0, norm.cdf((x0 + 1 / 255 - mean) / deviation))
    lower = np.where(x0 < -0.999, 0.0, norm.cdf((x0 - 1 / 255 - mean) / deviation))
    nats -= np.log(np.clip(upper - lower, 1e-12, None)).mean()
    last = bars[-1]
    nats += 0.5 * (last * (x0**2).mean() - last - math.log(1 - last))
    assert found == pytest.approx(nats / math.log(2), rel=0.01)
    assert task.evaluate(Zero(), data) == found


def test_images_are_shifted_by_whole_pixels_at_the_stated_rate() -> None:
    n, probability = 4000, 0.3
    images = torch.zeros(n, 1, 8, 8)
    images[:, 0, 4, 4] = 1
    shifted = random_shift(images, 2, probability, StepRandom(0, 0, slice(0, n), n, CPU))
    assert torch.equal(shifted.flatten(1).sum(1), torch.ones(n))
    places = shifted.flatten(1).argmax(1)
    rows, columns = places // 8 - 4, places % 8 - 4
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}
    moved = ((rows != 0) | (columns != 0)).double().mean().item()
    expected = probability * 24 / 25
    assert abs(moved - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    for values in (rows, columns):
        assert abs(values.double().mean().item()) < 5 * math.sqrt(probability * 2 / n)


def test_the_border_is_filled_with_the_nearest_pixels() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4).expand(200, 1, 4, 4)
    shifted = random_shift(image, 1, 1.0, StepRandom(0, 0, slice(0, 200), 200, CPU))
    right = torch.tensor([[0, 0, 1, 2], [4, 4, 5, 6], [8, 8, 9, 10], [12, 12, 13, 14]]).float()
    assert any(torch.equal(one[0], right) for one in shifted)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--patience", "3"], "--patience requires --held-out."),
        (["--held-out", "digits"], "--held-out digits: these are the training images."),
    ],
)
def test_errors_are_one_line(options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "unet", "--data", "digits", "--out", str(tmp_path / "x"), "--steps", "1", "--cpu", *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"samplerbench: {line}\n"
    assert not (tmp_path / "x").exists()
