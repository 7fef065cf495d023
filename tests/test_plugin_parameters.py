"""The parameters of a plugin are its fields; a class whose parameters cannot be known is refused, by every way in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

import samplerbench
from samplerbench import registry
from samplerbench.errors import RunError, SamplerbenchError, UserError
from samplerbench.options import build, parameters_of
from samplerbench.sampling import Denoiser, Noise, Sampler, Step, option


class Walk(Sampler):
    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        yield Step(0.0, denoise(x, float(sigmas[0])))


class OwnInit(Walk):
    def __init__(self, eta: float = 0.5) -> None:
        object.__setattr__(self, "eta", eta)


class OwnInitWithoutParameters(Walk):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


@dataclass(frozen=True)
class DecoratedOwnInit(Walk):
    eta: float = option(0.5, "a parameter", ge=0.0)

    def __init__(self, scale: float = 1.0) -> None:
        object.__setattr__(self, "eta", scale)


@dataclass(frozen=True, init=False)
class NoInit(Walk):
    eta: float = option(0.5, "a parameter", ge=0.0)


@dataclass(frozen=True)
class Hidden(Walk):
    extra: InitVar[float] = 1.0


class NotDecorated(Walk):
    eta: float = 0.5


class NotDecoratedWithOption(Walk):
    eta: float = option(0.5, "a parameter", ge=0.0)


class Plain(Walk):
    """No parameters, and no decorator: nothing is lost."""

    needs: ClassVar[frozenset[str]] = frozenset()
    own_grid: bool = True  # type: ignore[misc]


@dataclass(frozen=True)
class Sound(Walk):
    eta: float = option(0.5, "a parameter", ge=0.0)


class Inherits(Sound):
    """The parameters of its base."""


@pytest.mark.parametrize(
    ("cls", "line"),
    [
        (OwnInit, "OwnInit defines its own __init__"),
        (OwnInitWithoutParameters, "OwnInitWithoutParameters defines its own __init__"),
        (DecoratedOwnInit, "DecoratedOwnInit defines its own __init__"),
        (NoInit, "NoInit defines its own __init__"),
        (Hidden, "Hidden defines its own __init__"),
        (NotDecorated, "NotDecorated has the field eta but is not a dataclass"),
        (NotDecoratedWithOption, "NotDecoratedWithOption has the option eta but is not a dataclass"),
    ],
)
def test_a_class_whose_parameters_are_not_known_is_refused(cls: type[Sampler], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parameters_of(cls)
    with pytest.raises(UserError, match=line):
        build(cls, {"eta": "1"})


@pytest.mark.parametrize(("cls", "names"), [(Plain, []), (Sound, ["eta"]), (Inherits, ["eta"])])
def test_a_class_whose_fields_are_its_parameters_is_taken(cls: type[Sampler], names: list[str]) -> None:
    assert list(parameters_of(cls)) == names


def test_an_instance_is_refused_too() -> None:
    """Two of them, made with different values, would have one spec and so one result."""
    assert OwnInit(0.1).label() == OwnInit(0.9).label()
    with pytest.raises(UserError, match="OwnInit defines its own __init__"):
        samplerbench.evaluate(OwnInit(0.1), steps=1, n=2, quiet=True)


FILE = """
from samplerbench.sampling import Sampler, Step

class Mine(Sampler):
    def __init__(self, eta=0.5):
        self.eta = eta

    def steps(self, denoise, x, sigmas, noise):
        yield Step(0.0, x)
