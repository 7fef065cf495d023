"""The Python API: `load_model`, `sample` and `evaluate`."""

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
    prompts: str | Sequence[str] | None = None,
    negative_prompt: str | None = None,
    offline: bool = False,
    compile: bool = False,
    graphs: bool = False,
) -> Model:
    """Load a model once, to pass it to `sample` and `evaluate`.

    Args:
        source: A registered name (`digits`, `exact:mixture`), a checkpoint folder, a hub id, or `PATH.py:CLASS`.
        device: "auto", "cpu", "cuda", "cuda:1", …
        dtype: Precision of the network: "fp32", "tf32", "bf16", "fp16" or "fp64".
        revision: Branch, tag or commit of a model on the hub.
        variant: Variant of the weights, such as "fp16" or "ema".
        prompts: Text file with one prompt per line, or a list of prompts, for text-to-image models.
        negative_prompt: Negative prompt for classifier-free guidance.
        offline: Whether to use only the local cache of the hub.
        compile: Whether to compile the network with `torch.compile`.
        graphs: Whether to replay batches as CUDA graphs. Requires an NVIDIA GPU.

    Returns:
        The loaded model.

    Raises:
        UserError: If the model, device or dtype does not exist, or if the checkpoint cannot be used.
    """
    given = prompts if prompts is None or isinstance(prompts, str) else tuple(prompts)
    options = LoadOptions(revision, variant, given, negative_prompt, offline, compile=compile, graphs=graphs)
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
    """Sample images.

    Image i depends only on the seed and on i. It does not depend on n or on the batch size.

    Args:
        sampler: A spec (`"ddim:eta=0.5"`, `"./mine.py:Mine"`) or an instance.
        steps: Number of steps.
        n: Number of images.
        model: The source of a model (see `load_model`), or a loaded model.
        guidance: A spec or an instance. "none" disables guidance.
        spacing: A spec or an instance. If None, the default spacing of the sampler is used.
        labels: "balanced", "none" or a single label. If None, "balanced" for models with classes, else "none".
        seed: Seed of all noise.
        batch_size: Images per batch. "auto" measures which size is fastest.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.
        quiet: Whether to hide the progress bar.

    Returns:
        Images (n, C, H, W), uint8, on the CPU: round(clamp(x, -1, 1)·127.5 + 127.5).

    Raises:
        UserError: If an argument is invalid.
        RunError: If the sampler fails.
    """
    from samplerbench.notebook import progress_bars

    grid = Grid([sampler], [steps], [], [guidance], [spacing])
    n = check_whole("n", n, 1, MAX_IMAGES)  # required here, optional in a run
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
    """Evaluate every combination of sampler, guidance, and number of steps or budget.

    Each combination is called a cell. Give either `steps` or `nfe`. If both are empty, 50 steps are used.

    Args:
        samplers: Specs (`"ddim:eta=0.5"`, `"./mine.py:Mine"`) or instances.
        steps: Numbers of steps.
        nfe: Budgets, in network evaluations per image.
        guidances: Specs or instances. "none" disables guidance.
        spacing: A spec or an instance. If None, the default spacing of each sampler is used.
        model: The source of a model (see `load_model`), or a loaded model.
        metrics: Specs or instances.
        n: Images per block. If None, the number of real images, at most 50,000.
        blocks: Number of disjoint blocks of n images. With several blocks, results have a standard deviation.
        labels: "balanced", "none" or a single label. If None, "balanced" for models with classes, else "none".
        seed: Seed of all noise.
        batch_size: Images per batch. "auto" measures which size is fastest.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.
        features: Feature space of the metrics. If None, the one that belongs to the model.
        features_weights: File with the weights of the feature space.
        data: Real images or their statistics. If None, the training data of the model.
        out: Folder of results. Cells with a result in this folder are not run again. If None, no results are stored.
        rerun: Whether to run cells again that have a result in `out`.
        quiet: Whether to hide the progress bars.

    Returns:
        One record per cell. The record of a failed cell has an "error" and no metrics.

    Raises:
        UserError: If an argument is invalid.
        RunError: If every cell fails. The message is that of the first failure.
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
    """Shows the progress of a run as progress bars."""

    def __init__(self, bars: Progress | NotebookProgress) -> None:
        self.bars = bars
        self.running = bars.running  # type: ignore[method-assign]
        self.cell = bars.cell  # type: ignore[method-assign]
        self.solution = bars.solution  # type: ignore[method-assign]

    def done(self, outcome: engine.Outcome, title: str) -> None:
        self.bars.done(title if outcome.error is None else f"{title}: failed: {outcome.error}")


@dataclass(frozen=True)
class _Shown(JupyterMixin):
    """Content that rich prints, also as the output of a notebook cell."""

    content: Any

    def __rich__(self) -> Any:
        return self.content


@dataclass(frozen=True)
class Results(Sequence[Record], JupyterMixin):
    """The results of `evaluate`: a sequence of records, one per cell.

    A budget that is smaller than the cost of one step has a record with "unmet". A failed cell has a record with
    "error". Neither has metrics.

    Attributes:
        records: Dictionaries as in the result files (`docs/result.schema.json`).
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
        """Names of the metrics that at least one cell has."""
        return list(dict.fromkeys(name for r in self.records for name in r["metrics"]))

    def table(self, metric: str | None = None) -> Any:
        """Create a table of a metric with one row per sampler and one column per number of steps.

        Args:
            metric: Name of the metric. If None, the first metric.

        Returns:
            A table that rich prints and a notebook displays.

        Raises:
            UserError: If the results do not contain the metric.
        """
        from samplerbench.report.table import steps_table

        return _Shown(steps_table(self.records, self._metric(metric)))

    def to_pandas(self) -> DataFrame:
        """Convert the results to a pandas DataFrame.

        Returns:
            One row per cell, with its sampler, steps and cost, and one column per metric. With several blocks, the
            column METRIC_sd has the standard deviation over the blocks.

        Raises:
            UserError: If pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise UserError("to_pandas needs pandas; install it, or use .records.") from None
        return DataFrame([self._row(r) for r in self.records])

    def figure(
        self, metric: str | None = None, horizontal: Literal["nfe", "steps", "seconds_per_image"] = "nfe"
    ) -> Figure:
        """Plot a metric against the cost, one line per sampler.

        Args:
            metric: Name of the metric. If None, the first metric.
            horizontal: Horizontal axis: "nfe", "steps" or "seconds_per_image".

        Returns:
            A matplotlib figure that is not registered with pyplot.

        Raises:
            UserError: If the results do not contain the metric.
        """
        from samplerbench.report.plots import metric_figure
        from samplerbench.results.groups import group

        name = self._metric(metric)
        return metric_figure(group([r for r in self.records if name in r["metrics"]])[0], name, horizontal)

    def _metric(self, name: str | None) -> str:
        if not self.metrics:
            raise UserError("these results contain no metrics.")
        name = name and current_name("metric", name)
        if name is not None and name not in self.metrics:
            raise UserError(f'there is no metric "{name}" in these results; they contain {", ".join(self.metrics)}.')
        return name or self.metrics[0]

    def _row(self, record: Record) -> Record:
        plain = {k: v for k, v in record.items() if not isinstance(v, dict | list) and k not in ("protocol", "seal")}
        values = {name: entry["value"] for name, entry in record["metrics"].items()}
        return plain | values | {f"{name}_sd": e["sd"] for name, e in record["metrics"].items() if "sd" in e}


def _prepare(grid: Grid, model: str | Model, device: str, **fields: Any) -> Prepared:
    """Prepare a request with one grid. A loaded model is recorded under the source it was loaded from."""
    loaded = model if isinstance(model, Model) else None
    name = str(model.identity["source"]) if isinstance(model, Model) else model
    return prepare(Request([grid], model=name, **fields), device, loaded)


def _check_sources(prepared: Prepared) -> None:
    """Raise UserError if a plugin has no source file: its stored results could not be matched to its code."""
    plugins: list[Configurable | None] = [*prepared.metrics, *prepared.guidances]
    plugins += [p for cell in prepared.cells for p in (cell.method, cell.spacing)]
    for plugin in plugins:
        if plugin is not None and not describe_plugin(plugin)["source"]:
            raise UserError(
                f"the {plugin.kind} {plugin.label()} has no source file, so stored results could not be matched to "
                "its code: define it in a file (PATH.py:CLASS), or omit `out`."
            )


def _list(value: Any) -> list[Any]:
    """Return a single value or a sequence as a list."""
    return [value] if isinstance(value, str | int | Configurable) else list(value)
