"""The embedded digits model, classifier, features and reference, each with the card of its training."""

from pathlib import Path

from samplerbench.errors import UserError

REFERENCES = {
    ("digits-cnn", "digits"): "references/digits-all.safetensors",
    ("digits-cnn", "digits:split=train"): "references/digits-train.safetensors",
    ("digits-cnn", "digits:split=held-out"): "references/digits-held-out.safetensors",
}
"""Files with the statistics of real images, by feature space and data set."""


def asset(name: str) -> Path:
    """The folder or file of an asset. Raises UserError where the installation lacks it."""
    path = Path(__file__).parent / name
    if not path.exists():
        raise UserError(f"the installation lacks the asset {name}; install samplerbench again.")
    return path
