"""The embedded digits model, classifier, features and reference, each with the card of its training."""

from pathlib import Path

from samplerbench.errors import UserError


def asset(name: str) -> Path:
    """The folder or file of an asset. Raises UserError where the installation lacks it."""
    path = Path(__file__).parent / name
    if not path.exists():
        raise UserError(f"the installation lacks the asset {name}; install samplerbench again.")
    return path
