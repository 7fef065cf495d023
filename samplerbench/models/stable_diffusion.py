"""Text-to-image latent diffusion: `StableDiffusionPipeline` checkpoints (Rombach et al. 2022).

Also `LatentConsistencyModelPipeline` checkpoints (Luo et al. 2023), whose network takes the guidance scale as an input.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.diffusers_unet import card_fields, check_channels, identity_of, load_schedule
from samplerbench.models.discrete import DiscreteVP
from samplerbench.models.guidance_embedding import embedded_guidance
from samplerbench.models.latent import load_autoencoder
from samplerbench.models.model import Condition
from samplerbench.models.prompts import TextEncoder, load_text_encoder, read_prompts
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.process import VARIANCE_PRESERVING

_EXTRA = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "num_class_embeds")
"""Settings of a UNet2DConditionModel for conditions other than text. They are not supported."""


@dataclass
class StableDiffusion(DiscreteVP):
    """A `UNet2DConditionModel` in latent space, conditioned on prompts.

    The unconditional prediction uses the negative prompt, or the empty prompt if there is none.

    Attributes:
        embeddings: embeddings of the prompts, (K, L, d) on the CPU, because there may be many prompts.
        null_embedding: embedding of the negative or empty prompt, (1, L, d).
        prompts: the K prompts.
        guidance_embedding: embedding of the guidance scale of a distilled network, (1, d). None for other networks.
        text_encoder: the text encoder, if `keep_text_encoder` is set. Otherwise None, to free its memory.
    """

    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))
    null_embedding: Tensor = field(default_factory=lambda: torch.empty(0))
    prompts: tuple[str, ...] = ()
    guidance_embedding: Tensor | None = None
    text_encoder: TextEncoder | None = None

    def condition(self, inputs: Inputs) -> Condition:
        if inputs.prompts is None:
            return self.null_condition(inputs)
        return {"text": self.embeddings[inputs.prompts.cpu()].to(self.device, self.dtype)}

    def null_condition(self, inputs: Inputs) -> Condition:
        return {"text": self.null_embedding.expand(len(inputs), -1, -1)}

    def encode_prompts(self, inputs: Inputs, unconditional: bool = False) -> Tensor | None:
        if self.text_encoder is None:
            return None
        lines = [] if inputs.prompts is None else [self.prompts[i] for i in inputs.prompts.tolist()]
        if unconditional or not lines:
            lines.append(self.identity["negative prompt"])
        return self.text_encoder.encode(lines)

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        embedding = self.guidance_embedding
        scale = None if embedding is None else embedding.expand(len(x), -1)
        return self.network(x.to(self.dtype), time, encoder_hidden_states=condition["text"], timestep_cond=scale).sample


def load_stable_diffusion(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """Load the U-Net, autoencoder and text encoder of an opened pipeline, and encode the prompts.

    Args:
        checkpoint: the opened pipeline.
        device: device of the network.
        dtype: dtype of the network's weights.

    Raises:
        UserError: if prompts are missing (unless `options.show`), the network has conditions other than text, or its
            width differs from that of the text encoder. See also `Checkpoint.load`, `read_schedule`,
            `load_autoencoder` and `read_prompts`.
    """
    from diffusers import UNet2DConditionModel

    source, options = checkpoint.source, checkpoint.options
    if options.prompts is None and not options.show:
        raise UserError(
            f"{source} is a text-to-image model; give a file with one prompt per line, {argument('prompts', 'FILE')}, "
            f"or a prompt, {argument('prompt', 'TEXT')}."
        )
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    checkpoint.require("unet", "UNet2DConditionModel")
    checkpoint.check_variant(["unet", "vae", "text_encoder"])
    config = checkpoint.fields("unet", UNet2DConditionModel)
    if extra := [name for name in _EXTRA if config.values.get(name) is not None]:
        raise UserError(f"{source}: conditions other than text are not supported ({', '.join(extra)}).")
    schedule = load_schedule(checkpoint)
    channels, size = config.integer("in_channels", 1, MAX_CHANNELS), config.sides("sample_size")
    width = config.integer("cross_attention_dim", 1, MAX_CHANNELS)
    autoencoder, latent = load_autoencoder(checkpoint, "vae", channels, size, device, dtype)
    check_channels(source, config, schedule)
    text = load_text_encoder(checkpoint, device)
    if width != text.width:
        raise UserError(
            f"{source}: cross_attention_dim of the network is {width}, but the embeddings of the text encoder have "
            f"{text.width} channels."
        )
    scale, embedding = embedded_guidance(checkpoint, config)
    part = checkpoint.load("unet", UNet2DConditionModel, dtype, device)
    negative = options.negative_prompt or ""
    null_embedding = text.encode([negative])
    embeddings = torch.empty(0) if prompts is None else text.encode(prompts.lines)
    made = card_fields(checkpoint, part.module)
    if text.truncated:
        made["notes"]["truncated prompts"] = str(text.truncated)
    return StableDiffusion(
        network=part.module,
        shape=(channels, *size),
        levels=schedule.levels,
        process=VARIANCE_PRESERVING,
        device=device,
        dtype=dtype,
        autoencoder=autoencoder,
        text=True,
        classes=None if prompts is None else len(prompts.lines),
        null=True,
        clip=schedule.clip,
        clip_range=schedule.clip_range,
        learned_variance=schedule.variance == "learned_range",
        doubled=schedule.doubled,
        identity=identity_of(checkpoint, part.sha256)
        | schedule.identity
        | latent
        | {
            "text encoder": text.sha256,
            "prompts": "" if prompts is None else prompts.sha256,
            "number of prompts": 0 if prompts is None else len(prompts.lines),
            "negative prompt": negative,
        }
        | ({} if scale is None else {"embedded guidance": scale}),
        preconditioning=schedule.preconditioning,
        embeddings=embeddings.to(dtype),
        prompts=() if prompts is None else tuple(prompts.lines),
        null_embedding=null_embedding.to(device, dtype),
        guidance_embedding=None if embedding is None else embedding.to(device, dtype),
        text_encoder=text if options.keep_text_encoder else None,
        **made,
    )
