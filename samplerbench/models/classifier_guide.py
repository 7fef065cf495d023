"""Loading a noise-conditional classifier beside a model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.files import hash_files
from samplerbench.models.model import LoadedClassifier, Model
from samplerbench.models.noise_classifier import NoiseConditionalClassifier


def load_classifier(folder: str, model: Model) -> LoadedClassifier:
    """The `NoiseConditionalClassifier` saved in a folder, on the model's device, in float32.

    Raises:
        UserError: no such folder, not a classifier, or one of images with other channels.
    """
    path = Path(folder).expanduser()
    weights = path / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        raise UserError(
            f"no classifier in {folder}: {weights.name} is not there; `samplerbench train classifier` makes one."
        )
    try:
        network = NoiseConditionalClassifier.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the classifier in {folder} cannot be loaded: {error}") from None
    if network.config.in_channels != model.shape[0]:
        raise UserError(
            f"the classifier in {folder} is of images with {network.config.in_channels} channels; "
            f"the model's have {model.shape[0]}."
        )
    network.requires_grad_(False).eval().to(model.device)

    def logits(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x.float(), sigma.float())

    return LoadedClassifier(network, hash_files([weights]), logits, network.config.num_classes)
