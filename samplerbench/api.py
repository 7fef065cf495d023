"""The Python API: `load_model`, `sample`, `initial_noise` and `evaluate`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from rich.console import Group
from rich.jupyter import JupyterMixin
from torch import Tensor

from samplerbench.bench import engine, setup
from samplerbench.bench.cell import describe_plugin
from samplerbench.bench.labels import given_labels
from samplerbench.bench.prepare import Prepared, prepare
from samplerbench.bench.request import Grid, Request, check_whole, one_grid
from samplerbench.bench.run import Observer, Run
from samplerbench.data.pixels import quantise
from samplerbench.errors import ArgumentTypeError, UserError, argument
from samplerbench.limits import MAX_IMAGES, MAX_SEED
from samplerbench.models.model import Model
from samplerbench.models.sample import start_noise
from samplerbench.options import Configurable
from samplerbench.registry import current_name
from samplerbench.results.groups import comparable
from samplerbench.results.selection import matching, union
from samplerbench.results.store import Store
from samplerbench.sampling import Guidance, Sampler, Spacing, Task
from samplerbench.sampling.trajectory import Trajectory, join
from samplerbench.text import literal, printable
from samplerbench.untrusted import user_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from samplerbench.metrics import Metric
    from samplerbench.notebook import NotebookProgress
    from samplerbench.progress import Progress

Record = dict[str, Any]


def load_model(
    source: str | Path = "digits",
    *,
    device: str | torch.device = "auto",
    dtype: str = "fp32",
    revision: str | None = None,
    variant: str | None = None,
    prompts: str | Sequence[str] | None = None,
    negative_prompt: str | None = None,
    image_size: tuple[int, int] | None = None,
    embedded_guidance: float | None = None,
    memory: Sequence[str] = (),
    lora: str | Sequence[str] | None = None,
    scheduler: str | None = None,
    config: str | None = None,
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
        prompts: Prompts of a text-to-image model: a text file with one prompt per line, a JSON Lines or CSV file,
            `hf:owner/name`, or a list of prompts.
        negative_prompt: Negative prompt for classifier-free guidance.
        image_size: Height and width of the images of a text-to-image model, in pixels. None for its own size.
        embedded_guidance: Guidance scale that a guidance-distilled network (FLUX.1-dev, LCM) takes as an input. None
            for the default of its pipeline.
        memory: Ways to save memory with a text-to-image model: "offload", "sequential-offload", "vae-tiling",
            "vae-slicing" and "attention-slicing".
        lora: LoRA files to merge into the network, each `FILE` or `FILE:scale`, for text-to-image models.
        scheduler: Path of a scheduler_config.json, or of its folder, in place of that of the pipeline.
        config: Pipeline (folder or hub id) with the parts that a single file or the folder of a network lacks.
        offline: Whether to use only the local cache of the hub.
        compile: Whether to compile the network with `torch.compile`.
        graphs: Whether to replay batches as CUDA graphs. Requires an NVIDIA GPU.

    Returns:
        The loaded model.

    Raises:
        ArgumentTypeError: If an argument has the wrong type.
        UserError: If the model, device or dtype does not exist, or if the checkpoint cannot be used.
    """
    source, device = _source(source), _device_name(device)
    given = prompts if prompts is None or isinstance(prompts, str) else tuple(prompts)
    # The request checks the values and their types.
    request = Request(
        (),
        revision=revision,
        variant=variant,
        prompts=given,
        negative_prompt=negative_prompt,
        image_size=image_size,
        embedded_guidance=embedded_guidance,
        memory=memory,
        lora=lora,
        scheduler=scheduler,
        config=config,
        offline=offline,
        compile=compile,
        graphs=graphs,
    )
    return setup.load_model(source, setup.pick_device(device), dtype, request.load)


