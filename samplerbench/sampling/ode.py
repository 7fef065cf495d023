"""The probability-flow ODE in the variable that is natural for the process."""

from __future__ import annotations

from torch import Tensor

from samplerbench.sampling.denoiser import Denoiser


class Ode:
    """The probability-flow ODE dy/dτ = (y - D)/τ of a denoiser.

    For variance-preserving and variance-exploding processes y is the state x and τ is σ (Karras et al. 2022, eq. 1 with
    σ(t) = t). For a rectified flow y = (1-t) x is the state in the network's coordinates and τ is its time t, so that
    the slope is the velocity v = (y - D)/t (Liu et al. 2023). The ODE then starts at t = 1, where σ = ∞, and solvers of
    every order start there without a special first step. In both cases y = (τ/σ) x.

    Args:
        denoise: denoiser D(x, σ).
    """

    def __init__(self, denoise: Denoiser) -> None:
        self.denoiser, self.process = denoise, denoise.process

    def time(self, sigma: float) -> float:
        """The variable τ at a noise level."""
        return self.process.time(sigma)

    def state(self, x: Tensor, sigma: float) -> Tensor:
        """The state y of the ODE for x at noise level σ, (B, C, H, W)."""
        return x * (self.time(sigma) / sigma) if self.process.ends else x

    def back(self, y: Tensor, tau: float) -> Tensor:
        """The state x = (σ/τ) y for y at time τ, (B, C, H, W)."""
        return y * (self.process.level(tau) / tau) if self.process.ends else y

    def denoise(self, y: Tensor, tau: float) -> Tensor:
        """D of the state y at time τ, (B, C, H, W). It takes one evaluation."""
        return self.denoiser(self.back(y, tau), self.process.level(tau))

    def slope(self, y: Tensor, tau: float) -> Tensor:
        """The right-hand side (y - D)/τ, (B, C, H, W). It takes one evaluation."""
        return (y - self.denoise(y, tau)) / tau


def runge_kutta(denoise: Denoiser, x: Tensor, x0: Tensor, s: float, t: float, order: int) -> Tensor:
    """One step of an explicit Runge-Kutta method on `Ode`, with `order` - 1 evaluations of D.

    Order 1 is Euler's method, which is DDIM. Order 2 is the midpoint rule. Order 3 is Heun's third-order method, with
    nodes at 0, 1/3 and 2/3 of the interval.

    Args:
        denoise: denoiser D(x, σ).
        x: state at level s, (B, C, H, W).
        x0: D(x, s), (B, C, H, W).
        s: noise level of x. It may be infinite for a rectified flow (`is_infinite`).
        t: next noise level, s > t > 0.
        order: order of the method, from 1 to 3.

    Returns:
        The state at level t, (B, C, H, W).
    """
    ode = Ode(denoise)
    start, end = ode.time(s), ode.time(t)
    y, h = ode.state(x, s), end - start
    slope = (y - x0) / start
    if order == 2:
        slope = ode.slope(y + (h / 2) * slope, start + h / 2)
    elif order == 3:
        second = ode.slope(y + (h / 3) * slope, start + h / 3)
        third = ode.slope(y + (2 * h / 3) * second, start + 2 * h / 3)
        slope = slope / 4 + 3 * third / 4
    return ode.back(y + h * slope, end)
