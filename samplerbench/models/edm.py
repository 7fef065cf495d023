"""EDM-preconditioned networks: a U-Net between the scalings of Karras et al. 2022, and the adapter that loads it."""

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
"""Points of the grid that stands for a continuous model's levels."""


class EDMPreconditioned(ModelMixin, ConfigMixin):
    """D(x, σ) = c_skip x + c_out F(c_in x, c_noise) around a `UNet2DModel` F (Karras et al. 2022, eq. 7 and table 1).

    c_skip = σ_d²/(σ² + σ_d²), c_out = σ σ_d/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²), c_noise = ln(σ)/4, which F gets as
    its timestep. `save_pretrained` writes config.json and safetensors; such a folder is a model: `model="FOLDER"`.

    Args:
        unet: the configuration of F, the keywords of `UNet2DModel`. sigma_data: σ_d, the data's standard deviation.
        sigma_min, sigma_max: the levels it is meant for. null_label: the label that means "none", the last of
            `num_class_embeds`; None where it cannot be asked without a label.

    Raises:
        ValueError: settings that contradict each other.
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
            raise ValueError(f"the network makes {config.out_channels} channels of {config.in_channels}")
        if config.time_embedding_type != "positional":
            raise ValueError(
                f"c_noise may be negative, and a {config.time_embedding_type} embedding takes its logarithm"
            )
        if not (0 < sigma_min < sigma_max and sigma_data > 0):
            raise ValueError(f"0 < sigma_min {sigma_min} < sigma_max {sigma_max} and 0 < sigma_data {sigma_data} fail")
        if null_label is not None and null_label != (config.num_class_embeds or 0) - 1:
            raise ValueError(f"null_label {null_label} is not the last of {config.num_class_embeds} class embeddings")

    @classmethod
    def around(cls, unet: UNet2DModel, **settings: Any) -> EDMPreconditioned:
        """A preconditioned copy of a network; `settings` are those of the class."""
        given = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        made = cls(unet=given, **settings)
        made.network.load_state_dict(unet.state_dict())
        return made.to(unet.device, unet.dtype)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """D (B, C, H, W), in x's dtype, of x = x₀ + σ z (B, C, H, W) at levels sigma (B,) with labels (B,)."""
        scalings, dtype = edm(self.config.sigma_data), self.network.dtype
        time = torch.as_tensor(scalings.time(sigma.double()) if scalings.time else sigma)
        output = self.network(scalings.input(x, sigma).to(dtype), time.to(dtype), class_labels=labels).sample
        return scalings.denoised(output.to(x.dtype), x, sigma)


@dataclass
class EDM(Model):
    """An `EDMPreconditioned` network: a denoiser already, of variance-exploding states, at any level."""

    null_label: int | None = None

    def null_condition(self, inputs: Inputs) -> Condition:
        if self.null_label is None:
            return {}
        return {"labels": torch.full((len(inputs),), self.null_label, device=self.device)}

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.network(x, time, condition.get("labels"))


def edm_levels(sigma_min: float, sigma_max: float, n: int = LEVELS, rho: float = 7.0) -> Tensor:
    """(σ_min^(1/ρ) + i/(n-1) (σ_max^(1/ρ) - σ_min^(1/ρ)))^ρ, (n,) float64, increasing (Karras et al. 2022, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    levels = (low + torch.arange(n, dtype=torch.float64) / (n - 1) * (high - low)) ** rho
    levels[0], levels[-1] = sigma_min, sigma_max
    return levels


def is_edm(folder: Path) -> bool:
    """Whether a folder holds an `EDMPreconditioned`."""
    try:
        found = read_json(folder / "config.json", "")
    except UserError:
        return False
    return found.get("_class_name") == EDMPreconditioned.__name__


def load_edm(
    source: str, device: torch.device, dtype: torch.dtype, options: LoadOptions, found: tuple[Path, str]
) -> EDM:
    """The `EDMPreconditioned` in a folder or on the hub, as a model. found: where `resolve_checkpoint` found it.

    Raises:
        UserError: weights that are missing or damaged, or a configuration that contradicts itself.
    """
    folder, revision = found
    card = read_card(folder, source)
    checkpoint = Checkpoint(source, folder, revision, options, {"_class_name": EDMPreconditioned.__name__}, card)
    config = checkpoint.fields(".", EDMPreconditioned)
    settings = {key: config.number(key, 1e-12, 1e12) for key in ("sigma_data", "sigma_min", "sigma_max")}
    null = config.integer_or_none("null_label", 0, MAX_CLASSES)
    if not isinstance(config.values.get("unet"), dict):
        raise config.refusal("unet", config.values.get("unet"), "an object, the keywords of UNet2DModel")
    part = checkpoint.load(".", EDMPreconditioned, dtype, device)
    inner = Fields(part.module.network.config, f"{source}: unet in config.json")
    height, width = inner.sides("sample_size")
    embeds = inner.integer_or_none("num_class_embeds", 0, MAX_CLASSES)
    return EDM(
        network=part.module,
        shape=(inner.integer("in_channels", 1, MAX_CHANNELS), height, width),
        levels=edm_levels(settings["sigma_min"], settings["sigma_max"]),
        process=VARIANCE_EXPLODING,
        device=device,
        dtype=dtype,
        classes=embeds - (null is not None) if embeds else None,
        null=null is not None,
        identity=identity_of(checkpoint, part.sha256) | {"prediction": "edm", "levels": LEVELS, **settings},
        null_label=null,
        **card_fields(checkpoint, part.module),
    )
