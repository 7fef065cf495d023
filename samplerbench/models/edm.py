"""EDM-preconditioned networks: a U-Net with the scalings of Karras et al. 2022, and its adapter.

The U-Net is a `UNet2DModel` of diffusers, or one of EDM's own (`models.edm_unet`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CHANNELS, MAX_CLASSES, MAX_TIMESTEPS
from samplerbench.models.checkpoint import Checkpoint, read_card
from samplerbench.models.diffusers_unet import card_fields, identity_of
from samplerbench.models.edm_unet import build_unet
from samplerbench.models.fields import Fields
from samplerbench.models.files import LoadOptions
from samplerbench.models.model import Condition, Model
from samplerbench.models.preconditioning import VE_SDE, Preconditioning, edm, vp_level, vp_sde
from samplerbench.models.score_sde import geometric_levels
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import VARIANCE_EXPLODING, VARIANCE_PRESERVING
from samplerbench.untrusted import read_json

LEVELS = 1000
"""Number of noise levels of the grid for a continuous-time model."""
PRECONDITIONINGS = ("edm", "vp", "ve")
"""The scalings of EDM, and those of networks of the VP SDE and the VE SDE (Karras et al. 2022, table 1)."""


class EDMPreconditioned(ModelMixin, ConfigMixin):
    """D(x, σ) = c_skip x + c_out F(c_in x, c_noise) around a U-Net F (Karras et al. 2022, eq. 7 and table 1).

    c_skip = σ_d²/(σ² + σ_d²), c_out = σ σ_d/√(σ² + σ_d²), c_in = 1/√(σ² + σ_d²), c_noise = ln(σ)/4. The
    timestep of F is c_noise. A folder written by `save_pretrained` can be used as a model: `model="FOLDER"`.

    F is a `UNet2DModel`, or one of EDM's own U-Nets if the configuration has a `model_type`: `SongUNet` (DDPM++ and
    NCSN++) or `DhariwalUNet` (ADM). Networks of the VP SDE and the VE SDE have the scalings of these (table 1).

    Args:
        unet: configuration of F: the keyword arguments of `UNet2DModel`, or the settings of `models.edm_unet`.
        sigma_data: standard deviation σ_d of the data.
        sigma_min: smallest noise level.
        sigma_max: largest noise level.
        null_label: label for the unconditional prediction, the last of `num_class_embeds`. For EDM's own U-Nets it is
            `label_dim`. None if the network has no unconditional prediction.
        preconditioning: "edm", "vp" or "ve".
        beta_d: slope β_d of the rate of the VP SDE.
        beta_min: rate β_min of the VP SDE at t = 0.
        timesteps: number of timesteps M of a network of the VP SDE.

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
        preconditioning: str = "edm",
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.own = "model_type" in unet
        self.network: Any = build_unet(unet) if self.own else UNet2DModel(**unet)
        config: Any = self.network.config
        if config.in_channels != config.out_channels:
            raise ValueError(f"out_channels {config.out_channels} must equal in_channels {config.in_channels}")
        if not self.own and config.time_embedding_type != "positional":
            raise ValueError(
                f"time_embedding_type {config.time_embedding_type} is not supported, because c_noise may be negative"
            )
        if not (0 < sigma_min < sigma_max and sigma_data > 0):
            raise ValueError(
                f"0 < sigma_min {sigma_min} < sigma_max {sigma_max} and 0 < sigma_data {sigma_data} must hold"
            )
        if self.own and null_label not in (None, self.network.settings.label_dim or None):
            raise ValueError(f"null_label {null_label} must be label_dim, {self.network.settings.label_dim}")
        if not self.own and null_label is not None and null_label != (config.num_class_embeds or 0) - 1:
            raise ValueError(f"null_label {null_label} must be the last of {config.num_class_embeds} class embeddings")
        if preconditioning not in PRECONDITIONINGS:
            raise ValueError(f"preconditioning {preconditioning} must be one of {', '.join(PRECONDITIONINGS)}")
        self.scalings = scalings(preconditioning, sigma_data, beta_d, beta_min, timesteps)

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
        rule, dtype = self.scalings, self.dtype
        time = torch.as_tensor(rule.time(sigma.double()) if rule.time else sigma)
        # EDM's own networks compute the phases of the time in at least float32, and convert the embedding.
        time = time.to(torch.promote_types(dtype, torch.float32) if self.own else dtype)
        output = self.network(rule.input(x, sigma).to(dtype), time, class_labels=labels).sample
        return rule.denoised(output.to(x.dtype), x, sigma)


