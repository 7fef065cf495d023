"""Names of samplers and spacings in ComfyUI and k-diffusion, and the schedulers of diffusers that may be equivalent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from samplerbench import registry
from samplerbench.errors import SamplerbenchError
from samplerbench.options import Configurable

Same = Callable[[str], bool]
"""A function that returns whether a spec stands for a given sampler or spacing."""


@dataclass(frozen=True)
class NameElsewhere:
    """The name of a method in ComfyUI and k-diffusion.

    Attributes:
        name: its name in ComfyUI: `dpmpp_2m`.
        k_diffusion: its name in k-diffusion: `sample_dpmpp_2m`. None if it has none.
        exact: whether it is the same method, and not only the nearest one.
        note: how they differ, or what to know; "" for nothing.
    """

    name: str
    k_diffusion: str | None
    exact: bool
    note: str

    @property
    def text(self) -> str:
        """`dpmpp_2m`, or `uni_pc (the nearest one: their last interval does not end at σ = 0)`."""
        words = [] if self.exact else ["the nearest one"]
        words += [self.note] if self.note else []
        return f"{self.name} ({': '.join(words)})" if words else self.name

    def as_dict(self) -> dict[str, Any]:
        """The fields."""
        return {"name": self.name, "k_diffusion": self.k_diffusion, "exact": self.exact, "note": self.note}


def same_parameters(kind: str, plugin: Configurable) -> Same:
    """Return a function that tells whether a spec has the class and the parameters of a plugin.

    Args:
        kind: kind of the plugin.
        plugin: the plugin.
    """

    def same(spec: str) -> bool:
        try:
            other = registry.parse(kind, spec)
        except SamplerbenchError:
            return False
        return type(other) is type(plugin) and other.parameters == plugin.parameters

    return same


def name_in_comfyui(kind: Literal["sampler", "spacing"], same: Same) -> NameElsewhere | None:
    """The name of a sampler or spacing in ComfyUI and k-diffusion, or that of the nearest method; None without one.

    Args:
        kind: the kind.
        same: returns whether a spec of this kind stands for the method.
    """
    table = registry.foreign_names()
    row = None if table is None else table.equivalent(kind, same)
    if row is None:
        return None
    prefix = "sample_" if kind == "sampler" else "get_sigmas_"
    library = next((name for name in row.names if name.startswith(prefix)), None)
    name = next((name for name in row.names if not name.startswith(prefix)), row.names[0])
    notes = [part.strip() for part in row.note.replace("`", "").split(";")]
    note = "; ".join(part for part in notes if not part.endswith("gives the same images"))
    return NameElsewhere(name, library, bool(row.shown_by), note)


def scheduler_candidates(same_sampler: Same, same_spacing: Same) -> list[tuple[str, dict[str, Any]]]:
    """Schedulers of diffusers, with arguments, that may be equivalent to a sampler with a spacing.

    Args:
        same_sampler: returns whether a spec stands for the sampler.
        same_spacing: returns whether a spec stands for the spacing.

    Returns:
        Names of classes with their arguments. Whether one is equivalent also depends on the pipeline's configuration.
    """
    table = registry.foreign_names()
    return [] if table is None else list(table.schedulers(same_sampler, same_spacing))


def guidance_scale(spec: str) -> float | None:
    """The `guidance_scale` of a diffusers pipeline that is a guidance; None if no value is the same.

    Args:
        spec: spec of the guidance.
    """
    table = registry.foreign_names()
    guidance = registry.parse("guidance", spec)
    scale = guidance.parameters.get("scale")
    if table is None or registry.split(spec)[0] not in table.GUIDANCE_SCALES or not isinstance(scale, int | float):
        return None
    plain = type(guidance)(scale=scale)
    return float(scale) if plain.parameters == guidance.parameters else None


__all__ = ["NameElsewhere", "guidance_scale", "name_in_comfyui", "same_parameters", "scheduler_candidates"]
