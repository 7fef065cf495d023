"""EDM-preconditioned networks: the scalings against the paper's table, the closed form, and the folder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_cell, run_images
from diffusers import UNet2DModel
from huggingface_hub import constants
from support.denoising import denoiser
from torch import Tensor

from samplerbench import registry
from samplerbench.bench import setup
from samplerbench.errors import UserError
from samplerbench.models.edm import EDMPreconditioned, edm_levels
from samplerbench.models.files import LoadOptions
from samplerbench.sampling import Noise
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.spacing import make_grid

DATA = 0.7


def unet(classes: int | None = None, **changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "norm_num_groups": 4,
        "num_class_embeds": classes,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**(settings | changes)).eval()


def saved(folder: Path, network: UNet2DModel, **settings: Any) -> Path:
    EDMPreconditioned.around(network, sigma_data=DATA, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def random_states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    return torch.randn(4, 1, 8, 8, generator=generator).double() * (1 + sigma[:, None, None, None]), sigma


def test_the_scalings_are_those_of_table_1(random_states: tuple[Tensor, Tensor]) -> None:
    x, sigma = random_states
    network = unet().double()
    wrapped = EDMPreconditioned.around(network, sigma_data=DATA)
    with torch.no_grad():
        found = wrapped(x, sigma)
        for i, s in enumerate(sigma.tolist()):
            power = s**2 + DATA**2
            output = network(x[i : i + 1] / math.sqrt(power), torch.tensor([math.log(s) / 4]).double()).sample
            expected = DATA**2 / power * x[i : i + 1] + s * DATA / math.sqrt(power) * output
            torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=1e-10)


def test_every_image_has_its_own_label_and_its_own_null(tmp_path: Path, random_states: tuple[Tensor, Tensor]) -> None:
    x, sigma = random_states
    network = unet(classes=4).double()
    model = setup.load_model(str(saved(tmp_path, network, null_label=3)), CPU, "fp64")
    assert (model.classes, model.null) == (3, True)
    labels = torch.tensor([0, 2, 1, 1])
    wrapped = EDMPreconditioned.around(network, sigma_data=DATA)
    with torch.no_grad():
        torch.testing.assert_close(denoiser(model, labels, 4)(x, sigma), wrapped(x, sigma, labels), rtol=0, atol=1e-9)
        free = wrapped(x, sigma, torch.full((4,), 3))
        torch.testing.assert_close(denoiser(model, None, 4)(x, sigma), free, rtol=0, atol=1e-9)
    assert (free - wrapped(x, sigma, labels)).abs().max() > 1e-3


@pytest.mark.slow
def test_with_a_network_of_zeros_heun_converges_to_the_closed_form(tmp_path: Path) -> None:
    """F = 0 leaves c_skip x, the exact D of N(0, σ_d² I); its ODE from s ends at σ_d x/√(s² + σ_d²)."""
    network = unet()
    network.conv_out.weight.data.zero_()
    network.conv_out.bias.data.zero_()
    model = setup.load_model(str(saved(tmp_path, network)), CPU, "fp64")
    index, start = torch.arange(4), 80.0
    x = model.prior(normal(0, Purpose.PRIOR, index, 0, model.shape), start)
    truth = DATA * x / math.sqrt(start**2 + DATA**2)
    sampler, errors = registry.parse("sampler", "heun"), []
    for steps in (36, 72, 144):
        grid = make_grid(registry.parse("spacing", "karras"), model.levels, steps)
        assert grid[0] == start
        assert grid[-2] == pytest.approx(0.002)
        final = drive(sampler, denoiser(model, None, 4), x, grid, Noise(0, index, model.shape, torch.float64))
        errors.append(float((final - truth).abs().max()))
    assert errors[2] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_a_saved_folder_gives_the_same_images(tmp_path: Path) -> None:
    network = unet()
    model = setup.load_model(str(saved(tmp_path, network)), CPU, "fp32")
    assert list(tmp_path.glob("*.safetensors"))
    wrapped = EDMPreconditioned.around(network, sigma_data=DATA)
    grid = make_cell(model, "ddim", "karras", 5).sigmas
    x = (80.0 * normal(3, Purpose.PRIOR, torch.arange(2), 0, model.shape)).float()
    with torch.no_grad():
        for s, t in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):  # Euler's method, written out
            x = x + (t - s) / s * (x - wrapped(x, torch.full((2,), s)))
    found = run_images(model, "ddim", "karras", 5, 2, None, seed=3)
    torch.testing.assert_close(found, x, rtol=0, atol=2e-5)


def test_the_levels_are_the_papers_grid() -> None:
    levels = edm_levels(0.002, 80.0, 18)
    assert (levels[0], levels[-1]) == (0.002, 80.0)
    # The first levels of the paper's 18-step schedule, from its equation 5.
    for i, level in enumerate(levels.flip(0).tolist()):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert level == pytest.approx(expected, rel=1e-9)
    assert bool((levels[1:] > levels[:-1]).all())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sigma_data": -1}, "sigma_data is -1; it must be a number from 1e-12 to 1e+12"),
        ({"sigma_min": 90.0}, "sigma_min 90.0 < sigma_max 80.0"),
        ({"null_label": 2}, "null_label 2 must be the last"),
        ({"unet": {"time_embedding_type": "fourier"}}, "time_embedding_type fourier is not supported"),
        ({"unet": {"out_channels": 2}}, "out_channels 2 must equal in_channels 1"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_one_line(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    file = saved(tmp_path, unet()) / "config.json"
    config = json.loads(file.read_text("utf-8"))
    change = change | {"unet": config["unet"] | change.get("unet", {})}
    file.write_text(json.dumps(config | change), "utf-8")
    with pytest.raises(UserError) as caught:
        setup.load_model(str(tmp_path), CPU, "fp32")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    for file in saved(tmp_path, unet()).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=r"is incomplete: .*safetensors does not exist"):
        setup.load_model(str(tmp_path), CPU, "fp32")


def test_a_network_on_the_hub_is_the_one_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "edm", unet())
    root = tmp_path / "hub" / "models--owner--edm"
    shutil.copytree(folder, root / "snapshots" / ("a" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = setup.load_model("owner/edm", CPU, "fp32", LoadOptions(offline=True))
    assert model.identity["revision"] == "a" * 40
    assert model.identity["weights"] == setup.load_model(str(folder), CPU, "fp32").identity["weights"]
