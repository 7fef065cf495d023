"""The code runs on Linux, macOS and Windows: no call of one system alone, and files as Windows has them."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import pytest

from samplerbench import cache, plugin_file, portable, text
from samplerbench.bench import cell
from samplerbench.cli.app import main
from samplerbench.errors import SamplerbenchError
from samplerbench.portable import Replaced, end_session, new_session, remove_file, replace_file, replace_process
from samplerbench.results.claims import Claims, is_running
from samplerbench.results.files import set_aside, write_atomically

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    file
    for folder in ("samplerbench", "plugins")
    for file in (ROOT / folder).rglob("*.py")
    if "tests" not in file.parts and "__pycache__" not in file.parts
)

# --- The source -----------------------------------------------------------------------------------------------------

MODULES = {"fcntl", "resource", "pwd", "grp", "spwd", "termios", "tty", "pty", "crypt", "posix", "nt", "msvcrt"}
MODULES |= {"winreg", "winsound", "syslog", "readline", "curses"}
"""Modules that some systems lack."""

OS = """
    fork forkpty register_at_fork getuid geteuid getgid getegid getresuid getgroups getlogin getpgid getpgrp getsid
    setuid setgid setsid setpgid setpgrp killpg wait wait3 wait4 waitid nice getpriority setpriority uname chown
    lchown lchmod fchmod fchown chroot fchdir mkfifo mknod pread preadv pwrite pwritev readv writev sendfile
    sched_getaffinity sched_setaffinity sched_yield statvfs fstatvfs sync fdatasync lockf ttyname openpty getloadavg
    sysconf confstr pathconf posix_fadvise posix_fallocate posix_spawn pipe2 memfd_create getxattr setxattr ctermid
    O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY O_SYNC O_NOCTTY O_BINARY startfile
    """
ELSEWHERE = "execl execle execlp execv execve execvp execvpe _exit kill rename replace"
"""They exist on Windows, but do something else there."""
SIGNALS = """
    SIGKILL SIGSTOP SIGCONT SIGTSTP SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGALRM SIGCHLD SIGPIPE alarm setitimer pause sigwait
    sigtimedwait pthread_kill pthread_sigmask siginterrupt
    """
NAMES = {"os": {*OS.split(), *ELSEWHERE.split()}, "signal": set(SIGNALS.split()), "socket": {"AF_UNIX"}}
NAMES |= {"time": {"tzset"}, "select": {"poll", "epoll"}}
KEYWORDS = {"preexec_fn", "start_new_session", "process_group", "pass_fds", "umask"}
FOLDERS = ("/proc", "/dev/", "/sys/", "/tmp", "/var/", "/etc/")
GUARDS = {"WINDOWS", "hasattr", "platform"}

ALLOWED = {
    "samplerbench/portable.py": {
        "os.replace": "in `replace_file`, which repeats it",
        "os._exit": "in `leave`, which flushes and says why; it exists on every system",
    },
    "samplerbench/results/claims.py": {
        "os.rename": "to a name that does not exist; Windows refuses it while another process reads the file",
        "/proc/sys/kernel/random/boot_id": "an OSError leads to the address of the network card",
        "/proc/self/ns/pid": "an OSError is ignored",
        "/proc/…/stat": "an OSError leads to psutil",
    },
    "samplerbench/results/files.py": {"os.rename": "to a name that does not exist; an OSError keeps the file"},
}
"""What is not portable but needed, by file, and why it does no harm."""


def is_guard(test: ast.expr) -> bool:
    """Whether a condition asks for the system."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    system = any(isinstance(n, ast.Attribute) and ast.unparse(n) == "os.name" for n in ast.walk(test))
    return system or bool(names & GUARDS)


