"""GitHub's files: they can be read, run what `.ci/run` runs, and name versions and commands that exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from samplerbench.cli.app import main

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted(f for f in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if f.name != "config.yml")
FILES = [ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff", *sorted(GITHUB.rglob("*.yml"))]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def read(file: Path) -> dict[str, Any]:
    """A YAML file, in which no key stands twice. `on` is a truth value in YAML 1.1, and is named again."""
    loader = type("Strict", (yaml.SafeLoader,), {})

    def mapping(own: Any, node: Any) -> dict[Any, Any]:
        keys = [own.construct_object(key) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"{file.name}:{node.start_mark.line + 1}: a key stands twice"
        return {k: own.construct_object(value, deep=True) for k, (_, value) in zip(keys, node.value, strict=True)}

    loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)  # type: ignore[attr-defined]
    found = yaml.load(file.read_text("utf-8"), loader)
    assert isinstance(found, dict)
    return {"on" if key is True else key: value for key, value in found.items()}


WORKFLOWS = {file.stem: read(file) for file in sorted((GITHUB / "workflows").glob("*.yml"))}
STEPS = [step for flow in WORKFLOWS.values() for job in flow["jobs"].values() for step in job["steps"]]


def test_every_file_can_be_read() -> None:
    assert len(FILES) >= 9
    for file in FILES:
        assert read(file), file.name


def commands(text: str) -> list[str]:
    """The commands of a shell script: an environment's own Python is `python`, and no variable is set before it."""
    lines = [re.sub(r"\S*\.venv/bin/python|python3", "python", line.strip()) for line in text.splitlines()]
    return [re.sub(r'^(\w+=("[^"]*"|\S*) )+', "", line) for line in lines if line and not line.startswith("#")]


