"""Preconditioning: the scalings of a network's input and output, as four functions of the noise level.

    D(x, σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x, time(σ))        (Karras et al. 2022, eq. 7 and table 1)

with the state x = x₀ + σ z. Each parametrisation is one object. An adapter only defines how to call its network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplerbench.sampling.denoiser import Sigma, coefficient

Coefficient = Callable[[Any], Any]
"""A function of σ that maps a float to a float, and a tensor (B,) to a float64 tensor (B,)."""


def _one(_: Any) -> float:
    return 1.0


def _zero(_: Any) -> float:
    return 0.0


def _root(value: Any) -> Any:
    return value**0.5


def _log(sigma: Any) -> Any:
    return torch.as_tensor(sigma, dtype=torch.float64).log()


@dataclass(frozen=True)
class Preconditioning:
    """The scalings of a network F.

    Attributes:
        name: name of the parametrisation, such as "epsilon" or "v_prediction".
        skip: c_skip(σ), the scale of the state in D.
        out: c_out(σ), the scale of the network's output in D.
        scale: c_in(σ), the scale of the network's input.
        time: time input of the network as a function of σ. None if the adapter uses discrete timesteps.
    """

    name: str
    skip: Coefficient = field(repr=False)
    out: Coefficient = field(repr=False)
    scale: Coefficient = field(repr=False)
    time: Coefficient | None = field(default=None, repr=False)

    def input(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Compute the input of the network, c_in(σ) x.

        Args:
            x: noisy state, (B, C, H, W).
            sigma: noise level of x.
        """
        return x * coefficient(self.scale(_exact(sigma, x)), x)

    def denoised(self, output: Tensor, x: Tensor, sigma: Sigma) -> Tensor:
        """Compute D(x, σ) from the output of the network.

        Args:
            output: output of the network, (B, C, H, W).
            x: noisy state, (B, C, H, W).
            sigma: noise level of x.
        """
        level = _exact(sigma, x)
        skip, out = self.skip(level), self.out(level)
        # Skip multiplications by 0 and 1. 0 · x would be NaN for an infinite state.
        scaled = output if _is(out, 1.0) else coefficient(out, x) * output
        if _is(skip, 0.0):
            return scaled
        return x + scaled if _is(skip, 1.0) else x * coefficient(skip, x) + scaled

    def output(self, x0: Tensor, x: Tensor, sigma: Sigma) -> Tensor:
        """Compute the output of the network from D, the inverse of `denoised`.

        Args:
            x0: denoised state D, (B, C, H, W).
            x: noisy state, (B, C, H, W).
            sigma: noise level of x, σ > 0.
        """
        level = _exact(sigma, x)
        skip, out = self.skip(level), self.out(level)
        rest = x0 if _is(skip, 0.0) else x0 - x * coefficient(skip, x)
        return rest if _is(out, 1.0) else rest / coefficient(out, x)


def _is(value: Any, number: float) -> bool:
    return isinstance(value, float) and value == number


def _exact(sigma: Sigma, x: Tensor) -> Sigma:
    if isinstance(sigma, Tensor) and sigma.ndim:
        return sigma.to(x.device).double()
    return float(sigma)


def _keep(sigma: Any) -> Any:
    return (1 + sigma**2) ** -0.5


EPSILON = Preconditioning("epsilon", _one, lambda s: -s, _keep)
"""ε-prediction of a variance-preserving process: D = x - σ ε (Ho et al. 2020)."""

VELOCITY = Preconditioning("v_prediction", lambda s: 1 / (1 + s**2), lambda s: -s * _keep(s), _keep)
"""v-prediction of a variance-preserving process: D = x/(1+σ²) - σ/√(1+σ²) v (Salimans & Ho 2022, appendix D)."""

SAMPLE = Preconditioning("sample", _zero, _one, _keep)
"""Sample prediction of a variance-preserving process: D is the output of the network."""

SCORE = Preconditioning("score", _one, lambda s: s**2, _one, lambda s: s)
"""The score of a variance-exploding process: D = x + σ² s(x, σ) (Song et al. 2021)."""


def _flow_time(sigma: Any) -> Any:
    return sigma / (1 + sigma)


def _flow_scale(sigma: Any) -> Any:
    return 1 / (1 + sigma)


FLOW = Preconditioning("flow", _flow_scale, lambda s: -_flow_time(s), _flow_scale, _flow_time)
"""The velocity of a rectified flow at t = σ/(1+σ): D = y - t v with y = x/(1+σ) (Liu et al. 2023)."""

DENOISED = Preconditioning("denoised", _zero, _one, _one, lambda s: s)
"""The output of the network is D."""


