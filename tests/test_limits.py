"""Numbers beyond what is possible: every whole number a user gives has a bound, and the error states it."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import CPU

import samplerbench
from samplerbench import limits, registry
from samplerbench.bench import setup
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.bench.suite import load_suite
from samplerbench.cli.app import app, main
from samplerbench.errors import SamplerbenchError, UserError
from samplerbench.metrics import Metric
from samplerbench.models.exact import exact, parse_shape
from samplerbench.options import option, parameters_of
from samplerbench.sampling import Spacing
from samplerbench.sampling.spacing import make_grid

HUGE = 99999999999999999999999
DIGITS = 10**5000
"""More digits than Python writes."""


def refusal(call: Any) -> str:
    with pytest.raises(UserError) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1500
    return str(refused.value)


# --- Options and parameters -----------------------------------------------------------------------------------------


def options(group: typer.Typer, path: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """(command, parameter, type, typer's description) of every command."""
    for command in group.registered_commands:
        assert command.callback is not None
        for name, hint in typing.get_type_hints(command.callback, include_extras=True).items():
            if typing.get_origin(hint) is typing.Annotated:
                kind, *notes = typing.get_args(hint)
                yield f"{path}{command.name or command.callback.__name__}", name, kind, notes[0]
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from options(inner.typer_instance, f"{path}{inner.name} ")


def test_every_whole_number_on_the_command_line_has_an_upper_bound() -> None:
    numbers = [(f"{c} {n}", note) for c, n, kind, note in options(app) if int in (kind, *typing.get_args(kind))]
    assert len(numbers) > 30
    assert [name for name, note in numbers if note.max is None] == []


def test_every_whole_number_of_a_built_in_plugin_has_an_upper_bound() -> None:
    unbounded = []
    for kind in registry.BASES:
        for entry in registry.entries(kind):
            if entry.distribution == registry.OWN:
                known = parameters_of(registry.load(entry)).values()
                unbounded += [
                    f"{entry.name}:{p.name}" for p in known if p.is_integer and not {"le", "lt"} & {*p.bounds}
                ]
    assert unbounded == []


@dataclasses.dataclass(frozen=True)
class Unbounded(Spacing):
    """A plugin that states no bounds."""

    size: int = option(1, "how large")
    more: int | None = option(None, "how much more", ge=0)

    def grid(self, levels: torch.Tensor, steps: int) -> torch.Tensor:
        return torch.linspace(1, 0, self.size + 1)


def test_a_plugins_whole_number_fits_into_64_bits_where_no_bound_is_stated() -> None:
    assert Unbounded(2**63 - 1, 2**63 - 1).size == 2**63 - 1
    assert Unbounded(-(2**63) + 1).more is None
    for values in ((2**63,), (-(2**63),), (1, 2**63), (1, -1), (DIGITS,), (1, DIGITS), (True, "x")):
        assert refusal(lambda v=values: Unbounded(*v)).startswith("spacing Unbounded: ")


def test_a_spec_of_thousands_of_digits_is_one_short_line() -> None:
    for spec in (f"langevin:T={'9' * 5000}", f"ddim:eta={'9' * 5000}x"):
        assert "…: " in refusal(lambda s=spec: registry.parse("sampler", s))
    for spec in ("x" * 5000, f"ddim:{'x' * 5000}", f"ddim:{'x' * 5000}=1", ":" * 5000, "/" * 5000):
        refusal(lambda s=spec: registry.parse("sampler", s))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (f"run -s ddim --steps {HUGE}", f"--steps {HUGE}: at most 1,000,000 are possible."),
        (f"run -s ddim --steps 1,{'9' * 5000}", "is not a whole number"),
        (f"run -s ddim --nfe {HUGE}", f"--nfe {HUGE}: at most 1,000,000 are possible."),
        (f"run -s ddim --n {HUGE}", f"--n {HUGE}: it must be at most 100,000,000."),
        (f"run -s ddim --blocks {HUGE}", f"--blocks {HUGE}: it must be at most 100,000,000."),
        (
            "run -s ddim --n 10000000 --blocks 11",
            "--n 10000000 and --blocks 11: these are 110,000,000 images; ",
        ),
        (f"run -s ddim --batch-size {HUGE}", f"--batch-size {HUGE}: at most 1,000,000 images are possible."),
        (f"run -s ddim --labels {HUGE}", f"--labels {HUGE}: the model has the labels 0 to 1."),
        (f"sample x.png -s ddim --steps {HUGE}", f"--steps {HUGE}: it must be at most 1,000,000."),
        (f"run -s ddim --spacing leading:offset={HUGE}", "spacing leading: offset="),
        (
            "run -s ddim --spacing karras:rho=1e-300",
            "spacing karras: rho=1e-300: it must be at least",
        ),
        ("run -s ddim --spacing karras:rho=1e300", "spacing karras: rho=1e300: it must be at most"),
        (
            "run -s ddim --spacing exponential:rho=1e-300",
            "spacing exponential:rho=1e-300 does not give 50 decreasing",
        ),
        ("run -s ddim --spacing exponential:rho=1000", "spacing exponential:rho=1000 does not give 50 decreasing"),
        (
            "run -s ddim --spacing karras:sigma_max=1e308,rho=0.05",
            "spacing karras: sigma_max=1e308: it must be at most",
        ),
        (
            "run -s ddim --spacing list:levels=" + ";".join(map(str, range(2000, 0, -1))),
            "spacing list: it has 2000 lev",
        ),
        ("run -s ddim --spacing list:levels=inf;1", "spacing list: only a rectified flow can start at inf"),
        ("run -s ddim --spacing list:levels=1e999;1", "spacing list: only a rectified flow can start at inf"),
    ],
)
def test_a_number_beyond_what_is_possible_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    with pytest.raises(SystemExit) as ended:
        main([*arguments.split(), "--model", "exact:mixture"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("samplerbench: ")
    assert says in err


@pytest.mark.parametrize(
    "shape", ["9x9", "axbxc", "0x8x8", "-1x8x8", "²x8x8", "1x8x8x8", f"1x{'9' * 5000}x8", "9x9999x9999"]
)
def test_a_shape_that_is_none_is_one_line(shape: str) -> None:
    assert "the shape " in refusal(lambda: registry.parse("model", f"exact:shape={shape}").load(CPU, torch.float32))
    assert parse_shape("3x16x8") == (3, 16, 8)


# --- From Python ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 10**18}, "steps=1000000000000000000: at most 1,000,000 are possible"),
        ({"steps": DIGITS}, "at most 1,000,000 are possible"),
        ({"n": 10**18}, "at most 100,000,000 images are possible"),
        ({"n": DIGITS}, "are possible"),
        ({"seed": 2**64}, "seed=18446744073709551616: give a whole number from 0 to 18446744073709551615"),
        ({"seed": -1}, "seed=-1: "),
        ({"seed": 1.5}, "seed=1.5: "),
        ({"seed": True}, "seed=True: "),
        ({"seed": DIGITS}, 'seed="an integer of 16610 bits": '),
        ({"batch_size": 10**18}, "at most 1,000,000 images are possible"),
        ({"labels": 10**5}, "the model has the labels 0 to 1"),
    ],
)
def test_the_python_functions_refuse_the_same(values: dict[str, Any], says: str) -> None:
    model = exact("mixture")
    assert says in refusal(lambda: samplerbench.sample("ddim", **{"steps": 2, "n": 2, "model": model, **values}))
    if "labels" not in values:
        given = {"steps": 2, "n": 2, "model": model, "quiet": True, **values}
        assert says in refusal(lambda: samplerbench.evaluate("ddim", **given))