"""


@pytest.mark.parametrize("parameters", ["", ":eta=1"])
def test_a_file_is_refused_where_it_is_named(parameters: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    with pytest.raises(UserError, match="Mine defines its own __init__, so its parameters are unknown"):
        registry.parse("sampler", f"{tmp_path}/mine.py:Mine{parameters}")


def test_a_plugin_that_exits_while_it_is_made_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom samplerbench.sampling import Sampler\n\n"
        "@dataclass(frozen=True)\nclass Mine(Sampler):\n    def __post_init__(self):\n        sys.exit(0)\n\n"
        "    def steps(self, denoise, x, sigmas, noise):\n        yield\n"
    )
    with pytest.raises(UserError, match="cannot be created: SystemExit: 0"):
        registry.parse("sampler", f"{tmp_path}/mine.py:Mine")


def test_a_file_is_named_as_the_user_named_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.py").write_text(FILE, encoding="utf-8")
    with pytest.raises(UserError, match=r"^\./one\.py:Mine defines its own __init__"):
        registry.parse("sampler", "./one.py:Mine")


@pytest.mark.parametrize("spec", ["./bad:a:b.py:OneOf", "sub/bad:a.py:OneOf:eta=1", "/x/a:b.py"])
def test_a_path_with_a_colon_is_refused_as_such(spec: str) -> None:
    with pytest.raises(UserError, match="must not contain a colon"):
        registry.parse("sampler", spec)


@pytest.mark.parametrize("spec", ["ddim:eta=./a:b.py", "exact/./a:problem=b.py", "diffusers/DDIMScheduler:a=b.py:c"])
def test_a_parameter_that_looks_like_a_path_is_none(spec: str) -> None:
    registry.split(spec)


BODIES = {
    "needs = 3": "needs is 3; it must be a frozenset of names",
    "needs = frozenset({1})": "needs is frozenset({1}); it must be",
    "spacing = 3": "spacing is 3; it must be a name or None",
    "own_grid = 1": "own_grid is 1; it must be True or False",
    "own_grid = property(lambda self: 1 / 0)": "raised ZeroDivisionError in own_grid: division by zero",
    "spec = property(lambda self: 1 / 0)": "raised ZeroDivisionError in spec",
    "spec = 3": "spec is 3; it must be a text",
    "parameters = 3": "parameters is 3; it must be a dictionary",
    "label = lambda self: 3": "label is 3; it must be a text",
    "label = classmethod(lambda cls: exit(0))": "raised SystemExit in label: 0",
    "__hash__ = None": "raised TypeError in __hash__",
}
METRIC_BODIES = {
    "better = 'more'": "better is 'more'; it must be one of 'lower', 'higher'",
    "layer = 'nosuch'": "layer is 'nosuch'; it must be one of 'fid'",
    "layer = ['fid']": "layer is ['fid']; it must be one of",
    "of = 'images'": "of is 'images'; it must be one of 'samples', 'data'",
    "feature_space = None": "feature_space is None; it must be a text",
    "needs_prompts = 1": "needs_prompts is 1; it must be True or False",
    "needs_truth = 1": "needs_truth is 1; it must be True or False",
    "ordered = 1": "ordered is 1; it must be True or False",
    "needs_real_images = None": "needs_real_images is None",
    "needs_features = property(lambda self: 1 / 0)": "raised ZeroDivisionError in needs_features",
    "label = classmethod(lambda cls: 1 / 0)": "raised ZeroDivisionError in label",
}
GUIDANCE_BODIES = {
    "needs_condition = 1": "needs_condition is 1; it must be True or False",
    "needs_labels = 'labels'": "needs_labels is 'labels'; it must be True or False",
    "needs_unconditional = frozenset({'labels'})": "needs_unconditional is frozenset({'labels'})",
    "differentiates = None": "differentiates is None",
    "clip = 'never'": "clip is 'never'",
}
GENERATOR_BODIES = {
    "needs_labels = 'yes'": "needs_labels is 'yes'; it must be True or False",
    "spec = 3": "spec is 3; it must be a text",
}


@pytest.mark.parametrize(
    ("kind", "body", "line"),
    [
        (kind, *case)
        for kind, cases in (
            ("sampler", BODIES),
            ("metric", METRIC_BODIES),
            ("guidance", GUIDANCE_BODIES),
            ("generator", GENERATOR_BODIES),
        )
        for case in cases.items()
    ],
)
def test_what_a_plugin_says_of_itself_is_checked_when_it_is_made(
    kind: str, body: str, line: str, tmp_path: Path
) -> None:
    method = {"sampler": "steps", "metric": "start", "guidance": "predict", "generator": "images"}[kind]
    package = "metrics" if kind == "metric" else "sampling"
    (tmp_path / "mine.py").write_text(
        f"from samplerbench.{package} import {kind.title()}\n\n\nclass Mine({kind.title()}):\n"
        f"    {method} = lambda self, *_: None\n    {body}\n"
    )
    with pytest.raises(SamplerbenchError) as caught:
        registry.parse(kind, f"{tmp_path}/mine.py:Mine")
    assert type(caught.value) in (UserError, RunError)
    assert line in str(caught.value)
    assert "Mine" in str(caught.value)
    assert "\n" not in str(caught.value)
