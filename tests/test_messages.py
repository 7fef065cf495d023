"""Errors name arguments; Python, the command line and a suite spell them in their own ways."""

from __future__ import annotations

import ast
import io
import json
import logging
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import samplerbench
from samplerbench.bench.suite import in_toml, load_suite
from samplerbench.bench.team import Team
from samplerbench.boundary import plugin_call
from samplerbench.cli.app import main
from samplerbench.cli.spelling import as_option, with_options
from samplerbench.errors import Message, RunError, SamplerbenchError, UserError, argument, message_of, spell
from samplerbench.models.exact import exact
from samplerbench.sampling import Denoiser, Noise, Sampler, Step
from samplerbench.testing.checks import Check, run_check
from samplerbench.text import json_text, one_line, printable

ROOT = Path(__file__).resolve().parents[1]
MIXTURE = ("--model", "exact:mixture")
INSIDE = re.compile("[\ufdd0-\ufdef]")
"""What the tokens of arguments are made of, within a message that is being put together."""


@pytest.mark.parametrize(
    ("name", "value", "python", "option", "toml"),
    [
        ("labels", "balanced", 'labels="balanced"', "--labels balanced", 'labels = "balanced"'),
        ("n", 5, "n=5", "--n 5", "n = 5"),
        ("batch_size", 5, "batch_size=5", "--batch-size 5", "batch_size = 5"),
        ("seed", 2**64, "seed=18446744073709551616", f"--seed {2**64}", "seeds = 18446744073709551616"),
        ("sampler", None, "`sampler`", "--sampler", "samplers"),
        ("channels", (8, 10), "channels=(8, 10)", "--channels 8,10", "channels = [8, 10]"),
        ("class_conditional", False, "class_conditional=False", "--unconditional", "class_conditional = false"),
        ("autoencoder", None, "`autoencoder`", "--latents", "autoencoder"),
        ("prompts", 'a "b"\\', "prompts='a \"b\"\\\\'", '--prompts a "b"\\', 'prompts = "a \\"b\\"\\\\"'),
    ],
)
def test_an_argument_has_three_spellings(name: str, value: Any, python: str, option: str, toml: str) -> None:
    error = UserError(f"before {argument(name, value)}: after.")
    assert str(error) == f"before {python}: after."
    assert spell(error, as_option) == f"before {option}: after."
    assert spell(error, in_toml) == f"before {toml}: after."
    if value is not None:
        assert ast.literal_eval(python.partition("=")[2]) == value


def test_a_value_of_another_type_and_a_very_long_integer_can_be_shown() -> None:
    assert str(UserError(f"{argument('out', Path('a/b'))}")) == 'out="a/b"'
    assert str(UserError(f"{argument('n', 10**9000)}")) == 'n="an integer of 29898 bits"'


def quote_while_handling(error: UserError) -> SamplerbenchError:
    try:
        try:
            raise error
        except UserError as caught:
            raise RunError(f"a:3: {caught}") from None
    except RunError as made:
        return made


def quote_twice(error: UserError) -> SamplerbenchError:
    return quote_while_handling(UserError(quote_while_handling(error).args[0]))


def quote_in_a_plugin(error: UserError) -> SamplerbenchError:
    try:
        with plugin_call("sampler x", "in step 1"):
            raise error
    except SamplerbenchError as raised:
        return raised


def quote_another_process(error: UserError) -> SamplerbenchError:
    with pytest.raises(UserError) as caught:
        Team().agree(pickle.loads(pickle.dumps(error)))
    return caught.value


@pytest.mark.parametrize("quote", [quote_while_handling, quote_twice, quote_in_a_plugin, quote_another_process])
def test_arguments_survive_where_an_error_is_quoted(quote: Callable[[UserError], SamplerbenchError]) -> None:
    quoted = quote(UserError(f"{argument('n', 1)}: use a larger {argument('n')}."))
    assert with_options(quoted).endswith("--n 1: use a larger --n.")
    assert str(quoted).endswith("n=1: use a larger `n`.")


