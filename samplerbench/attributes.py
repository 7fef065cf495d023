"""Validation of the class attributes and properties of a plugin, once, when an instance is created."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from samplerbench.errors import UserError
from samplerbench.options import Configurable


def _one_of(*values: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in values, "one of " + ", ".join(map(repr, values))


def _absent(value: Any) -> bool:
    """For an attribute of version 0.1 that no longer has an effect."""
    return not value


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


TEXT = (_text, "a text")
NAME = (lambda value: value is None or _text(value), "a name or None")
FLAG = (lambda value: isinstance(value, bool), "True or False")

ATTRIBUTES: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "sampler": {
        "needs": (lambda v: isinstance(v, frozenset) and all(isinstance(n, str) for n in v), "a frozenset of names"),
        "spacing": NAME,
        "own_grid": FLAG,
        "needs_task": FLAG,
        "reversible": FLAG,
        "even_in": _one_of("log sigma", "sigma"),
        "uniform_steps_only": FLAG,
    },
    "guidance": {
        "needs": (_absent, "absent: declare needs_condition, needs_labels or needs_unconditional"),
        "needs_condition": FLAG,
        "needs_labels": FLAG,
        "needs_unconditional": FLAG,
        "needs_task": FLAG,
        "differentiates": FLAG,
        "bayes": FLAG,
        "clip": _one_of("after", "before"),
    },
    "generator": {"needs_labels": FLAG},
    "spacing": {"flows_only": FLAG, "learned": FLAG},
    "task": {"linear": FLAG},
    "metric": {
        "of": _one_of("samples", "data"),
        "better": _one_of("lower", "higher"),
        "layer": _one_of("fid", "kid", "isc", "prc"),
        "ordered": FLAG,
        "needs_features": FLAG,
        "needs_reference": FLAG,
        "needs_real_images": FLAG,
        "needs_labels": FLAG,
        "needs_prompts": FLAG,
        "needs_truth": FLAG,
        "needs_class_pairs": FLAG,
        "prefers_real_images": FLAG,
        "feature_space": (lambda value: isinstance(value, str), "a text"),
        "data_source": (lambda value: value is None or isinstance(value, str), "a text or None"),
    },
}
"""The attributes of each kind of plugin: a test of the value, and a description of valid values."""


def check_attributes(plugin: Configurable) -> None:
    """Check the label, parameters, spec and hash of a plugin, and the ATTRIBUTES of its kind.

    Raises:
        UserError: a value of the wrong type, or a plugin that is not hashable.
        RunError: the plugin raised an exception.
    """
    from samplerbench.boundary import plugin_call, shown

    def read(name: str, get: Callable[[], Any], rule: tuple[Callable[[Any], bool], str], who: str) -> None:
        with plugin_call(who, f"in {name}"):
            value = get()
            sound = rule[0](value)
        if not sound:
            raise UserError(f"{who}: {name} is {shown(value)}; it must be {rule[1]}.")

    cls = type(plugin)
    who = f"{cls.kind} {cls.__name__}" if isinstance(cls.kind, str) else f"plugin {cls.__name__}"
    read("label", plugin.label, TEXT, who)
    who = f"{cls.kind} {plugin.label()}"
    mapping = (lambda value: isinstance(value, Mapping), "a dictionary")
    read("parameters", lambda: plugin.parameters, mapping, who)
    read("spec", lambda: plugin.spec, TEXT, who)
    read("__hash__", lambda: hash(plugin), (lambda value: isinstance(value, int), "a whole number"), who)
    for name, rule in ATTRIBUTES.get(cls.kind, {}).items():
        if not hasattr(cls, name):  # a direct subclass of Configurable lacks it
            continue
        read(name, lambda name=name: getattr(plugin, name), rule, who)  # type: ignore[misc]
