"""The built-in tasks against independent implementations, and the checks of tasks against broken ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.sampling import Inputs, LinearOperator, Observation, Operator, Task, option
from samplerbench.sampling.task import operator_of
from samplerbench.testing import parametrize_with_checks, run_checks

SPECS = [
    *("inpaint:mask=half", "inpaint:mask=random,rate=0.5", "inpaint:size=3,sigma=0"),
    *("super-resolution:factor=2,filter=average", "super-resolution:factor=2,sigma=0"),
    *("blur:width=3", "blur:kernel=motion,width=5", "blur:size=3", "colourise", "denoise", "denoise:sigma=0"),
    *("compressed-sensing", "compressed-sensing:rate=1", "clip"),
]


def operator(spec: str, *shape: int) -> Any:
    return operator_of(registry.parse("task", spec), (shape[0], shape[1], shape[2]))


def images(*shape: int) -> Tensor:
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


@parametrize_with_checks(["inpaint", "super-resolution", "blur"], kind="task")
def test_built_in_tasks_pass(check: Any) -> None:
    check()


@pytest.mark.slow
@parametrize_with_checks(SPECS, kind="task")
def test_every_built_in_task_passes(check: Any) -> None:
    check()


def test_the_box_is_in_the_centre_and_missing_in_all_channels() -> None:
    x = images(3, 8, 10)
    kept = torch.ones(8, 10, dtype=torch.bool)
    kept[2:6, 3:7] = False
    a = operator("inpaint:mask=box", 3, 8, 10)
    assert torch.equal(a.forward(x), x[:, :, kept])
    assert torch.equal(a.pseudo_inverse(a.forward(x)), x * kept)


@pytest.mark.parametrize(("rate", "missing"), [(0.92, 59), (0.0, 0), (0.5, 32)])
def test_a_random_mask_has_the_rate(rate: float, missing: int) -> None:
    a = operator(f"inpaint:mask=random,rate={rate}", 1, 8, 8)
    assert a.observed == (1, 64 - missing)
    if 0 < missing < 64:
        other = operator(f"inpaint:mask=random,rate={rate},seed=1", 1, 8, 8)
        assert not torch.equal(a.pixels, other.pixels)


def test_bicubic_is_pillows() -> None:
    x = images(1, 16, 24)
    small = operator("super-resolution:factor=4", 1, 16, 24).forward(x)
    for row, made in zip(x, small, strict=True):
        expected = Image.fromarray(row[0].float().numpy(), mode="F").resize((6, 4), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(made[0].numpy(), np.asarray(expected), atol=2e-6)


def test_a_gaussian_blur_is_scipys() -> None:
    x = images(3, 16, 16)
    made = operator("blur:width=0.5", 3, 16, 16).forward(x)
    for c in range(3):
        expected = scipy.ndimage.gaussian_filter(x[0, c].numpy(), 0.5, mode="wrap", radius=2)
        np.testing.assert_allclose(made[0, c].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize(("angle", "axis"), [(0, 1), (90, 0)])
def test_motion_along_an_axis_averages_along_it(angle: int, axis: int) -> None:
    """A line of length 4 has the weights of its convolution with the hat function: 1/4 but at its ends."""
    made = operator(f"blur:kernel=motion,width=4,angle={angle}", 1, 16, 16).forward(images(1, 16, 16))
    weights = np.array([0.125, 0.25, 0.25, 0.25, 0.125])
    expected = scipy.ndimage.convolve1d(images(1, 16, 16)[0, 0].numpy(), weights, axis=axis, mode="wrap")
    np.testing.assert_allclose(made[0, 0].numpy(), expected, atol=5e-3)


def test_blurs_keep_the_mean() -> None:
    x = images(1, 16, 16)
    for spec in ("blur:width=2", "blur:kernel=motion,width=7,angle=30"):
        torch.testing.assert_close(operator(spec, 1, 16, 16).forward(x).mean((1, 2, 3)), x.mean((1, 2, 3)))


def test_averages() -> None:
    x = images(3, 8, 8)
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(operator("super-resolution:factor=2,filter=average", 3, 8, 8).forward(x), pooled)
    torch.testing.assert_close(operator("colourise", 3, 8, 8).forward(x), x.mean(1, keepdim=True))


def test_the_rows_of_a_projection_are_orthonormal() -> None:
    matrix = operator("compressed-sensing:rate=0.3", 3, 8, 8).matrix
    assert matrix.shape == (58, 192)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(58, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_observation_is_of_the_image_of_the_sample() -> None:
    """Two seeds differ by noise of variance 2 σ_y² alone."""
    task = registry.parse("task", "denoise:sigma=0.3")
    x = images(1, 8, 8)
    a, b = (Observation(task, operator_of(task, (1, 8, 8)), x, seed) for seed in (0, 1))
    index = torch.arange(100)
    one, two = (o.extend(index, Inputs(100)).tensors for o in (a, b))
    assert torch.equal(one["image"], index % 2)
    assert torch.equal(one["truth"], x[index % 2])
    difference = (one["observation"] - two["observation"])[:2]
    assert float(difference.var()) == pytest.approx(2 * 0.09, rel=6 * math.sqrt(2 / 128))


@pytest.mark.parametrize(
    ("spec", "shape", "says"),
    [
        ("inpaint:size=9", (1, 8, 8), "a box of 9x9 pixels does not fit into images of 8x8."),
        ("inpaint:size=8", (1, 8, 8), "no pixel of images of 8x8 is observed; use a smaller mask."),
        ("inpaint:mask=random,rate=0.999", (1, 8, 8), "no pixel of images of 8x8 is observed"),
        ("super-resolution:factor=3", (1, 8, 8), "the factor 3 does not divide the sides of images of 8x8."),
        ("blur:size=9", (1, 8, 8), "a kernel of 9x9 pixels does not fit into images of 8x8."),
        ("blur:size=4", (1, 8, 8), "size=4 is even; use an odd number of pixels."),
        ("colourise", (1, 8, 8), "the images of this model are grey; use a model of colour images."),
        ("compressed-sensing", (3, 128, 128), "the images have 49,152 values; at most 16,384 are possible."),
    ],
)
def test_a_task_that_does_not_fit_is_refused(spec: str, shape: tuple[int, int, int], says: str) -> None:
    with pytest.raises(UserError) as error:
        operator(spec, *shape)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_negative_noise_is_refused() -> None:
    with pytest.raises(UserError, match=r"task denoise: sigma=-0.1: it must be at least 0\."):
        registry.parse("task", "denoise:sigma=-0.1")


# --- The checks find what is wrong -----------------------------------------------------------------------------------


class _Row(LinearOperator):
    """A x = the first row, with one thing wrong."""

    def __init__(self, shape: tuple[int, int, int], wrong: str) -> None:
        self.shape, self.observed, self.wrong = shape, (shape[0], shape[2]), wrong

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, :, 0] * 2.0
        if self.wrong == "dtype":
            y = y.double()
        if self.wrong == "offset":
            y = y + 0.1
        if self.wrong == "batch":
            y = y - y.mean(0)
        if self.wrong == "random":
            y = y + torch.rand(())
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), *self.shape)
        x[:, :, 0] = y * (1.0 if self.wrong == "adjoint" else 2.0)
        return x

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self.adjoint(y) / (4.0 if self.wrong != "inverse" else 2.0)

    def solve(self, r: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        wide = [n.reshape(-1, 1, 1) if isinstance(n, Tensor) else n for n in (scale, shift)]
        return r / ((4.0 if self.wrong != "solve" else 2.0) * wide[0] + wide[1])


@dataclass(frozen=True)
class Row(Task):
    """The first row of the image is observed (unpublished)."""

    wrong: str = option("", "what is wrong")

    def operator(self, shape: tuple[int, int, int]) -> LinearOperator:
        return _Row(shape, self.wrong)


@dataclass(frozen=True)
class Untrue(Task):
    """Says that it is linear, and gives an operator that is not (unpublished)."""

    linear: ClassVar[bool] = True

    def operator(self, shape: tuple[int, int, int]) -> Operator:
        return operator("clip", *shape)  # type: ignore[no-any-return]


def failed(task: Task) -> dict[str, str]:
    return {result.name: result.figure for result in run_checks(task) if result.passed is False}


def test_a_sound_task_passes() -> None:
    assert failed(Row()) == {}


@pytest.mark.parametrize(
    ("wrong", "by", "says"),
    [
        ("offset", "linear", "A(2 x - 3 z) differs from 2 A x - 3 A z by"),
        ("adjoint", "adjoint", "⟨A x, y⟩ and ⟨x, Aᵀ y⟩ differ by"),
        ("inverse", "pseudo-inverse", "the equations of Penrose (1955) are violated by"),
        ("solve", "solve", "the solution leaves a residual of"),
        ("batch", "batch-split", "A x changes by"),
        ("dtype", "dtype", "A of float32 images is torch.float64"),
        ("random", "observation", "it draws from torch's global generator"),
    ],
)
def test_a_broken_operator_is_caught(wrong: str, by: str, says: str) -> None:
    assert says in failed(Row(wrong=wrong))[by]


def test_a_task_that_is_not_linear_is_caught() -> None:
    with pytest.raises(Exception, match=r"it must be a LinearOperator\."):
        operator_of(Untrue(), (1, 8, 8))
