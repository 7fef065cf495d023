"""`samplerbench plugins` and `samplerbench --no-plugins`: whose plugins there are, and what is wrong with them."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from samplerbench import registry
from samplerbench.cli.app import main
from samplerbench.errors import UserError

PLUGINS = '''
    from dataclasses import dataclass

    from samplerbench.sampling import Sampler, Step, option

    @dataclass(frozen=True)
    class Fine(Sampler):
        """One line that says what it is."""

        def steps(self, denoise, x, sigmas, noise):
            yield Step(0.0, x)

    @dataclass(frozen=True)
    class Silent(Fine):
        size: int = option(3, "how large", ge=1)

    class Bare(Fine):
        pass

    @dataclass(frozen=True)
    class Default(Fine):
        """Its default is out of its own bounds."""

        eta: float = option(2.0, "how much", ge=0.0, le=1.0)

    @dataclass(frozen=True)
    class Unhelpful(Fine):
        """A parameter that is not declared."""

        eta: float = 0.0

    @dataclass(frozen=True)
    class Raising(Fine):
        """It cannot be made."""

        def __post_init__(self):
            raise RuntimeError("no [licence]")

    @dataclass(frozen=True)
    class Abstract(Sampler):
        """It has no steps."""

    class Nothing:
        """No plugin."""
'''
WRONG = {
    "default": "eta=2: it must be at most 1",
    "unhelpful": "the field eta has no help and no bounds",
    "raising": "it cannot be created with its defaults: RuntimeError: no [licence]",
    "abstract": "does not define steps",
    "nothing": "is not a samplerbench.sampling.Sampler",
    "absent": "cannot be imported: AttributeError",
    "sick": "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    "deadly": "its import ended the process: exit code 3",
    "ddim": "registered twice, by many-one 1.0 (many_one:Fine) and samplerbench ",
}


def distribution(folder: Path, name: str, source: str, points: Mapping[str, str], kind: str = "samplers") -> Path:
    """An installed distribution of one module: what pip leaves behind."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(textwrap.dedent(source), "utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[samplerbench.{kind}]", *lines, ""]))
    return info


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    names = ["Fine", "Silent", "Bare", "Default", "Unhelpful", "Raising", "Abstract", "Nothing", "Absent"]
    distribution(folder, "many_one", PLUGINS, {n.lower(): f"many_one:{n}" for n in names} | {"ddim": "many_one:Fine"})
    distribution(folder, "sick_one", "import no_such_module", {"sick": "sick_one:Sick"}, "metrics")
    distribution(folder, "deadly_one", "import os; os._exit(3)", {"deadly": "deadly_one:Deadly"}, "spacings")
    return folder


