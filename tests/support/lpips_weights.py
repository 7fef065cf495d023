"""Networks of LPIPS with random weights, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file


def reference(net: str) -> Any:
    """torchmetrics' LPIPS with a random network, and random weights of its linear layers."""
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(2)
    made = _LPIPS(pretrained=False, net=cast(Literal["alex", "vgg"], net), pnet_rand=True, use_dropout=True)
    for name, parameter in made.named_parameters():
        if name.startswith("lin"):
            torch.nn.init.uniform_(parameter, 0, 1)
    return made.eval()


def save(network: Any, file: Path) -> Path:
    state = {name: tensor.clone() for name, tensor in network.state_dict().items() if not name.startswith("lins.")}
    save_file(state, file)
    return file