@overload
def sample(
    sampler: str | Sampler,
    steps: int = 50,
    *,
    n: int | None = None,
    model: str | Path | Model = "digits",
    guidance: str | Guidance = "none",
    spacing: str | Spacing | None = None,
    labels: str | int | Sequence[str | int] | Tensor | None = None,
    x_T: Tensor | None = None,
    output_type: Literal["uint8", "float", "state"] = "uint8",
    return_trajectory: Literal[False] = False,
    seed: int = 0,
    batch_size: int | Literal["auto"] = 256,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
    quiet: bool = False,
) -> Tensor: ...
@overload
def sample(
    sampler: str | Sampler,
    steps: int = 50,
    *,
    n: int | None = None,
    model: str | Path | Model = "digits",
    guidance: str | Guidance = "none",
    spacing: str | Spacing | None = None,
    labels: str | int | Sequence[str | int] | Tensor | None = None,
    x_T: Tensor | None = None,
    output_type: Literal["uint8", "float", "state"] = "uint8",
    return_trajectory: Literal[True],
    seed: int = 0,
    batch_size: int | Literal["auto"] = 256,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
    quiet: bool = False,
) -> tuple[Tensor, Trajectory]: ...
def sample(
    sampler: str | Sampler,
    steps: int = 50,
    *,
    n: int | None = None,
    model: str | Path | Model = "digits",
    guidance: str | Guidance = "none",
    spacing: str | Spacing | None = None,
    labels: str | int | Sequence[str | int] | Tensor | None = None,
    x_T: Tensor | None = None,
    output_type: Literal["uint8", "float", "state"] = "uint8",
    return_trajectory: bool = False,
    seed: int = 0,
    batch_size: int | Literal["auto"] = 256,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
    quiet: bool = False,
) -> Tensor | tuple[Tensor, Trajectory]:
    """Sample images.

    Image i depends only on the seed, on i, and on row i of `labels` and `x_T`. It does not depend on n or on the batch
    size.

    Args:
        sampler: A spec (`"ddim:eta=0.5"`, `"./mine.py:Mine"`) or an instance.
        steps: Number of steps.
        n: Number of images. If None, the number of `labels` or of rows of `x_T`, else 16.
        model: The source of a model (see `load_model`), or a loaded model.
        guidance: A spec or an instance. "none" disables guidance.
        spacing: A spec or an instance. If None, the default spacing of the sampler is used.
        labels: "balanced", "none", a single label, or a list of n labels, one for each image. A label is a number, or
            the name of a class for a model with class names. For a text-to-image model, a label is the index of a
            prompt. If None, "balanced" for models with classes, else "none".
        x_T: Initial noise z ~ N(0, I), (n, *model.shape), with a variance of 1 for every model, like `latents` of
            diffusers. It is scaled to the first noise level of the run. If None, `initial_noise` is used.
        output_type: "uint8" for pixels, "float" for images before rounding and clamping, or "state" for the final
            states of the sampler, which are latents if the model has an autoencoder.
        return_trajectory: Whether to return the states of all steps, too. They are kept in memory.
        seed: Seed of all noise.
        batch_size: Images per batch. "auto" measures which size is fastest.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.
        quiet: Whether to hide the progress bar.

    Returns:
        Images (n, C, H, W) on the CPU. "uint8" is round(clamp(x, -1, 1)·127.5 + 127.5), "float" is x in the dtype of
        the state, nominally in [-1, 1]. "state" has the shape (n, *model.shape). With `return_trajectory`, a tuple of
        the images and a `Trajectory`.

    Raises:
        ArgumentTypeError: If an argument has the wrong type. It is a UserError and a TypeError.
        UserError: If an argument is invalid.
        RunError: If the sampler fails.
    """
    from samplerbench.notebook import progress_bars

    if output_type not in _OUTPUT_TYPES:
        raise UserError(f"{argument('output_type', output_type)}: choose one of {', '.join(_OUTPUT_TYPES)}.")
    grid = Grid([sampler], [steps], [], [guidance], [spacing])
    if isinstance(labels, Set | Mapping):
        raise ArgumentTypeError(
            f"{argument('labels')} is of type {type(labels).__name__}, which has no order; give a list."
        )
    listed = labels if isinstance(labels, Iterable) and not isinstance(labels, str) else None
    n = _number_of_images(n, listed, x_T)
    mode = labels if listed is None else None
    prepared = _prepare(grid, model, device, labels=mode, n=n, seeds=(seed,), batch_size=batch_size, dtype=dtype)
    cell = prepared.cells[0]
    if output_type == "state":
        cell.sampler  # noqa: B018 - raises for a generator, which has no states
    if listed is None:
        inputs = prepared.inputs(n)
    else:
        inputs = prepared.inputs_of(n, given_labels(listed, prepared.classes, prepared.model.class_names))
    start = None if x_T is None else _checked_noise(x_T, n, prepared.model)
    images: list[Tensor] = []
    trajectories: list[Trajectory] = []
    with (
        progress_bars(1, quiet).running() as progress,
        progress.cell(cell.title, cell.steps, n, prepared.batch_size) as on_step,
    ):
        for batch in engine.generate(
            prepared.model,
            cell,
            torch.arange(n),
            inputs,
            seed,
            prepared.batch_size,
            on_step,
            decode=output_type != "state",
            start=start,
            record=return_trajectory,
        ):
            images.append((quantise(batch.images) if output_type == "uint8" else batch.images).cpu())
            trajectories += [] if batch.trajectory is None else [batch.trajectory]
    made = torch.cat(images)
    return (made, join(trajectories)) if return_trajectory else made