def scalings(
    name: str, sigma_data: float, beta_d: float = 19.9, beta_min: float = 0.1, timesteps: int = 1000
) -> Preconditioning:
    """Return the scalings of a network (Karras et al. 2022, table 1).

    Args:
        name: "edm", "vp" or "ve".
        sigma_data: standard deviation σ_d of the data, for "edm".
        beta_d: slope β_d of the rate, for "vp".
        beta_min: rate β_min at t = 0, for "vp".
        timesteps: number of timesteps M, for "vp".
    """
    if name == "vp":
        return vp_sde(beta_d, beta_min, timesteps)
    return VE_SDE if name == "ve" else edm(sigma_data)


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


def vp_levels(sigma_min: float, sigma_max: float, beta_d: float, beta_min: float, n: int = LEVELS) -> Tensor:
    """Compute σ(t) of the VP SDE at n times t at equal distances (Karras et al. 2022, table 1).

    Args:
        sigma_min: smallest noise level.
        sigma_max: largest noise level.
        beta_d: slope β_d of the rate.
        beta_min: rate β_min at t = 0.
        n: number of noise levels.

    Returns:
        The noise levels, (n,) float64, increasing.
    """
    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
    low, high = (((beta_min**2 + 2 * beta_d * (ends**2).log1p()).sqrt() - beta_min) / beta_d).tolist()
    levels: Tensor = vp_level(torch.linspace(low, high, n, dtype=torch.float64), beta_d, beta_min)
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
    settings: dict[str, Any] = {
        key: config.number(key, 1e-12, 1e12) for key in ("sigma_data", "sigma_min", "sigma_max")
    }
    rule = config.text("preconditioning") or "edm"
    if rule not in PRECONDITIONINGS:
        raise config.refusal("preconditioning", rule, " or ".join(f'"{word}"' for word in PRECONDITIONINGS))
    rate = {key: config.number(key, 1e-12, 1e12) for key in ("beta_d", "beta_min")}
    timesteps = config.integer("timesteps", 2, MAX_TIMESTEPS)
    if rule != "edm":
        del settings["sigma_data"]
        settings |= rate | {"timesteps": timesteps} if rule == "vp" else {}
    null = config.integer_or_none("null_label", 0, MAX_CLASSES)
    if not isinstance(config.values.get("unet"), dict):
        raise config.refusal("unet", config.values.get("unet"), "an object with the arguments of UNet2DModel")
    part = checkpoint.load(".", EDMPreconditioned, dtype, device)
    wrapped = part.module
    if wrapped.own:
        inner = wrapped.network.settings
        channels, height = inner.in_channels, inner.img_resolution
        width, classes = height, inner.label_dim or None
    else:
        fields = Fields(wrapped.network.config, f"{source}: unet in config.json")
        channels = fields.integer("in_channels", 1, MAX_CHANNELS)
        height, width = fields.sides("sample_size")
        embeds = fields.integer_or_none("num_class_embeds", 0, MAX_CLASSES)
        classes = embeds - (null is not None) if embeds else None
    levels = edm_levels(settings["sigma_min"], settings["sigma_max"])
    if rule == "vp":
        levels = vp_levels(settings["sigma_min"], settings["sigma_max"], rate["beta_d"], rate["beta_min"])
    elif rule == "ve":
        levels = geometric_levels(settings["sigma_min"], settings["sigma_max"], LEVELS)
    return EDM(
        network=part.module,
        shape=(channels, height, width),
        levels=levels,
        process=VARIANCE_PRESERVING if rule == "vp" else VARIANCE_EXPLODING,
        device=device,
        dtype=dtype,
        classes=classes,
        null=null is not None,
        identity=identity_of(checkpoint, part.sha256) | {"prediction": rule, "levels": LEVELS, **settings},
        null_label=null,
        **card_fields(checkpoint, part.module, classes),
    )