def found(node: ast.AST, guarded: bool = False) -> Iterator[str]:
    """What of a module's code exists on some systems only, outside of conditions that ask for the system."""
    if isinstance(node, ast.FunctionDef | ast.Module):
        # After `if not hasattr(...): return`, the rest of the function is guarded.
        for child in node.body:
            yield from found(child, guarded)
            if (
                isinstance(child, ast.If)
                and is_guard(child.test)
                and isinstance(child.body[-1], ast.Return | ast.Raise)
            ):
                guarded = True
        return
    if isinstance(node, ast.If | ast.IfExp):
        inside = guarded or is_guard(node.test)
        for child in ast.iter_child_nodes(node):
            yield from found(child, inside if child is not node.test else guarded)
        return
    if not guarded:
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in MODULES:
                yield f"import {module}"
            yield from (f"{module}.{a.name}" for a in node.names if a.name in NAMES.get(module, ()))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in NAMES.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            yield f"{node.arg}="
        elif isinstance(node, ast.JoinedStr):
            shown = "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values)
            if shown.startswith(FOLDERS):
                yield shown
                return
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(FOLDERS):
            yield node.value
    for child in ast.iter_child_nodes(node):
        yield from found(child, guarded)


def texts(tree: ast.AST) -> Iterator[str]:
    """Text files that are opened in the encoding, or written with the line ends, of the system."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).rpartition(".")[2]
        given = {k.arg for k in call.keywords}
        values = [*call.args, *(k.value for k in call.keywords)]
        mode = {a.value for a in values if isinstance(a, ast.Constant)} & {"r", "w", "a", "x", "r+", "w+"}
        encoded = "encoding" in given
        if (
            (name == "write_text" and ("newline" not in given or not (encoded or len(call.args) > 1)))
            or (name == "read_text" and not (encoded or call.args))
            or (name in ("open", "fdopen") and mode and not encoded)
            or (name in ("Popen", "run", "check_output") and given & {"text", "universal_newlines"} and not encoded)
        ):
            yield ast.unparse(call)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """The modules with a word that the checks look for."""
    words = {*MODULES, *NAMES, *KEYWORDS, "open", "fdopen", "read_text", "write_text", "subprocess"}
    suspect = re.compile(rf"\b({'|'.join(words)})\b|[\"']({'|'.join(FOLDERS)})")
    assert len(SOURCES) > 150
    read = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in SOURCES}
    return {name: ast.parse(source) for name, source in read.items() if suspect.search(source)}


def test_no_call_of_one_system_is_without_an_alternative(trees: dict[str, ast.Module]) -> None:
    used = {name: set(found(tree)) for name, tree in trees.items()}
    assert {name: calls for name, calls in used.items() if calls} == {n: set(why) for n, why in ALLOWED.items()}


def test_text_files_have_an_encoding_and_line_feeds(trees: dict[str, ast.Module]) -> None:
    assert {name: calls for name, tree in trees.items() if (calls := list(texts(tree)))} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import fcntl", ["import fcntl"]),
        ("def f():\n    from resource import getrusage", ["import resource"]),
        ("if sys.platform != 'win32':\n    import fcntl", []),
        ("os.fork()", ["os.fork"]),
        ("from os import getuid", ["os.getuid"]),
        ("if hasattr(os, 'getuid'):\n    os.getuid()\nos.getuid()", ["os.getuid"]),
        ("x = os.getuid() if os.name == 'posix' else 0", []),
        ("def f():\n    if not hasattr(os, 'pread'):\n        return 0\n    return os.pread(1, 2, 3)", []),
        ("def f():\n    if not hasattr(os, 'pread'):\n        pass\n    return os.pread(1, 2, 3)", ["os.pread"]),
        ("if ready:\n    os.killpg(1, signal.SIGKILL)", ["os.killpg", "signal.SIGKILL"]),
        ("flags = getattr(os, 'O_NOFOLLOW', 0)", []),
        ("Popen(x, start_new_session=True)", ["start_new_session="]),
        ("Path(f'/proc/{pid}/stat')", ["/proc/…/stat"]),
        ("open('/dev/null')", ["/dev/null"]),
    ],
)
def test_the_check_finds_what_it_is_for(source: str, expected: list[str]) -> None:
    assert list(found(ast.parse(source))) == expected


@pytest.mark.parametrize(
    ("source", "fails"),
    [
        ("p.read_text()", True),
        ("p.read_text('utf-8')", False),
        ("p.write_text(x, 'utf-8')", True),
        ("p.write_text(x, newline='\\n')", True),
        ("p.write_text(x, encoding='utf-8', newline='\\n')", False),
        ("open(p, 'w')", True),
        ("open(p, 'rb')", False),
        ("os.fdopen(h, 'w', encoding='utf-8')", False),
        ("subprocess.run(c, text=True)", True),
    ],
)
def test_the_check_of_text_files_finds_what_it_is_for(source: str, fails: bool) -> None:
    assert bool(list(texts(ast.parse(source)))) is fails


# --- Files ----------------------------------------------------------------------------------------------------------


def busy(code: int = 32) -> PermissionError:
    """The error of Windows for a file that another process has open."""
    error = PermissionError(errno.EACCES, "The process cannot access the file")
    error.winerror = code  # type: ignore[attr-defined, unused-ignore]
    return error


class Failing:
    """A function of `os` that raises an error a few times before it works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError, times: int) -> None:
        self.real, self.error, self.left, self.calls = getattr(os, name), error, times, 0
        monkeypatch.setattr(os, name, self)
        monkeypatch.setattr(time, "sleep", lambda _: None)

    def __call__(self, *arguments: Any, **rest: Any) -> Any:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return self.real(*arguments, **rest)