def edm(sigma_data: float) -> Preconditioning:
    """Create the preconditioning of EDM (Karras et al. 2022, table 1).

    c_skip = σ_d²/(σ² + σ_d²), c_out = σ σ_d/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²), time ln(σ)/4.

    Args:
        sigma_data: standard deviation σ_d of the data.
    """

    def norm(sigma: Any) -> Any:
        return (sigma**2 + sigma_data**2) ** -0.5

    return Preconditioning(
        "edm",
        lambda s: (sigma_data * norm(s)) ** 2,
        lambda s: s * sigma_data * norm(s),
        norm,
        lambda s: _log(s) / 4,
    )


def vp_level(t: Any, beta_d: float, beta_min: float) -> Any:
    """Compute σ(t) = √(exp(β_d t²/2 + β_min t) - 1) of the VP SDE (Karras et al. 2022, table 1).

    Args:
        t: time, float64 tensor.
        beta_d: slope β_d of the rate.
        beta_min: rate β_min at t = 0.
    """
    return (beta_d * t**2 / 2 + beta_min * t).expm1().sqrt()


def vp_sde(beta_d: float, beta_min: float, timesteps: int) -> Preconditioning:
    """Create the preconditioning of a network of the VP SDE (Karras et al. 2022, table 1).

    c_skip = 1, c_out = -σ, c_in = 1/√(σ² + 1), time (M-1) t(σ), t(σ) = (√(β_min² + 2 β_d ln(1 + σ²)) - β_min)/β_d.

    Args:
        beta_d: slope β_d of the rate.
        beta_min: rate β_min at t = 0.
        timesteps: number of timesteps M of the network.
    """

    def time(sigma: Any) -> Any:
        squared = torch.as_tensor(sigma, dtype=torch.float64) ** 2
        return (timesteps - 1) * ((beta_min**2 + 2 * beta_d * squared.log1p()).sqrt() - beta_min) / beta_d

    return Preconditioning("vp", _one, lambda s: -s, _keep, time)


VE_SDE = Preconditioning("ve", _one, lambda s: s, _one, lambda s: _log(s / 2))
"""A network of the VE SDE: c_skip = 1, c_out = σ, c_in = 1, time ln(σ/2) (Karras et al. 2022, table 1)."""


def consistency(sigma_data: float, sigma_min: float) -> Preconditioning:
    """Create the preconditioning of consistency models, with D(x, σ_min) = x (Song et al. 2023, appendix C).

    c_skip = σ_d²/((σ-σ_min)² + σ_d²), c_out = (σ-σ_min) σ_d/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²), time 250 ln σ.

    Args:
        sigma_data: standard deviation σ_d of the data.
        sigma_min: smallest noise level σ_min.
    """

    def norm(sigma: Any) -> Any:
        return (sigma**2 + sigma_data**2) ** -0.5

    return Preconditioning(
        "consistency",
        lambda s: sigma_data**2 / ((s - sigma_min) ** 2 + sigma_data**2),
        lambda s: (s - sigma_min) * sigma_data * norm(s),
        norm,
        lambda s: 250 * _log(s),
    )


def latent_consistency(
    base: Preconditioning, timestep: Coefficient, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> Preconditioning:
    """Add the boundary condition of latent consistency models to a variance-preserving parametrisation.

    D(x, σ) = c_skip y + c_out D₀(x, σ), where y = x/√(1+σ²) and D₀ is the prediction of x₀ from the network's output,
    with c_skip = σ_d²/(s² + σ_d²), c_out = s/√(s² + σ_d²), s = timestep_scaling · t(σ) (Luo et al. 2023, section 4.1;
    Song et al. 2023, appendix C). At t = 0, D is y.

    Args:
        base: parametrisation of the network: `EPSILON`, `VELOCITY` or `SAMPLE`.
        timestep: the timestep t(σ).
        timestep_scaling: factor of the timestep.
        sigma_data: σ_d of the boundary condition.
    """

    def skip(sigma: Any) -> Any:
        return sigma_data**2 / ((timestep_scaling * timestep(sigma)) ** 2 + sigma_data**2)

    def weight(sigma: Any) -> Any:
        scaled = timestep_scaling * timestep(sigma)
        return scaled * (scaled**2 + sigma_data**2) ** -0.5

    return Preconditioning(
        base.name,
        lambda s: skip(s) * _keep(s) + weight(s) * base.skip(s),
        lambda s: weight(s) * base.out(s),
        base.scale,
        base.time,
    )


DISCRETE = {p.name: p for p in (EPSILON, VELOCITY, SAMPLE)}
"""The parametrisations of discrete variance-preserving networks, keyed by `prediction_type` of diffusers."""