_OUTPUT_TYPES = ("uint8", "float", "state")


def initial_noise(
    n: int = 16,
    *,
    model: str | Path | Model = "digits",
    seed: int = 0,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
) -> Tensor:
    """Draw the noise that `sample` starts from: `sample(..., x_T=initial_noise(n, model=model))` changes nothing.

    Row i depends only on the seed and on i.

    Args:
        n: Number of rows.
        model: The source of a model (see `load_model`), or a loaded model.
        seed: Seed of the noise.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.

    Returns:
        z ~ N(0, I), (n, *model.shape) on the CPU, in the dtype of the state: float64 for "fp64", otherwise float32.

    Raises:
        UserError: If an argument is invalid.
    """
    n, seed = check_whole("n", n, 1, MAX_IMAGES), check_whole("seed", seed, 0, MAX_SEED)
    loaded = model if isinstance(model, Model) else load_model(model, device=device, dtype=dtype)
    return start_noise(loaded, torch.arange(n, device=loaded.device), seed).cpu()


def _number_of_images(n: int | None, labels: Iterable[Any] | None, x_T: Tensor | None) -> int:
    """Return the number of images. Raise UserError if arguments with a row for each image disagree."""
    sizes: dict[str, int] = {}
    for name, rows in (("labels", labels), ("x_T", x_T)):
        if rows is not None:
            if not isinstance(rows, Sized) or (isinstance(rows, Tensor) and rows.ndim == 0):
                what = "a tensor" if name == "x_T" else "a list of labels"
                raise ArgumentTypeError(f"{argument(name)} is of type {type(rows).__name__}; give {what}.")
            if not len(rows):
                raise UserError(f"{argument(name)} is empty; give one row for each image.")
            sizes[name] = len(rows)
    if n is None:
        n = next(iter(sizes.values()), 16)
    n = check_whole("n", n, 1, MAX_IMAGES)
    for name, size in sizes.items():
        if size != n:
            rows_given = f"{size} row{'s' if size > 1 else ''}"
            raise UserError(f"{argument(name)} has {rows_given}, but {argument('n', n)}; give one row for each image.")
    return n


