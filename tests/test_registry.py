"""Entry points → names → objects, and what a broken plugin may break: nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

import samplerbench
from samplerbench import registry
from samplerbench.errors import UserError
from samplerbench.options import parameters_of
from samplerbench.registry import Entry
from samplerbench.sampling import Sampler

CORE = Path(samplerbench.__file__).parent
BUILT_IN = {
    "sampler": {"ddim", "ddpm", "langevin", "pf-ode"},
    "guidance": {"cfg", "classifier"},
    "spacing": {"trailing", "leading", "linspace", "quadratic", "karras", "geometric"},
    "generator": {"autoencoder-prior"},
    "task": {"inpaint", "super-resolution", "blur", "colourise", "denoise", "compressed-sensing", "clip"},
    "model": {"digits"},
    "metric": {"fid"},
    "data set": {"digits", "mnist", "fashion-mnist", "cifar10", "hf"},
}
GOOD = '''
    from dataclasses import dataclass

    import torch

    from samplerbench.sampling import Sampler, Spacing, Step, option

    @dataclass(frozen=True)
    class Good(Sampler):
        """One line that says what it is [in brackets].

        More that the list leaves out.
        """

        problem: str = option("gaussian", "which", positional=True)
        size: int = option(8, "how large", ge=1)

        def steps(self, denoise, x, sigmas, noise):
            yield Step(0.0, x)

    @dataclass(frozen=True)
    class Abstract(Sampler):
        """It has no steps."""

    class NoPlugin:
        """Not a sampler."""

    @dataclass(frozen=True)
    class Even(Spacing):
        """A spacing, not a sampler."""

        def grid(self, levels, steps):
            return torch.linspace(1, 0, steps + 1)
'''


def distribution(folder: Path, name: str, source: str, points: Mapping[str, str], kind: str = "samplers") -> None:
    """An installed distribution of one module: what pip leaves behind."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(textwrap.dedent(source), "utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[samplerbench.{kind}]", *lines, ""]))


def python(code: str, *path: Path, arguments: tuple[str, ...] = ()) -> str:
    """The output of a fresh interpreter with folders on its path."""
    env = {k: v for k, v in os.environ.items() if k != "SAMPLERBENCH_DEBUG"}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], env=env, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    points = {"good": "good_one:Good", "abstract": "good_one:Abstract", "nothing": "good_one:NoPlugin"}
    points |= {"spacing": "good_one:Even", "absent": "good_one:Absent"}
    distribution(tmp_path, "good_one", GOOD, points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "good_one", raising=False)
    registry.load.cache_clear()
    return tmp_path


# --- What is installed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", registry.BASES)
def test_the_built_in_plugins_are_found_and_are_what_they_should_be(kind: str) -> None:
    found = {e.name: e for e in registry.entries(kind)}
    assert BUILT_IN[kind] <= set(found)
    for name in BUILT_IN[kind]:
        cls = registry.get(kind, name)
        assert cls.kind == kind
        assert cls.name == name
        assert found[name].origin == f"samplerbench {samplerbench.__version__}"
        assert registry.summary(found[name]) == (cls.__doc__ or "").strip().split("\n")[0] != ""


def test_every_plugin_loads_and_its_parameters_are_documented() -> None:
    for kind in registry.BASES:
        for entry in registry.entries(kind):
            cls = registry.load(entry)
            assert (cls.__doc__ or "").strip(), entry
            assert all(p.help for p in parameters_of(cls).values()), entry


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BUILT_IN for name in sorted(BUILT_IN[kind])])
def test_a_name_alone_is_a_spec_and_the_way_back(kind: str, name: str) -> None:
    made = registry.parse(kind, name)
    assert made.spec == name
    assert registry.parse(kind, made.spec) == made


def test_the_default_spacing_is_a_registered_name() -> None:
    assert registry.default("spacing") in BUILT_IN["spacing"]
    with pytest.raises(UserError, match="no default sampler"):
        registry.default("sampler")


# --- Specs ---------------------------------------------------------------------------------------------------------