def commands_of_ci() -> set[str]:
    """What `.ci/run` does with the environment of the README's test command: installs, tests and checks."""
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    checks = re.search(r"^for check in (.*); do$", script, re.MULTILINE)
    assert checks is not None
    readme = re.search(r"<!-- test command -->\s*```\w*\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert readme is not None
    first, *rest = commands(readme[1].replace(" && ", "\n"))
    assert first == "python -m venv .venv"
    own = [line for line in commands(script) if re.match(r"python -m (pip|pytest|build|mkdocs)\b", line)]
    return {*rest, *own, *(f"python -m {check}" for check in shlex.split(checks[1]))}


PACKAGING = {"python -m pip install -q build twine", "python -m build", "python -m twine check --strict dist/*"}
FURTHER = {*PACKAGING, 'python -m pytest -q tests/test_docs.py -k "link"', 'python -m venv "$RUNNER_TEMP/new"'}
"""What a workflow runs besides: the packages that are uploaded, and tests that `.ci/run` runs with all others."""


def test_the_workflows_run_what_ci_runs() -> None:
    expected = commands_of_ci()
    assert len(expected) == 10
    jobs = WORKFLOWS["ci"]["jobs"].values()
    run = {line for job in jobs for step in job["steps"] if "run" in step for line in commands(step["run"])}
    python = {line for line in run if line.startswith("python ")}
    assert expected <= python, "a command of .ci/run or of the README is in no workflow"
    assert python - expected == FURTHER, "a workflow runs what .ci/run does not"


def test_a_command_is_the_same_in_both_places() -> None:
    assert commands('# why\n  .venv/bin/python -m x\n\nA=1 B="$c d" .venv/bin/python -m y') == [
        "python -m x",
        "python -m y",
    ]


def test_the_wheel_runs_the_first_command_of_the_readme() -> None:
    first = re.search(r"(samplerbench run .*)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert first is not None
    (step,) = [s["run"] for s in WORKFLOWS["ci"]["jobs"]["wheel"]["steps"] if "new environment" in s.get("name", "")]
    last = step.strip().splitlines()[-1]
    assert last.replace('"$bin/samplerbench"', "samplerbench") == first[1]


def test_python_versions_are_those_of_the_project() -> None:
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    named = {c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)}
    matrix = WORKFLOWS["ci"]["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in matrix), "3.10 without quotes is the number 3.1"
    order = sorted(named, key=lambda version: int(version.partition(".")[2]))
    assert (order[0], order[-1]) == (least, max(matrix, key=lambda version: int(version.partition(".")[2])))
    assert least in matrix
    used = {s["with"]["python-version"] for s in STEPS if "python-version" in s.get("with", {})}
    assert used - {"${{ matrix.python }}"} <= named
    assert PROJECT["tool"]["mypy"]["python_version"] == least
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + least.replace(".", "")
    assert f"Python ≥ {least}" in (ROOT / "README.md").read_text("utf-8")


def test_systems_are_those_of_the_project() -> None:
    named = {
        c.rpartition(" ")[2].lower() for c in PROJECT["project"]["classifiers"] if c.startswith("Operating System")
    }
    tested = {name.removesuffix("-latest") for name in WORKFLOWS["ci"]["jobs"]["tests"]["strategy"]["matrix"]["os"]}
    assert {{"ubuntu": "linux"}.get(name, name) for name in tested} == named == {"linux", "macos", "windows"}


def test_workflows_have_few_rights_and_end() -> None:
    assert set(WORKFLOWS) == {"ci", "release"}
    for name, flow in WORKFLOWS.items():
        assert flow["permissions"] == {"contents": "read"}
        assert flow["concurrency"]["group"]
        assert flow["defaults"] == {"run": {"shell": "bash"}}, "the commands are those of bash, on Windows too"
        for job in flow["jobs"].values():
            assert job["timeout-minutes"] <= 90
            rights = {"id-token": "write"} if (name, job) == ("release", flow["jobs"].get("publish")) else None
            assert job.get("permissions") == rights
    actions = [step["uses"] for step in STEPS if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action) for action in actions)
    assert "secrets." not in "".join(f.read_text("utf-8") for f in (GITHUB / "workflows").glob("*.yml"))
    assert any(update["package-ecosystem"] == "github-actions" for update in read(GITHUB / "dependabot.yml")["updates"])


def test_a_release_is_of_a_tag_that_is_built_and_checked_before() -> None:
    release = WORKFLOWS["release"]
    assert release["on"] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["publish"]["needs"] == "build"
    run = "\n".join(step.get("run", "") for step in release["jobs"]["build"]["steps"])
    assert set(commands(run)) >= PACKAGING
    assert "${GITHUB_REF_NAME#v}" in run
    (publish,) = [s for s in release["jobs"]["publish"]["steps"] if s["uses"].startswith("pypa/")]
    assert "password" not in publish.get("with", {})


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.stem)
def test_a_form_is_one_that_github_shows(form: Path) -> None:
    content = read(form)
    assert {"name", "description", "body"} <= set(content) <= {"name", "description", "title", "labels", "body"}
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for field in content["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
        assert field["type"] not in ("dropdown", "checkboxes") or field["attributes"]["options"]
    assert any(field.get("validations", {}).get("required") for field in content["body"])


def test_a_bug_report_asks_for_the_versions_the_command_and_the_error() -> None:
    fields = {f["id"]: f for f in read(GITHUB / "ISSUE_TEMPLATE" / "bug_report.yml")["body"]}
    for name in ("command", "observed", "environment"):
        assert fields[name]["validations"]["required"]
    assert "`samplerbench --version`" in fields["environment"]["attributes"]["description"]
    assert "samplerbench --debug" in fields["observed"]["attributes"]["description"]


def test_forms_name_files_and_commands_that_exist() -> None:
    text = "\n".join(f.read_text("utf-8") for f in [*FORMS, GITHUB / "PULL_REQUEST_TEMPLATE.md"])
    pages = set(re.findall(r"[\w./-]+\.(?:md|py)\b", text))
    assert {"CONTRIBUTING.md", "docs/plugins.md", "docs/generate.py"} <= pages
    assert [page for page in pages if not (ROOT / page).is_file()] == []
    reference = (ROOT / "docs" / "cli.md").read_text("utf-8")
    called = set(re.findall(r"`samplerbench ([a-z]+)", text))
    assert called >= {"plugins", "check"}
    assert [name for name in called if f"\n## {name}\n" not in reference] == []


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    from samplerbench import __version__

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"samplerbench {__version__} (Python 3.")
    assert f"torch {version('torch')}, diffusers {version('diffusers')}, " in told.out
    assert (told.out.count("\n"), told.err) == (1, "")


def test_hooks_before_a_commit_are_checks_of_ci() -> None:
    config = read(ROOT / ".pre-commit-config.yaml")
    local = [hook for repo in config["repos"] if repo["repo"] == "local" for hook in repo["hooks"]]
    checks = {entry.removesuffix(" .") for entry in commands_of_ci() if re.search("ruff|mypy", entry)}
    ours = {hook["entry"].removesuffix(" --fix") for hook in local}
    assert ours == {check.removesuffix(" --check") for check in checks}
    tools = {re.split("[>=<]", requirement)[0] for requirement in PROJECT["project"]["optional-dependencies"]["test"]}
    assert {entry.split()[2] for entry in ours} <= tools
    assert all(re.fullmatch(r"v\d+(\.\d+)+", repo["rev"]) for repo in config["repos"] if repo["repo"] != "local")
