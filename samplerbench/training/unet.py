"""Train a diffusers `UNet2DModel` with ε-prediction, optionally with classes and a learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from samplerbench.data import ImageSet
from samplerbench.data.pixels import dequantise
from samplerbench.errors import Argument, UserError, argument
from samplerbench.models.model import Model
from samplerbench.models.runner import Runner
from samplerbench.models.schedule import alphas_cumprod
from samplerbench.training.augment import random_shift
from samplerbench.training.loop import StepRandom, Task

COPIES = 16
"""Copies of each held-out image in an evaluation of the variational bound, each with its own timestep."""


_ARCHITECTURE = (
    *("sample_size", "in_channels", "block_out_channels", "layers_per_block", "down_block_types", "up_block_types"),
    *("attention_head_dim", "norm_num_groups", "norm_eps", "act_fn", "num_class_embeds", "time_embedding_type"),
    *("flip_sin_to_cos", "freq_shift", "add_attention", "resnet_time_scale_shift", "center_input_sample"),
)
"""The entries of the configuration of a `UNet2DModel` that a copy of its weights must share."""


@dataclass(frozen=True)
class UNetSettings:
    """Settings of the network and the loss, as the options of `samplerbench train unet`."""

    channels: tuple[int, ...] = (64, 64)
    layers: int = 1
    attention: tuple[int, ...] = (1,)
    head_dim: int = 16
    groups: int = 8
    dropout: float = 0.0
    timesteps: int = 1000
    beta_schedule: str = "linear"
    class_conditional: bool = True
    label_dropout: float = 0.1
    learn_variance: bool = False
    clip_sample: bool = False
    flip: bool = False
    shift: int = 0
    shift_probability: float = 0.5
    objective: Literal["epsilon", "flow"] = "epsilon"
    times: Literal["uniform", "logit-normal"] = "uniform"


class UNetTask(Task):
    """L_simple (Ho et al. 2020 eq. 14), or L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021 eq. 16).

    A class-conditional network has one more embedding than classes: the last is the null label, which replaces a label
    with probability `label_dropout` (Ho & Salimans 2022 algorithm 1).

    Args:
        data: the training data.
        settings: settings of the network and the loss.
        shape: (C, H, W) of the network's input, if it differs from the images.
    """

    what = "unet"

    def __init__(self, data: ImageSet, settings: UNetSettings, shape: tuple[int, int, int] | None = None) -> None:
        from diffusers import UNet2DModel

        channels, height, width = shape or data.shape
        depth = len(settings.channels)
        if height != width or height % 2 ** (depth - 1):
            state = f"{data.name} is" if shape is None else f"the latents of {data.name} are"
            raise UserError(
                f"{state} {height}x{width}; a U-Net of {depth} resolutions needs square "
                f"{'images' if shape is None else 'latents'} whose side is a multiple of {2 ** (depth - 1)}: "
                f"give fewer {argument('channels')}."
            )
        if settings.class_conditional and data.classes is None:
            raise UserError(f"{data.name} has no labels; train with {argument('class_conditional', False)}.")
        for width in settings.channels:
            if width % settings.groups:
                raise UserError(
                    f"{argument('channels', width)}: each width must be a multiple of "
                    f"{argument('groups', settings.groups)}."
                )
        # The middle of the network, as wide as the last resolution, has attention too.
        for width in (*(settings.channels[i] for i in settings.attention if i < depth), settings.channels[-1]):
            if width % settings.head_dim:
                raise UserError(
                    f"{argument('channels', width)}: a width with attention must be a multiple of "
                    f"{argument('head_dim', settings.head_dim)}."
                )
        self.settings, self.classes = settings, data.classes if settings.class_conditional else None
        down = ["AttnDownBlock2D" if i in settings.attention else "DownBlock2D" for i in range(depth)]
        up = ["AttnUpBlock2D" if i in settings.attention else "UpBlock2D" for i in reversed(range(depth))]
        self.network: nn.Module = UNet2DModel(
            sample_size=height,
            in_channels=channels,
            out_channels=channels * (2 if settings.learn_variance else 1),
            block_out_channels=settings.channels,
            layers_per_block=settings.layers,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            attention_head_dim=settings.head_dim,
            norm_num_groups=settings.groups,
            dropout=settings.dropout,
            num_class_embeds=None if self.classes is None else self.classes + 1,
        )
        self.scheduler_config: dict[str, Any] = {
            "num_train_timesteps": settings.timesteps,
            "beta_schedule": settings.beta_schedule,
            "beta_start": 1e-4,
            "beta_end": 0.02,
        }
        self.alphas_cumprod = alphas_cumprod(self.scheduler_config)
        self.initial: str | None = None

    def start_from(self, model: Model) -> None:
        """Copy the weights of a model into the network, to continue its training.

        A network with a learned variance can start from one without: the additional output channels start at 0, which
        is the geometric mean of β̃ and β.

        Args:
            model: a `UNet2DModel` with the same architecture, prediction type and noise levels.

        Raises:
            UserError: the model differs from the network in one of these.
        """
        from diffusers import UNet2DModel

        name = argument("init", model.identity["source"])
        own: Any = self.network.config
        network = model.network.inner if isinstance(model.network, Runner) else model.network
        if not isinstance(network, UNet2DModel):
            raise UserError(f"{name}: its network is a {type(network).__name__}, not a UNet2DModel.")
        other: Any = network.config
        for key in _ARCHITECTURE:
            if _plain(other[key]) != _plain(own[key]):
                raise UserError(
                    f"{name}: its {key} is {_plain(other[key])}, but that of the new network is {_plain(own[key])}; "
                    "use the options that the model was trained with (`samplerbench show` prints them)."
                )
        self.check_process(model, name)
        weights, target = network.state_dict(), self.network.state_dict()
        for key, tensor in weights.items():
            if tensor.shape != target[key].shape:
                if own.out_channels < other.out_channels:
                    raise UserError(
                        f"{name}: it has a learned variance, and the new network has none; add "
                        f"{argument('learn_variance', True)}."
                    )
                tensor = torch.cat([tensor, torch.zeros_like(tensor)])
            target[key] = tensor
        self.network.load_state_dict(target)
        self.initial = str(model.identity["weights"])

    def check_process(self, model: Model, name: Argument) -> None:
        """Check that a model has the prediction type and the noise levels of this task.

        Args:
            model: the model.
            name: the option that names the model, for messages.

        Raises:
            UserError: it has others.
        """
        levels = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        if model.preconditioning.name != "epsilon" or not _same(model.levels, levels):
            raise UserError(
                f"{name}: it has another prediction type or other noise levels than the new network; use the "
                f"{argument('objective')}, the {argument('timesteps')} and the {argument('beta_schedule')} that it was "
                "trained with."
            )

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        images = self.augmented(images, random)
        t = random.integers(self.settings.timesteps)
        noise = random.normal(*images.shape[1:])
        alpha_cumprod = self.alphas_cumprod.to(images.device)[t].float()[:, None, None, None]
        noisy = alpha_cumprod.sqrt() * images + (1 - alpha_cumprod).sqrt() * noise
        labels = self.dropped(labels, random)
        output = network(noisy, t, class_labels=labels).sample.float()
        if not self.settings.learn_variance:
            return (output - noise).square().mean()
        epsilon, fraction = output.chunk(2, dim=1)
        bound = variational_bound(self.alphas_cumprod, images, noisy, t, epsilon.detach(), fraction)
        # L_vlb is a sum over T levels, of which one is drawn: T times its mean estimates it.
        return (epsilon - noise).square().mean() + 0.001 * self.settings.timesteps * bound.mean()

    def augmented(self, images: Tensor, random: StepRandom) -> Tensor:
        """The images with random flips and shifts, (B, C, H, W)."""
        if self.settings.flip:
            flipped = random.uniform(1, 1, 1) < 0.5
            images = torch.where(flipped, images.flip(-1), images)
        if self.settings.shift:
            images = random_shift(images, self.settings.shift, self.settings.shift_probability, random)
        return images

    def dropped(self, labels: Tensor | None, random: StepRandom) -> Tensor | None:
        """The labels for the network, (B,), where some are the null label. None for an unconditional network."""
        if self.classes is None or labels is None:
            return None
        return torch.where(random.uniform() < self.settings.label_dropout, self.classes, labels)

    def evaluator(self, data: ImageSet) -> Callable[[nn.Module], float]:
        """See `Task.evaluator`. The value is the variational bound (`evaluate`)."""
        if self.classes is not None and (data.classes is None or data.classes > self.classes):
            raise UserError(
                f"{argument('held_out', data.source)}: a network with {self.classes} classes requires held-out images "
                "with labels of these classes."
            )
        return partial(self.evaluate, data=data)

    @torch.no_grad()
    def evaluate(self, network: nn.Module, data: ImageSet) -> float:
        """The variational bound of held-out images (Ho et al. 2020, eq. 5), in bits per dimension.

        -log p(x₀) ≤ L_0 + … + L_T, with the variance of the saved scheduler. One timestep is drawn for each copy of an
        image, stratified over all copies, with the same noise in every evaluation.

        Args:
            network: the network in evaluation mode.
            data: held-out images. Labels are given to a class-conditional network.

        Returns:
            The bound. Lower is better.
        """
        device = next(network.parameters()).device
        draws = torch.Generator().manual_seed(0)
        total, timesteps = COPIES * len(data), self.settings.timesteps
        strata = (torch.arange(total) + torch.rand(total, generator=draws)) / total
        t = (strata * timesteps).long().clamp(max=timesteps - 1)[torch.randperm(total, generator=draws)]
        image = torch.arange(total) % len(data)
        alphas_cumprod = self.alphas_cumprod
        x0 = dequantise(data.images)
        bound = 0.0
        for rows in torch.arange(total).split(1024):
            images, levels = x0[image[rows]].to(device), t[rows].to(device)
            noise = torch.randn(images.shape, generator=draws).to(device)
            scale = alphas_cumprod[t[rows]].float().to(device)[:, None, None, None]
            noisy = scale.sqrt() * images + (1 - scale).sqrt() * noise
            labels = None if self.classes is None or data.labels is None else data.labels[image[rows]].to(device)
            output = network(noisy, levels, class_labels=labels).sample.float()
            epsilon, fraction = (
                output.chunk(2, dim=1) if self.settings.learn_variance else (output, torch.full_like(output, -1.0))
            )
            terms = variational_bound(alphas_cumprod, images, noisy, levels, epsilon, fraction)
            bound += float(terms.double().sum())
        last = float(alphas_cumprod[-1])
        prior = 0.5 * (last * x0.double().square().mean() - last - math.log1p(-last)) / math.log(2)
        return timesteps * bound / total + float(prior)

    def identity(self) -> dict[str, Any]:
        # Trainings that were begun before these settings existed can be resumed.
        later = {"objective": "epsilon", "times": "uniform"}
        settings = {key: value for key, value in asdict(self.settings).items() if later.get(key) != value}
        return settings | ({} if self.initial is None else {"init": self.initial})

    def pipeline(self, network: nn.Module) -> Any:
        """The diffusers pipeline that is saved."""
        from diffusers import DDPMPipeline, DDPMScheduler

        scheduler = DDPMScheduler(
            **self.scheduler_config,
            clip_sample=self.settings.clip_sample,
            variance_type="learned_range" if self.settings.learn_variance else "fixed_small",
            prediction_type="epsilon",
        )
        return DDPMPipeline(unet=network, scheduler=scheduler)

    def decode(self, x: Tensor) -> Tensor:
        """Decode states to images (B, C, H, W) in [-1, 1]."""
        return x

    def save(self, network: nn.Module, out: Path) -> dict[str, Any]:
        self.pipeline(network).save_pretrained(out, safe_serialization=True)
        return {
            "parameters": sum(p.numel() for p in network.parameters()),
            "classes": self.classes,
            "null_label": self.classes,
            "label_dropout": self.settings.label_dropout if self.classes is not None else None,
            "learned_variance": self.settings.learn_variance,
            **({} if self.initial is None else {"initial_weights": self.initial}),
        }

    @torch.no_grad()
    def preview(self, network: nn.Module, file: Path) -> None:
        from diffusers import DDIMScheduler

        from samplerbench.data.grid import save_grid

        device = next(network.parameters()).device
        scheduler = DDIMScheduler(
            **self.scheduler_config, clip_sample=self.settings.clip_sample, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(50)
        config: Any = network.config
        generator = torch.Generator().manual_seed(0)
        x = torch.randn((100, config.in_channels, config.sample_size, config.sample_size), generator=generator).to(
            device
        )
        labels = None if self.classes is None else (torch.arange(100, device=device) // 10) % self.classes
        for t in scheduler.timesteps:
            output = network(x, t, class_labels=labels).sample[:, : config.in_channels]
            x = scheduler.step(output, t, x).prev_sample
        save_grid(self.decode(x).cpu(), file, columns=10)


def _plain(value: Any) -> Any:
    """A value of a configuration, for comparison: lists instead of tuples."""
    return list(value) if isinstance(value, tuple) else value


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double().cpu(), b.double().cpu(), rtol=1e-6)


def variational_bound(
    alphas_cumprod: Tensor, x0: Tensor, noisy: Tensor, t: Tensor, epsilon: Tensor, fraction: Tensor
) -> Tensor:
    """One term of L_vlb per image, with the learned variance (Nichol & Dhariwal 2021, eq. 4-6 and 15).

    For t > 0 it is KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)). For t = 0 it is the negative log-likelihood of the
    data quantised to 256 levels (Ho et al. 2020, eq. 13).

    Args:
        alphas_cumprod: ᾱ of every timestep, (T,) float64.
        x0: images in [-1, 1], (B, C, H, W).
        noisy: x_t, the images with noise, (B, C, H, W).
        t: timesteps, (B,) int64.
        epsilon: the predicted noise, (B, C, H, W).
        fraction: the predicted variance, (B, C, H, W): -1 is log β̃, 1 is log β.

    Returns:
        Bits per dimension, (B,).
    """
    device = x0.device
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / before
    posterior = betas * (1 - before) / (1 - alphas_cumprod)
    posterior[0] = posterior[1]  # log β̃ is undefined at t = 0; use that of t = 1 (Nichol & Dhariwal 2021)

    def at(table: Tensor) -> Tensor:
        return table.to(device)[t].float()[:, None, None, None]

    log_small, log_large = at(posterior.log()), at(betas.log())
    log_variance = log_small + (fraction + 1) / 2 * (log_large - log_small)
    weight0, weight = (
        at(before.sqrt() * betas / (1 - alphas_cumprod)),
        at((1 - betas).sqrt() * (1 - before) / (1 - alphas_cumprod)),
    )
    predicted = (noisy - at((1 - alphas_cumprod).sqrt()) * epsilon) / at(alphas_cumprod.sqrt())
    mean, true_mean = weight0 * predicted + weight * noisy, weight0 * x0 + weight * noisy
    divergence = 0.5 * (
        log_variance
        - log_small
        + (log_small - log_variance).exp()
        - 1
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    scale = (-0.5 * log_variance).exp()
    upper, lower = (x0 - mean + 1 / 255) * scale, (x0 - mean - 1 / 255) * scale
    normal = torch.special.ndtr
    probability = torch.where(
        x0 < -0.999, normal(upper), torch.where(x0 > 0.999, normal(-lower), normal(upper) - normal(lower))
    )
    likelihood = -probability.clamp(min=1e-12).log()
    first = (t == 0)[:, None, None, None]
    return torch.where(first, likelihood, divergence).flatten(1).mean(1) / math.log(2)
