"""`samplerbench schedule`: its file holds the levels for `list` and for the schedulers of diffusers."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from typer.testing import CliRunner

from samplerbench import registry
from samplerbench.cli.app import app
from samplerbench.figures.schedules import diffusers_sigmas, diffusers_timesteps
from samplerbench.models.exact import exact
from samplerbench.sampling import SIGMA_INFINITY, FlowSchedule
from samplerbench.sampling.spacing import make_grid

SMALL = ["--model", "exact/mixture:shape=1x2x2"]
CHEAP = "gits:points=12,images=8"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["schedule", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_the_file_holds_the_levels_for_list_and_diffusers(tmp_path: Path, suffix: str) -> None:
    out, figure = tmp_path / f"levels.{suffix}", tmp_path / "levels.png"
    shown = run(
        CHEAP, *SMALL, "-s", "ddim", "--nfe", "3,5", "--out", str(out), "--figure", str(figure), "--compare", "karras"
    )
    read: Any = json.loads if suffix == "json" else tomllib.loads
    three, five = read(out.read_text("utf-8"))["schedules"]
    assert (three["nfe"], five["nfe"], three["evaluations"]) == (3, 5, 11 * 8)
    assert "88 network evaluations to learn" in shown
    model = exact("mixture", shape="1x2x2")
    for one in (three, five):
        grid = make_grid(registry.parse("spacing", one["list"]), model.levels, one["steps"])
        assert grid.tolist() == [*one["levels"], 0.0] == one["diffusers"]["sigmas"]
        euler = EulerDiscreteScheduler(beta_schedule="linear", interpolation_type="log_linear")
        euler.set_timesteps(sigmas=one["diffusers"]["sigmas"])
        np.testing.assert_allclose(euler.sigmas.numpy(), grid.numpy(), rtol=1e-6)
        np.testing.assert_allclose(euler.timesteps.numpy(), one["diffusers"]["timesteps"], atol=0.51)
    with Image.open(figure) as image:
        assert min(image.size) > 200


def test_sigmas_of_a_flow_are_those_before_the_shift_of_its_scheduler() -> None:
    flow: Any = SimpleNamespace(flow=FlowSchedule(shift=3.0), levels=exact("gaussian", process="flow").levels)
    levels = [SIGMA_INFINITY, 4.0, 1.0, 0.2, 0.0]
    given = diffusers_sigmas(flow, levels)
    assert given is not None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=list(given))
    expected = [1.0, *(s / (1 + s) for s in levels[1:])]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), expected, rtol=1e-6)
    assert diffusers_timesteps(flow, levels) is None
    stretched: Any = SimpleNamespace(flow=FlowSchedule(terminal=0.02))
    assert diffusers_sigmas(stretched, levels) is None


def test_timesteps_of_levels_of_the_model_are_exact_and_equal_ones_are_left_out() -> None:
    model = exact("gaussian")
    spacing = registry.parse("spacing", "trailing")
    ddim = DDIMScheduler(timestep_spacing="trailing")
    ddim.set_timesteps(10)
    grid = make_grid(spacing, model.levels, 10).tolist()
    assert list(diffusers_timesteps(model, grid) or ()) == ddim.timesteps.tolist()
    close = torch.tensor([5.0, 0.0101, 0.01001, 0.0]).tolist()
    assert diffusers_timesteps(model, close) is None


def test_a_sampler_with_its_own_levels_has_no_schedule() -> None:
    result = CliRunner().invoke(app, ["schedule", "karras", *SMALL, "-s", "pf-ode:solver=rk45", "--steps", "5"])
    assert "chooses its own noise levels" in str(result.exception)
