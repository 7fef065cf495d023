"""Plugins with weights of their own, which are bound to a model before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Self

from samplerbench.boundary import called, plugin_call, shown
from samplerbench.errors import RunError
from samplerbench.options import Configurable
from samplerbench.sampling.view import ModelView


@dataclass(frozen=True)
class Bindable(Configurable):
    """Base class of guidances and generators."""

    bound_to: ClassVar[ModelView | None] = None
    """The model that this instance was bound to by `bind_guidance` or `bind_generator`. None if it is not bound."""
    bound_identity: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The `identity` of this instance when it was bound."""

    @property
    def identity(self) -> dict[str, str]:
        """Additional protocol fields of a bound instance, for example the hash of its weights."""
        return {}

    def bound_with(self, model: ModelView) -> Self:
        """Return a copy that is marked as bound to the model, with its checked identity.

        Args:
            model: the model.

        Raises:
            RunError: if `identity` raises an error, or is not a dictionary of strings.
        """
        with plugin_call(self, "in identity"):
            identity = self.identity
        if not isinstance(identity, dict) or not all(
            isinstance(text, str) for pair in identity.items() for text in pair
        ):
            raise RunError(f"{called(self)}: identity is {shown(identity)}; it must be a dictionary of strings.")
        return self.with_state(bound_to=model, bound_identity=dict(identity))
