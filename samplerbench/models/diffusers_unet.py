"""Pixel-space `UNet2DModel` checkpoints (DDPM and DDIM pipelines), unconditional or class-conditional."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.files import hash_files, resolve_checkpoint
from samplerbench.models.model import Condition, Model
from samplerbench.models.schedule import alphas_cumprod, noise_levels
from samplerbench.sampling.denoiser import Prediction, Sigma, coefficient

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CARD = "samplerbench.json"


@dataclass
class DiffusersUNet(Model):
    """A discrete variance-preserving U-Net seen in variance-exploding coordinates.

    The network sees x/√(1+σ²) at timestep t(σ). ε-prediction: D = x - σ ε. v-prediction:
    D = x/(1+σ²) - σ/√(1+σ²) v. Sample prediction: D is the output (Salimans & Ho 2022 appendix D, in σ).

    rounding: how a σ between two timesteps is met: "fractional" interpolates linearly in log σ, "nearest" rounds.
    null_label: the label that means "none".
    """

    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    rounding: Literal["fractional", "nearest"] = "fractional"
    null_label: int | None = None

    def __post_init__(self) -> None:
        self._levels = self.levels.tolist()
        self._log_levels = self.levels.log()

    def timestep(self, sigma: Sigma) -> float | Tensor:
        """t(σ): exactly the integer where σ is one of the model's levels; a float, or (B,) float64 for a (B,) σ."""
        if isinstance(sigma, Tensor) and sigma.ndim:
            log_levels = self._log_levels.to(sigma.device)
            log_sigma = sigma.double().log()
            upper = torch.searchsorted(log_levels, log_sigma).clamp(1, len(log_levels) - 1)
            low, high = log_levels[upper - 1], log_levels[upper]
            t = (upper - 1) + ((log_sigma - low) / (high - low)).clamp(0, 1)
            near = t.round()
            snap = (log_levels[near.long()] - log_sigma).abs() < 1e-9
            return near if self.rounding == "nearest" else torch.where(snap, near, t)
        value, levels = float(sigma), self._levels
        if value <= levels[0]:
            return 0.0
        if value >= levels[-1]:
            return float(len(levels) - 1)
        above = bisect_left(levels, value)
        below = above - 1
        t_scalar = below + math.log(value / levels[below]) / math.log(levels[above] / levels[below])
        nearest = round(t_scalar)
        if self.rounding == "nearest" or abs(levels[nearest] - value) <= 1e-9 * value:
            return float(nearest)
        return t_scalar

    def condition(self, labels: Tensor | None) -> Condition:
        if labels is None or self.classes is None:
            return {}
        return {"labels": labels.to(self.device)}

    def null_condition(self, batch: int) -> Condition:
        if self.null_label is None:
            return {}
        return {"labels": torch.full((batch,), self.null_label, device=self.device)}

    def evaluate(self, x: Tensor, sigma: Sigma, condition: Condition) -> Prediction:
        s = sigma.to(x.device).double() if isinstance(sigma, Tensor) and sigma.ndim else float(sigma)
        power = 1 + s**2
        t = self.timestep(sigma)
        times = t.to(x.device).float() if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
        scaled = (x * coefficient(power**-0.5, x)).to(self.dtype)
        output = self.network(scaled, times, class_labels=condition.get("labels")).sample.to(x.dtype)
        variance = None
        if self.learned_variance:
            output, fraction = output.chunk(2, dim=1)
            variance = (fraction + 1) / 2
        if self.prediction == "epsilon":
            x0 = x - coefficient(s, x) * output
        elif self.prediction == "v_prediction":
            x0 = x * coefficient(1 / power, x) - coefficient(s * power**-0.5, x) * output
        else:
            x0 = output
        return Prediction(x0, variance)


