"""Select the adapter for a pipeline class."""

from __future__ import annotations

import importlib

import torch

from samplerbench.errors import UserError, argument
from samplerbench.limits import MAX_CHANNELS
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.files import (
    LATENT,
    PIXEL,
    TEXT,
    LoadOptions,
    check_no_parts,
    check_no_prompts,
    check_pipeline,
    resolve_checkpoint,
)
from samplerbench.models.lora import check_no_lora, merge_loras
from samplerbench.models.model import Model
from samplerbench.models.parts import is_single_file, open_source
from samplerbench.models.text import check_prompts
from samplerbench.models.text_encoders import explain_loading

VE_SCHEDULER = "ScoreSdeVeScheduler"
DISTILLED = ("FluxPipeline", "LatentConsistencyModelPipeline", "QwenImagePipeline", "StableDiffusionPipeline")
"""Class names of pipelines whose network can take the guidance scale as an input."""
_TEXT_LOADERS = {
    "LatentConsistencyModelPipeline": ("stable_diffusion", "load_stable_diffusion"),
    "StableDiffusionPipeline": ("stable_diffusion", "load_stable_diffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "load_stable_diffusion_xl"),
    "PixArtAlphaPipeline": ("pixart", "load_pixart"),
    "PixArtSigmaPipeline": ("pixart", "load_pixart"),
    "StableDiffusion3Pipeline": ("stable_diffusion_3", "load_stable_diffusion_3"),
    "FluxPipeline": ("flux", "load_flux"),
    "SanaPipeline": ("sana", "load_sana"),
    "Lumina2Pipeline": ("lumina2", "load_lumina2"),
    "AuraFlowPipeline": ("aura_flow", "load_aura_flow"),
    "QwenImagePipeline": ("qwen_image", "load_qwen_image"),
    "ZImagePipeline": ("z_image", "load_z_image"),
}
"""Module and function that load each text-to-image pipeline."""


def load_pipeline(source: str, device: torch.device, dtype: torch.dtype, options: LoadOptions | None = None) -> Model:
    """Load a diffusers pipeline as a model.

    Args:
        source: path or hub id of a pipeline, or path of a single safetensors file or of the folder of a network.
        device: device of the network.
        dtype: dtype of the network's weights.
        options: options for loading.

    Raises:
        UserError: if the pipeline class is not supported, parts are missing, damaged or inconsistent, or prompts are
            given for a model that is not a text-to-image model.
    """
    from samplerbench.models.edm import is_edm, load_edm

    options = options or LoadOptions()
    found = None if is_single_file(source) else resolve_checkpoint(source, options)
    if found is not None and is_edm(found[0]):
        check_no_prompts(source, options)
        check_no_lora(source, options.lora)
        check_no_parts(source, options)
        return load_edm(source, device, dtype, options, found)
    checkpoint = open_source(source, options, found)
    name = check_pipeline(source, checkpoint.index)
    if name in TEXT:
        model = _text(checkpoint, device, dtype)
        merge_loras(model, name, options.lora)
        return model
    check_no_prompts(source, options)
    check_no_lora(source, options.lora)
    if name in PIXEL:
        model = _pixel(checkpoint, device, dtype)
    elif name in LATENT:
        model = _latent(checkpoint, device, dtype)
    elif name == "ConsistencyModelPipeline":
        from samplerbench.models.consistency import load_consistency

        model = load_consistency(checkpoint, device, dtype)
    else:
        from samplerbench.models.dit import load_dit

        model = load_dit(checkpoint, device, dtype)
    return model


def _pixel(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    from samplerbench.models.diffusers_unet import unet_model
    from samplerbench.models.score_sde import load_score_sde

    if checkpoint.kind("unet") != "UNet2DModel":
        raise UserError(
            f"{checkpoint.source} is a {checkpoint.pipeline} with the network {checkpoint.kind('unet')}; only a "
            "pixel-space UNet2DModel is supported."
        )
    checkpoint.check_variant(["unet"])
    if checkpoint.kind("scheduler") == VE_SCHEDULER:
        return load_score_sde(checkpoint, device, dtype)
    return unet_model(checkpoint, device, dtype)


def _latent(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    from diffusers import UNet2DModel

    from samplerbench.models.diffusers_unet import unet_model
    from samplerbench.models.latent import beside_flow, load_autoencoder

    checkpoint.require("unet", "UNet2DModel")
    checkpoint.check_variant(["unet", "vqvae"])
    config = checkpoint.fields("unet", UNet2DModel)
    channels, size = config.integer("in_channels", 1, MAX_CHANNELS), config.sides("sample_size")
    autoencoder, identity = load_autoencoder(checkpoint, "vqvae", channels, size, device, dtype)
    model = unet_model(checkpoint, device, dtype, autoencoder=autoencoder)
    model.identity |= identity if model.flow is None else beside_flow(identity)
    return model


def _text(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    """Load a text-to-image pipeline."""
    options = checkpoint.options
    if options.embedded_guidance is not None and checkpoint.pipeline not in DISTILLED:
        raise UserError(
            f"{argument('embedded_guidance', options.embedded_guidance)} requires a network with an embedded guidance "
            f"scale; {checkpoint.source} is a {checkpoint.pipeline}, which has none."
        )
    check_prompts(checkpoint)
    module, function = _TEXT_LOADERS[checkpoint.pipeline]
    load = getattr(importlib.import_module(f"samplerbench.models.{module}"), function)
    with explain_loading("the model", device):
        model: Model = load(checkpoint, device, dtype)
    return model
