"""Generated specs, suites, settings, files, results and checkpoints: a loader reads them, or refuses in one line.

A refusal is a SamplerbenchError of one line. The examples are the same in every run (`derandomize`); to search
further, raise `max_examples`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.synthetic_results import record as make_record

from samplerbench import registry
from samplerbench.bench.request import Request, one_grid
from samplerbench.bench.suite import load_suite
from samplerbench.cache import cached_json
from samplerbench.cli import numbers
from samplerbench.data import load_data
from samplerbench.errors import SamplerbenchError
from samplerbench.models.checkpoint import read_card
from samplerbench.models.exact import exact
from samplerbench.models.schedule import read_schedule
from samplerbench.options import show_value
from samplerbench.report import formats
from samplerbench.report.load import load as load_results
from samplerbench.report.reproduce import command
from samplerbench.report.table import long_table, steps_table
from samplerbench.results.groups import group
from samplerbench.results.partial import Extent, Progress, load_partial, save_partial
from samplerbench.results.seal import digest
from samplerbench.results.store import Store
from samplerbench.results.tensors import DamagedError, save_tensors
from samplerbench.sampling.spacing import make_grid
from samplerbench.untrusted import parse_json

pytestmark = pytest.mark.filterwarnings("ignore")
LOOK = settings(
    derandomize=True, deadline=None, database=None, max_examples=30, suppress_health_check=list(HealthCheck)
)


def clean(call: Callable[[], Any]) -> Any:
    """What a call gives, or None where it refuses in one line. Anything else that it raises fails the test."""
    try:
        return call()
    except SamplerbenchError as error:
        text = str(error)
    assert text.strip()
    assert "\n" not in text
    return None


# --- What is thrown -------------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        *(
            "",
            " ",
            "none",
            "true",
            "nan",
            "-1",
            "1e400",
            "9" * 5000,
            "x" * 5000,
            "\x1b[31m",
            "=1+1",
            "\0",
            "\ud800",
            "²",
        ),
        *("../..", "~nobody-of-this-name", "/dev/zero", "a\nb", "[red]", "a:b", "a=b", "a,b", "a;b", "\u202e", "🅰"),
        *(10**30, -(10**30), 2**63, 2**64, 2**70, 0, -1, 1, True, False, None, [], {}, [[]], [None], {"a": {}}),
        *(float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, -0.0, 0.5),
    ]
)
LEAF = ODD | st.integers() | st.floats() | st.text(max_size=8) | st.booleans()
JUNK = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a document."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found: list[tuple[Any, ...]] = []
    for key in keys:
        found += [(*path, key), *places(value[key], (*path, key))]
    return found


@st.composite
def spoiled(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any] = JUNK) -> Any:
    """A document with one to three things replaced, taken out or added."""
    made = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        known = places(made)
        if not known:
            return made
        *before, last = draw(st.sampled_from(known))
        inside = made
        for key in before:
            inside = inside[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if how == "replace":
            inside[last] = draw(values)
        elif how == "remove":
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw(st.text(max_size=8))] = draw(values)
        else:
            inside.append(draw(values))
    return made


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some replaced, and perhaps cut off or repeated."""
    made = bytearray(content)
    for _ in range(draw(st.integers(0, 6))):
        made[draw(st.integers(0, len(made) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        made = made[: draw(st.integers(0, len(made)))]
    if draw(st.integers(0, 4)) == 0:
        made += draw(st.binary(max_size=40))
    return bytes(made)


# --- Specs ----------------------------------------------------------------------------------------------------------

NAMES = {kind: sorted({e.name for e in registry.entries(kind)}) for kind in registry.BASES}
KEYS = sorted({name for k in NAMES for n in NAMES[k] for name in registry.parameters_of(registry.get(k, n))})
TEXT = ODD.map(lambda v: show_value(v) if isinstance(v, int | float) else str(v)) | st.text(max_size=12)


@st.composite
def specs(draw: st.DrawFn, kind: str) -> str:
    """A name of the kind, nearly always, and parameters that it may have."""
    name = draw(st.sampled_from(NAMES[kind]) if draw(st.integers(0, 9)) else TEXT)
    pairs = draw(st.lists(st.tuples(st.sampled_from(KEYS) | TEXT, TEXT | st.floats().map(str)), max_size=3))
    parts = [f"{key}={value}" if draw(st.integers(0, 5)) else value for key, value in pairs]
    slash = f"/{draw(TEXT)}" if draw(st.integers(0, 5)) == 0 else ""
    return f"{name}{slash}:{','.join(parts)}" if parts else f"{name}{slash}"


@settings(LOOK, max_examples=70)
@given(st.sampled_from(sorted(registry.BASES)).flatmap(lambda kind: st.tuples(st.just(kind), specs(kind))))
def test_specs(drawn: tuple[str, str]) -> None:
    kind, spec = drawn
    made = clean(lambda: registry.parse(kind, spec))
    if made is not None:
        # What was accepted is written as a spec that is accepted, and means the same.
        again = clean(lambda: registry.parse(kind, made.spec))
        assert again is None or again.spec == made.spec


@LOOK
@given(specs("spacing"), st.sampled_from([1, 2, 7, 1000, 1001, 0, -1, 10**6 + 1, 10**18, 10**30]))
def test_grids(spec: str, steps: int) -> None:
    levels = exact("gaussian").levels
    grid = clean(lambda: make_grid(registry.parse("spacing", spec), levels, steps))
    if grid is not None:
        assert grid.shape == (steps + 1,)
        assert bool(grid.isfinite().all())
        assert bool((grid[1:] < grid[:-1]).all())


@LOOK
@given(st.text(max_size=30) | TEXT | st.lists(TEXT, max_size=3).map(",".join))
def test_numbers_of_the_command_line(text: str) -> None:
    steps = clean(lambda: one_grid(["ddim"], numbers.parse_steps(text)).steps)
    assert steps is None or all(1 <= n <= 10**6 for n in steps)
    size = clean(lambda: Request([], batch_size=numbers.parse_batch_size(text)).batch_size)
    assert size in (None, "auto") or 1 <= int(size) <= 10**6


# --- Suites ---------------------------------------------------------------------------------------------------------

SUITE: dict[str, Any] = {
    "name": "mine",
    "model": "exact:mixture",
    "labels": "balanced",
    "n": 64,
    "blocks": 2,
    "seeds": [0, 1],
    "batch_size": 32,
    "metrics": ["fid", "kid"],
    "data": "digits",
    "compile": False,
    "grid": [
        {
            "samplers": ["ddim"],
            "steps": [5, 10],
            "guidances": ["none", "cfg:scale=2"],
            "spacings": ["default"],
            "parameters": {"eta": [0.0, 1.0]},
            "published": {"source": "a paper", "fid": [[1.0, 2.0]] * 4},
        },
        {"samplers": ["heun"], "nfe": [9]},
    ],
}


def toml(value: Any) -> str:
    """A value as TOML spells it; what TOML cannot spell is spelled wrongly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def suite_text(suite: dict[str, Any]) -> str:
    lines = [f"{json.dumps(k, ensure_ascii=False)} = {toml(v)}" for k, v in suite.items() if k != "grid"]
    grids = suite.get("grid")
    for grid in grids if isinstance(grids, list) and all(isinstance(g, dict) for g in grids) else []:
        lines += ["[[grid]]", *(f"{json.dumps(k, ensure_ascii=False)} = {toml(v)}" for k, v in grid.items())]
    return "\n".join(lines) + "\n"


def test_the_suite_that_is_spoiled_is_sound(tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(suite_text(SUITE))
    request = load_suite(tmp_path / "suite.toml")
    assert [len(grid.samplers) for grid in request.grids] == [2, 1]


@LOOK
@given(
    spoiled(SUITE, JUNK | TEXT | specs("sampler")).map(suite_text)
    | st.text(max_size=60)
    | damaged(suite_text(SUITE).encode())
)
def test_suites(text: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "suite.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        clean(lambda: load_suite(file))


# --- Checkpoints of models ------------------------------------------------------------------------------------------

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 50,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": [0.1, 0.2],
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "variance_type": "fixed_small",
    "rescale_betas_zero_snr": False,
}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")


@LOOK
@given(spoiled(SCHEDULE), st.booleans(), st.sampled_from(SCHEDULERS))
def test_schedules(config: dict[str, Any], trained: bool, name: str) -> None:
    if not trained:
        config.pop("trained_betas", None)
    found = clean(lambda: read_schedule(name, config, "it"))
    if found is not None:
        assert bool(found.levels.isfinite().all())
        assert float(found.levels[0]) > 0
        assert json.dumps(found.identity)


CARD: dict[str, Any] = {
    "classes": 3,
    "null_label": 3,
    "feature_space": "digits-cnn",
    "command": "samplerbench train unet",
    "data": {
        "name": "mine",
        "split": "all",
        "source": "mine",
        "images": 9,
        "classes": 3,
        "class_counts": [3, 3, 3],
        "class_names": ["cat", "dog", "rat"],
    },
}


def written(document: Any) -> str:
    """JSON as anyone may write it: integers of any length, NaN, halves of characters."""
    return json.dumps(document)


@LOOK
@given(
    spoiled(CARD).map(written)
    | damaged(written(CARD).encode()).map(lambda b: b.decode("latin-1"))
    | st.text(max_size=40)
)
def test_cards_and_other_json(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "samplerbench.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        card = clean(lambda: read_card(folder, "it"))
        if card is not None:
            assert card.get("classes") is None or 1 <= card["classes"] <= 10**6
    with contextlib.suppress(ValueError):
        parse_json(text)


# --- Data sets ------------------------------------------------------------------------------------------------------


def zipped() -> bytes:
    buffer = io.BytesIO()
    picture = io.BytesIO()
    Image.new("L", (2, 2)).save(picture, "PNG")
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        for name in ("a/1.png", "b/1.png"):
            made.writestr(name, picture.getvalue())
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros((2, 2, 2), np.uint8), labels=np.array([0, 1]))
    return buffer.getvalue()


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("P" if kind == "GIF" else "RGB", (3, 3)).save(buffer, kind)
    return buffer.getvalue()


FILES = {"i.zip": zipped(), "i.npz": arrays()} | {
    f"i/a.{k.lower()}": picture(k) for k in ("PNG", "JPEG", "GIF", "BMP", "TIFF")
}


@settings(LOOK, max_examples=70)
@given(st.sampled_from(sorted(FILES)).flatmap(lambda name: st.tuples(st.just(name), damaged(FILES[name]))))
def test_data_sets(drawn: tuple[str, bytes]) -> None:
    name, content = drawn
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        found = clean(lambda: load_data(str(file if file.parent == Path(folder) else file.parent)))
        assert found is None or len(found) >= 1


def is_looked_up(text: str) -> bool:
    """Whether a name is only looked up: none that is fetched, and no folder of this machine that is read."""
    return not text.startswith(("hf", "mnist", "cifar", "svhn", "kmnist", "fashion", "/", ".", "~"))


@LOOK
@given((TEXT | specs("data set")).filter(is_looked_up))
def test_names_of_data_sets(text: str) -> None:
    clean(lambda: load_data(text))


# --- The cache ------------------------------------------------------------------------------------------------------


@LOOK
@given(spoiled({"identity": {"of": "this"}, "values": {"a": 1.0, "b": 2}}).map(written) | st.text(max_size=30))
def test_cache_files(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("SAMPLERBENCH_CACHE", folder)
        with cached_json("n", {"of": "this"}) as known:
            known["a"] = 1.0
        (file,) = Path(folder).iterdir()
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        with cached_json("n", {"of": "this"}) as known:
            assert all(0 <= value < float("inf") for value in known.values())


# --- Results --------------------------------------------------------------------------------------------------------


def stored(document: dict[str, Any], folder: Path, seal: bool) -> Path:
    """The record written as a result file, with keys and seal that fit where it can have them."""
    with contextlib.suppress(TypeError, ValueError, KeyError, RecursionError):
        if seal:
            document = {k: v for k, v in document.items() if k != "seal"}
            document["protocol"] = digest(document["protocol_fields"])
            document["seal"] = digest(document)
    file = folder / f"{str(document.get('protocol'))[:20].replace('/', '_')[:20] or 'x'}.json"
    file = folder / "x.json" if "\0" in file.name or not file.name.isascii() else file
    file.write_bytes(json.dumps(document).encode("utf-8", "surrogatepass"))
    return file


@LOOK
@given(spoiled(make_record()), st.sampled_from([True, True, True, False]))
def test_results(document: dict[str, Any], seal: bool) -> None:
    """A record is valid, and then everything that is made of it can be made; or it is none."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        file = stored(document, folder, seal)
        found = [record for _, record in Store(folder).records()]
        assert len(found) == 1
        loaded = clean(lambda: load_results(folder))
        key = document.get("protocol")
        if found[0] is not None:
            console = Console(file=io.StringIO(), width=200)
            for record in loaded.records if loaded is not None else []:
                console.print(long_table([record]))
                for metric in record["metrics"]:
                    console.print(steps_table([record], metric))
                clean(lambda record=record: command(record))
            if loaded is not None:
                groups = group(loaded.records)
                clean(lambda: formats.markdown(groups, loaded.problems, None))
                clean(lambda: formats.to_csv(groups))
                clean(lambda: json.dumps(formats.payload(groups, loaded.problems), allow_nan=False))
            key = found[0]["protocol"]
            assert Store(folder).get(key) == found[0]
        elif isinstance(key, str) and len(key) == 64 and file.name == f"{key[:20]}.json":
            assert Store(folder).get(key) is None
            assert not file.exists()


# --- Checkpoints of cells -------------------------------------------------------------------------------------------

KEY = "a" * 64
EXTENT = Extent(metrics=1, n=9, blocks=2, image_shape=(1, 2, 2), keep=4)


def checkpoint(folder: Path) -> Path:
    states = [{"mean": torch.zeros(3, dtype=torch.float64), "n": torch.tensor(4)}]
    save_partial(folder / "x", KEY, Progress(done=4), states, torch.zeros(4, 1, 2, 2, dtype=torch.uint8))
    return folder / "x"


with tempfile.TemporaryDirectory() as _folder:
    CHECKPOINT = checkpoint(Path(_folder)).read_bytes()
    TENSORS = load_file(checkpoint(Path(_folder)))


def loaded_partial(file: Path) -> Any:
    """The checkpoint, or None where it is refused as damaged: with the one error that a run catches."""
    with contextlib.suppress(DamagedError):
        return load_partial(file, KEY, EXTENT)
    return None


def test_the_checkpoint_that_is_spoiled_is_sound(tmp_path: Path) -> None:
    assert loaded_partial(checkpoint(tmp_path)) is not None


@LOOK
@given(damaged(CHECKPOINT) | st.binary(max_size=40))
def test_checkpoints_with_other_bytes(content: bytes) -> None:
    """None is read, unless nothing was changed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x").write_bytes(content)
        assert (loaded_partial(Path(folder) / "x") is not None) == (content == CHECKPOINT)


PROGRESS = json.loads(
    json.loads(CHECKPOINT[8 : 8 + int.from_bytes(CHECKPOINT[:8], "little")])["__metadata__"]["progress"]
)


@LOOK
@given(
    spoiled(PROGRESS).map(written) | st.text(max_size=20).filter(lambda t: "\0" not in t),
    st.sampled_from(["", "0.x", "9.x", "x"]),
)
def test_checkpoints_of_another_content_under_a_seal_that_fits(progress: str, more: str) -> None:
    """What a run's own functions sealed, of values no run has: read only if every number is in its range."""
    tensors = TENSORS | ({more: torch.ones(1)} if more else {})
    metadata = {"format": "2", "key": KEY, "progress": progress}
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "x", tensors, metadata)
        found = loaded_partial(Path(folder) / "x")
        if found is not None:
            assert 0 <= found.progress.done < EXTENT.n
            assert 0 <= found.progress.block < EXTENT.blocks
            assert len(found.states) == EXTENT.metrics


def test_nothing_was_left_out() -> None:
    """The strategies draw every kind of junk: a spoiled document differs from the sound one."""
    assert len(KEYS) > 20
    assert all(NAMES.values())
    assert len(list(itertools.chain.from_iterable(places(d) for d in (SUITE, SCHEDULE, CARD)))) > 50
