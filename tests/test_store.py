"""Results on disk: whole or not there, and as they were written or not used."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support import synthetic_results

from samplerbench.errors import RunError, UserError
from samplerbench.results.files import write_atomically
from samplerbench.results.seal import canonical, digest
from samplerbench.results.store import Store, sound

WHOLE = synthetic_results.record("ddim:eta=0.1", metrics={"fid": 1 / 3}, labels="7")
KEY, FIELDS = WHOLE["protocol"], WHOLE["protocol_fields"]


def record(**more: Any) -> dict[str, Any]:
    return {**WHOLE, **more}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "x.json"
    write_atomically(file, b"first")
    write_atomically(file, b"second")
    assert file.read_bytes() == b"second"
    assert [f.name for f in file.parent.iterdir()] == ["x.json"]
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "x.json"
    write_atomically(file, b"old")
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(
        RunError, match=r"cannot write .*x.json: No space left on device; free some space .* or choose another `out`"
    ) as caught:
        write_atomically(file, b"new")
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


def test_an_interrupted_write_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x.json", b"new")
    assert list(tmp_path.iterdir()) == []


def test_data_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=original: (order.append(n), f(*a))[1])
    write_atomically(tmp_path / "x.json", b"new")
    assert order == ["fsync", "replace"]


def test_a_folder_that_cannot_be_written_to_is_one_line_before_anything_begins(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("x")
    for folder in (occupied, occupied / "below"):
        with pytest.raises(UserError, match=r"cannot write .*; choose another `out`") as caught:
            Store(folder).prepare()
        assert "\n" not in str(caught.value)
    assert occupied.read_text("utf-8") == "x"


def test_prepare_makes_the_folder_and_leaves_no_probe(store: Store) -> None:
    store.prepare()
    assert list(store.folder.iterdir()) == []


def test_a_result_comes_back_as_it_was_written(store: Store) -> None:
    file = store.put(record())
    assert file == store.folder / f"{KEY[:20]}.json"
    found = store.get(KEY)
    assert found is not None
    assert sound(found)
    assert {k: v for k, v in found.items() if k != "seal"} == record()


def test_what_was_never_put_is_not_there(store: Store) -> None:
    assert store.get(KEY) is None
    store.put(record())
    assert store.get(digest({"n": 11})) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.3333333333333333", "0.2"),
        ('"batch_size": 256', '"batch_size": 255'),
        ('"features": "digits-cnn"', '"features": "inception-v3-compat"'),
        ('"seal": "', '"seal": "0'),
        ('"seal"', '"sealed"'),
        ('"sampler": "ddim:eta=0.1"', '"sampler": "ddim"'),
    ],
)
def test_an_edited_result_is_not_used(store: Store, old: str, new: str) -> None:
    file = store.put(record())
    text = file.read_text("utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), "utf-8")
    assert store.get(KEY) is None


def test_a_result_whose_protocol_is_not_its_key_is_not_sound(store: Store) -> None:
    store.put(record(protocol_fields={**FIELDS, "another": 11}))
    assert store.get(KEY) is None


@pytest.mark.parametrize("size", [0, 1, 50, -2])
def test_a_truncated_result_is_not_used(store: Store, size: int) -> None:
    file = store.put(record())
    file.write_bytes(file.read_bytes()[:size])
    assert store.get(KEY) is None


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"seal": 1}', "\udcff"])
def test_a_file_that_is_no_result_is_not_used(store: Store, content: str) -> None:
    store.prepare()
    store.path(KEY).write_text(content, "utf-8", "surrogateescape")
    assert store.get(KEY) is None


def test_a_result_under_another_name_is_not_used(store: Store) -> None:
    other = digest({"n": 11})
    store.put(record()).rename(store.path(other))
    assert store.get(other) is None


def test_white_space_is_no_edit(store: Store) -> None:
    file = store.put(record())
    file.write_text(json.dumps(json.loads(file.read_text("utf-8"))), "utf-8")
    assert store.get(KEY) is not None


def test_the_key_is_the_hash_of_canonical_json() -> None:
    assert canonical({"b": [1, 2.5], "a": None}) == '{"a":null,"b":[1,2.5]}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    # sha256 of {}, as `printf '{}' | sha256sum` gives it.
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
