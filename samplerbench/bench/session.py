"""A session: what the cells of a run are measured with, and how they are executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell, metric_sources, protocol_of
from samplerbench.bench.team import Team
from samplerbench.boundary import plugin_call
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.guarded import fewest_images
from samplerbench.metrics.metric import Layer, Metric, check_requirements
from samplerbench.metrics.reference import Reference
from samplerbench.models.model import Model
from samplerbench.results.store import Store
from samplerbench.sampling.driver import OnStep
from samplerbench.text import note


@dataclass
class Measurement:
    """What is measured: everything here is part of the protocol.

    Attributes:
        model: the checkpoint.
        reference: statistics of the real images; None where no metric needs them.
        extractor: the feature space; None where no metric needs features.
        metrics: what is computed.
        labels: (n,) int64, the label of each sample of a block; None without labels.
        mode: how the labels were requested ("balanced", "none", a number).
        n: images per block.
        seed: of all noise.
        blocks: disjoint sets of samples; block b holds the samples b·n … (b+1)·n - 1.
        real: the features of the real images in a layer, (N, d), for the metrics that need them.
        real_labels: the labels of the real images, (N,) int64, or None where they have none.
    """

    model: Model
    reference: Reference | None
    extractor: Extractor | None
    metrics: Sequence[Metric]
    labels: Tensor | None
    mode: str
    n: int
    seed: int
    blocks: int = 1
    real: Callable[[Layer], Tensor] | None = None
    real_labels: Callable[[], Tensor | None] = lambda: None
    shared: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        reference = self.reference
        check_metrics(
            self.model,
            self.metrics,
            self.labels,
            self.mode,
            self.n,
            dimension=None if reference is None else len(reference.moments.mean),
            has_real_images=None if reference is None else self.real is not None,
            real_images=None if reference is None else reference.data.get("n"),
        )
        counts = None if self.labels is None else torch.bincount(self.labels).tolist()
        self.shared = {
            "model": self.model.identity,
            "labels": {"mode": self.mode, "counts": counts},
            "n": self.n,
            "blocks": self.blocks,
            "seed": self.seed,
            "dtype": "tf32" if self.model.precision == "tf32" else str(self.model.dtype).removeprefix("torch."),
            **({"compile": True} if self.model.compiled else {}),
            "metrics": [m.spec for m in self.metrics],
            **metric_sources(self.metrics, self.stratified),
            "features": None if self.extractor is None else self.extractor.identity,
            "reference": None if self.reference is None else self.reference.data,
        }

    @property
    def stratified(self) -> bool:
        """Whether the number of images of each label is fixed, so that the images are not independent draws."""
        return is_stratified(self.model, self.labels, self.mode)

    def strata(self) -> Tensor | None:
        """The labels of the real images, (N,) int64, where the generated ones have the same proportions; else None."""
        labels = self.real_labels() if self.stratified else None
        if labels is None:
            return None
        counts = torch.bincount(labels).double()
        wanted = self.model.class_counts
        intended = (counts > 0).double() if wanted is None else torch.tensor(wanted, dtype=torch.float64)
        if len(counts) != len(intended):
            return None
        same = torch.allclose(counts / counts.sum(), intended / intended.sum(), rtol=1e-9, atol=0)
        return labels if same else None

    def protocol(self, cell: Cell) -> dict[str, Any]:
        """The protocol of a cell, with the weights of the classifier that guides it, if any."""
        fields = protocol_of(cell, self.shared)
        classifier = None if cell.guidance is None else self.model.guide_classifier(cell.guidance)
        if classifier is not None:
            fields["classifier"] = classifier.sha256
        return fields


def is_stratified(model: Model, labels: Tensor | None, mode: str) -> bool:
    """Whether the number of images of each label (n,) is fixed, so that the images are not independent draws.

    It is under balanced labels. Prompts that are used once each are a sample of prompts, not strata.
    """
    if labels is None or mode != "balanced":
        return False
    return not model.text or len(labels) > (model.classes or 0)


def check_metrics(
    model: Model,
    metrics: Sequence[Metric],
    labels: Tensor | None,
    mode: str,
    n: int,
    *,
    dimension: int | None,
    has_real_images: bool | None,
    real_images: int | None,
) -> None:
    """Check that each metric has what it needs (`check_requirements`), for a run and for its dry run alike.

    Args:
        model: the checkpoint.
        metrics: what is to be computed.
        labels: (n,) int64, of the samples of a block; None without labels.
        mode: how the labels were requested.
        n: images per block.
        dimension: d, the number of features; None where it is not known.
        has_real_images: whether the real images are at hand; None where there is no reference.
        real_images: how many there are; None where it is not known.

    Raises:
        UserError: what a metric lacks. RunError: a plugin failed.
    """
    stratified = is_stratified(model, labels, mode)
    for metric in metrics:
        fewest_images(metric)
        features = metric.needs_features
        with plugin_call(metric, "in what it needs"):
            check_requirements(
                metric,
                n=n,
                dimension=dimension if features else None,
                has_labels=labels is not None,
                labels=labels if stratified else None,
                has_real_images=has_real_images if features else None,
                real_images=real_images if features else None,
            )


@dataclass
class Execution:
    """How the cells are executed: none of it changes a number.

    Attributes:
        store: the folder of results.
        batch_size: images at a time.
        rerun: run cells again whose results are in the store.
        keep: how many images the sample grid shows.
        team: the processes that share the work.
        checkpoint: images between two checkpoints of a cell; None is a tenth of a block.
        stop: asked after each checkpoint, after each step of a converged solution, and while waiting for another run;
            true ends the run there.
        solving: entered with two numbers while a converged solution is computed: of the images that are solved now, and
            of all images that the run needs solved; gives what is called after each of the solver's steps, or None.
        say: takes a line about what the run waits for.
    """

    store: Store
    batch_size: int = 256
    rerun: bool = False
    keep: int = 100
    team: Team = field(default_factory=Team)
    checkpoint: int | None = None
    stop: Callable[[], bool] = lambda: False
    solving: Callable[[int, int], AbstractContextManager[OnStep | None]] = lambda images, total: nullcontext()
    say: Callable[[str], None] = note


@dataclass
class Session:
    """What is measured and how it is executed.

    solutions: converged solutions that metrics of the discretisation error have asked for, shared by all cells.
    """

    measurement: Measurement
    execution: Execution
    solutions: dict[Any, Tensor] = field(init=False, default_factory=dict)

    @property
    def conditions(self) -> dict[str, Any]:
        """What the times of this session's cells are measured under (`samplerbench.results.timings.CONDITIONS`)."""
        model = self.measurement.model
        return {
            "batch_size": self.execution.batch_size,
            "processes": self.execution.team.size,
            "device": str(model.device),
            "device_name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "",
            "threads": torch.get_num_threads(),
            "graphs": bool(model.graphs),
        }

    @property
    def chunk(self) -> int:
        """Images between two checkpoints: whole batches, so that a resumed run cuts the stream as the first did."""
        wanted = self.execution.checkpoint or -(-self.measurement.n // 10)
        whole = self.execution.batch_size * self.execution.team.size
        return max(whole, -(-wanted // whole) * whole)