def test_another_process_of_a_team_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key of tokens is another one: what is sent is no text with tokens."""
    team = Team(0, 2)
    monkeypatch.setattr(Team, "gather", lambda self, told: [None, pickle.loads(pickle.dumps(told))])
    with pytest.raises(UserError) as caught:
        team.agree(UserError(f"{argument('device', 'cuda')}: no."))
    assert str(caught.value) == 'process 0: device="cuda": no.'
    assert with_options(caught.value) == "process 0: --device cuda: no."


def test_a_suites_error_is_spelled_once(tmp_path: Path) -> None:
    """It names the keys of its file; the command line does not make options of them."""
    file = tmp_path / "a.toml"
    file.write_text('n = 0\n[[grid]]\nsamplers = ["ddim"]\nsteps = [2]\n')
    with pytest.raises(UserError) as caught:
        load_suite(file)
    assert str(caught.value) == with_options(caught.value) == f"{file}:1: n = 0: at least 1 image is needed."


@given(st.text(), st.text() | st.integers() | st.booleans() | st.none())
def test_no_text_of_a_user_is_taken_for_an_argument(text: str, value: Any) -> None:
    """Not even the pieces that tokens are made of."""
    for forged in (text, f'\ufdd0{text}\ufdd1["n", 1]\ufdd2{text}\ufdd3', "n=1", "--n 1", "`n`"):
        assert Message.read(forged).parts in ((forged,), ())
        error = UserError(f"{forged}{argument('labels', forged)}{forged}")
        assert [part for part in error.args[0].parts if not isinstance(part, str)] == [argument("labels", forged)]
    error = UserError(f"{argument('n', value)}")
    assert error.args[0].parts == (argument("n", value),)


def shown_forms(error: BaseException) -> Iterator[str]:
    yield from (str(error), repr(error), f"{error}", f"{error!r}", format(error), "%s" % error)  # noqa: UP031
    yield from (str(error.args), "".join(traceback.format_exception(error)), one_line(error), printable(error))
    yield json_text({"error": str(error)})
    yield json_text({"error": message_of(error)})
    screen = io.StringIO()
    handler = logging.StreamHandler(screen)
    handler.emit(logging.makeLogRecord({"msg": "%s", "args": (error,), "exc_info": (type(error), error, None)}))
    yield screen.getvalue()
    yield with_options(error)
    yield spell(error, in_toml)


def test_a_token_is_never_shown() -> None:
    made = UserError(f"{argument('n', 1)}: use {argument('labels', 'balanced')}.")
    for error in (made, quote_while_handling(made), pickle.loads(pickle.dumps(made))):
        for text in shown_forms(error):
            assert INSIDE.search(text) is None
    assert INSIDE.search(printable(f"left in a text: {argument('n', 1)}")) is None
    assert str(argument("n", 1)) == "n=1"


# --- Where messages are shown ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overflowing(Sampler):
    """Its states are not finite."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield Step(0.0, x * torch.inf)


def test_a_failed_cell_says_it_in_python_and_in_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the record, in the line of the cell and in JSON."""
    python, options = 'another spacing, or dtype="fp32".', "another spacing, or --dtype fp32."
    records = samplerbench.evaluate(["ddim", Overflowing()], steps=1, n=2, model=exact("mixture"), metrics="gap")
    assert records[1]["error"].endswith(python)
    assert json.loads(json.dumps(records[1]["error"])) == records[1]["error"]
    assert python in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    source = "from torch import inf\nfrom samplerbench.sampling import Sampler, Step\nclass Lost(Sampler):\n"
    Path("lost.py").write_text(
        f"{source}    def steps(self, denoise, x, sigmas, noise):\n        yield Step(0.0, x * inf)\n", encoding="utf-8"
    )
    with pytest.raises(SystemExit) as ended:
        main(["run", "-s", "./lost.py:Lost", "--steps", "1", "--n", "2", *MIXTURE, "--metric", "gap", "--json"])
    assert ended.value.code == 1
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["error"].endswith(options)
    assert options in err
    assert options in Path("results/run.log").read_text("utf-8")


def test_a_check_shows_the_message_of_a_refusal_with_options() -> None:
    def refuse(_: Any) -> str:
        raise UserError(f"use fewer {argument('steps')}.")

    assert with_options(run_check(Check("x", "", Overflowing(), refuse)).figure) == "use fewer --steps."


# --- The source -----------------------------------------------------------------------------------------------------

OPTION = re.compile(r"(?<![\w-])--[a-z]")
ALLOWED = {
    "samplerbench/bench/launch.py": "the options of accelerate and torchrun",
    "samplerbench/report/reproduce.py": "writes a command",
}
COMMAND = re.compile(r"`samplerbench [^`]*`|samplerbench run … --out ")


def literals(tree: ast.AST) -> Iterator[str]:
    """The texts in a file, docstrings included; an f-string is one text, with … for its values."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
            for part in node.values:
                yield from literals(part) if isinstance(part, ast.FormattedValue) else ()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        else:
            yield from literals(node)


def test_the_library_names_no_options_of_the_command_line() -> None:
    files = [*(ROOT / "samplerbench").rglob("*.py"), *(ROOT / "plugins/samplerbench_plugins").rglob("*.py")]
    names = {str(file.relative_to(ROOT)): file for file in files}
    assert names.keys() >= ALLOWED.keys()
    naming = {
        name: text
        for name, file in names.items()
        if not name.startswith("samplerbench/cli/") and name not in ALLOWED
        for text in literals(ast.parse(file.read_text("utf-8")))
        if OPTION.search(COMMAND.sub("", text))
    }
    assert naming == {}


def test_an_option_in_a_text_is_found() -> None:
    found = list(literals(ast.parse("def f(n):\n    raise E(f'--n {n}: ' 'x' + f'{g(\"--steps\")}')")))
    assert [text for text in found if OPTION.search(text)] == ["--n …: x", "--steps"]
    assert OPTION.search(COMMAND.sub("", "`samplerbench run … --out …` makes one")) is None
