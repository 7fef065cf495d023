"""What the tests share: the embedded model, the feature space it is measured in, and one call that samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.denoising import inputs_of, labelled
from torch import Tensor

from samplerbench import registry
from samplerbench.bench import engine, request, setup
from samplerbench.bench.labels import balanced_labels
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.reference import Reference
from samplerbench.models import Model
from samplerbench.results.store import Store
from samplerbench.sampling import Denoiser, Prediction, Sigma
from samplerbench.sampling.process import VARIANCE_PRESERVING

CPU = torch.device("cpu")

# The tests run as two workers on two cores: threads of torch's own would only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# The width of output in a pipe is the default: pytest-xdist may tell its workers that of the terminal.
os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a sampler keeps in the user's cache is found anew, and the user's own cache is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMPLERBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digits() -> Model:
    """The embedded model on the CPU in fp32. Shared by all tests: whoever changes it works on a copy."""
    return setup.load_model("digits", CPU, "fp32")


@pytest.fixture(scope="session")
def extractor(digits: Model) -> Extractor:
    """The feature space of the embedded model's card."""
    return setup.pick_extractor(digits, None, None, CPU)


@pytest.fixture(scope="session")
def reference(digits: Model, extractor: Extractor) -> Reference:
    """The statistics of the real digits in that feature space."""
    return setup.pick_reference(digits, None, extractor)


@pytest.fixture(scope="session")
def labels(digits: Model) -> Tensor:
    """As many labels as there are real digits, (1797,), in the data's own proportions; so is every prefix."""
    assert digits.class_counts is not None
    return balanced_labels(sum(digits.class_counts), digits.class_counts)


class Half(Denoiser):
    """D(x; σ) = x/2 at every σ."""

    levels, process = torch.linspace(0.1, 10, 10).double(), VARIANCE_PRESERVING

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return Prediction(x / 2)

    def rows(self, index: Tensor) -> Denoiser:
        return self


def make_cell(model: Model, sampler: str, spacing: str | None, steps: int, guidance: str = "none") -> engine.Cell:
    """The one cell of these specs."""
    (cell,), _ = engine.plan(
        model,
        [*request.Grid([sampler], [1]).samplers],
        [steps],
        [setup.pick_guidance(guidance)],
        lambda chosen: setup.pick_spacing(chosen, spacing),
    )
    return cell


def run_images(
    model: Model,
    sampler: str,
    spacing: str | None,
    steps: int,
    n: int,
    labels: Tensor | None,
    *,
    guidance: str = "none",
    seed: int = 0,
    batch_size: int = 256,
    index: Tensor | None = None,
) -> Tensor:
    """Images (n, C, H, W) in [-1, 1] of the samples `index` (0 … n-1 unless given), each with its own label."""
    index = torch.arange(n) if index is None else index
    cell = make_cell(model, sampler, spacing, steps, guidance)
    given = inputs_of(model, None if labels is None else labels[index], len(index))
    return torch.cat([batch.images for batch in engine.generate(model, cell, index, given, seed, batch_size)])


@pytest.fixture
def make_session(
    digits: Model, extractor: Extractor, reference: Reference, labels: Tensor, tmp_path: Path
) -> Callable[..., engine.Session]:
    """Makes sessions of n images that measure the FID and keep their results in tmp_path."""

    def make(
        n: int = 8, seed: int = 0, batch_size: int = 256, model: Model = digits, rerun: bool = False
    ) -> engine.Session:
        metrics = [registry.parse("metric", "fid")]
        measurement = engine.Measurement(
            model, reference, extractor, metrics, labelled(labels[:n]), "balanced", n, seed
        )
        return engine.Session(measurement, engine.Execution(Store(tmp_path), batch_size, rerun))

    return make


@pytest.fixture(scope="session")
def saved_pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one saved pipeline of each kind, and a file of prompts; not to be changed."""
    from support.pipelines import save_pipelines

    return save_pipelines(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    """A file with one prompt per line and empty lines between them."""
    from support.pipelines import PROMPTS

    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n", "utf-8")
    return str(file)