def test_the_largest_seed_is_a_seed() -> None:
    image = samplerbench.sample("ddim", 1, n=1, model="exact", seed=limits.MAX_SEED, quiet=True)
    assert not torch.equal(image, samplerbench.sample("ddim", 1, n=1, model="exact", seed=0, quiet=True))


def test_a_request_is_checked_whoever_makes_it() -> None:
    for length in ({"steps": [10**18]}, {"nfe": [10**18]}):
        assert "at most 1,000,000" in refusal(lambda given=length: Grid(["ddim"], **given))
    assert "seed=" in refusal(lambda: Request([Grid(["ddim"], [2])], model="exact", seeds=[2**70]))


def test_a_spacing_that_overflows_is_one_line() -> None:
    levels = torch.linspace(1, 10, 10, dtype=torch.float64)
    with pytest.raises(SamplerbenchError, match="spacing Unbounded raised ") as refused:
        make_grid(Unbounded(2**63 - 1), levels, 3)
    assert "\n" not in str(refused.value)
    assert "at most 1,000,000" in refusal(lambda: make_grid(registry.parse("spacing", "karras"), levels, 10**18))


@pytest.mark.parametrize(
    "spec", ["karras:rho=0.05", "karras:rho=1000", "exponential:rho=1e-300", "geometric", "logsnr"]
)
def test_within_the_bounds_no_spacing_over_noise_levels_overflows(spec: str) -> None:
    """At the largest and smallest levels that are accepted: a grid, or a refusal; the plugin itself never raises."""
    for low, high in ((1e-12, 1e12), (1e-300, 1e12), (1.0, 1e12)):
        made = registry.parse("spacing", registry.extend(spec, f"sigma_min={low},sigma_max={high}"))
        with contextlib.suppress(UserError):
            make_grid(made, torch.tensor([0.1, 10.0], dtype=torch.float64), 5)


