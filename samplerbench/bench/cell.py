"""A cell: one combination to run, its protocol and the hash of it."""

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
        method: the sampler or the generator.
        guidance: bound to the model; None without guidance.
        spacing: None where the method chooses its own levels or has none.
        steps: None where the method chooses its own steps or has none.
        sigmas: (N+1,) float64 on the CPU, the grid; of a generator, only 0.
        budget: the evaluations that `steps` was chosen to fit into; None without a budget.
        error: why the cell could not be planned; None where it could.
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
        """The sampler. Raises UserError for a generator."""
        if isinstance(self.method, Generator):
            raise UserError(f"{self.method.spec} is a generator and has no noise levels; name a sampler.")
        return self.method

    @property
    def title(self) -> str:
        """`ddim:eta=0.5 + cfg, 50 steps`."""
        if isinstance(self.method, Generator):
            return self.method.spec
        guided = f" + {self.guidance.spec}" if self.guidance else ""
        own = "its own steps" if self.error is None else f"a budget of {self.budget}"
        return f"{self.sampler.spec}{guided}, " + (f"{self.steps} steps" if self.steps else own)

    def check(self) -> None:
        """Raise the error of a cell that could not be planned."""
        if self.error is not None:
            raise self.error

    @property
    def pending(self) -> dict[str, Any]:
        """What stands in the place of a result while there is none."""
        return {
            "sampler": self.method.spec,
            "guidance": None if self.guidance is None else self.guidance.spec,
            "spacing": None if self.spacing is None else self.spacing.spec,
            "steps": self.steps,
            "budget": self.budget,
            "metrics": {},
            "pending": True,
            "protocol_fields": plugin_parameters(self.method, self.guidance, self.spacing),
        }


def plugin_parameters(
    method: Sampler | Generator, guidance: Guidance | None, spacing: Spacing | None = None
) -> dict[str, dict[str, Any] | None]:
    """The part of a protocol that row names are made from, for records of cells that have no result."""
    plugins = {"sampler": method, "guidance": guidance, "spacing": spacing}
    return {kind: None if p is None else {"parameters": p.parameters} for kind, p in plugins.items()}


def protocol_of(cell: Cell, shared: dict[str, Any]) -> dict[str, Any]:
    """Everything that must be equal for two results to be the same experiment (DESIGN section 6).

    shared: what all cells of a run have in common: model, labels, n, seed, dtype, features, reference, metrics.
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
    """Name, parameters, distribution and the hash of the source file: an edited plugin is another plugin."""
    return {
        "name": _name(plugin),
        "parameters": plugin.parameters,
        "distribution": _origin(plugin.kind, plugin.label()),
        "source": _source_hash(type(plugin)),
    }


def metric_sources(metrics: Iterable[Metric], stratified: bool = False) -> dict[str, dict[str, str]]:
    """The protocol's field for what the metrics are computed by, by spec; {} where there is nothing to say.

    That is the hash of the source of a metric that is not built in, and the name of its estimator, where it has one
    (`Metric.estimator`).
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
    """The registered name; of a plugin in a file, FILE:CLASS: where the file lies is no part of the experiment."""
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
    except (TypeError, OSError):  # made in a notebook or at a prompt: there is no file
        return ""


@functools.cache
def _file_hash(file: str | None, module: str = "") -> str:
    """Of a plugin's file, and of the modules beside it that it imports: a part of it may be there."""
    if not file:
        return ""
    digest = hashlib.sha256(Path(file).read_bytes())
    for _, other in sorted(_siblings(Path(file), module, {}).items()):
        digest.update(other.read_bytes())
    return digest.hexdigest()[:16]


def _siblings(file: Path, module: str, found: dict[str, Path]) -> dict[str, Path]:
    """The files, by name, of the package's own modules that a module imports from its folder, directly or not."""
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
    """Of what the numbers depend on."""
    found = {"samplerbench": samplerbench.__version__}  # another distribution may have this name, too
    for name in ("torch", "diffusers", "torch-fidelity"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
