"""Denoisers and inputs of a batch, in one line."""

from __future__ import annotations

import torch
from torch import Tensor

from samplerbench.models.model import Model
from samplerbench.sampling import Denoiser, Guidance, Inputs
from samplerbench.sampling.guidance import bind_guidance


def labelled(labels: Tensor) -> Inputs:
    """Inputs with these labels (B,)."""
    return Inputs(len(labels), labels)


def inputs_of(model: Model, labels: Tensor | None, batch: int) -> Inputs:
    """Inputs with these labels (B,), which are prompts where the model takes prompts; or with neither."""
    return Inputs(batch, prompts=labels) if model.text else Inputs(batch, labels)


def denoiser(model: Model, labels: Tensor | None, batch: int, guidance: Guidance | None = None) -> Denoiser:
    """The denoiser of a batch with labels (B,) or None, under a guidance that is bound to the model."""
    inputs = model.inputs(torch.arange(batch, device=model.device), inputs_of(model, labels, batch))
    return model.denoiser(inputs, bind_guidance(guidance, model))