def _checked_noise(x_T: Tensor, n: int, model: Model) -> Tensor:
    """Return the initial noise in the dtype of the states."""
    if not isinstance(x_T, Tensor):
        raise ArgumentTypeError(f"{argument('x_T')} is of type {type(x_T).__name__}; give a tensor.")
    if not x_T.is_floating_point():
        kind = str(x_T.dtype).removeprefix("torch.")
        raise ArgumentTypeError(f"{argument('x_T')} is a tensor of {kind}; give floating-point numbers.")
    expected = (n, *model.shape)
    if x_T.shape != expected:
        raise UserError(f"{argument('x_T')} has the shape {tuple(x_T.shape)}; it must have the shape {expected}.")
    if not bool(x_T.isfinite().all()):
        raise UserError(f"{argument('x_T')} contains NaN or infinity; give finite numbers.")
    return x_T.detach().to(model.state_dtype)


def evaluate(
    samplers: str | Sampler | Sequence[str | Sampler],
    *,
    steps: int | Sequence[int] = (),
    nfe: int | Sequence[int] = (),
    guidances: str | Guidance | Sequence[str | Guidance] = "none",
    spacing: str | Spacing | None = None,
    model: str | Path | Model = "digits",
    metrics: str | Metric | Sequence[str | Metric] = "fid",
    n: int | None = None,
    blocks: int = 1,
    labels: str | int | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = 256,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
    features: str | None = None,
    features_weights: str | None = None,
    data: str | None = None,
    tasks: str | Task | Sequence[str | Task] = (),
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
        labels: "balanced", "none", a single label, or the name of a class for a model with class names. If None,
            "balanced" for models with classes, else "none".
        seed: Seed of all noise.
        batch_size: Images per batch. "auto" measures which size is fastest.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.
        features: Feature space of the metrics. If None, the one that belongs to the model.
        features_weights: File with the weights of the feature space.
        data: Real images or their statistics. If None, the training data of the model.
        tasks: Inverse problems, specs or instances. Every cell is run for each of them.
        out: Folder of results. Cells with a result in this folder are not run again. If None, no results are stored.
        rerun: Whether to run cells again that have a result in `out`.
        quiet: Whether to hide the progress bars.

    Returns:
        One record per cell. The record of a failed cell has an "error" and no metrics.

    Raises:
        ArgumentTypeError: If an argument has the wrong type. It is a UserError and a TypeError.
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
        tasks=_list(tasks),
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

        Results of different protocols are not comparable: each group of comparable results has a table of its own,
        under the fields in which the groups differ.

        Args:
            metric: Name of the metric. If None, the first metric.

        Returns:
            A table that rich prints and a notebook displays.

        Raises:
            UserError: If the results do not contain the metric.
        """
        from samplerbench.report.table import steps_table

        name = self._metric(metric)
        parts = [(title, part) for title, part in comparable(self.records) if any(name in r["metrics"] for r in part)]
        if len(parts) == 1:
            return _Shown(steps_table(parts[0][1], name))
        return _Shown(Group(*(Group(literal(title, "italic"), steps_table(part, name)) for title, part in parts)))

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
            A matplotlib figure. A notebook displays it, and `figure.savefig(FILE)` writes it. It is not registered with
            pyplot.

        Raises:
            UserError: If the results do not contain the metric, or if they are not all comparable.
        """
        from samplerbench.report.plots import metric_figure
        from samplerbench.results.groups import differing, group, shared_protocol

        name = self._metric(metric)
        groups = group([r for r in self.records if name in r["metrics"]])
        if len(groups) > 1:
            fields = differing([shared_protocol(g.records[0]) for g in groups]) or ["the parameters of a metric"]
            raise UserError(
                f"these results are in {len(groups)} groups that are not comparable, because they differ in "
                f"{', '.join(fields)}; plot each of `groups()` on its own."
            )
        return metric_figure(groups[0], name, horizontal)

    def filter(
        self,
        where: Callable[[Record], bool] | None = None,
        *,
        sampler: str | Sampler | Sequence[str | Sampler] | None = None,
        guidance: str | Guidance | Sequence[str | Guidance] | None = None,
        spacing: str | Spacing | Sequence[str | Spacing] | None = None,
        steps: int | Sequence[int] | None = None,
        nfe: int | Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        n: int | Sequence[int] | None = None,
        model: str | Sequence[str] | None = None,
        labels: str | int | Sequence[str | int] | None = None,
    ) -> Results:
        """Select cells. All conditions must hold. A list selects the cells with any of its values.

        Args:
            where: Function that is called with each record and returns whether to keep it.
            sampler: Specs or instances. The parameters must be equal: "ddim" does not select "ddim:eta=0.5".
            guidance: Specs or instances. "none" selects cells without guidance.
            spacing: Specs or instances. "none" selects samplers that choose their own noise levels.
            steps: Numbers of steps.
            nfe: Network evaluations per image: the budget of a cell, or the counted evaluations of a cell without one.
            seed: Seeds.
            n: Numbers of images per block.
            model: Sources of models.
            labels: "balanced", "none" or single labels. Records contain the number of a class, not its name.

        Returns:
            The selected cells, in their order. They may be none.

        Raises:
            ArgumentTypeError: If an argument has the wrong type.
        """
        if where is not None and not callable(where):
            raise ArgumentTypeError(
                f"{argument('where')} is of type {type(where).__name__}; give a function of a record, or the name of a "
                "field, as in sampler=..."
            )
        found = self.records
        given = {"sampler": sampler, "guidance": guidance, "spacing": spacing, "steps": steps, "nfe": nfe}
        for field, value in (given | {"seed": seed, "n": n, "model": model, "labels": labels}).items():
            if value is not None:
                found = matching(found, field, value)
        return Results([record for record in found if where is None or where(record)])

    def join(self, *others: Results) -> Results:
        """Join these results with others. `a + b` is `a.join(b)`.

        A cell that occurs more than once, with the same protocol and budget, is kept once: the first record, or the
        first one without an error. Results of different protocols may be joined. `table` and `groups` keep them apart.

        Args:
            *others: Other results.

        Returns:
            The joined results, in order of appearance.

        Raises:
            ArgumentTypeError: If an argument is not a `Results`.
        """
        for other in others:
            if not isinstance(other, Results):
                raise ArgumentTypeError(f"`join` was given a value of type {type(other).__name__}; give `Results`.")
        return Results(union([self.records, *(other.records for other in others)]))

    def __add__(self, other: Results) -> Results:
        return self.join(other) if isinstance(other, Results) else NotImplemented

    def groups(self) -> list[Results]:
        """Split the results into groups of comparable ones. They have the same protocol, except for the sampler.

        Records that differ only in their metrics are merged.

        Returns:
            The groups, in order of appearance.
        """
        return [Results(part) for _, part in comparable(self.records)]

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


def _prepare(grid: Grid, model: str | Path | Model, device: str | torch.device, **fields: Any) -> Prepared:
    """Prepare a request with one grid. A loaded model is recorded under the source it was loaded from."""
    loaded = model if isinstance(model, Model) else None
    name = str(model.identity["source"]) if isinstance(model, Model) else _source(model)
    return prepare(Request([grid], model=name, **fields), _device_name(device), loaded)


def _source(model: Any) -> str:
    """Return the source of a model as text."""
    if not isinstance(model, str | os.PathLike):
        raise ArgumentTypeError(
            f"{argument('model')} is of type {type(model).__name__}; give the name of a model, a checkpoint folder, or "
            "what `load_model` returns."
        )
    return os.fspath(model)


def _device_name(device: Any) -> str:
    if not isinstance(device, str | torch.device):
        raise ArgumentTypeError(f'{argument("device")} is of type {type(device).__name__}; give text, such as "cuda".')
    return str(device)


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
    """Return a single value or the values of a sequence as a list. The request checks their types."""
    single = isinstance(value, str | Configurable | type | Mapping) or not isinstance(value, Iterable)
    return [value] if single else list(value)
