"""`train unet --objective flow`: the loss, the held-out value, and folders that stock diffusers loads and samples."""

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
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler
from scipy.stats import kstest, norm
from torch import Tensor, nn

from samplerbench import registry
from samplerbench.bench import setup
from samplerbench.data import ImageSet, load_data
from samplerbench.data.pixels import dequantise
from samplerbench.errors import UserError
from samplerbench.models.diffusers_unet import FlowUNet
from samplerbench.sampling import SIGMA_INFINITY, Inputs, Noise
from samplerbench.sampling.driver import drive
from samplerbench.sampling.process import flow_level
from samplerbench.training.flow import FlowTask
from samplerbench.training.loop import StepRandom, TrainSettings, fit
from samplerbench.training.unet import UNetSettings, UNetTask

CPU = torch.device("cpu")
TINY = UNetSettings(channels=(8, 8), groups=4, head_dim=4, dropout=0.1, objective="flow")
SHORT = TrainSettings(steps=6, batch_size=8, warmup=2, checkpoint_every=3, ema_decay=0.9, cpu=True, evaluate_every=3)


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return load_data("digits:split=train")


class Recorded(nn.Module):
    """A network with a given answer, which keeps what it was given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)
        self.given: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, y: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        self.given.append((y, t, class_labels))
        return SimpleNamespace(sample=self.answer[: len(y)])


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
def test_the_loss_is_the_error_of_the_velocity(data: ImageSet, times: Any) -> None:
    """y = (1-t) x₀ + t z, the time is 1000 t, the target z - x₀, and t has the stated distribution."""
    batch = 400
    images = dequantise(data.images[:batch])
    network = Recorded(torch.randn(batch, *data.shape))
    task = FlowTask(data, replace(TINY, times=times))
    loss = task.loss(network, images, data.labels[:batch], StepRandom(0, 0, slice(0, batch), batch, CPU)).detach()
    ((y, time, labels),) = network.given
    t = (time / 1000)[:, None, None, None]
    z = (y - (1 - t) * images) / t
    assert float(loss) == pytest.approx(float((network.answer.detach() - (z - images)).square().mean()), rel=1e-4)
    assert abs(float(z.mean())) < 0.03
    assert abs(float(z.std()) - 1) < 0.03
    assert labels is not None
    assert 0 < int((labels == 10).sum()) < 100
    expected = "uniform" if times == "uniform" else (lambda v: norm.cdf(np.log(v / (1 - v))))
    assert kstest(t.flatten().numpy(), expected).pvalue > 0.01


def test_the_held_out_value_is_the_error_over_uniform_times(data: ImageSet) -> None:
    """A network that returns 0 has the error E(z - x₀)² = 1 + E x₀², for every label."""
    held_out = load_data("digits:split=held-out")
    task = FlowTask(data, TINY)
    network = Recorded(torch.zeros(1024, *data.shape))
    expected = 1 + float(dequantise(held_out.images).double().square().mean())
    assert task.evaluate(network, held_out) == pytest.approx(expected, rel=0.01)
    times = torch.cat([t for _, t, _ in network.given]) / 1000
    assert kstest(times.numpy(), "uniform").pvalue > 0.9  # stratified
    assert task.evaluate(network, held_out) == task.evaluate(network, held_out)


@pytest.fixture(scope="module")
def folder(data: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional flow, trained for a few steps with held-out images."""
    out = tmp_path_factory.mktemp("flow")
    torch.manual_seed(0)
    held_out = load_data("digits:split=held-out").subset(torch.arange(20), "held-out")
    task = FlowTask(data, replace(TINY, class_conditional=False))
    fit(task, data, SHORT, out, ["samplerbench", "train", "unet", "--objective", "flow"], held_out)
    return out


def test_stock_diffusers_samples_the_folder_as_ddim_does(folder: Path) -> None:
    """`DDPMPipeline` with its flow scheduler gives the images of `ddim` on the same times, from the same noise."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    generator = torch.Generator().manual_seed(3)
    images = pipeline(batch_size=4, generator=generator, num_inference_steps=8, output_type="np").images
    z = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    model = setup.load_model(str(folder), CPU, "fp32")
    grid = torch.tensor([flow_level(float(t)) for t in pipeline.scheduler.sigmas], dtype=torch.float64)
    assert grid[0] == SIGMA_INFINITY
    noise = Noise(0, torch.arange(4), model.shape, torch.float32)
    x = drive(registry.parse("sampler", "ddim"), model.denoiser(Inputs(4)), model.prior(z, SIGMA_INFINITY), grid, noise)
    ours = ((x + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert float(np.abs(ours - images).max()) <= 1e-5


def test_the_folder_is_a_flow(folder: Path) -> None:
    model = setup.load_model(str(folder), CPU, "fp32")
    assert isinstance(model, FlowUNet)
    assert model.identity["prediction"] == "flow"
    card = json.loads((folder / "samplerbench.json").read_text("utf-8"))
    steps = dict(map(tuple, card["held_out"]["curve"]))
    assert card["held_out"]["velocity_error"] == min(steps.values())
    assert math.isfinite(card["held_out"]["velocity_error"])
    assert "held-out velocity error" in (folder / "README.md").read_text("utf-8")


def test_a_flow_with_other_output_channels_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"out_channels": 2}), "utf-8")
    with pytest.raises(UserError, match="2 output channels; a rectified flow with 1 input channels requires 1"):
        setup.load_model(str(copy), CPU, "fp32")


@pytest.mark.parametrize("name", ["learn_variance", "clip_sample"])
def test_settings_of_diffusion_are_refused(data: ImageSet, name: str) -> None:
    with pytest.raises(UserError, match='cannot be used with objective="flow"'):
        FlowTask(data, replace(TINY, **{name: True}))


def test_trainings_from_before_flows_can_be_resumed(data: ImageSet) -> None:
    """The settings of an ε-prediction network are those that were recorded before."""
    assert not {"objective", "times"} & set(UNetTask(data, UNetSettings()).identity())
    assert FlowTask(data, TINY).identity()["objective"] == "flow"