@pytest.mark.parametrize("code", sorted(portable.BUSY))
def test_a_file_that_is_busy_is_replaced_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    replace = Failing(monkeypatch, "replace", busy(code), 2)
    write_atomically(tmp_path / "a.json", b"{}")
    assert replace.calls == 3
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_file_that_stays_busy_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Failing(monkeypatch, "replace", busy(), 1000)
    with pytest.raises(SamplerbenchError, match=r"^cannot write .*a\.json: The process cannot access the file; "):
        write_atomically(tmp_path / "a.json", b"{}")
    assert replace.calls == len(portable.DELAYS) + 1
    assert list(tmp_path.iterdir()) == []


def test_a_permission_that_is_missing_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Failing(monkeypatch, "replace", PermissionError(errno.EACCES, "Permission denied"), 1000)
    with pytest.raises(PermissionError):
        replace_file(tmp_path / "a", tmp_path / "b")
    assert replace.calls == 1


def test_removing_setting_aside_and_caching_wait_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / name).touch()
    unlink = Failing(monkeypatch, "unlink", busy(), 2)
    remove_file(tmp_path / "a")
    remove_file(tmp_path / "a")  # it does not exist
    rename = Failing(monkeypatch, "rename", busy(), 2)
    assert set_aside(tmp_path / "b") == tmp_path / "b.damaged"
    replace = Failing(monkeypatch, "replace", busy(), 2)
    with cache.cached_json("x", {}) as known:
        known["y"] = 1.0
    assert (unlink.calls, rename.calls, replace.calls) == (4, 3, 3)
    assert sorted(f.name.partition("-")[0] for f in tmp_path.rglob("*") if f.is_file()) == ["b.damaged", "x"]


KEY = "5" * 64


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_has_claims_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """FAT and exFAT, some network drives: the lease is then created as a new file."""
    link = Failing(monkeypatch, "link", OSError(number, "no hard links"), 1000)
    one, other = Claims(tmp_path), Claims(tmp_path)
    lease = one.take(KEY)
    assert lease is not None
    assert other.take(KEY) is None
    assert other.holder(KEY) == lease.owner
    lease.release()
    again = other.take(KEY)
    assert again is not None
    again.release()
    assert link.calls == 2
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_is_busy_for_a_moment_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Claims(tmp_path).take(KEY)
    assert lease is not None
    with monkeypatch.context() as patch:
        opened = Failing(patch, "open", busy(), 2)
        assert lease.is_held()
    assert opened.calls == 3
    lease.release()


