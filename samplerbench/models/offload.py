"""Ways to run text-to-image models with little memory: offloading, tiling and slicing of diffusers and accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from samplerbench.errors import UserError, argument
from samplerbench.models.files import OFFLOADS, LoadOptions
from samplerbench.models.model import Model


def check_memory_options(options: LoadOptions, device: torch.device) -> None:
    """Check that the ways to save memory are possible together and on this device.

    Args:
        options: options for loading.
        device: device of the network.

    Raises:
        UserError: if they are not.
    """
    chosen = [word for word in options.memory if word in OFFLOADS]
    if len(chosen) > 1:
        raise UserError(f"{argument('memory', ','.join(chosen))}: choose one of {' and '.join(chosen)}.")
    if not chosen:
        return
    if device.type == "cpu":
        raise UserError(f"{argument('memory', chosen[0])} requires a GPU: it moves weights from the host to the GPU.")
    for name, given in (("compile", options.compile), ("graphs", options.graphs)):
        if given:
            raise UserError(f"{argument('memory', chosen[0])} and {argument(name)} cannot be combined.")


def save_memory(model: Model, options: LoadOptions) -> None:
    """Apply the ways to save memory to a loaded model.

    - `offload`: only the module that runs is on the device (`accelerate.cpu_offload_with_hook`).
    - `sequential-offload`: only the layer that runs is on the device (`accelerate.cpu_offload`).
    - `vae-tiling`: large images are decoded in overlapping tiles. This changes them, so the protocol records it.
    - `vae-slicing`: images are decoded one by one.
    - `attention-slicing`: attention is computed in slices. For U-Nets only.

    Args:
        model: the model. Its network has no `Runner` yet.
        options: options for loading.

    Raises:
        UserError: if the autoencoder or the network does not support a way.
    """
    vae = None if model.autoencoder is None else model.autoencoder.module
    for word, method in (("vae-tiling", "enable_tiling"), ("vae-slicing", "enable_slicing")):
        if word in options.memory:
            if not hasattr(vae, method):
                raise UserError(f"{argument('memory', word)} is not supported by the autoencoder {type(vae).__name__}.")
            getattr(vae, method)()
    if "vae-tiling" in options.memory:
        model.identity["autoencoder tiling"] = True
    if "attention-slicing" in options.memory:
        network: Any = model.network
        if not hasattr(network, "set_attention_slice"):
            raise UserError(
                f"{argument('memory', 'attention-slicing')} is for U-Nets, and the network is a "
                f"{type(network).__name__}; leave it out, its attention needs little memory."
            )
        network.set_attention_slice("auto")
    if OFFLOADS.intersection(options.memory):
        offload([model.network, *([] if vae is None else [vae])], model.device, "offload" not in options.memory)


def offload(modules: list[nn.Module], device: torch.device, sequential: bool) -> None:
    """Keep the weights of modules on the host while they do not run.

    Args:
        modules: modules on the host that run in turn.
        device: device on which they run.
        sequential: whether to move single layers instead of whole modules.
    """
    import accelerate

    if sequential:
        for module in modules:
            accelerate.cpu_offload(module, device, offload_buffers=True)
        return
    hooks = [accelerate.cpu_offload_with_hook(module, device)[1] for module in modules]
    # When one runs, the one before it returns to the host, also in the next batch.
    for hook, before in zip(hooks, [hooks[-1], *hooks[:-1]], strict=True):
        if before is not hook:
            hook.hook.prev_module_hook = before


def offload_alone(module: Any, options: LoadOptions, device: torch.device) -> Any:
    """Offload a module that runs alone, such as a text encoder, if the options say so. Return it.

    Args:
        module: the module, on the host if it is to be offloaded.
        options: options for loading.
        device: device on which it runs.
    """
    if OFFLOADS.intersection(options.memory):
        offload([module], device, "offload" not in options.memory)
    return module
