"""Cells: one combination of sampler, guidance, spacing and steps, and its protocol."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

import samplerbench
from samplerbench import plugin_file, registry
from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError, SamplerbenchError, UserError
from samplerbench.metrics.metric import Metric
from samplerbench.options import Configurable
from samplerbench.sampling import Generator, Guidance, Sampler, Spacing

QUANTISATION = "round(clamp(x, -1, 1) * 127.5 + 127.5)"
FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """One sampler at one number of steps, or one generator.

    Attributes:
        method: The sampler or the generator.
        guidance: The guidance, bound to the model, or None.
        spacing: The spacing. None if the method chooses its own noise levels or has none.
        steps: Number of steps. None if the method chooses its own steps or has none.
        sigmas: Noise levels (N+1,), float64, on the CPU. Only 0 for a generator.
        budget: Budget of network evaluations per image from which `steps` was derived, or None.
        error: The error that occurred while the cell was planned, or None.
    """

    method: Sampler | Generator
    guidance: Guidance | None
    spacing: Spacing | None
    steps: int | None
    sigmas: Tensor
    budget: int | None = None
    error: SamplerbenchError | None = field(default=None, compare=False)

    @property
    def sampler(self) -> Sampler:
        """The sampler.

        Raises:
            UserError: If the method is a generator.
        """
        if isinstance(self.method, Generator):
            raise UserError(f"{self.method.spec} is a generator and has no noise levels; name a sampler.")
        return self.method

    @property
    def title(self) -> str:
        """Title of the cell, such as `ddim:eta=0.5 + cfg, 50 steps`."""
        guided = f" + {self.guidance.spec}" if self.guidance else ""
        return f"{self.method.spec}{guided}{self.length}"

    @property
    def length(self) -> str:
        """The part of a title that says how long a run is: ", 50 steps". Empty for a generator."""
        if isinstance(self.method, Generator):
            return ""
        if self.steps:
            return f", {self.steps} steps"
        return ", its own steps" if self.budget is None else f", a budget of {self.budget}"

    def check(self) -> None:
        """Raise the error that occurred while the cell was planned, if any."""
        if self.error is not None:
            raise self.error

    @property
    def pending(self) -> dict[str, Any]:
        """Placeholder record for a cell that has no result yet."""
        return {
            "sampler": self.method.spec,
            "guidance": None if self.guidance is None else self.guidance.spec,
            "spacing": None if self.spacing is None else self.spacing.spec,
            "steps": self.steps,
            "budget": self.budget,
            "metrics": {},
            "pending": True,
            "protocol_fields": plugin_parameters(self.method, self.guidance, self.spacing)
            | ({"sigmas": [0.0]} if isinstance(self.method, Generator) else {}),
        }


def plugin_parameters(
    method: Sampler | Generator, guidance: Guidance | None, spacing: Spacing | None = None
) -> dict[str, dict[str, Any] | None]:
    """Return the protocol fields that row names are derived from, for records without a result.

    Args:
        method: The sampler or the generator.
        guidance: The guidance, or None.
        spacing: The spacing, or None.

    Returns:
        The parameters of each plugin, by kind. None for a plugin that is None.
    """
    plugins = {"sampler": method, "guidance": guidance, "spacing": spacing}
    return {kind: None if p is None else {"parameters": p.parameters} for kind, p in plugins.items()}


def protocol_of(cell: Cell, shared: dict[str, Any]) -> dict[str, Any]:
    """Return the protocol: everything that must be equal for two results to be the same experiment (DESIGN section 6).

    Args:
        cell: The cell.
        shared: Fields that all cells of a run have in common: model, labels, n, seed, dtype, features, reference,
            metrics.

    Returns:
        The protocol as a dictionary that can be written as JSON.
    """
    spacing = None if cell.spacing is None else describe_plugin(cell.spacing)
    return {
        "format": FORMAT,
        "sampler": describe_plugin(cell.method),
        "guidance": None if cell.guidance is None else describe_plugin(cell.guidance),
        "spacing": spacing,
        "sigmas": cell.sigmas.tolist(),
        "terminal": "zero",
        "quantisation": QUANTISATION,
        "versions": versions(),
        **shared,
    }


def describe_plugin(plugin: Configurable) -> dict[str, Any]:
    """Return the name, parameters, distribution and source hash of a plugin. Editing a plugin changes its hash."""
    return {
        "name": _name(plugin),
        "parameters": plugin.parameters,
        "distribution": _origin(plugin.kind, plugin.label()),
        "source": _source_hash(type(plugin)),
    }


def metric_sources(metrics: Iterable[Metric], stratified: bool = False) -> dict[str, dict[str, str]]:
    """Return the protocol field that records how the metrics are computed.

    Args:
        metrics: The metrics.
        stratified: Whether the number of images of each label is fixed.

    Returns:
        For each spec, the source hash of a metric that is not built in and the name of its estimator
        (`Metric.estimator`), if it has one. Empty if no metric has either.

    Raises:
        RunError: If a plugin fails.
    """
    own, found = f"{registry.OWN} ", {}
    for metric in metrics:
        builtin = _origin(metric.kind, metric.label()).startswith(own)
        source = None if builtin else _source_hash(type(metric))
        with plugin_call(metric, "in estimator"):
            estimator = metric.estimator(stratified)
        if not isinstance(estimator, str | None):
            raise RunError(f"metric {metric.label()}: estimator returned {shown(estimator)}; it must be a name.")
        parts = [part for part in (source, estimator) if part is not None]
        if parts:
            found[metric.spec] = " ".join(parts)
    return {"metric sources": found} if found else {}


def _name(plugin: Configurable) -> str:
    """Return the registered name, or FILE:CLASS for a plugin in a file. The folder of the file is not included."""
    file = plugin_file.split(plugin.label())
    return plugin.label() if file is None else f"{Path(file[0]).name}:{file[1]}"


def _origin(kind: str, name: str) -> str:
    if file := plugin_file.split(name):
        return f"file {Path(file[0]).name}"
    named = [e for e in registry.entries(kind) if e.name == name]
    return named[0].origin if named else "not installed"


def _source_hash(cls: type) -> str:
    try:
        return plugin_file.hash_of(cls) or _file_hash(inspect.getsourcefile(cls), cls.__module__)
    except (TypeError, OSError):  # defined interactively, without a file
        return ""


@functools.cache
def _file_hash(file: str | None, module: str = "") -> str:
    """Hash a plugin's file and the modules of its package that it imports from the same folder."""
    if not file:
        return ""
    digest = hashlib.sha256(plugin_file.with_line_feeds(Path(file).read_bytes()))
    for _, other in sorted(_siblings(Path(file), module, {}).items()):
        digest.update(plugin_file.with_line_feeds(other.read_bytes()))
    return digest.hexdigest()[:16]


def _siblings(file: Path, module: str, found: dict[str, Path]) -> dict[str, Path]:
    """Return the modules in a module's folder that it imports, directly or indirectly, by file name."""
    package = module.rpartition(".")[0]
    try:
        nodes = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.ImportFrom)]
    except (OSError, SyntaxError, ValueError):
        return found
    for node in nodes if package else []:
        name = node.module or ""
        if node.level == 0 and name.startswith(f"{package}."):
            name = name.removeprefix(f"{package}.")
        elif node.level != 1:
            continue
        other = file.parent / f"{name}.py"
        if other.name not in found and other != file and other.is_file():
            found[other.name] = other
            _siblings(other, module, found)
    return found


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    found = {"samplerbench": samplerbench.__version__}  # another distribution may have the same name
    for name in ("torch", "diffusers", "torch-fidelity"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
