"""A verb that would fill the disk says so before it writes."""

import pytest

from glmtune import cli, disk


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("new-model {}/new --like glm-tiny", "the weights take 11 MB; name a folder on another"),
        ("demo --out {}/new", "the demo takes at most 67 MB; free some"),
        ("bench memory --shape small --use_cpu true", "random weights take at most"),
    ],
)
def test_too_little_room_is_told_in_one_line(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10**6)
    assert cli.main(line.format(tmp_path).split()) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert ": 1 MB are free, but " in told
    assert words in told
    assert not (tmp_path / "new").exists()