def samplerbench(*arguments: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a fresh interpreter with a folder on its path; it ends with what it imported."""
    code = """
        import sys
        from samplerbench.cli import main
        try:
            main(sys.argv[1:])
        finally:
            heavy = {"torch", "diffusers", "samplerbench_plugins", "many_one"} & set(sys.modules)
            print("imported:", *sorted(heavy), file=sys.stderr)
    """
    env = {k: v for k, v in os.environ.items() if k not in ("SAMPLERBENCH_DEBUG", registry.NO_PLUGINS)} | environment
    env["PYTHONPATH"] = os.pathsep.join([str(path), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", check=False)


@pytest.fixture(scope="module")
def told(site: Path) -> dict[tuple[str, str], dict[str, str]]:
    """`samplerbench plugins --json` beside plugins that are broken in every way: (distribution, name) → record."""
    done = samplerbench("plugins", "--json", path=site)
    assert done.returncode == 0, done.stderr
    # On a busy machine an import takes longer than the notice waits.
    lines = [line for line in done.stderr.splitlines() if "waiting for the import of" not in line]
    assert [line.strip() for line in lines if line.strip()] == ["imported:"]
    return {(r["distribution"], r["name"]): r for r in json.loads(done.stdout) if r["kind"] != "data set"}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_told_with_its_reason(told: dict[tuple[str, str], dict[str, str]], name: str) -> None:
    distributions = {"sick": "sick-one", "deadly": "deadly-one"}
    found = told[distributions.get(name, "many-one"), name]
    assert WRONG[name] in found["error"]
    assert "\n" not in found["error"]
    assert found["remark"] == ""


def test_what_can_be_used_has_no_error(told: dict[tuple[str, str], dict[str, str]]) -> None:
    for name in ("fine", "silent", "bare"):
        assert told["many-one", name]["error"] == ""
    assert told["many-one", "fine"]["remark"] == ""
    for name in ("silent", "bare"):  # of a dataclass the docstring would be its signature, of a class its base's
        assert told["many-one", name]["remark"] == "it has no docstring"
    broken = {name for (distribution, name), found in told.items() if found["error"] and distribution == registry.OWN}
    assert broken == {"ddim"}  # the name that another distribution took too
    assert told["many-one", "fine"] == {
        "kind": "sampler",
        "name": "fine",
        "distribution": "many-one",
        "version": "1.0",
        "value": "many_one:Fine",
        "error": "",
        "remark": "",
    }


def test_the_table_names_each_distribution_and_what_it_brings(site: Path) -> None:
    done = samplerbench("plugins", path=site)
    assert done.returncode == 0, done.stderr
    blocks = {block.split("\n")[0].strip(): block for block in re.split(r"\n\s*\n", done.stdout)}
    assert {"many-one 1.0", "sick-one 1.0", "deadly-one 1.0"} <= set(blocks)
    (own,) = (block for title, block in blocks.items() if title.endswith("(built in)"))
    assert "heun" in own
    assert "karras" in own
    assert re.search(r"sampler +fine\b", blocks["many-one 1.0"])
    assert re.search(r"sampler +raising +broken: .* no \[licence\]", blocks["many-one 1.0"])
    assert re.search(r"sampler +silent +it has no docstring", blocks["many-one 1.0"])
    assert re.search(r"spacing +deadly +broken: its import ended the process", blocks["deadly-one 1.0"])
    assert f"{len(WRONG) + 1} cannot be used; all other plugins work." in done.stdout  # ddim counts twice


@pytest.mark.parametrize(("arguments", "environment"), [(("--no-plugins",), {}), ((), {registry.NO_PLUGINS: "1"})])
def test_without_plugins_there_are_the_built_in_ones(
    site: Path, arguments: tuple[str, ...], environment: dict[str, str]
) -> None:
    done = samplerbench(*arguments, "plugins", "--json", path=site, **environment)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert {r["distribution"] for r in records} == {registry.OWN}
    assert {"ddim", "heun", "karras", "fid"} <= {r["name"] for r in records}
    assert not any(r["error"] for r in records)


# --- In one process ------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_twice_is_free_without_plugins(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    with pytest.raises(UserError, match="registered twice"):
        registry.find("sampler", "ddim")
    assert registry.find("sampler", "fine").origin == "many-one 1.0"
    monkeypatch.setenv(registry.NO_PLUGINS, "1")
    assert registry.find("sampler", "ddim").distribution == registry.OWN
    with pytest.raises(UserError, match='no sampler "fine"'):
        registry.find("sampler", "fine")
    for off in ("", "0", "false"):
        monkeypatch.setenv(registry.NO_PLUGINS, off)
        assert registry.find("sampler", "fine").name == "fine"


def test_a_default_that_is_registered_under_no_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "default_one", "", {"spacing": "default_one:Mine"}, "defaults")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.find("spacing", registry.default("spacing")).distribution == registry.OWN


def test_a_distribution_that_cannot_be_read_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = distribution(tmp_path, "sound_one", PLUGINS, {"sound": "sound_one:Fine"})
    damaged = distribution(tmp_path, "damaged_one", "", {"damaged": "damaged_one:Fine"})
    nameless = distribution(tmp_path, "nameless_one", PLUGINS, {"nameless": "nameless_one:Fine"})
    (damaged / "entry_points.txt").write_text("[samplerbench.samplers]\nno equals sign here\n")
    (nameless / "METADATA").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    names = {e.name: e.distribution for e in registry.entries("sampler")}
    assert names["ddim"] == registry.OWN
    assert names["sound"] == "sound-one"
    assert names["nameless"] == "unknown"
    assert registry.default("spacing")
    assert sound.exists()
    (told,) = registry.unreadable()
    assert str(damaged) in told
    monkeypatch.setattr(registry, "findings", lambda found: {})  # the import of the plugins is tested above
    with pytest.raises(SystemExit) as ended:
        main(["plugins"])
    assert not ended.value.code
    assert f"unreadable distribution: {damaged}" in capsys.readouterr().out.replace("\n", "")
