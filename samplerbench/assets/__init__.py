"""The included models, classifiers and feature networks, each with the card of its training, and statistics."""

from pathlib import Path

from samplerbench.errors import UserError

FEATURES = {"digits-cnn": "digits-features", "mnist-cnn": "mnist-features"}
"""Folders of the included feature networks, by feature space."""

REFERENCES = {
    ("digits-cnn", "digits"): "references/digits-all.safetensors",
    ("digits-cnn", "digits:split=train"): "references/digits-train.safetensors",
    ("digits-cnn", "digits:split=held-out"): "references/digits-held-out.safetensors",
    ("mnist-cnn", "mnist"): "references/mnist-train.safetensors",
    ("mnist-cnn", "mnist:split=test"): "references/mnist-test.safetensors",
}
"""Files with the statistics of real images, by feature space and data set."""


def asset(name: str) -> Path:
    """The folder or file of an asset. Raises UserError where the installation lacks it."""
    path = Path(__file__).parent / name
    if not path.exists():
        raise UserError(f"the installation lacks the asset {name}; install samplerbench again.")
    return path