def test_a_lease_that_windows_does_not_let_be_renamed_is_left_to_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims(tmp_path)
    lease = claims.take(KEY)
    assert lease is not None
    with monkeypatch.context() as patch:
        Failing(patch, "rename", busy(), 1000)
        patch.setattr(portable, "WINDOWS", True)
        assert claims._remove(lease.file, lease.owner.token) is False
        patch.setattr(portable, "WINDOWS", False)
        with pytest.raises(PermissionError):
            claims._remove(lease.file, lease.owner.token)
    lease.release()


RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{name}{i}" for name in ("COM", "LPT") for i in range(1, 10))}


def windows_can_have(name: str) -> bool:
    """Whether Windows accepts the name of a file: https://learn.microsoft.com/windows/win32/fileio/naming-a-file."""
    plain = not set(name) & set('<>:"/\\|?*') and all(ord(c) >= 32 for c in name)
    stem = name.partition(".")[0].upper()
    return plain and not name.endswith((" ", ".")) and stem not in RESERVED and PureWindowsPath(name).name == name


def test_the_check_of_names_knows_those_that_windows_refuses() -> None:
    for name in ("a:b", "con", "NUL.txt", "a.", "a ", "a?b", "x\ty", "a/b", "com1.json"):
        assert not windows_can_have(name), name
    for name in ("a.json", ".a.tmp", "console", "fid-vs-nfe.png", "aux-1.svg"):
        assert windows_can_have(name), name


@pytest.mark.slow
def test_every_file_of_a_run_and_its_report_has_a_name_that_windows_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Specs with a colon, a path, a comma and a reserved word are in the results, not in the names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    source = "from samplerbench.sampling import Sampler, Step\n\n\nclass Con(Sampler):\n"
    body = "    def steps(self, denoise, x, sigmas, noise):\n        yield Step(0.0, denoise(x, float(sigmas[0])))\n"
    Path("con_sampler.py").write_text(source + body, "utf-8")
    run = ["run", "-s", "./con_sampler.py:Con", "-s", "ddim:eta=0.5", "--steps", "1", "--n", "2", "-m", "exact:mixture"]
    for command in ([*run, "--metric", "gap:images=1,tol=0.01"], ["report", "results", "--out", "report"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
    names = [file.name for file in tmp_path.rglob("*")]
    assert {"run.log", "report.html"} < set(names)
    assert any(name.startswith("gap-") and name.endswith(".svg") for name in names)
    assert [name for name in names if not windows_can_have(name)] == []


def test_every_file_of_the_repository_has_a_name_that_windows_can_have() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60
    ).stdout.decode("utf-8")
    names = listed.split("\0")[:-1]
    assert len(names) > 300
    assert [n for n in names if not all(windows_can_have(part) for part in PurePath(n).parts)] == []
    assert len({n.lower() for n in names}) == len(names), "two names differ only by case"


# --- Line ends ------------------------------------------------------------------------------------------------------


def test_line_ends_do_not_change_the_hash_of_a_plugin(tmp_path: Path) -> None:
    source = b"class A:\n    pass\n"
    assert plugin_file.source_hash(source.replace(b"\n", b"\r\n")) == plugin_file.source_hash(source)
    assert plugin_file.source_hash(source) != plugin_file.source_hash(source + b"\n")
    for name, content in (("unix.py", source), ("windows.py", source.replace(b"\n", b"\r\n"))):
        (tmp_path / name).write_bytes(content)
    assert cell._file_hash(str(tmp_path / "unix.py")) == cell._file_hash(str(tmp_path / "windows.py"))


def test_every_checkout_has_line_feeds() -> None:
    lines = (ROOT / ".gitattributes").read_text("utf-8").splitlines()
    assert "* text=auto eol=lf" in lines
    assert {"*.png binary", "*.safetensors binary"} < set(lines)
    kinds = {".py", ".md", ".json", ".toml", ".tmpl", ".html", ".css", ".js", ".txt"}
    folders = (ROOT / name for name in ("samplerbench", "plugins", "docs", "benchmarks/suites", "benchmarks/results"))
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in kinds]
    assert len(files) > 200
    assert [f for f in files if b"\r" in f.read_bytes()] == []


