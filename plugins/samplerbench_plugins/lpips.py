"""LPIPS: the learned perceptual distance of two images (Zhang et al. 2018)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplerbench.metrics import Metric
from samplerbench.sampling import UserError, option

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Normalisation of images in [-1, 1]: (x - SHIFT)/SCALE."""

LAYERS: dict[str, list[list[int | str]]] = {
    "alex": [[0], ["pool", 3], ["pool", 6], [8], [10]],
    "vgg": [[0, 2], ["pool", 5, 7], ["pool", 10, 12, 14], ["pool", 17, 19, 21], ["pool", 24, 26, 28]],
}
"""The convolutions of each slice by their number in torchvision's `features`. Each is followed by a ReLU."""
GEOMETRY = {"alex": {0: (4, 2), 3: (1, 2)}, "vgg": {}}
"""(stride, padding) of the convolutions for which they are not (1, 1)."""
POOLING = {"alex": (3, 2), "vgg": (2, 2)}
"""(kernel, stride) of the maximum pooling."""
LEAST_SIDE = {"alex": 31, "vgg": 16}
"""The smallest side of an image that has a feature in every layer, in pixels."""
WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
KERNELS = {"alex": {0: 11, 3: 5}, "vgg": {}}


@dataclass(frozen=True)
class LPIPS:
    """LPIPS with given weights: Σ_l mean_hw w_l · (ŷ_l - ŷ'_l)², where ŷ are features of unit length (equation 1).

    Attributes:
        net: "alex" or "vgg".
        weights: tensors by their names in the state dict of the package lpips, in float32.
        sha256: hash of the weights.
        user: name of the metric, for messages.
    """

    net: str
    weights: dict[str, Tensor]
    sha256: str
    user: str

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The distances (B,) float64 of images x and y, (B, C, H, W) uint8, C = 1 or 3, on the CPU.

        Raises:
            UserError: as `check`.
        """
        self.check(x.shape)
        return torch.cat([self._distance(a, b) for a, b in zip(x.split(AT_ONCE), y.split(AT_ONCE), strict=True)])

    def check(self, shape: Sequence[int]) -> None:
        """Raise UserError for images of a shape (..., H, W) that are too small for the network."""
        side = min(shape[-2:])
        if side < LEAST_SIDE[self.net]:
            raise UserError(
                f"the metric {self.user} with the network {self.net} needs images of at least {LEAST_SIDE[self.net]} "
                f"pixels a side, and the model's have {side}."
            )

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=torch.float64)
        for number, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            square = (_unit(a) - _unit(b)).square()
            total += nn.functional.conv2d(square, self.weights[f"lin{number}.model.1.weight"]).mean(dim=(1, 2, 3)).cpu()
        return total

    def features(self, images: Tensor) -> list[Tensor]:
        """The features of the five layers, each (B, c, h, w) float32, of images (B, C, H, W) uint8."""
        device = self.weights["lin0.model.1.weight"].device
        x = images.to(device).float() / 127.5 - 1
        shift, scale = (x.new_tensor(v).reshape(1, 3, 1, 1) for v in (SHIFT, SCALE))
        x = (x.expand(-1, 3, -1, -1) - shift) / scale
        layers = []
        for number, convolutions in enumerate(LAYERS[self.net], start=1):
            for step in convolutions:
                if isinstance(step, str):
                    x = nn.functional.max_pool2d(x, *POOLING[self.net])
                    continue
                stride, padding = GEOMETRY[self.net].get(step, (1, 1))
                weight, bias = (self.weights[f"net.slice{number}.{step}.{part}"] for part in ("weight", "bias"))
                x = nn.functional.conv2d(x, weight, bias, stride, padding).relu()
            layers.append(x)
        return layers

    def to(self, device: torch.device) -> LPIPS:
        """The same distance with its weights on a device."""
        return replace(self, weights={name: w.to(device) for name, w in self.weights.items()})


AT_ONCE = 16
"""Number of pairs per forward pass."""


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def shapes(net: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of a network: "alex" or "vgg"."""
    sizes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for number, (convolutions, width) in enumerate(zip(LAYERS[net], WIDTHS[net], strict=True)):
        for step in convolutions:
            if isinstance(step, int):
                kernel = KERNELS[net].get(step, 3)
                sizes[f"net.slice{number + 1}.{step}.weight"] = (width, channels, kernel, kernel)
                sizes[f"net.slice{number + 1}.{step}.bias"] = (width,)
                channels = width
        sizes[f"lin{number}.model.1.weight"] = (1, width, 1, 1)
    return sizes


@dataclass(frozen=True)
class NeedsLPIPS(Metric):
    """Base of metrics that measure LPIPS: the weights, which the protocol records."""

    weights: str = option("", "safetensors file with the state dict of the package lpips, net=alex or net=vgg")

    @property
    def lpips(self) -> LPIPS:
        """The distance on the CPU. Raises UserError if the weights cannot be read."""
        return self.lpips_on(torch.device("cpu"))

    def lpips_on(self, device: torch.device) -> LPIPS:
        """The distance with its weights on a device. Raises UserError if the weights cannot be read."""
        if not self.weights:
            raise UserError(
                f"the metric {self.label()} needs weights: {self.label()}:weights=FILE.safetensors, with the state "
                "dict of the package lpips."
            )
        return _load(self.weights, self.label(), str(device))

    def estimator(self, stratified: bool) -> str:
        """The network and the hash of its weights, for the protocol."""
        return f"lpips-{self.lpips.net} {self.lpips.sha256}"


@functools.lru_cache(maxsize=4)
def _load(file: str, user: str, device: str) -> LPIPS:
    return load_lpips(file, user).to(torch.device(device))


def load_lpips(file: str, user: str) -> LPIPS:
    """Load the weights of LPIPS.

    Args:
        file: a safetensors file with the state dict of `lpips.LPIPS(net="alex")` or `net="vgg"` of the package lpips.
            Entries other than the convolutions and the linear layers are ignored.
        user: name of the metric, for messages.

    Raises:
        UserError: the file does not exist, is no safetensors file, or has other tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"the weights {file} of the metric {user} do not exist.")
    try:
        content = path.read_bytes()
        tensors: dict[str, Any] = load(content)
    except (SafetensorError, OSError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"the weights {file} of the metric {user} are not a safetensors file ({line}).") from None
    first = tensors.get("net.slice1.0.weight")
    net = "alex" if first is not None and tuple(first.shape) == (64, 3, 11, 11) else "vgg"
    for name, shape in shapes(net).items():
        if name not in tensors or tuple(tensors[name].shape) != shape or not tensors[name].is_floating_point():
            what = "has no tensor" if name not in tensors else "has another shape or type of"
            raise UserError(
                f"the file {file} of the metric {user} {what} {name}; write it from the state dict of the package "
                "lpips, net=alex or net=vgg."
            )
    weights = {name: tensors[name].float() for name in shapes(net)}
    return LPIPS(net, weights, hashlib.sha256(content).hexdigest(), user)
