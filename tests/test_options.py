"""Typed, bounded, documented parameters."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.options import Configurable, build, did_you_mean, list_parameters, option, parameters_of, show_value


@dataclass(frozen=True)
class Solver(Configurable):
    """A plugin with a parameter of every type."""

    kind = "solver"
    name = "toy"

    order: int = option(2, "order of the method", ge=1, le=3)
    eta: float = option(0.0, "noise", ge=0.0, le=1.0)
    rho: float = option(7.0, "exponent", gt=0.0, lt=100.0)
    variance: Literal["small", "large"] = option("small", "variance")
    last: bool = option(True, "a last step")
    sigma_min: float | None = option(None, "smallest level", gt=0.0)
    weights: str = option("", "a folder")


@dataclass(frozen=True)
class Problem(Configurable):
    """A plugin with positional parameters."""

    kind = "model"
    name = "exact"

    problem: str = option("gaussian", "which", positional=True)
    size: int = option(8, "side of an image", ge=1, positional=True)
    seed: int = option(0, "seed")


@dataclass(frozen=True)
class Wrapper(Configurable):
    """A plugin that takes parameters it does not know."""

    kind = "sampler"
    name = "wrapper"

    scheduler: str = option("DDIM", "which", positional=True)
    config: tuple[tuple[str, str], ...] = option((), "its own parameters", rest=True)


@dataclass(frozen=True)
class Plain(Configurable):
    """A plugin without parameters."""

    kind = "solver"
    name = "plain"


def refusal(arguments: dict[str, str], cls: type[Configurable] = Solver, positional: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        build(cls, arguments, positional)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        ("order", "3", 3),
        ("eta", "0.5", 0.5),
        ("eta", "1", 1.0),
        ("rho", "1e-3", 0.001),
        ("variance", "large", "large"),
        ("last", "false", False),
        ("last", "true", True),
        ("sigma_min", "0.1", 0.1),
        ("sigma_min", "none", None),
        ("sigma_min", "None", None),
        ("weights", "/a/b=c:d", "/a/b=c:d"),
        ("weights", "none", "none"),
    ],
)
def test_strings_become_the_parameters_type(parameter: str, text: str, value: Any) -> None:
    made = getattr(build(Solver, {parameter: text}), parameter)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        ("order", "0"),
        ("order", "4"),
        ("order", "2.5"),
        ("order", "two"),
        ("order", "none"),
        ("eta", "-0.001"),
        ("eta", "1.001"),
        ("eta", "nan"),
        ("eta", "none"),
        ("rho", "0"),
        ("rho", "100"),
        ("rho", "inf"),
        ("variance", "medium"),
        ("variance", ""),
        ("last", "perhaps"),
        ("sigma_min", "0"),
        ("sigma_min", "nan"),
        ("sigma_min", "inf"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_parameters_that_exist(parameter: str, text: str) -> None:
    message = refusal({parameter: text})
    assert message.startswith(f"solver toy: {parameter}={text}: ")
    assert message.endswith(list_parameters(Solver))
    assert "\n" not in message


def test_bounds_hold_at_their_ends() -> None:
    assert build(Solver, {"eta": "0"}).eta == 0
    assert build(Solver, {"eta": "1"}).eta == 1
    assert build(Solver, {"rho": "99.99"}).rho == 99.99


def test_a_choice_is_refused_with_the_choices() -> None:
    message = refusal({"variance": "medium"})
    assert "choose one of small, large." in message


def test_python_values_are_checked_as_strings_are() -> None:
    made = Solver(eta=1, order=3)
    assert type(made.eta) is float
    with pytest.raises(UserError, match=r"eta=2: it must be at most 1"):
        Solver(eta=2)
    with pytest.raises(UserError, match="order=none"):
        Solver(order=None)


def test_an_unknown_parameter_is_refused_with_the_closest_and_the_list() -> None:
    message = refusal({"etta": "1"})
    assert message.startswith('solver toy has no parameter "etta". Did you mean "eta"? Parameters of toy: ')
    for field in dataclasses.fields(Solver):
        assert f"{field.name}: " in message
    assert refusal({"zzz": "1"}, Plain) == 'solver plain has no parameter "zzz". plain has no parameters.'


def test_the_list_of_parameters_says_type_bounds_and_default() -> None:
    described = {name: p.describe() for name, p in parameters_of(Solver).items()}
    assert list(described) == ["order", "eta", "rho", "variance", "last", "sigma_min", "weights"]
    assert described["order"] == "order: int, ≥ 1, ≤ 3, default 2"
    assert described["rho"] == "rho: float, > 0, < 100, default 7"
    assert described["variance"] == "variance: small | large, default small"
    assert described["last"] == "last: bool, default true"
    assert described["sigma_min"] == "sigma_min: float or none, > 0, default none"
    assert list_parameters(Solver) == "Parameters of toy: " + "; ".join(described.values()) + "."


def test_positional_values_fill_the_positional_parameters_in_order() -> None:
    assert build(Problem, {}, ["mixture"]) == Problem(problem="mixture")
    assert build(Problem, {"seed": "3"}, ["mixture", "16"]) == Problem("mixture", 16, 3)
    assert "has no name; write parameter=value" in refusal({}, Problem, ("mixture", "16", "3"))
    assert "has no name; write parameter=value" in refusal({}, Solver, ("0.5",))


def test_rest_takes_what_has_no_field_of_its_own() -> None:
    made = build(Wrapper, {"eta": "0.5", "scheduler": "PNDM", "skip": "true"})
    assert made == Wrapper("PNDM", (("eta", "0.5"), ("skip", "true")))
    assert made.spec == "wrapper/PNDM:eta=0.5,skip=true"
    assert Wrapper().spec == "wrapper/DDIM"


def test_choices_may_be_numbers() -> None:
    @dataclass(frozen=True)
    class Multistep(Configurable):
        order: Literal[1, 2, 3] = option(2, "order")

    assert build(Multistep, {"order": "3"}) == Multistep(3)
    assert "choose one of 1, 2, 3." in refusal({"order": "4"}, Multistep)


def test_a_parameter_given_twice_is_refused() -> None:
    assert "problem is given twice" in refusal({"problem": "points"}, Problem, ("gaussian",))


@pytest.mark.parametrize(
    "made",
    [
        Solver(),
        Solver(eta=0.5),
        Solver(order=3, variance="large", last=False, sigma_min=0.002, weights="/a/b"),
        Solver(rho=math.pi, eta=1 / 3),
        Solver(rho=1e-7, eta=0.1 + 0.2),
        Solver(rho=1e-300),
        Problem(),
        Problem("mixture", seed=3),
        Problem("mixture", 16),
        Problem("a/b"),
        Problem("a:b", 16),
        Problem(""),
        Wrapper(),
        Wrapper("PNDM", (("eta", "0.5"), ("skip", "true"))),
        Plain(),
    ],
)
def test_spec_is_the_way_back(made: Configurable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "get", lambda *_: type(made))
    assert registry.parse("any", made.spec) == made


def test_spec_says_only_what_differs_and_parameters_say_all() -> None:
    assert Solver().spec == "toy"
    assert Solver(eta=0.5, order=2).spec == "toy:eta=0.5"
    assert Solver(last=False, sigma_min=2).spec == "toy:last=false,sigma_min=2"
    assert Solver(eta=0.5).parameters == {
        "order": 2,
        "eta": 0.5,
        "rho": 7.0,
        "variance": "small",
        "last": True,
        "sigma_min": None,
        "weights": "",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (2.0, "2"),
        (1e-5, "1e-05"),
        (1 / 3, "0.3333333333333333"),
        (None, "none"),
        (True, "true"),
        (3, "3"),
    ],
)
def test_values_are_shown_as_one_writes_them(value: Any, text: str) -> None:
    assert show_value(value) == text


def test_an_instance_is_frozen_and_hashable() -> None:
    made = Solver(eta=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.eta = 0.7
    assert {made: 1}[Solver(eta=0.5)] == 1


def test_a_field_without_option_is_refused() -> None:
    @dataclass(frozen=True)
    class Careless(Configurable):
        eta: float = 0.0

    with pytest.raises(UserError, match=r"Careless: the field eta .* eta: float = option"):
        Careless()


def test_options_on_a_class_that_is_no_dataclass_are_refused() -> None:
    class Undecorated(Solver):
        extra: float = option(0.0, "never seen by the dataclass")

    with pytest.raises(UserError, match=r"Undecorated has the option extra .* @dataclass\(frozen=True\)"):
        Undecorated()


def test_a_subclass_inherits_the_parameters_and_adds_its_own() -> None:
    @dataclass(frozen=True)
    class More(Solver):
        extra: int = option(1, "one more", ge=0)

    assert list(parameters_of(More)) == [*parameters_of(Solver), "extra"]
    assert More(eta=0.5, extra=2).spec == "toy:eta=0.5,extra=2"


@pytest.mark.parametrize(
    ("word", "known", "answer"),
    [
        ("ddmi", ["ddpm", "ddim", "heun"], "ddim"),
        ("DDIM", ["ddpm", "ddim"], "ddim"),
        ("langevn", ["langevin", "ddim"], "langevin"),
        ("zzz", ["ddim"], None),
        ("ddim", [], None),
        ("", [], None),
    ],
)
def test_did_you_mean(word: str, known: list[str], answer: str | None) -> None:
    assert did_you_mean(word, known) == (f' Did you mean "{answer}"?' if answer else "")


def test_annotations_as_strings_are_understood() -> None:
    """A plugin file begins with `from __future__ import annotations`, so its types are strings."""
    namespace: dict[str, Any] = {"Configurable": Configurable, "option": option, "dataclass": dataclass}
    exec("@dataclass(frozen=True)\nclass Late(Configurable):\n    k: 'int | None' = option(None, 'x', ge=1)", namespace)
    late = namespace["Late"]
    late.__module__ = __name__
    assert parameters_of(late)["k"].type == int | None
    assert late(k="4").k == 4


def test_a_parameter_cannot_take_the_place_of_what_every_plugin_has() -> None:
    @dataclass(frozen=True)
    class Labelled(Configurable):
        label: str = option("", "hides the method that names the plugin")  # type: ignore[assignment]

    with pytest.raises(UserError, match="a parameter cannot be called label"):
        parameters_of(Labelled)
