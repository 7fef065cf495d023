"""EDM-preconditioned networks: a U-Net with the scalings of Karras et al. 2022, and its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS, MAX_CLASSES
from samplerbench.models.checkpoint import Checkpoint, read_card
from samplerbench.models.diffusers_unet import card_fields, identity_of
from samplerbench.models.fields import Fields
from samplerbench.models.files import LoadOptions
from samplerbench.models.model import Condition, Model
from samplerbench.models.preconditioning import edm
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import VARIANCE_EXPLODING
from samplerbench.untrusted import read_json

LEVELS = 1000
"""Number of noise levels of the grid for a continuous-time model."""


class EDMPreconditioned(ModelMixin, ConfigMixin):
    """D(x, σ) = c_skip x + c_out F(c_in x, c_noise) around a `UNet2DModel` F (Karras et al. 2022, eq. 7 and table 1).

    c_skip = σ_d²/(σ² + σ_d²), c_out = σ σ_d/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²), c_noise = ln(σ)/4. The
    timestep of F is c_noise. A folder written by `save_pretrained` can be used as a model: `model="FOLDER"`.

    Args:
        unet: configuration of F, the keyword arguments of `UNet2DModel`.
        sigma_data: standard deviation σ_d of the data.
        sigma_min: smallest noise level.
        sigma_max: largest noise level.
        null_label: label for the unconditional prediction, the last of `num_class_embeds`. None if the network has no
            unconditional prediction.

    Raises:
        ValueError: if the settings are inconsistent.
    """

    @register_to_config
    def __init__(
        self,
        unet: dict[str, Any],
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        null_label: int | None = None,
    ) -> None:
        super().__init__()
        self.network = UNet2DModel(**unet)
        config: Any = self.network.config
        if config.in_channels != config.out_channels:
            raise ValueError(f"out_channels {config.out_channels} must equal in_channels {config.in_channels}")
        if config.time_embedding_type != "positional":
            raise ValueError(
                f"time_embedding_type {config.time_embedding_type} is not supported, because c_noise may be negative"
            )
        if not (0 < sigma_min < sigma_max and sigma_data > 0):
            raise ValueError(
                f"0 < sigma_min {sigma_min} < sigma_max {sigma_max} and 0 < sigma_data {sigma_data} must hold"
            )
        if null_label is not None and null_label != (config.num_class_embeds or 0) - 1:
            raise ValueError(f"null_label {null_label} must be the last of {config.num_class_embeds} class embeddings")

    @classmethod
    def around(cls, unet: UNet2DModel, **settings: Any) -> EDMPreconditioned:
        """Create a preconditioned copy of a network.

        Args:
            unet: the network F.
            settings: other arguments of the class.
        """
        given = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        made = cls(unet=given, **settings)
        made.network.load_state_dict(unet.state_dict())
        return made.to(unet.device, unet.dtype)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute D(x, σ).

        Args:
            x: noisy state x₀ + σ z, (B, C, H, W).
            sigma: noise levels, (B,).
            labels: class labels, (B,) int64. None without labels.

        Returns:
            D, (B, C, H, W), in the dtype of x.
        """
        scalings, dtype = edm(self.config.sigma_data), self.network.dtype
        time = torch.as_tensor(scalings.time(sigma.double()) if scalings.time else sigma)
        output = self.network(scalings.input(x, sigma).to(dtype), time.to(dtype), class_labels=labels).sample
        return scalings.denoised(output.to(x.dtype), x, sigma)


@dataclass
class EDM(Model):
    """An `EDMPreconditioned` network. Its output is D(x, σ) at any noise level.

    Attributes:
        null_label: label for the unconditional prediction. None if the model has no such label.
    """

    null_label: int | None = None

    def null_condition(self, inputs: Inputs) -> Condition:
        if self.null_label is None:
            return {}
        return {"labels": torch.full((len(inputs),), self.null_label, device=self.device)}

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x, time, condition.get("labels"))


def edm_levels(sigma_min: float, sigma_max: float, n: int = LEVELS, rho: float = 7.0) -> Tensor:
    """Compute (σ_min^(1/ρ) + i/(n-1) (σ_max^(1/ρ) - σ_min^(1/ρ)))^ρ (Karras et al. 2022, eq. 5).

    Args:
        sigma_min: smallest noise level.
        sigma_max: largest noise level.
        n: number of noise levels.
        rho: exponent ρ.

    Returns:
        The noise levels, (n,) float64, increasing.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    levels = (low + torch.arange(n, dtype=torch.float64) / (n - 1) * (high - low)) ** rho
    levels[0], levels[-1] = sigma_min, sigma_max
    return levels


def is_edm(folder: Path) -> bool:
    """Whether a folder contains an `EDMPreconditioned`."""
    try:
        found = read_json(folder / "config.json", "")
    except UserError:
        return False
    return found.get("_class_name") == EDMPreconditioned.__name__


def load_edm(
    source: str, device: torch.device, dtype: torch.dtype, options: LoadOptions, found: tuple[Path, str]
) -> EDM:
    """Load an `EDMPreconditioned` as a model.

    Args:
        source: path or hub id.
        device: device of the network.
        dtype: dtype of the network's weights.
        options: options for loading.
        found: folder and revision returned by `resolve_checkpoint`.

    Raises:
        UserError: if the weights are missing or damaged, or the configuration is inconsistent.
    """
    folder, revision = found
    card = read_card(folder, source)
    checkpoint = Checkpoint(source, folder, revision, options, {"_class_name": EDMPreconditioned.__name__}, card)
    config = checkpoint.fields(".", EDMPreconditioned)
    settings = {key: config.number(key, 1e-12, 1e12) for key in ("sigma_data", "sigma_min", "sigma_max")}
    null = config.integer_or_none("null_label", 0, MAX_CLASSES)
    if not isinstance(config.values.get("unet"), dict):
        raise config.refusal("unet", config.values.get("unet"), "an object with the arguments of UNet2DModel")
    part = checkpoint.load(".", EDMPreconditioned, dtype, device)
    inner = Fields(part.module.network.config, f"{source}: unet in config.json")
    height, width = inner.sides("sample_size")
    embeds = inner.integer_or_none("num_class_embeds", 0, MAX_CLASSES)
    classes = embeds - (null is not None) if embeds else None
    return EDM(
        network=part.module,
        shape=(inner.integer("in_channels", 1, MAX_CHANNELS), height, width),
        levels=edm_levels(settings["sigma_min"], settings["sigma_max"]),
        process=VARIANCE_EXPLODING,
        device=device,
        dtype=dtype,
        classes=classes,
        null=null is not None,
        identity=identity_of(checkpoint, part.sha256) | {"prediction": "edm", "levels": LEVELS, **settings},
        null_label=null,
        **card_fields(checkpoint, part.module, classes),
    )
