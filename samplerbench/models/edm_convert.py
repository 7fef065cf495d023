"""Convert a published network of EDM, a pickle, to a folder that can be used as a model. No code of the file is run.

The pickle has the source code, the name and the attributes of each module. Only the names and the attributes are read;
the network is then built from the settings by `models.edm_unet`.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CLASSES, MAX_PICKLE_BYTES, MAX_TIMESTEPS
from samplerbench.models.edm import EDMPreconditioned
from samplerbench.models.edm_blocks import Resample
from samplerbench.models.edm_unet import MODEL_TYPES, UNetSettings, read_settings
from samplerbench.models.fields import Fields
from samplerbench.models.inert_pickle import Bounded, Budget, Function, Instance, PickleError, read_pickle
from samplerbench.models.preconditioning import vp_level
from samplerbench.models.torch_pickle import inert, tensor_functions
from samplerbench.untrusted import reason, shorten

PRECONDITIONERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve"}
"""EDM's classes of preconditioning."""
SAMPLED = (0.002, 80.0)
"""Noise levels of EDM's sampler, to which those of a network are restricted (Karras et al. 2022, table 1)."""
VP_START = 1e-3
"""Time of the smallest noise level of the VP SDE, ε_s (Karras et al. 2022, table 1)."""
CONTAINERS = tuple(f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential"))
MAX_MODULES = 100_000
MAX_NESTING = 16

OURS = (
    (r"network\.embed\.fourier\.", "map_noise."),
    (r"network\.embed\.label\.", "map_label."),
    (r"network\.embed\.first\.", "map_layer0."),
    (r"network\.embed\.second\.", "map_layer1."),
    (r"\.norm_in\.", ".norm0."),
    (r"\.norm_out\.", ".norm1."),
    (r"\.conv_in\.conv\.", ".conv0."),
    (r"\.conv_out\.", ".conv1."),
    (r"\.modulation\.", ".affine."),
    (r"\.shortcut\.conv\.", ".skip."),
    (r"\.attention\.norm\.", ".norm2."),
    (r"\.attention\.(qkv|proj)\.", r".\1."),
)
"""Patterns of our names of tensors, and EDM's names."""


def convert_edm(file: Path, out: Path) -> EDMPreconditioned:
    """Convert a network of EDM to a folder with config.json and diffusion_pytorch_model.safetensors.

    Args:
        file: the pickle, such as `edm-cifar10-32x32-cond-vp.pkl`.
        out: folder to write. It must be empty, or not exist.

    Returns:
        The network.

    Raises:
        UserError: if the file cannot be read, is not a supported network, or contains anything but its settings and
            tensors; or if the folder is not empty or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder; choose another folder.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"the folder {out} is not empty; choose another folder.")
    network = read_network(file)
    try:
        network.save_pretrained(out)
    except Exception as error:  # safetensors and diffusers have exception types of their own
        raise UserError(f"the folder {out} cannot be written ({reason(error)}).") from None
    return network


def read_network(file: Path) -> EDMPreconditioned:
    """Read a network of EDM.

    Args:
        file: the pickle.

    Raises:
        UserError: if the file cannot be read, is not a supported network, or contains anything but its settings and
            tensors.
    """
    complaint = f"{file} cannot be converted"
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{complaint}: it is not a file.")
        if status.st_size > MAX_PICKLE_BYTES:
            raise UserError(f"{complaint}: it has {status.st_size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read.")
        budget = Budget()
        with open(file, "rb") as handle:
            content = read_pickle(Bounded(handle, status.st_size), functions(budget), budget)
        return _network(content, status.st_size, complaint)
    except OSError as error:
        raise UserError(f"{complaint}: it cannot be read ({reason(error)}).") from None
    except PickleError as error:
        raise UserError(f"{complaint}: {error}.") from None


def functions(budget: Budget) -> Mapping[str, Function]:
    """Return the functions that replace every name in a pickle of EDM.

    Args:
        budget: number of opcodes that may be read in all storages.
    """
    tensors = tensor_functions(budget)
    return {
        **tensors,
        **{name: inert(name) for name in CONTAINERS},
        "dnnlib.util.EasyDict": tensors["collections.OrderedDict"],
        "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    }


def _persistent_object(meta: Any) -> Instance:
    """The object that EDM's persistence describes, without the source code of its class."""
    state = meta.get("state") if isinstance(meta, dict) else None
    name = meta.get("class_name") if isinstance(meta, dict) else None
    if not isinstance(state, dict) or not isinstance(name, str) or meta.get("type") != "class":
        raise PickleError("it has an object that is not described as in EDM's files")
    return Instance(name, (), state)


def _network(content: Any, size: int, complaint: str) -> EDMPreconditioned:
    outer = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(outer, Instance):
        raise UserError(f'{complaint}: it has no network under the key "ema", as the files of EDM have.')
    rule = PRECONDITIONERS.get(outer.name)
    if rule is None:
        known = " and ".join([", ".join(list(PRECONDITIONERS)[:-1]), list(PRECONDITIONERS)[-1]])
        raise UserError(
            f"{complaint}: its network is {shorten(ascii(outer.name)[1:-1], 40)}; only {known} are supported."
        )
    inner = _part(outer, "_modules").get("model")
    if not isinstance(inner, Instance) or inner.name not in MODEL_TYPES:
        raise UserError(f"{complaint}: its U-Net must be {' or '.join(MODEL_TYPES)}.")
    given = inner.state.get("_init_kwargs")
    if not isinstance(given, dict) or inner.state.get("_init_args") not in ((), []):
        raise UserError(f"{complaint}: it has no settings of its U-Net (_init_kwargs).")
    settings = read_settings({**given, "model_type": inner.name}, f"{complaint}: settings of the U-Net")
    arguments = _scalings(rule, outer, settings, f"{complaint}: settings of the network")
    try:
        with torch.device("meta"):  # the sizes are compared with those of the file before memory is allocated
            network = EDMPreconditioned(unet=settings.to_json(), **arguments)
    except ValueError as error:
        raise UserError(f"{complaint}: {reason(error)}.") from None
    expected = network.state_dict()
    # A file of this size cannot contain the weights, whatever it claims: 16 bits are the smallest type.
    if 2 * sum(tensor.numel() for tensor in expected.values()) > size:
        raise UserError(f"{complaint}: it is smaller than the weights of the network that it describes.")
    tensors = _weights(expected, dict(_tensors(inner)), settings, complaint)
    network.load_state_dict(tensors, assign=True)
    return network.requires_grad_(False).eval()


def _part(module: Instance, name: str) -> dict[Any, Any]:
    """`_parameters`, `_buffers` or `_modules` of a module."""
    part = module.state.get(name) if isinstance(module.state, dict) else None
    if not isinstance(part, dict):
        raise PickleError(f"its module {shorten(ascii(module.name)[1:-1], 40)} has no {name}")
    return part


def _scalings(rule: str, outer: Instance, settings: UNetSettings, where: str) -> dict[str, Any]:
    """The arguments of `EDMPreconditioned`, besides the U-Net."""
    fields = Fields(outer.state, where)
    arguments: dict[str, Any] = {"preconditioning": rule}
    if rule == "vp":
        beta_d, beta_min = (fields.number(key, 1e-6, 1e6) for key in ("beta_d", "beta_min"))
        ends = [float(vp_level(torch.tensor(t, dtype=torch.float64), beta_d, beta_min)) for t in (VP_START, 1.0)]
        if not math.isfinite(ends[1]):
            raise fields.refusal("beta_d", beta_d, "so small that the largest noise level is finite")
        arguments |= {"beta_d": beta_d, "beta_min": beta_min, "timesteps": fields.integer("M", 2, MAX_TIMESTEPS)}
    else:
        ends = [fields.number("sigma_min", 0, 1e12), fields.number("sigma_max", 1e-12, math.inf)]
    if rule == "edm":
        arguments["sigma_data"] = fields.number("sigma_data", 1e-6, 1e6)
        ends = [max(ends[0], SAMPLED[0]), min(ends[1], SAMPLED[1])]
    if fields.integer("label_dim", 0, MAX_CLASSES) != settings.label_dim:
        raise fields.refusal("label_dim", outer.state["label_dim"], f"{settings.label_dim}, that of the U-Net")
    if settings.label_dim and settings.label_dropout:
        arguments["null_label"] = settings.label_dim
    return arguments | {"sigma_min": ends[0], "sigma_max": ends[1]}


def _tensors(module: Instance) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module and its submodules, by EDM's names."""
    waiting, count = [("", module, 0)], 0
    while waiting:
        prefix, current, depth = waiting.pop()
        count += 1
        if count > MAX_MODULES or depth > MAX_NESTING:
            raise PickleError("its modules are nested too deeply")
        for kind in ("_parameters", "_buffers"):
            for name, value in _part(current, kind).items():
                if isinstance(value, Tensor):
                    yield f"{prefix}{name}", value
                elif value is not None:
                    raise PickleError("it has a parameter that is not a tensor")
        for name, value in _part(current, "_modules").items():
            if isinstance(value, Instance):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
            elif value is not None:
                raise PickleError("it has a module that is not described as in EDM's files")


def _weights(
    expected: Mapping[str, Tensor], tensors: dict[str, Tensor], settings: UNetSettings, complaint: str
) -> dict[str, Tensor]:
    """The weights of our network. Every tensor of the file must be one of them, or one that sampling does not need."""
    weights = {}
    for ours, blank in expected.items():
        name = edm_name(ours, settings)
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise UserError(f"{complaint}: it has no tensor {name}.")
        if tensor.shape != blank.shape or not tensor.is_floating_point():
            raise UserError(f"{complaint}: the tensor {name} is {_described(tensor)}; it must be {_described(blank)}.")
        weights[ours] = tensor.to(torch.float32, copy=True)
        if not weights[ours].isfinite().all():
            raise UserError(f"{complaint}: the tensor {name} contains values that are not finite.")
    kernel = torch.as_tensor(Resample("down", settings.resample_filter).kernel)[None, None]
    for name, tensor in tensors.items():
        # The augmentation labels are zero in sampling, and their layer has no bias.
        if name == "map_augment.weight":
            continue
        is_filter = name.endswith(".resample_filter") and tensor.shape == kernel.shape
        if not is_filter or not torch.allclose(tensor.float(), kernel):
            raise UserError(f"{complaint}: it has an unknown tensor, {shorten(ascii(name)[1:-1], 60)}.")
    return weights


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def edm_name(ours: str, settings: UNetSettings) -> str:
    """Return EDM's name of a tensor of an `EDMPreconditioned`, in its U-Net.

    EDM names the layers after their resolution: `enc.32x32_block0.conv0.weight`.

    Args:
        ours: name of the tensor in the state dict.
        settings: settings of the U-Net.
    """

    def place(level: int) -> str:
        side = settings.img_resolution >> level
        return f"{side}x{side}"

    lowest = len(settings.channel_mult) - 1
    side = "aux_residual" if settings.encoder_type == "residual" else "aux_skip"
    head = ("out_norm", "out_conv") if settings.adm else ("aux_norm", "aux_conv")
    name = ours
    for pattern, theirs in OURS:
        name = re.sub(pattern, theirs, name)
    if found := re.match(r"network\.encoder\.(\d+)\.(enter|side|blocks\.(\d+))\.", name):
        level, kind, index = int(found[1]), found[2], found[3]
        layer = {"enter": "down" if level else "conv", "side": side}.get(kind, f"block{index}")
        rest = name[found.end() :].removeprefix("conv.")
        return f"enc.{place(level)}_{layer}.{rest}"
    if found := re.match(r"network\.middle\.(\d)\.", name):
        return f"dec.{place(lowest)}_in{found[1]}.{name[found.end() :]}"
    if found := re.match(r"network\.decoder\.(\d+)\.(up|head\.(norm|conv)|blocks\.(\d+))\.", name):
        level, kind = lowest - int(found[1]), found[2]
        rest = name[found.end() :]
        if kind.startswith("head"):
            layer = head[found[3] == "conv"]
            return f"{layer}.{rest}" if settings.adm else f"dec.{place(level)}_{layer}.{rest}"
        return f"dec.{place(level)}_{'up' if kind == 'up' else f'block{found[4]}'}.{rest}"
    return name
