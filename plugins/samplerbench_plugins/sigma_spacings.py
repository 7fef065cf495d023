"""Spacings in the noise level σ, for any model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samplerbench.sampling import Spacing, UserError, option


@dataclass(frozen=True)
class _Range(Spacing):
    """A grid between two noise levels. The defaults are the smallest and largest level of the model."""

    sigma_min: float | None = option(None, "smallest noise level above 0; none: that of the model", gt=0.0, le=1e12)
    sigma_max: float | None = option(None, "largest noise level; none: that of the model", gt=0.0, le=1e12)

    def ends(self, levels: Tensor) -> tuple[float, float]:
        low = float(levels[0]) if self.sigma_min is None else self.sigma_min
        high = float(levels[-1]) if self.sigma_max is None else self.sigma_max
        if low >= high:
            raise UserError(f"spacing {self.spec}: sigma_min = {low:g} is not below sigma_max = {high:g}.")
        return low, high


@dataclass(frozen=True)
class Karras(_Range):
    """σ_i = (σ_max^(1/ρ) + i/(N-1) (σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ, then 0 (Karras et al. 2022, eq. 5)."""

    rho: float = option(7.0, "ρ: larger puts more steps at small noise", ge=0.05, le=1000.0)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        low, high = (s ** (1 / self.rho) for s in self.ends(levels))
        roots = torch.linspace(high, low, steps, dtype=torch.float64) if steps > 1 else torch.tensor([high]).double()
        return torch.cat([roots**self.rho, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class Geometric(_Range):
    """σ_i = σ_max (σ_min/σ_max)^(i/(N-1)), then 0 (Song & Ermon 2019, section 4.1): even in log σ."""

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        low, high = self.ends(levels)
        share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        return torch.cat([high * (low / high) ** share, torch.zeros(1, dtype=torch.float64)])


@dataclass(frozen=True)
class LogSNR(Geometric):
    """Even in the log signal-to-noise ratio, λ = -log σ, from σ_max to σ_min, then 0 (Lu et al. 2022a, section 3.4).

    In these coordinates λ is -log σ for every model, so the grid is `geometric`'s.
    """


@dataclass(frozen=True)
class Exponential(_Range):
    """log σ_i = log σ_min + (1 - i/(N-1))^ρ log(σ_max/σ_min), then 0: polynomial in log σ (Crowson's k-diffusion).

    ρ = 1 is even in log σ, as `geometric` and `logsnr` are.
    """

    rho: float = option(1.0, "ρ: larger puts more steps at small noise", gt=0.0, le=1000.0)

    def grid(self, levels: Tensor, steps: int) -> Tensor:
        low, high = self.ends(levels)
        ramp = (1 - torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)) ** self.rho
        return torch.cat([low * (high / low) ** ramp, torch.zeros(1, dtype=torch.float64)])
