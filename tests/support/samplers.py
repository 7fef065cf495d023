"""The built-in samplers by what they need."""

from __future__ import annotations

from samplerbench import registry


def own_samplers(*, needs_task: bool) -> list[str]:
    """The names of the built-in samplers that need a task, or of those that do not, in alphabetical order."""
    own = sorted({e.name for e in registry.entries("sampler") if e.distribution == registry.OWN})
    return [name for name in own if registry.get("sampler", name).needs_task == needs_task]
