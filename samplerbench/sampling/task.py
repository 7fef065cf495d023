"""Tasks: inverse problems y = A x₀ + σ_y n as plugins, and their observations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError, UserError
from samplerbench.options import Configurable, option
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.noise import Purpose, normal

Shape = tuple[int, int, int]
"""The shape (C, H, W) of an image."""


class Operator(ABC):
    """The forward operator A of a task for images of one shape.

    Each row of a batch is computed independently of the others. The results have the dtype and device of the argument,
    and gradients pass through `forward`.

    Attributes:
        shape: shape (C, H, W) of an image x.
        observed: shape of an observation y = A x.
    """

    shape: Shape
    observed: tuple[int, ...]

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Compute A x.

        Args:
            x: images, (B, *shape).

        Returns:
            Observations without noise, (B, *observed).
        """

    def pullback(self, x: Tensor, r: Tensor) -> Tensor:
        """Compute (∂A/∂x)ᵀ r at the images x.

        Args:
            x: images, (B, *shape).
            r: vectors in the space of observations, (B, *observed).

        Returns:
            Vectors in the space of images, (B, *shape).
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            (product,) = torch.autograd.grad(self.forward(leaf), leaf, r)
        return product


@dataclass(frozen=True, eq=False)
class SVD:
    """The singular value decomposition A = U S Vᵀ of a linear operator, in coordinates of the operator's choice.

    V and U are isometries, Vᵀ V = I and Uᵀ U = I. The coordinates may be complex, as those of the Fourier transform.
    Directions of the image that are orthogonal to V have the singular value 0.

    Attributes:
        values: singular values s ≥ 0, float64, of a shape that broadcasts with the coordinates.
        u_adjoint: function y ↦ Uᵀ y, from (B, *observed) to (B, *coordinates).
        v_adjoint: function x ↦ Vᵀ x, from (B, *shape) to (B, *coordinates).
        v: function c ↦ V c, from (B, *coordinates) to (B, *shape).
    """

    values: Tensor
    u_adjoint: Callable[[Tensor], Tensor]
    v_adjoint: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]


class LinearOperator(Operator):
    """A linear forward operator A."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Compute Aᵀ y, (B, *shape), of y (B, *observed)."""

    @abstractmethod
    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Compute A⁺ y, (B, *shape), of y (B, *observed), with the Moore-Penrose inverse A⁺."""

    @abstractmethod
    def solve(self, r: Tensor, scale: float | Tensor, shift: float | Tensor) -> Tensor:
        """Compute (scale A Aᵀ + shift I)⁻¹ r. In directions in which scale A Aᵀ + shift I is zero, the result is zero.

        Args:
            r: vectors in the space of observations, (B, *observed).
            scale: factor of A Aᵀ, a number or (B,), ≥ 0.
            shift: factor of I, a number or (B,), ≥ 0.

        Returns:
            Vectors in the space of observations, (B, *observed).
        """

    def svd(self) -> SVD | None:
        """Return the singular value decomposition. By default, None: it is not available."""
        return None

    def pullback(self, x: Tensor, r: Tensor) -> Tensor:
        return self.adjoint(r)


@dataclass(frozen=True)
class Regime:
    """Where a method samples the posterior of a Gaussian prior with independent pixels exactly.

    `samplerbench check` compares the method with the closed form there.

    Attributes:
        any_task: whether A may be any linear operator. If False, A selects pixels.
        noise: whether σ_y may be above 0.
        equal_variances: whether all pixels must have the same variance.
        variance: the variance that the pixels must have. None for any.
        measurements: the largest number of observed values. None for any.
        covariance: whether the covariance of the samples is exact besides their mean, for a sampler.
    """

    any_task: bool = True
    noise: bool = True
    equal_variances: bool = False
    variance: float | None = None
    measurements: int | None = None
    covariance: bool = True


@dataclass(frozen=True)
class Task(Configurable, ABC):
    """Base class of task plugins: y = A x₀ + σ_y n with n ~ N(0, I). A subclass implements `operator`."""

    kind: ClassVar[str] = "task"
    linear: ClassVar[bool] = True
    """Whether the operator is a LinearOperator."""

    _: KW_ONLY
    sigma: float = option(0.05, "σ_y, standard deviation of the observation's noise, for images in [-1, 1]", ge=0.0)
    images: int = option(
        0, "number of real images that are observed; the samples take them in turn. 0 is all", ge=0, le=100_000_000
    )

    @abstractmethod
    def operator(self, shape: Shape) -> Operator:
        """Create the operator for a shape of images.

        Args:
            shape: shape (C, H, W) of the images.

        Raises:
            UserError: if the task does not fit the shape.
        """


def operator_of(task: Task, shape: Shape) -> Operator:
    """Call `task.operator(shape)` and check the result.

    Raises:
        UserError: if the task does not fit the shape.
        RunError: if the plugin raises an error, or does not return an operator for this shape.
    """
    with plugin_call(task, "in operator"):
        operator = task.operator(shape)
    expected = LinearOperator if task.linear else Operator
    if not isinstance(operator, expected):
        raise RunError(f"task {task.label()}: operator returned {shown(operator)}; it must be a {expected.__name__}.")
    if tuple(operator.shape) != tuple(shape):
        raise RunError(f"task {task.label()}: its operator has shape {shown(operator.shape)}; it must be {shape}.")
    return operator


@dataclass(frozen=True, eq=False)
class Observation:
    """A task with the real images that it observes.

    Sample i belongs to image i mod N. Its observation is a function of this image, the task and the seed: the noise n
    is drawn from the seed and the number of the image.

    Attributes:
        task: the task.
        operator: operator of the task for the shape of the images.
        images: the real images x₀, (N, *shape).
        seed: seed of the noise.
    """

    task: Task
    operator: Operator
    images: Tensor
    seed: int = 0

    @property
    def sigma(self) -> float:
        """σ_y, standard deviation of the observation's noise."""
        return self.task.sigma

    def linear(self, user: str) -> LinearOperator:
        """Return the operator if it is linear.

        Args:
            user: what requires a linear operator, for the message.

        Raises:
            UserError: if the operator is not linear.
        """
        if not isinstance(self.operator, LinearOperator):
            raise UserError(f"{user} requires a linear task, and {self.task.label()} is not linear.")
        return self.operator

    def svd(self, user: str) -> SVD:
        """Return the singular value decomposition of the operator.

        Args:
            user: what requires it, for the message.

        Raises:
            UserError: if the operator is not linear, or has no singular value decomposition.
        """
        operator = self.linear(user)
        with plugin_call(self.task, "in svd"):
            svd = operator.svd()
        if svd is None:
            raise UserError(
                f"{user} requires the singular value decomposition of the task, and {self.task.label()} has none."
            )
        if not isinstance(svd, SVD):
            raise RunError(f"task {self.task.label()}: svd returned {shown(svd)}; it must be an SVD or None.")
        return svd

    def image(self, index: Tensor) -> Tensor:
        """Return the number of the real image of each sample, (B,) int64, for sample indices (B,)."""
        return index % len(self.images)

    def picture(self, y: Tensor) -> Tensor:
        """Show observations as images, (B, *shape).

        An observation that is an image itself is enlarged to the size of x₀. Of other ones, A⁺ y is shown, or
        (∂A/∂x)ᵀ y at x = 0 if the task is not linear.

        Args:
            y: observations, (B, *observed).
        """
        with plugin_call(self.task, "in showing an observation"), torch.no_grad():
            if y.ndim == 4 and y.shape[1] in (1, self.operator.shape[0]):
                enlarged = torch.nn.functional.interpolate(y, size=self.operator.shape[1:], mode="nearest")
                return enlarged.expand(-1, self.operator.shape[0], -1, -1)
            if isinstance(self.operator, LinearOperator):
                return self.operator.pseudo_inverse(y)
            return self.operator.pullback(y.new_zeros(len(y), *self.operator.shape), y)

    def extend(self, index: Tensor, inputs: Inputs) -> Inputs:
        """Add the observation, the truth and the number of the real image of each sample to its inputs.

        Args:
            index: sample indices, (B,) int64.
            inputs: labels or prompts of the samples.

        Returns:
            The inputs with "observation" (B, *observed), "truth" (B, *shape) and "image" (B,) int64.
        """
        image = self.image(index)
        truth = self.images[image.to(self.images.device)].to(index.device)
        with plugin_call(self.task, "in forward"), torch.no_grad():
            y = self.operator.forward(truth)
        expected = (len(index), *self.operator.observed)
        if not isinstance(y, Tensor) or y.shape != expected or y.dtype != truth.dtype:
            what = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else shown(y)
            raise RunError(
                f"task {self.task.label()}: forward returned {what}; it must be a {truth.dtype} tensor of shape "
                f"{expected}."
            )
        if self.sigma:
            noise = normal(self.seed, Purpose.OBSERVATION, image, 0, self.operator.observed)
            y = y + self.sigma * noise.to(y.dtype)
        return inputs.extended(observation=y, truth=truth, image=image)