# --- Streams --------------------------------------------------------------------------------------------------------


def test_output_in_a_code_page_of_windows_is_escaped_and_json_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="cp1252", newline="")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(UnicodeEncodeError):
        print("σ ≈ 1", flush=True)
    text.tolerate_encoding()
    text.say("σ ≈ é")
    value = {"name": "é ≈ σ 🙂"}
    text.print_json(value)
    stream.flush()
    line, rest = buffer.getvalue().split(b"\n", 1)
    assert line.decode("cp1252") == "\\u03c3 \\u2248 é"
    assert json.loads(rest.decode("ascii")) == value


def test_a_command_runs_in_a_code_page_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="cp1252"))
    with pytest.raises(SystemExit) as ended:
        main(["show", "karras"])
    sys.stdout.flush()
    assert ended.value.code == 0
    assert b"\\u03c3" in buffer.getvalue()


# --- Processes ------------------------------------------------------------------------------------------------------


def test_a_program_takes_the_place_of_the_process(tmp_path: Path) -> None:
    """Its output, its environment and its exit code are those of the process, on Windows as elsewhere."""
    code = "import os, sys; print(os.environ['MARK'], sys.argv[1]); sys.exit(3)"
    start = (
        "import os, sys\nfrom samplerbench import portable\nportable.WINDOWS = sys.argv[1] == 'True'\n"
        f"print('before')\nportable.replace_process([sys.executable, '-c', {code!r}, 'a b'], os.environ | "
        "{'MARK': 'x'})"
    )
    for windows in (True, False) if os.name == "posix" else (True,):
        ended = subprocess.run(
            [sys.executable, "-c", start, str(windows)], capture_output=True, timeout=60, encoding="utf-8", check=False
        )
        assert (ended.returncode, ended.stdout.split(), ended.stderr) == (3, ["before", "x", "a", "b"], "")


def test_ctrl_c_reaches_the_program_and_the_process_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Child:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.left = 2

        def wait(self) -> int:
            self.left -= 1
            if self.left >= 0:
                raise KeyboardInterrupt
            return 130

    monkeypatch.setattr(portable, "WINDOWS", True)
    monkeypatch.setattr(subprocess, "Popen", Child)
    with pytest.raises(Replaced) as ended:
        replace_process(["x"], {})
    assert ended.value.code == 130


def test_the_command_line_ends_with_the_code_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Windows, `accelerate launch --cpu` ends as torchrun does, and says no more than torchrun."""

    def start() -> None:
        raise Replaced(7)

    monkeypatch.setattr("samplerbench.bench.team.start_the_others", start)
    with pytest.raises(SystemExit) as ended:
        main(["run", "-s", "ddim", "--steps", "1"])
    assert ended.value.code == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("windows", [False, True])
def test_a_child_process_ends_with_its_own_children(monkeypatch: pytest.MonkeyPatch, windows: bool) -> None:
    if windows:
        monkeypatch.setattr(portable, "WINDOWS", True)
    elif os.name != "posix":
        pytest.skip("process groups of POSIX")
    sleep = "import time; time.sleep(60)"
    code = (
        f"import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', {sleep!r}])\nprint(p.pid, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code + sleep], stdout=subprocess.PIPE, **new_session())
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    assert is_running(grandchild, "")
    end_session(child)
    assert child.returncode != 0
    until = time.monotonic() + 10
    while alive := is_running(grandchild, ""):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not alive
    child.stdout.close()


def test_leaving_flushes_the_streams() -> None:
    code = "from samplerbench.portable import leave\nprint('said', end='')\nleave(5)"
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, timeout=60, encoding="utf-8", check=False, env=buffered)
    assert (ended.returncode, ended.stdout) == (5, "said")
