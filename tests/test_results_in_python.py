"""`Results` in Python: select, join, group, and show in a notebook."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from support.synthetic_results import record

from samplerbench import registry
from samplerbench.api import Results
from samplerbench.errors import ArgumentTypeError, UserError

UNMET = {
    "sampler": "heun",
    "guidance": None,
    "spacing": None,
    "steps": None,
    "budget": 1,
    "metrics": {},
    "unmet": "a budget of 1 evaluations is too small: one step costs 2",
    "protocol_fields": {"sampler": {"parameters": {}}, "guidance": None, "spacing": None},
}


def failed(*arguments: Any, **options: Any) -> dict[str, Any]:
    made = record(*arguments, **options)
    return made | {"metrics": {}, "error": "no luck"}


ALL = Results(
    [
        record("ddim", 10),
        record("ddim:eta=0.5", 10),
        record("ddim", 20, guidance="cfg:scale=2.0"),
        record("ddim", 5, budget=6, nfe=5),
        record("langevin", None, spacing=None, nfe=123.5),
        record("ddim", 10, seed=1),
        UNMET,
    ]
)


def printed(content: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(content)
    return out.getvalue()


def places(found: Results) -> list[int]:
    return [next(i for i, r in enumerate(ALL) if r is one) for one in found]


# --- filter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"sampler": "ddim"}, [0, 2, 3, 5]),
        ({"sampler": "ddim:eta=0"}, [0, 2, 3, 5]),
        ({"sampler": "ddim:0.5"}, [1]),
        ({"sampler": registry.parse("sampler", "ddim:eta=0.5")}, [1]),
        ({"sampler": ["langevin", "ddim:eta=0.5"]}, [1, 4]),
        ({"sampler": "nothing"}, []),
        ({"guidance": "none"}, [0, 1, 3, 4, 5, 6]),
        ({"guidance": "cfg:scale=2.0"}, [2]),
        ({"guidance": ["none", "cfg:scale=2.0"], "sampler": "ddim", "seed": 0}, [0, 2, 3]),
        ({"spacing": "own"}, [4, 6]),
        ({"steps": 10}, [0, 1, 5]),
        ({"steps": range(5, 11)}, [0, 1, 3, 5]),
        ({"nfe": 6}, [3]),
        ({"nfe": 5}, []),
        ({"nfe": [10, 1]}, [0, 1, 5, 6]),
        ({"seed": 1}, [5]),
        ({"n": 9, "model": "digits", "labels": "balanced"}, [0, 1, 2, 3, 4, 5]),
        ({"model": ["a", "b"]}, []),
        ({"labels": 3}, []),
        ({"where": lambda r: r.get("nfe", 0) > 100}, [4]),
        ({"where": lambda r: r["steps"] == 10, "sampler": "ddim"}, [0, 5]),
    ],
)
def test_filter_selects_the_cells_with_these_values(given: dict[str, Any], expected: list[int]) -> None:
    assert places(ALL.filter(**given)) == expected


def test_a_single_label_is_a_number_or_a_text() -> None:
    results = Results([record(labels="3"), record(labels="balanced")])
    assert len(results.filter(labels=3)) == len(results.filter(labels="3")) == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"sampler": 3}, "`sampler` is of type int; give text, or an instance."),
        ({"sampler": registry.parse("spacing", "karras")}, "`sampler` is of type Karras; give text, or an instance."),
        ({"steps": "10"}, "`steps` is of type str; give a number."),
        ({"steps": True}, "`steps` is of type bool; give a number."),
        ({"model": 3}, "`model` is of type int; give text."),
        ({"where": "ddim"}, "`where` is of type str; give a function of a record"),
    ],
)
def test_filter_refuses_values_of_the_wrong_type(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        ALL.filter(**given)
    assert str(caught.value).startswith(reason)
    with pytest.raises(TypeError):
        ALL.filter(sampling="ddim")  # type: ignore[call-arg]


# --- join ------------------------------------------------------------------------------------------------------------


def test_a_joined_cell_is_there_once() -> None:
    """The first record of a protocol and budget is kept, or the first with a result. None of the parts is changed."""
    one, two = Results([record(steps=5), failed(steps=10)]), Results([record(steps=5), record(steps=10), UNMET])
    joined = one + two
    assert [r.get("steps") for r in joined] == [5, 10, None]
    assert joined[0] is one[0]
    assert joined[1] is two[1]
    assert (two + one)[1] is two[1]
    assert len(one) == 2
    assert joined.join(one, two, Results([UNMET])).records == joined.records
    assert [len(one.join()), len(one.join(two, Results([record(steps=20)])))] == [2, 4]


def test_the_same_result_under_two_budgets_is_two_cells() -> None:
    assert len(Results([record(steps=5, budget=5)]) + Results([record(steps=5, budget=6), record(steps=5)])) == 3


def test_only_results_are_joined() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        ALL + 3  # type: ignore[operator]
    with pytest.raises(ArgumentTypeError, match="`join` was given a value of type list; give `Results`"):
        ALL.join([record()])  # type: ignore[arg-type]


# --- Groups, tables and figures --------------------------------------------------------------------------------------


def test_only_results_of_one_protocol_are_in_one_table() -> None:
    """As the tables of a report group them: the sampler may differ, the number of images may not."""
    many = Results([record("ddim"), record("ddpm"), record("ddim", n=90), record("ddpm", 20)])
    first, second = many.groups()
    assert [(r["sampler"], r["n"]) for r in first] == [("ddim", 9), ("ddpm", 9), ("ddpm", 9)]
    assert [(r["sampler"], r["n"]) for r in second] == [("ddim", 90)]
    text = printed(many)
    assert text.index("n = 9\n") < text.index("ddpm") < text.index("n = 90\n") < text.rindex("ddim")
    assert text.count("FID") == 2
    assert "n = " not in printed(first)
    with pytest.raises(UserError, match=r"2 groups that are not comparable, because they differ in n; plot each of `"):
        many.figure()
    assert len(first.figure().axes) == 1


def test_metrics_of_two_runs_are_merged_into_one_row() -> None:
    """A table of either metric has every value, although the protocols differ in their metrics."""
    fid, kid = record(metrics={"fid": 4.25}), record(metrics={"kid": 0.5})
    joined = Results([kid]) + Results([fid])
    assert len(joined) == 2
    (merged,) = joined.groups()
    assert len(merged) == 1
    assert set(merged[0]["metrics"]) == {"fid", "kid"}
    assert "4.25" in printed(joined.table("fid"))
    assert "0.500" in printed(joined.table("kid"))
    assert len(joined.figure("fid").axes) == 1


def test_one_result_under_two_budgets_fills_both_columns() -> None:
    both = Results(
        [record(steps=5, nfe=5, budget=5, metrics={"fid": 4.25}), record("ddpm", budget=6, metrics={"fid": 1.0})]
    )
    both += Results([record(steps=5, nfe=5, budget=6, metrics={"fid": 4.25}), UNMET | {"budget": 6}])
    (group,) = both.groups()
    assert len(group) == 4
    assert printed(both).count("4.25") == 2
    assert printed(both).count("unmet") == 1


def test_a_budget_that_is_too_small_is_in_the_tables_of_this_budget() -> None:
    cells = [record("ddim", 1, budget=1), record("ddim", 1, budget=1, n=90), record("ddim", 5, n=900), UNMET]
    parts = Results(cells).groups()
    assert [sum("unmet" in r for r in part) for part in parts] == [1, 1, 0]
    assert [len(part) for part in Results([UNMET]).groups()] == [1]
    assert Results([]).groups() == []


def test_metrics_with_other_parameters_are_not_in_one_column() -> None:
    three, five = (record(metrics={"recall": 0.5}, protocol={"metrics": [f"recall:k={k}"]}) for k in (3, 5))
    with pytest.raises(UserError, match="they differ in the parameters of a metric"):
        Results([three, five]).figure()


# --- In a notebook ---------------------------------------------------------------------------------------------------


def test_a_figure_is_a_picture_in_a_notebook() -> None:
    """IPython calls _repr_png_; a figure of matplotlib alone shows `<Figure size …>` until pyplot is imported."""
    figure = Results([record(steps=5), record(steps=10)]).figure()
    image = Image.open(io.BytesIO(figure._repr_png_()))  # type: ignore[attr-defined]
    assert image.format == "PNG"
    assert min(image.size) > 200
    assert len(image.convert("L").histogram()) - image.convert("L").histogram().count(0) > 10


def test_ipython_shows_the_figure_and_the_tables() -> None:
    """Without pyplot: a figure of matplotlib alone has no picture there."""
    formatters = pytest.importorskip("IPython.core.formatters")
    from matplotlib.figure import Figure

    shown = formatters.DisplayFormatter()
    results = Results([record(steps=5), record(n=90)])
    assert "image/png" in shown.format(results.filter(n=9).figure())[0]
    assert "image/png" not in shown.format(Figure())[0]
    for value in (results, results.table()):
        assert shown.format(value)[0]["text/html"].count("FID") == 2