# --- Suites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"seeds = [{2**70}]", "seeds = 1180591620717411303424: give a whole number from 0 to 18446744073709551615"),
        (f"n = {HUGE}", "at most 100,000,000 images are possible"),
        (f"blocks = {HUGE}", "at most 100,000,000 are possible"),
        (f"batch_size = {HUGE}", "at most 1,000,000 images are possible"),
        (f"labels = {HUGE}", "at most 1,000,000 labels are possible."),
        (f"labels = {'9' * 4000}", "at most 1,000,000 labels are possible."),
        (f'[[grid]]\nsamplers = ["ddim"]\nsteps = [{HUGE}]', "at most 1,000,000 are possible"),
        (f'[[grid]]\nsamplers = ["ddim"]\nnfe = [{HUGE}]', "at most 1,000,000 are possible"),
        (f'[[grid]]\nsamplers = ["ddim"]\nsteps = [1]\nparameters = {{eta = [{"9" * 400}]}}', "grid.parameters.eta"),
        (
            f'[[grid]]\nsamplers = ["ddim"]\nsteps = [1]\npublished = {{source = "x", fid = [[{"9" * 400}]]}}',
            "grid.published.fid",
        ),
        (
            '[[grid]]\nsamplers = ["ddim"]\nsteps = [1]\n[grid.parameters]\n'
            + "\n".join(f"p{i} = [{', '.join(map(str, range(10)))}]" for i in range(12)),
            "this grid has more than 100,000 cells",
        ),
    ],
)
def test_a_number_of_a_suite_beyond_what_is_possible_is_one_line(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(f'{line}\n[[grid]]\nsamplers = ["ddim"]\nsteps = [2]\n')
    refused = refusal(lambda: load_suite(file))
    assert refused.startswith(f"{file}:")
    assert says in refused


# --- Order of the checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", ["", " ", "no-such-data", "mnist:split=x", "x" * 5000, "~nobody-of-this-name/x", "a\0b"]
)
def test_the_data_is_looked_for_before_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    """With `stats` and with `run`: of the features the weights may have to be fetched."""
    from samplerbench.bench.prepare import measure_reference
    from samplerbench.cli import stats

    def fetched(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights were fetched")

    monkeypatch.setattr("samplerbench.metrics.extractors.load_extractor", fetched)
    monkeypatch.setattr("samplerbench.bench.setup.load_extractor", fetched)
    refusal(lambda: stats.stats(data, tmp_path / "out.safetensors"))
    metrics: list[Metric] = [registry.parse("metric", "fid")]
    prepared = prepare(Request([Grid(["ddim"], [1])], model="exact", data=data or " "), "cpu")
    assert prepared.metrics == metrics
    refusal(lambda: measure_reference(prepared))
    refusal(lambda: setup.check_reference(exact(), "no-such-file.safetensors"))
