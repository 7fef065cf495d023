"""One request for the command line, suites and Python: filled alike, checked in one place, with objects in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import samplerbench
from samplerbench import api, registry
from samplerbench.bench import prepare as module
from samplerbench.bench.request import Grid, Published, Request, RequestError, one_grid
from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.models.exact import exact

SUITE = """\
model = "exact:mixture"
labels = 1
n = 40
blocks = 2
seeds = [7]
batch_size = 16
dtype = "fp64"
metrics = ["fid", "kid"]
data = "digits"
features = "digits-cnn"

[[grid]]
samplers = ["ddim:eta=0.5", "heun"]
guidances = ["none", "cfg:scale=2"]
spacings = ["karras:rho=5"]
nfe = [5, 10]
"""
SAMPLERS, GUIDANCES = ["ddim:eta=0.5", "heun"], ["none", "cfg:scale=2"]


class Prepared(BaseException):
    """Ends a command where its request is made."""


def caught(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Request:
    """The request that a call prepares."""

    def prepare(request: Request, *_: Any, **__: Any) -> None:
        raise Prepared(request)

    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(api, "prepare", prepare)
    with pytest.raises(Prepared) as ended:
        call()
    found: Request = ended.value.args[0]
    return found


def test_the_command_line_a_suite_and_python_fill_the_same_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(SUITE)
    options = [
        "-s",
        SAMPLERS[0],
        "-s",
        SAMPLERS[1],
        "-g",
        GUIDANCES[0],
        "-g",
        GUIDANCES[1],
        "--spacing",
        "karras:rho=5",
    ]
    options += ["--nfe", "5,10", "-m", "exact:mixture", "--labels", "1", "--n", "40", "--blocks", "2", "--seed", "7"]
    options += ["-b", "16", "--dtype", "fp64", "--metric", "fid", "--metric", "kid"]
    options += ["--data", "digits", "--features", "digits-cnn"]
    given: dict[str, Any] = {"nfe": [5, 10], "guidances": GUIDANCES, "spacing": "karras:rho=5", "labels": 1, "n": 40}
    given |= {"model": "exact:mixture", "blocks": 2, "seed": 7, "batch_size": 16, "dtype": "fp64"}
    given |= {"metrics": ["fid", "kid"], "data": "digits", "features": "digits-cnn"}
    found = [
        load_suite(file),
        caught(monkeypatch, lambda: main(["run", str(file)])),
        caught(monkeypatch, lambda: main(["run", *options])),
        caught(monkeypatch, lambda: samplerbench.evaluate(SAMPLERS, **given)),
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0].grids[0].samplers == tuple(registry.parse("sampler", spec) for spec in SAMPLERS)
    assert found[0].grids[0].guidances == (None, registry.parse("guidance", "cfg:scale=2"))


def test_an_option_replaces_what_the_suite_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(SUITE)
    found = caught(monkeypatch, lambda: main(["run", str(file), "--n", "50", "--metric", "fid", "--offline"]))
    metrics = (registry.parse("metric", "fid"),)
    assert found == load_suite(file).replace(n=50, metrics=metrics, offline=True)
    assert found.load.offline


def test_a_spec_is_parsed_once_and_an_instance_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, parse = [], registry.parse

    def counted(kind: str, spec: Any) -> Any:
        parsed.append((kind, spec))
        return parse(kind, spec)

    sampler, metric = registry.parse("sampler", "ddim"), registry.parse("metric", "fid")
    monkeypatch.setattr(registry, "parse", counted)
    request = Request([Grid([sampler, "heun"], [2], guidances=["cfg"], spacings=["karras"])], n=10, metrics=[metric])
    prepared = module.prepare(request, "cpu", exact("mixture"))
    assert prepared.metrics[0] is metric
    for cell, given in zip(prepared.cells, request.grids[0].samplers, strict=True):
        assert cell.sampler is given
        assert cell.guidance == request.grids[0].guidances[0]
        assert cell.spacing is request.grids[0].spacings[0]
    assert prepared.cells[0].sampler is sampler
    specs = [spec for _, spec in parsed if isinstance(spec, str)]
    assert sorted(specs) == ["cfg", "heun", "karras"]


@pytest.mark.parametrize(
    ("make", "place", "says"),
    [
        (lambda: Grid(["ddim", "ddmi"], [2]), ("samplers", 1), 'no sampler "ddmi". Did you mean "ddim"?'),
        (lambda: Grid([5], [2]), ("samplers", 0), "sampler=5: give a name"),  # type: ignore[list-item]
        (lambda: Grid(["karras"], [2]), ("samplers", 0), 'no sampler "karras"'),
        (lambda: Grid([], [2]), ("samplers",), "`samplers` is empty; give at least one."),
        (lambda: Grid("ddim", [2]), ("samplers",), 'samplers="ddim": give a list: ["ddim"].'),
        (lambda: Grid(["ddim"], [2, True]), ("steps", 1), "steps=True: give a whole number"),
        (lambda: Grid(["ddim"], nfe=[0]), ("nfe", 0), "nfe=0: at least 1 evaluation is needed."),
        (lambda: Grid(["ddim"], [2], [2]), (), "`steps` and `nfe` cannot both be given"),
        (lambda: Grid(["ddim"]), (), "neither `steps` nor `nfe` is given"),
        (lambda: Grid(["ddim"], [2], spacings=[""]), ("spacings", 0), "`spacing` is empty; name a spacing"),
        (lambda: Grid(["ddim"], [2], guidances=["cgf"]), ("guidances", 0), 'Did you mean "cfg"?'),
        (lambda: Request([], n=0), ("n",), "n=0: at least 1 image is needed."),
        (lambda: Request([], n="4"), ("n",), 'n="4": give a whole number of at least 1.'),
        (
            lambda: Request([], n=10**5, blocks=10**5),
            (),
            "n=100000 and blocks=100000: these are 10,000,000,000 images; ",
        ),
        (lambda: Request([], seeds=[0, -1]), ("seeds", 1), "seed=-1: give a whole number from 0 to "),
        (lambda: Request([], seeds=[]), ("seeds",), "`seeds` is empty"),
        (lambda: Request([], labels=" "), ("labels",), 'labels=" ": give "balanced", "none" or one label.'),
        (lambda: Request([], labels=True), ("labels",), "labels=True: give "),
        (lambda: Request([], dtype="fp8"), ("dtype",), 'dtype="fp8": choose one of fp32'),
        (
            lambda: Request([], batch_size="big"),
            ("batch_size",),
            'batch_size="big": give a whole number of at least 1, or',
        ),
        (lambda: Request([], model=3), ("model",), "model=3: give text."),
        (lambda: Request([], graphs=1), ("graphs",), "graphs=1: give true or false."),
        (lambda: Request([], bloks=1), ("bloks",), 'there is no field "bloks". Did you mean "blocks"?'),
        (lambda: Request([{"samplers": ["ddmi"], "steps": [1]}]), ("grids", 0, "samplers", 0), 'no sampler "ddmi"'),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(make: Callable[[], Any], place: tuple[Any, ...], says: str) -> None:
    with pytest.raises(RequestError) as refused:
        make()
    assert refused.value.place == place
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_copy_with_changes_is_checked_and_the_first_stays() -> None:
    request = Request([Grid(["ddim"], [2])], n=5)
    assert request.replace(n=6).n == 6
    assert request.n == 5
    with pytest.raises(UserError, match="n=0"):
        request.replace(n=0)
    with pytest.raises(ValidationError, match="frozen"):
        request.n = 7  # type: ignore[misc]


def test_fifty_steps_are_taken_where_none_are_named() -> None:
    assert one_grid(["ddim"]).steps == (50,)
    assert (one_grid(["ddim"], nfe=[4]).steps, one_grid(["ddim"], [4]).steps) == ((), (4,))


def test_a_published_value_is_of_the_instance_in_its_row(tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(SUITE + '[grid.published]\nsource = "x"\nfid = [[1, 2], [3, 4], [5, 6], [7, nan]]\n')
    (grid,) = load_suite(file).grids
    assert len(grid.published) == 7
    last = grid.published[-1]
    assert last == Published(
        sampler=grid.samplers[1], guidance=grid.guidances[1], column=5, metric="fid", value=7.0, source="x"
    )
    assert last.sampler is grid.samplers[1]
    with pytest.raises(UserError, match=r"suite\.toml:4: blocks = 0: at least 1 block is needed\."):
        load_suite(_changed(file, "blocks = 2", "blocks = 0"))
    with pytest.raises(UserError, match=r'suite\.toml:8: no metric "kidd"\. Did you mean "kid"'):
        load_suite(_changed(file, '"kid"', '"kidd"'))


def _changed(file: Path, old: str, new: str) -> Path:
    other = file.parent / "other" / file.name
    other.parent.mkdir(exist_ok=True)
    other.write_text(file.read_text("utf-8").replace(old, new), "utf-8")
    return other