def load_diffusers_unet(
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    rounding: Literal["fractional", "nearest"] = "fractional",
) -> DiffusersUNet:
    """The U-Net pipeline in a folder or on the hub, as a model. Weights are read from safetensors only.

    Raises:
        UserError: a folder that is missing, incomplete, or of a class that is not supported.
    """
    folder, revision = resolve_checkpoint(source)
    index = _json(folder / "model_index.json", f"{source} is no diffusers pipeline")
    unet_class = (index.get("unet") or [None, None])[1]
    if unet_class != "UNet2DModel":
        raise UserError(
            f"{source} is a {index.get('_class_name')} with the network {unet_class or 'missing'}; "
            "supported are pipelines of a pixel-space UNet2DModel (DDPMPipeline, DDIMPipeline)."
        )
    scheduler_class = (index.get("scheduler") or [None, None])[1]
    if scheduler_class not in SCHEDULERS:
        raise UserError(
            f"{source} has the scheduler {scheduler_class}; supported are discrete variance-preserving ones: "
            f"{', '.join(SCHEDULERS)}."
        )
    config = _json(folder / "unet" / "config.json", f"{source} is incomplete")
    schedule = _json(folder / "scheduler" / "scheduler_config.json", f"{source} is incomplete")
    weights = sorted((folder / "unet").glob("diffusion_pytorch_model*.safetensors"))
    weights = [f for f in weights if ".fp16." not in f.name] or weights
    if not weights:
        raise UserError(
            f"{source} is incomplete: unet/diffusion_pytorch_model.safetensors is not there "
            "(weights in pickle files, .bin, are not loaded; convert them with diffusers)."
        )
    prediction = schedule.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"{source} predicts {prediction}; supported are {', '.join(PREDICTIONS)}.")
    network = _load_network(folder / "unet", source, dtype)
    channels, side = config["in_channels"], config.get("sample_size")
    height, width = (side, side) if isinstance(side, int) else tuple(side or (0, 0))
    if not height:
        raise UserError(f"{source} is incomplete: unet/config.json has no sample_size.")
    learned = schedule.get("variance_type") in ("learned", "learned_range")
    if config["out_channels"] != channels * (2 if learned else 1):
        raise UserError(
            f"{source}: the network has {config['out_channels']} output channels, but variance type "
            f"{schedule.get('variance_type', 'fixed_small')} with {channels} image channels needs "
            f"{channels * (2 if learned else 1)}."
        )
    card = _json(folder / CARD, f"{source} has a damaged card") if (folder / CARD).exists() else {}
    embeds = config.get("num_class_embeds")
    null_label = card.get("null_label") if embeds else None
    classes = (card.get("classes") or embeds) if embeds else None
    data = card.get("data", {})
    if not isinstance(data, dict):
        raise UserError(f'{source} has a damaged card: "data" in {CARD} is no object.')
    classifier = folder / "classifier"
    # On a CPU channels_last is no faster, and its kernels round twice as coarsely, which shows between batch sizes.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    network.requires_grad_(False).eval().to(device=device, memory_format=layout)
    return DiffusersUNet(
        network=network,
        shape=(channels, height, width),
        levels=noise_levels(alphas_cumprod(schedule)),
        variance_preserving=True,
        device=device,
        dtype=dtype,
        classes=classes,
        null=null_label is not None,
        clip=bool(schedule.get("clip_sample", scheduler_class != "PNDMScheduler")),
        learned_variance=learned,
        default_classifier=str(classifier) if classifier.is_dir() else "",
        data=data.get("name"),
        features=card.get("feature_space"),
        class_counts=data.get("class_counts"),
        identity={
            "source": source,
            "revision": revision,
            "weights": hash_files(weights),
            "prediction": prediction,
            "schedule": schedule.get("beta_schedule", "linear"),
            "timesteps": int(schedule.get("num_train_timesteps", 1000)),
            "clip": bool(schedule.get("clip_sample", scheduler_class != "PNDMScheduler")),
            "rounding": rounding,
        },
        notes={
            "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
            "data": f"{data['name']} ({data.get('split')}), {data.get('images')} images" if data else "not stated",
            "trained by": card.get("command", "not stated"),
        },
        prediction=prediction,
        rounding=rounding,
        null_label=null_label,
    )


def _json(file: Path, complaint: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found
    except FileNotFoundError:
        raise UserError(f"{complaint}: {file.parent.name}/{file.name} is not there.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{complaint}: {file.parent.name}/{file.name} cannot be read ({error}).") from None


def _load_network(folder: Path, source: str, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DModel
    from safetensors import SafetensorError

    try:
        network, info = UNet2DModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source} cannot be loaded as a UNet2DModel: {error}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{source} is incomplete: its weights lack {len(missing)} tensors, {missing[0]} first.")
    return network
