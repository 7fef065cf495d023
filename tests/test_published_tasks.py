"""The published inverse problems of 256 x 256 images: the suite, and the random path of motion."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from samplerbench_plugins.motion import _triangular, path, trajectory_kernel

from samplerbench.bench.suite import load_suite
from samplerbench.sampling.task import operator_of

SUITE = Path(__file__).parent.parent / "benchmarks" / "suites" / "inverse-images.toml"
SHAPE = (3, 256, 256)


def test_the_suite_has_the_published_settings() -> None:
    """Chung et al. 2023: box 128 x 128, random 92 %, SR x 4, Gaussian blur 61/3.0, motion blur 61/0.5; σ_y = 0.05."""
    tasks = load_suite(SUITE).tasks
    assert {task.sigma for task in tasks} == {0.05}
    box, random, small, gaussian, motion = (operator_of(task, SHAPE) for task in tasks)
    assert box.observed == (3, 256**2 - 128**2)
    assert random.observed == (3, 256**2 - round(0.92 * 256**2))
    assert small.observed == (3, 64, 64)
    x = torch.zeros(1, *SHAPE, dtype=torch.float64)
    x[0, :, 128, 128] = 1
    missing = box.adjoint(box.forward(torch.ones_like(x))) == 0  # type: ignore[attr-defined]
    rows = missing[0, 0].any(1).nonzero().flatten()
    assert (int(rows[0]), int(rows[-1])) == (64, 191)
    # The response to a point is the kernel. Frequencies with less than 0.001 of the largest response are set to 0.
    point = [operator.forward(x)[0, 0] for operator in (gaussian, motion)]
    for kernel in point:
        assert float(kernel.sum()) == pytest.approx(1)
        assert int(((kernel > 0.02 * kernel.max()).nonzero() - 128).abs().max()) <= 30
    profile = point[0].sum(0)
    for distance in (3, 6):
        assert float(profile[128 + distance] / profile[128]) == pytest.approx(math.exp(-(distance**2) / 18), abs=0.01)
    assert [task.parameters["size"] for task in tasks[3:]] == [61, 61]
    assert tasks[-1].parameters["intensity"] == 0.5


@pytest.mark.slow
def test_the_steps_of_a_path_are_those_of_its_distribution() -> None:
    size, diagonal = 61, 61 * math.sqrt(2)
    for intensity in (0.0, 0.5, 1.0):
        for seed in range(20):
            points = path(size, intensity, seed)
            moves = points[1:] - points[:-1]
            lengths = moves.norm(dim=1)
            # The path without its last step is shorter than the largest length, 0.75 d (1 + i²).
            assert float(lengths[:-1].sum()) <= 0.75 * diagonal * (1 + intensity**2)
            torch.testing.assert_close(points.mean(0), torch.zeros(2, dtype=torch.float64))
            if intensity == 0:  # angles of at most 0.1 to both sides of one direction
                angle = torch.atan2(moves[:, 1], moves[:, 0])
                turned = (angle - angle[0] + math.pi) % (2 * math.pi) - math.pi
                assert float(turned.max() - turned.min()) <= 0.2
    steps = torch.cat([(p[1:] - p[:-1]).norm(dim=1) for p in (path(size, 0.5, seed) for seed in range(100))])
    # The mean of Beta(1, 30) is 1/31. Steps longer than the path are left out, and the last step ends it.
    assert float(steps.mean()) == pytest.approx(0.6 * diagonal / 31, rel=0.1)
    assert torch.equal(path(size, 0.5, 3), path(size, 0.5, 3))
    assert not torch.equal(path(size, 0.5, 3)[:2], path(size, 0.5, 4)[:2])


def test_the_triangular_numbers_have_their_moments() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for mode, most in ((0.0, 0.1), (0.4, 0.9), (1.5, 1.6)):
        made = _triangular(u, mode, most)
        assert float(made.mean()) == pytest.approx((mode + most) / 3, rel=1e-6)
        variance = (mode**2 + most**2 - mode * most) / 18
        assert float(made.var()) == pytest.approx(variance, rel=1e-4)


def test_the_kernel_is_the_path_with_equal_weight_along_it() -> None:
    """Its mean is that of the path by length, and its variance that of the path and of the soft line."""
    for seed in range(12):
        points = path(61, 0.5, seed)
        if float(points.abs().max()) > 27:  # it leaves the kernel
            continue
        kernel = trajectory_kernel(61, 0.5, seed)
        kernel = kernel / kernel.sum()
        offset = torch.arange(61, dtype=torch.float64) - 30
        a, b = points[:-1], points[1:]
        weight = (b - a).norm(dim=1, keepdim=True)
        weight = weight / weight.sum()
        mean = (weight * (a + b) / 2).sum(0)
        square = (weight * (a * a + a * b + b * b) / 3).sum(0)
        for axis, profile in enumerate((kernel.sum(0), kernel.sum(1))):
            centre = float((profile * offset).sum())
            assert centre == pytest.approx(float(mean[axis]), abs=0.02)
            assert float((profile * offset**2).sum()) == pytest.approx(float(square[axis]) + 0.25, rel=0.01, abs=0.02)