def test_a_spec_is_a_name_and_parameters() -> None:
    assert registry.parse("sampler", "ddim").parameters == {"eta": 0.0, "cfg_pp": False}
    assert registry.parse("sampler", "ddim:").eta == 0
    assert registry.parse("sampler", " ddim : eta = 0.5 ,").eta == 0.5
    made = registry.parse("sampler", "pf-ode:solver=rk45,rtol=1e-3")
    assert (made.solver, made.rtol) == ("rk45", 1e-3)
    assert made.spec == "pf-ode:solver=rk45,rtol=0.001"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            "ddim:et=1",
            'no parameter "et". Did you mean "eta"? Parameters of ddim: eta: float, ≥ 0, ≤ 1, default 0; cfg_pp: bool',
        ),
        ("ddim:eta=1.5", "Parameters of ddim: eta: float, ≥ 0, ≤ 1, default 0; cfg_pp: bool, default false."),
        ("ddim:eta=0.1,eta=0.2", "eta is given twice"),
        ("ddim:half", '"half" has no name; write parameter=value. Parameters of ddim: '),
        ("ddim:0,5", '"5" has no name; write parameter=value. Parameters of ddim: '),
        ("ddim:0.5,eta=1", "eta is given twice"),
        ("ddim:1.5", "eta=1.5: it must be at most 1. Parameters of ddim: "),
        ("deis:2.5", "order=2.5: give a whole number"),
        ("dpm++:4", "order=4: choose one of 1, 2, 3. Parameters of dpm++: order: 1 | 2 | 3"),
        ("heun:40", '"40" has no name; write parameter=value. Parameters of heun: S_churn: float'),
        ("pf-ode:2", '"2" has no name; write parameter=value. Parameters of pf-ode: solver: '),
        ("ddpm:1", '"1" has no name; write parameter=value. Parameters of ddpm: variance: '),
        ("ddim/0.5", '"0.5" has no name; write parameter=value. Parameters of ddim: '),
        ("", "has no name"),
        (":eta=1", "has no name"),
        ("/x", "has no name"),
    ],
)
def test_a_bad_spec_is_refused(spec: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        registry.parse("sampler", spec)


@pytest.mark.parametrize(
    ("kind", "short", "long"),
    [
        ("guidance", "cfg:3", "cfg:scale=3"),
        ("guidance", "classifier:1.5", "classifier:scale=1.5"),
        ("guidance", "image-classifier:10,conditional=true", "image-classifier:scale=10,conditional=true"),
        ("sampler", "ddim:0.5", "ddim:eta=0.5"),
        ("sampler", "dpm++: 3 ,sde=false", "dpm++:order=3"),
        ("sampler", "dpm-solver:3", "dpm-solver:order=3"),
        ("sampler", "unipc:corrector=false,2", "unipc:order=2,corrector=false"),
        ("sampler", "deis:1", "deis:order=1"),
        ("sampler", "ipndm:2", "ipndm:order=2"),
        ("guidance", "cfg:2", "cfg"),
    ],
)
def test_a_number_sets_the_first_parameter_and_the_spec_has_its_name(kind: str, short: str, long: str) -> None:
    made = registry.parse(kind, short)
    assert made.spec == long
    assert made == registry.parse(kind, long)


@pytest.mark.parametrize(("kind", "spec"), [("spacing", "karras:7"), ("sampler", "langevin:5"), ("metric", "gap:100")])
def test_a_number_without_a_name_is_refused_if_several_parameters_are_numbers(kind: str, spec: str) -> None:
    with pytest.raises(UserError, match="has no name; write parameter=value"):
        registry.parse(kind, spec)


def test_slashes_and_colons(good: Path) -> None:
    for spec in ("good/mixture", "good:mixture", "good:problem=mixture"):
        assert registry.parse("sampler", spec).problem == "mixture"
    made = registry.parse("sampler", "good/mixture:size=3")
    assert (made.problem, made.size) == ("mixture", 3)
    assert registry.parse("sampler", "good:problem=/a/b:c=d").problem == "/a/b:c=d"
    assert registry.parse("sampler", "good/a/b").problem == "a/b"
    assert registry.parse("guidance", "classifier:weights=/a/b").weights == "/a/b"
    with pytest.raises(UserError, match="problem is given twice"):
        registry.parse("sampler", "good/mixture:problem=points")


@pytest.mark.parametrize(("word", "meant"), [("ddmi", "ddim"), ("DDPM", "ddpm"), ("pf_ode", "pf-ode")])
def test_an_unknown_name_gets_a_suggestion_and_the_list(word: str, meant: str) -> None:
    with pytest.raises(UserError, match=f'no sampler "{word}". Did you mean "{meant}"\\? Known: .*langevin') as caught:
        registry.parse("sampler", word)
    assert caught.value.exit_code == 2


# --- Other people's plugins ----------------------------------------------------------------------------------------


def test_a_plugin_of_another_distribution_is_found_by_its_entry_point(good: Path) -> None:
    entry = registry.find("sampler", "good")
    assert entry == Entry("sampler", "good", "good_one:Good", "good_one", "1.0")
    assert registry.summary(entry) == "One line that says what it is [in brackets]."
    assert "good_one" not in sys.modules
    made = registry.parse("sampler", "good:size=2")
    assert isinstance(made, Sampler)
    assert made.spec == "good/gaussian:size=2"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "nothing",
            "the sampler nothing of good_one 1.0 is not a samplerbench.sampling.Sampler: good_one:NoPlugin must",
        ),
        (
            "spacing",
            "the sampler spacing of good_one 1.0 is not a samplerbench.sampling.Sampler: good_one:Even must be",
        ),
        ("abstract", "the sampler abstract of good_one 1.0 does not define steps."),
        ("absent", "the sampler absent of good_one 1.0 cannot be imported: AttributeError: module 'good_one' has no"),
    ],
)
def test_what_is_no_usable_plugin_is_refused_with_its_origin(good: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        registry.get("sampler", name)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("def broken(:", "SyntaxError: "),
        ("raise SystemExit('needs a GPU')", "SystemExit: needs a GPU"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_an_error_where_it_is_used_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    distribution(tmp_path, "broken_one", source, {"broken": "broken_one:Broken"})
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.parse("sampler", "ddim").eta == 0
    with pytest.raises(UserError, match="the sampler broken of broken_one 1.0 cannot be imported: " + reason):
        registry.parse("sampler", "broken")
    assert registry.parse("sampler", "ddim").eta == 0


def test_two_distributions_with_one_name_are_both_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first_one", "second_one"):
        distribution(tmp_path, name, "", {"same": f"{name}:Same"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        registry.parse("sampler", "same")
    assert str(caught.value) == (
        'the sampler name "same" is registered twice, by first_one 1.0 (first_one:Same) and second_one 1.0 '
        "(second_one:Same); uninstall one of them."
    )


def test_a_foreign_name_does_not_replace_a_built_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "rival_one", GOOD, {"ddim": "rival_one:Good"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"registered twice, by rival_one 1\.0 .* and samplerbench "):
        registry.parse("sampler", "ddim")


# --- `samplerbench list` -------------------------------------------------------------------------------------------

LIST = """
    import sys
    from samplerbench.cli import main
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        assert not end.code, end.code
    heavy = {"torch", "diffusers", "transformers", "torch_fidelity", "samplerbench_plugins"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [("list",), ("list", "spacings"), ("--help",), ("run", "--help")])
def test_listing_and_help_import_neither_torch_nor_diffusers(arguments: tuple[str, ...]) -> None:
    assert python(LIST, arguments=arguments).strip()


def test_names_are_listed_without_importing_anything() -> None:
    code = """
        import json, sys
        from samplerbench import registry
        print(json.dumps({kind: [e.name for e in registry.entries(kind)] for kind in registry.BASES}))
        heavy = {"torch", "diffusers", "pydantic", "numpy", "samplerbench_plugins"} & set(sys.modules)
        assert not heavy, heavy
    """
    names = json.loads(python(code))
    assert all(BUILT_IN[kind] <= set(names[kind]) for kind in BUILT_IN)


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`samplerbench list samplers` beside plugins that are broken in every way: name → row."""
    folder = tmp_path_factory.mktemp("site")
    points = {"fine": "fine_one:Good", "bare": "fine_one:Abstract", "wrong": "fine_one:NoPlugin"}
    distribution(folder, "fine_one", "print('plugins may print', end='')\n" + textwrap.dedent(GOOD), points)
    distribution(folder, "sick_one", "import no_such_module", {"sick": "sick_one:Sick"})
    distribution(folder, "deadly_one", "import os; os._exit(3)", {"deadly": "deadly_one:Deadly"})
    distribution(folder, "leaving_one", "raise SystemExit('needs a GPU')", {"leaving": "leaving_one:Leaving"})
    for name in ("twin_one", "twin_two"):
        distribution(folder, name, "", {"twin": f"{name}:Twin"})
    out = python(LIST, folder, arguments=("list", "samplers"))
    rows: dict[str, str] = {}
    name = ""
    for line in out.splitlines()[1:]:
        if match := re.match(r" (\S+)", line):
            name = match[1]
        rows[name] = rows.get(name, "") + " " + " ".join(line.split())
    return rows


def test_a_listing_with_broken_plugins_shows_everything_that_works(listing: dict[str, str]) -> None:
    assert BUILT_IN["sampler"] | {"fine", "bare", "wrong", "sick", "deadly", "leaving", "twin"} <= set(listing)
    assert "One line that says what it is [in brackets]." in listing["fine"]
    working = [name for name in listing if "broken" not in listing[name]]
    assert BUILT_IN["sampler"] | {"fine"} <= set(working)
    assert not {"bare", "wrong", "sick", "deadly", "leaving", "twin"} & set(working)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sick", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("bare", "does not define steps"),
        ("wrong", "is not a samplerbench.sampling.Sampler"),
        ("deadly", "its import ended the process: exit code 3"),
        ("leaving", "SystemExit: needs a GPU"),
        ("twin", "registered twice, by twin_one 1.0 (twin_one:Twin) and twin_two 1.0"),
    ],
)
def test_a_broken_plugin_is_a_row_with_its_error(listing: dict[str, str], name: str, reason: str) -> None:
    assert "broken: " in listing[name]
    assert reason in listing[name]


def test_a_built_in_plugin_whose_file_is_gone_is_broken() -> None:
    gone = Entry("sampler", "gone", "samplerbench_plugins.no_such_file:Gone", registry.OWN, "1.0")
    there = registry.find("sampler", "ddim")
    assert registry.failures([gone, there]) == {gone: f"{gone.value} is not in the installation"}


# --- The core names no plugin --------------------------------------------------------------------------------------


def _code(file: Path) -> list[ast.AST]:
    """The nodes of a module without its docstrings: what is executed."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        if isinstance(node, ast.Call):  # a setting of diffusers' schedulers whose values are called like spacings
            node.keywords = [k for k in node.keywords if k.arg != "timestep_spacing"]
    return list(ast.walk(tree))


def test_the_core_names_no_plugin() -> None:
    """Neither the package of the built-in plugins, nor a class of it, nor a name of one stands in the core's code.

    "classifier" is also a word of the core: what a guidance needs, and a folder in a checkpoint.
    """
    names = (BUILT_IN["sampler"] | BUILT_IN["guidance"] | BUILT_IN["spacing"]) - {"classifier"}
    classes = {e.value.partition(":")[2] for kind in ("sampler", "guidance", "spacing") for e in registry.entries(kind)}
    for file in sorted(CORE.rglob("*.py")):
        assert "samplerbench_plugins" not in file.read_text("utf-8"), file
        for node in _code(file):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert re.split("[:/]", node.value)[0] not in names or " " in node.value, f"{file}:{node.lineno}"
            if isinstance(node, ast.Name | ast.Attribute):
                assert getattr(node, "id", getattr(node, "attr", "")) not in classes, f"{file}:{node.lineno}"


def test_without_their_entry_points_the_built_in_plugins_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda **_: ())
    monkeypatch.setattr(registry, "own_distribution", lambda: None)
    for kind in registry.BASES:
        assert registry.entries(kind) == []
    with pytest.raises(UserError, match=r'^no sampler "ddim"\. Known: none\.$'):
        registry.parse("sampler", "ddim")


def test_imports_of_the_core_run_downwards() -> None:
    """cli → bench, report → metrics, models → sampling: DESIGN section 3."""
    rank = {"sampling": 1, "data": 2, "metrics": 2, "models": 2, "report": 3, "bench": 3, "cli": 4}
    for file in sorted(CORE.rglob("*.py")):
        here = file.relative_to(CORE).parts[0]
        for node in _code(file):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for _, _, module in (m.partition("samplerbench.") for m in modules if m.startswith("samplerbench.")):
                there = module.partition(".")[0]
                assert rank.get(there, 0) <= rank.get(here, 9), f"{file}: imports samplerbench.{module}"
