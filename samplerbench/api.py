"""The toolkit from Python: `load_model`, `sample` and `evaluate`, which do what the commands of these names do."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from rich.jupyter import JupyterMixin
from torch import Tensor

from samplerbench.bench import engine, setup
from samplerbench.bench.cell import describe_plugin
from samplerbench.bench.prepare import Prepared, prepare
from samplerbench.bench.request import Grid, Request, check_whole, one_grid
from samplerbench.bench.run import Observer, Run
from samplerbench.data.pixels import quantise
from samplerbench.errors import UserError
from samplerbench.limits import MAX_IMAGES
from samplerbench.models.files import LoadOptions
from samplerbench.models.model import Model
from samplerbench.options import Configurable
from samplerbench.registry import current_name
from samplerbench.results.store import Store
from samplerbench.sampling import Guidance, Sampler, Spacing
from samplerbench.text import printable
from samplerbench.untrusted import user_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from samplerbench.metrics import Metric
    from samplerbench.notebook import NotebookProgress
    from samplerbench.progress import Progress

Record = dict[str, Any]


def load_model(
    source: str = "digits",
    *,
    device: str = "auto",
    dtype: str = "fp32",
    revision: str | None = None,
    variant: str | None = None,
    prompts: str | None = None,
    negative_prompt: str | None = None,
    offline: bool = False,
    compile: bool = False,
    graphs: bool = False,
) -> Model:
    """A model, to be given to `sample` and `evaluate`: loaded once, used often.

    Args:
        source: a name (`digits`, `exact:mixture`), a checkpoint folder, a hub id, or `PATH.py:CLASS`.
        device: auto, cpu, cuda, cuda:1, …  dtype: of the network, fp32, tf32, bf16, fp16 or fp64.
        revision, variant, prompts, negative_prompt, offline, compile, graphs: as the options of `samplerbench run`.

    Raises:
        UserError: there is no such model, device or dtype, or the checkpoint cannot be used.
    """
    options = LoadOptions(revision, variant, prompts, negative_prompt, offline, compile=compile, graphs=graphs)
    return setup.load_model(source, setup.pick_device(device), dtype, options)


def sample(
    sampler: str | Sampler,
    steps: int = 50,
    *,
    n: int = 16,
    model: str | Model = "digits",
    guidance: str | Guidance = "none",
    spacing: str | Spacing | None = None,
    labels: str | int | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = 256,
    dtype: str = "fp32",
    device: str = "auto",
    quiet: bool = False,
) -> Tensor:
    """Sample images: (n, C, H, W) uint8 on the CPU, by round(clamp(x, -1, 1)·127.5 + 127.5).

    Image i is a function of the seed and i alone, whatever n and the batch size are.

    Args:
        sampler, guidance, spacing: specs (`"ddim:eta=0.5"`, `"./mine.py:Mine"`) or instances. spacing: None is the
            sampler's own.
        labels: "balanced", "none" or one label; None is balanced, if there are classes.
        dtype, device: of a model that is named; one that is loaded keeps its own. quiet: no progress bar.

    Raises:
        UserError: bad input. RunError: the sampler failed.
    """
    from samplerbench.notebook import progress_bars

    grid = Grid([sampler], [steps], [], [guidance], [spacing])
    n = check_whole("n", n, 1, MAX_IMAGES)  # there is no default, unlike in a run
    prepared = _prepare(grid, model, device, labels=labels, n=n, seeds=(seed,), batch_size=batch_size, dtype=dtype)
    inputs = prepared.inputs(n)
    cell = prepared.cells[0]
    with (
        progress_bars(1, quiet).running() as progress,
        progress.cell(cell.title, cell.steps, n, prepared.batch_size) as on_step,
    ):
        batches = engine.generate(prepared.model, cell, torch.arange(n), inputs, seed, prepared.batch_size, on_step)
        return torch.cat([quantise(batch.images).cpu() for batch in batches])


def evaluate(
    samplers: str | Sampler | Sequence[str | Sampler],
    *,
    steps: int | Sequence[int] = (),
    nfe: int | Sequence[int] = (),
    guidances: str | Guidance | Sequence[str | Guidance] = "none",
    spacing: str | Spacing | None = None,
    model: str | Model = "digits",
    metrics: str | Metric | Sequence[str | Metric] = "fid",
    n: int | None = None,
    blocks: int = 1,
    labels: str | int | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = 256,
    dtype: str = "fp32",
    device: str = "auto",
    features: str | None = None,
    features_weights: str | None = None,
    data: str | None = None,
    out: str | Path | None = None,
    rerun: bool = False,
    quiet: bool = False,
) -> Results:
    """Measure every sampler with every guidance at every number of steps, or under every budget of evaluations.

    Args:
        samplers, guidances, metrics, spacing: specs (`"ddim:eta=0.5"`, `"./mine.py:Mine"`) or instances.
        steps: numbers of steps; nfe: budgets of network evaluations per image. One of the two; neither is 50 steps.
        n: images per block, None is as many as there are real ones, at most 50,000. blocks: disjoint blocks.
        features, features_weights, data: as the options of `samplerbench run`.
        out: a folder of results; a cell whose result is there is not run again, unless `rerun`. None keeps nothing.
        quiet: no progress bars.

    Returns:
        One record per cell; a cell that failed has an "error" and no metrics.

    Raises:
        UserError: bad input. RunError: every cell failed; the message is the first one's.
    """
    from samplerbench.notebook import progress_bars

    grid = one_grid(_list(samplers), _list(steps), _list(nfe), _list(guidances), spacing)
    prepared = _prepare(
        grid,
        model,
        device,
        labels=labels,
        n=n,
        blocks=blocks,
        seeds=(seed,),
        batch_size=batch_size,
        dtype=dtype,
        metrics=_list(metrics),
        features=features,
        features_weights=features_weights,
        data=data,
    )
    if out is not None:
        _check_sources(prepared)
    with tempfile.TemporaryDirectory(prefix="samplerbench-") as scratch:
        run = Run(prepared, Store(user_path(scratch if out is None else out)), rerun)
        run.run(_Bars(progress_bars(len(run.units), quiet)))
    if run.failed and len(run.failed) == len(run.outcomes):
        assert run.failed[0].error is not None
        raise run.failed[0].error
    return Results(run.records)


class _Bars(Observer):
    """Shows a run by bars."""

    def __init__(self, bars: Progress | NotebookProgress) -> None:
        self.bars = bars
        self.running = bars.running  # type: ignore[method-assign]
        self.cell = bars.cell  # type: ignore[method-assign]
        self.solution = bars.solution  # type: ignore[method-assign]

    def done(self, outcome: engine.Outcome, title: str) -> None:
        self.bars.done(title if outcome.error is None else f"{title}: failed: {outcome.error}")


@dataclass(frozen=True)
class _Shown(JupyterMixin):
    """What rich prints, also where a notebook shows the value of a cell."""

    content: Any

    def __rich__(self) -> Any:
        return self.content


@dataclass(frozen=True)
class Results(Sequence[Record], JupyterMixin):
    """What `evaluate` measured: a sequence of records, one per cell, and what can be made of them.

    records: dictionaries as in the result files (`docs/result.schema.json`). A budget below what a sampler's one step
    costs is a record with "unmet", a cell that failed one with "error"; both have no metrics.
    """

    records: list[Record]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Results: ...
    def __getitem__(self, index: int | slice) -> Record | Results:
        return Results(self.records[index]) if isinstance(index, slice) else self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __repr__(self) -> str:
        return printable(f"Results({len(self)} cells: {', '.join(self.metrics) or 'no metrics'})")

    def __rich__(self) -> Any:
        return self.table()

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that at least one cell has."""
        return list(dict.fromkeys(name for r in self.records for name in r["metrics"]))

    def table(self, metric: str | None = None) -> Any:
        """The steps-vs-metric table, for rich to print or a notebook to show; `metric` is the first one unless named.

        Raises:
            UserError: there is no such metric.
        """
        from samplerbench.report.table import steps_table

        return _Shown(steps_table(self.records, self._metric(metric)))

    def to_pandas(self) -> DataFrame:
        """One row per cell: its sampler, steps, costs, and a column per metric, with METRIC_sd where there are blocks.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise UserError("to_pandas needs pandas; install it, or use .records.") from None
        return DataFrame([self._row(r) for r in self.records])

    def figure(
        self, metric: str | None = None, horizontal: Literal["nfe", "steps", "seconds_per_image"] = "nfe"
    ) -> Figure:
        """The metric over its cost, one line per sampler: a matplotlib figure, outside pyplot. Raises UserError."""
        from samplerbench.report.plots import metric_figure
        from samplerbench.results.groups import group

        name = self._metric(metric)
        return metric_figure(group([r for r in self.records if name in r["metrics"]])[0], name, horizontal)

    def _metric(self, name: str | None) -> str:
        if not self.metrics:
            raise UserError("there is no metric in these results.")
        name = name and current_name("metric", name)
        if name is not None and name not in self.metrics:
            raise UserError(f'there is no metric "{name}" in these results; there is {", ".join(self.metrics)}.')
        return name or self.metrics[0]

    def _row(self, record: Record) -> Record:
        plain = {k: v for k, v in record.items() if not isinstance(v, dict | list) and k not in ("protocol", "seal")}
        values = {name: entry["value"] for name, entry in record["metrics"].items()}
        return plain | values | {f"{name}_sd": e["sd"] for name, e in record["metrics"].items() if "sd" in e}


def _prepare(grid: Grid, model: str | Model, device: str, **asked: Any) -> Prepared:
    """The objects of a request with one grid; of a model that is loaded, by the name it was loaded from."""
    loaded = model if isinstance(model, Model) else None
    name = str(model.identity["source"]) if isinstance(model, Model) else model
    return prepare(Request([grid], model=name, **asked), device, loaded)


def _check_sources(prepared: Prepared) -> None:
    """Raise UserError for a plugin that an edited one could not be told from: its results must not be kept."""
    plugins: list[Configurable | None] = [*prepared.metrics, *prepared.guidances]
    plugins += [p for cell in prepared.cells for p in (cell.method, cell.spacing)]
    for plugin in plugins:
        if plugin is not None and not describe_plugin(plugin)["source"]:
            raise UserError(
                f"the {plugin.kind} {plugin.label()} has no source file, so its results could not be told from those "
                "of an edited one: put it in a file (PATH.py:CLASS), or leave out `out`."
            )


def _list(value: Any) -> list[Any]:
    """One thing or several, as a list."""
    return [value] if isinstance(value, str | int | Configurable) else list(value)
