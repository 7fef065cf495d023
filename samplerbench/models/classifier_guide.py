"""Loading a noise-conditional classifier beside a model."""

from __future__ import annotations

from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.classifier import Classified, LoadedClassifier
from samplerbench.models.files import check_no_code, check_weights, hash_files
from samplerbench.models.noise_classifier import NoiseConditionalClassifier
from samplerbench.untrusted import read_json, reason, user_path


def load_classifier(folder: str, model: Classified) -> LoadedClassifier:
    """The `NoiseConditionalClassifier` saved in a folder, on the model's device, in float32.

    Raises:
        UserError: no such folder, not a classifier, or one of images with other channels.
    """
    path = user_path(folder)
    weights = path / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        raise UserError(
            f"no classifier in {folder}: {weights.name} is not there; `samplerbench train classifier` makes one."
        )
    complaint = f"the classifier in {folder} cannot be loaded"
    check_no_code(read_json(path / "config.json", complaint), complaint)
    check_weights(path, [weights], None, complaint)
    try:
        network = NoiseConditionalClassifier.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # what diffusers raises for a configuration of its classes has no end
        raise UserError(f"{complaint}: {reason(error)}") from None
    if network.config.in_channels != model.shape[0]:
        raise UserError(
            f"the classifier in {folder} is of images with {network.config.in_channels} channels; "
            f"the model's have {model.shape[0]}."
        )
    network.requires_grad_(False).eval().to(model.device)

    def logits(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x.float(), sigma.float())

    return LoadedClassifier(network, hash_files([weights]), logits, network.config.num_classes)
