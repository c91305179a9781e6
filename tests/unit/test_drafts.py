"""Drafts are written, flushed and renamed in this order, and none is left over."""

import os

import pytest

from glmtune.drafts import (
    clear_drafts,
    remove_folder,
    replacing_file,
    replacing_files,
    replacing_folder,
    write_errors,
)
from glmtune.errors import UserError


@pytest.fixture
def calls(monkeypatch):
    """The flushes and renames of a block, with the last name of what they are about."""
    told = []

    def watch(name):
        call = getattr(os, name)

        def watched(place, *args):
            path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place
            told.append((name, os.path.basename(path).replace(str(os.getpid()), "PID")))
            return call(place, *args)

        monkeypatch.setattr(os, name, watched)

    for name in ("fsync", "rename", "replace"):
        watch(name)
    return told


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    with replacing_file(tmp_path / "a.json") as draft:
        draft.write_text("new")
        assert names(tmp_path) == [draft.name]
    assert calls == [
        ("fsync", ".a.json.PID.tmp"),
        ("replace", ".a.json.PID.tmp"),
        ("fsync", tmp_path.name),
    ]
    assert names(tmp_path) == ["a.json"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    with replacing_folder(tmp_path / "new") as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "file").write_text("1")
        with replacing_file(draft / "other") as other:  # flushed once, with the rest
            other.write_text("2")
    flushed = [name for call, name in calls[:-2] if call == "fsync"]
    assert sorted(flushed) == [".new.PID.tmp", "file", "inner", "other"]
    assert calls[-2:] == [("rename", ".new.PID.tmp"), ("fsync", tmp_path.name)]
    assert names(tmp_path / "new") == ["inner", "other"]


def test_several_files_replace_those_of_a_folder(tmp_path, calls):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("mine")
    with replacing_files(tmp_path) as draft:
        (draft / "a").write_text("new")
        (draft / "c").write_text("new")
    assert [call for call, _ in calls] == ["fsync", "fsync", "replace", "replace", "fsync"]
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "a": "new",
        "b": "mine",
        "c": "new",
    }


@pytest.mark.parametrize("writing", [replacing_file, replacing_folder])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, writing):
    target = tmp_path / "target"
    if writing is replacing_file:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").write_text("")

    def fail():
        with writing(target) as draft:
            (draft / "x" if draft.is_dir() else draft).write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == ["target"]
    assert target.read_text() == "old" if target.is_file() else names(target) == ["old"]


def test_a_rename_that_fails_brings_the_earlier_folder_back(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("")
    rename = os.rename

    def fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="No space"), replacing_folder(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["old"]


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    with replacing_file(tmp_path / "link") as draft:
        draft.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "new"


def test_a_block_that_writes_nothing_changes_nothing(tmp_path):
    (tmp_path / "curve.png").write_text("old")
    with replacing_file(tmp_path / "curve.png"):
        pass
    assert (tmp_path / "curve.png").read_text() == "old"


def test_a_folder_is_removed_whole(tmp_path):
    (tmp_path / "gone" / "inner").mkdir(parents=True)
    remove_folder(tmp_path / "gone")
    assert names(tmp_path) == []


def test_drafts_of_our_names_are_cleared(tmp_path):
    for name in (".a.12.tmp", ".a.12.old", ".files.3.tmp", ".b.12.tmp", ".a.tmp", "a"):
        (tmp_path / name).mkdir()
    clear_drafts(tmp_path, lambda name: name == "a")
    assert names(tmp_path) == [".a.tmp", ".b.12.tmp", "a"]


def test_an_error_names_no_draft():
    with (
        pytest.raises(UserError, match=r"^run/checkpoint-3/x: cannot be written \(full\)"),
        write_errors("run/.checkpoint-3.77.tmp/x"),
    ):
        raise OSError(28, "full")
