"""Load a noise-conditional classifier for a model."""

from __future__ import annotations

from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.classifier import Classified, LoadedClassifier
from samplerbench.models.files import check_no_code, check_weights, hash_files
from samplerbench.models.noise_classifier import NoiseConditionalClassifier
from samplerbench.untrusted import read_json, reason, user_path


def load_classifier(folder: str, model: Classified) -> LoadedClassifier:
    """Load the `NoiseConditionalClassifier` in a folder, in float32.

    Args:
        folder: folder of the classifier.
        model: model to guide. The classifier is loaded to its device.

    Raises:
        UserError: if the folder does not contain a classifier, or its number of channels differs from the model's.
    """
    path = user_path(folder)
    weights = path / "diffusion_pytorch_model.safetensors"
    if not weights.exists():
        raise UserError(
            f"no classifier in {folder}: {weights.name} does not exist; train one with `samplerbench train classifier`."
        )
    complaint = f"the classifier in {folder} cannot be loaded"
    check_no_code(read_json(path / "config.json", complaint), complaint)
    check_weights(path, [weights], None, complaint)
    try:
        network = NoiseConditionalClassifier.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # diffusers raises many exception types for an invalid configuration
        raise UserError(f"{complaint}: {reason(error)}") from None
    if network.config.in_channels != model.shape[0]:
        raise UserError(
            f"the classifier in {folder} requires images with {network.config.in_channels} channels, "
            f"but the model has {model.shape[0]}."
        )
    network.requires_grad_(False).eval().to(model.device)

    def logits(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x.float(), sigma.float())

    return LoadedClassifier(network, hash_files([weights]), logits, network.config.num_classes)
