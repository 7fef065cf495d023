"""A small random network as a rectified flow."""

from __future__ import annotations

import torch

from samplerbench.models.diffusers_unet import FlowUNet
from samplerbench.models.flow import flow_fields
from samplerbench.sampling.flow import FlowSchedule


def small_flow(dtype: torch.dtype, schedule: FlowSchedule | None = None) -> FlowUNet:
    """A `FlowUNet` with a random U-Net of 8x8 images."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return FlowUNet(
        network=network.to(dtype).eval().requires_grad_(False),
        shape=(1, 8, 8),
        device=torch.device("cpu"),
        dtype=dtype,
        **flow_fields(schedule or FlowSchedule()),
    )
