"""Files that survive power cuts, damage and hostile content."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.runtime.messages import one_line, visible
from secateur.storage import held_folder
from secateur.storage.file_records import damage, first_damage, is_plain_name, read_records, record_of
from secateur.storage.held_folder import PARTIAL, HeldFolder, make_folders, write_durably
from secateur.storage.json_files import is_sealed, parse_json, sealed
from secateur.storage.paths import user_path

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


LINK = "Not a directory|symbolic links"  # how systems refuse to follow one


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def held(tmp_path):
    with HeldFolder(tmp_path) as folder:
        yield folder


def test_a_write_is_flushed_before_it_gets_its_name_and_the_name_after(held, monkeypatch):
    happened = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name, **k: (happened.append(name), real(*a, **k))[1])
    held.write("a", "content")
    assert happened == ["fsync", "replace", "fsync"]
    assert held.names() == ["a"]


@pytest.mark.parametrize("name", ["write", "fsync", "replace", "close"])
def test_a_write_that_fails_leaves_what_was_there(held, monkeypatch, name):
    held.write("a", "before")
    real = getattr(os, name)

    def fail(*arguments, **options):
        if name == "close":
            real(*arguments)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        with pytest.raises(OSError, match="Input/output error"):
            held.write("a", "after")
    assert (held.path / "a").read_text() == "before"
    assert held.names() == ["a"]


def test_an_error_of_closing_does_not_hide_the_one_of_writing(held, monkeypatch):
    def fail(number, message):
        def call(*_):
            raise OSError(number, message)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fail(errno.ENOSPC, "No space left on device"))
        patched.setattr(os, "close", fail(errno.EIO, "Input/output error"))
        with pytest.raises(OSError, match="No space left on device"):
            held.write("a", "content")


def test_short_writes_go_on(held, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
    held.write("a", "a longer content")
    assert (held.path / "a").read_text() == "a longer content"


def test_links_are_replaced_or_refused_and_never_followed(held, tmp_path):
    (tmp_path / "private").write_text("mine")
    (tmp_path / "link").symlink_to("private")
    held.write("link", "ours")
    assert (tmp_path / "private").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "way").symlink_to("folder")
    with pytest.raises(OSError, match=LINK):
        HeldFolder(tmp_path / "way")
    for call in (held.subfolder, held.record):
        with pytest.raises(OSError, match=LINK):
            call("way")
    held.remove_folder("way")
    assert held.names() == ["folder", "link", "private"]
    (tmp_path / "lock").symlink_to("private")
    with pytest.raises(OSError, match=LINK):
        held.lock("lock")
    assert (tmp_path / "private").read_text() == "mine"


def test_a_folder_whose_path_is_taken_by_another_is_still_the_one_that_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with HeldFolder(tmp_path / "folder") as held:
        (tmp_path / "folder").rename(tmp_path / "moved")
        (tmp_path / "other").mkdir()
        (tmp_path / "folder").symlink_to("other")
        assert not held.is_still_there()
        held.write("a", "content")
    assert names(tmp_path / "moved") == ["a"]
    assert not names(tmp_path / "other")


def test_a_lock_is_held_by_one_and_is_not_that_of_a_file_that_was_removed(held):
    handle = held.lock("lock")
    with pytest.raises(BlockingIOError):
        held.lock("lock")
    held.remove("lock")  # as its owner does, when it is done
    other = held.lock("lock")
    os.close(handle)
    with pytest.raises(BlockingIOError):
        held.lock("lock")
    os.close(other)


@pytest.mark.parametrize("offered", [True, False])
def test_two_folders_are_exchanged_where_the_system_can(held, monkeypatch, offered):
    for name in ("a", "b"):
        (held.path / name).mkdir()
        (held.path / name / f"of {name}").touch()
    if not offered:
        monkeypatch.setattr(held_folder.ctypes, "CDLL", lambda *_, **__: object())
    done = held.exchange("a", held, "b")
    assert offered or not done
    assert names(held.path / "a") == ["of b" if done else "of a"]


def test_an_error_of_an_exchange_is_one(held):
    (held.path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        held.exchange("a", held, "absent")


def test_what_a_killed_process_was_writing_is_removed(held, tmp_path):
    (tmp_path / f"{PARTIAL}1" / "deep").mkdir(parents=True)
    (tmp_path / f"{PARTIAL}2").touch()
    (tmp_path / "kept").touch()
    held.remove_partial()
    assert held.names() == ["kept"]


def test_folders_are_made_durably(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(HeldFolder, "flush", lambda folder: flushed.append(folder.path))
    assert make_folders(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert flushed == [tmp_path, tmp_path / "a"]
    write_durably(tmp_path / "a" / "file", "content")
    assert flushed[-1] == tmp_path / "a"


def test_damage_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    record = record_of(tmp_path / "a")
    assert damage(tmp_path, "a", record) is None
    (tmp_path / "a").write_bytes(b"CONTENT")
    assert "another SHA-256" in str(damage(tmp_path, "a", record))
    (tmp_path / "a").write_bytes(b"conten")
    assert "has 6 bytes, 7 are recorded" in str(first_damage(tmp_path, {"a": record}))
    (tmp_path / "a").unlink()
    assert "is gone" in str(damage(tmp_path, "a", record))
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("b")):
        make(tmp_path / "a")
        assert "not a regular file" in str(damage(tmp_path, "a", record))
        with pytest.raises(OSError, match=f"{LINK}|not a regular file"):
            record_of(tmp_path / "a")
        remove = Path.rmdir if (tmp_path / "a").is_dir() else Path.unlink
        remove(tmp_path / "a")


@pytest.mark.parametrize(
    "data", [5, [], {"../a": {}}, {"a": 5}, {"a": {"sha256": 5, "bytes": 1}}, {"a": {"sha256": ""}}]
)
def test_records_of_another_form_are_refused(data):
    with pytest.raises(ValueError, match="mapping|plain file name|lacks its"):
        read_records(data)


@given(st.text(max_size=8) | st.sampled_from(["..", ".", "", "a/b", "a\\b", "a\x00", "a\nb"]))
def test_a_plain_name_stays_in_its_folder(name):
    if is_plain_name(name):
        assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}"
        assert name.isprintable()


@given(PLAIN, st.integers(0, 10**6))
def test_a_seal_holds_after_a_file_and_tells_every_change(value, at):
    text = json.dumps(sealed({"value": value, "other": 1}))
    assert is_sealed(parse_json(text))
    changed = parse_json(text) | {"other": 2}
    assert not is_sealed(changed)
    assert not is_sealed({})


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1e400", "NaN", "-Infinity", '"\\ud800"', "{", "9" * 5000, '{"a": "\\udfff"}']
)
def test_json_that_no_program_should_take_is_refused(text):
    with pytest.raises(ValueError, match="deep|finite|surrogates|Expecting|digits"):
        parse_json(text)


def test_json_takes_what_is_valid():
    assert parse_json('{"a": [1.5, "\\ud83d\\ude00", null]}') == {"a": [1.5, "\U0001f600", None]}


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "a" * 300, "a\x00b", "loop/x"])
def test_names_that_no_file_can_have_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="can't be a path"):
        user_path(name)


def test_paths_of_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a"
    (tmp_path / "file").touch()
    assert user_path(tmp_path / "file" / "below") == tmp_path / "file" / "below"


@given(st.text())
def test_visible_text_moves_no_cursor(text):
    shown = visible(text)
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert one_line(text).isprintable()
    assert visible(shown) == shown


def test_visible_text_is_what_it_was():
    assert visible("plain, ünïcödé\nand lines") == "plain, ünïcödé\nand lines"
    assert visible("\x1b[31mred\x07 \u202etxt") == "\\x1b[31mred\\x07 \\u202etxt"
