"""Token rows written file by file: bounded memory, and a killed `tokenize` that goes on."""

import json
import os
import shutil
import signal
import tracemalloc
from pathlib import Path
from types import MappingProxyType

import datasets
import pytest
from glm_folders import toy_tiktoken, write_folder
from toys import die_before_change

from glmtune.config.settings import TokenizeSettings
from glmtune.data import row_files, token_files, tokenizing
from glmtune.data.tokenizing import tokenize
from glmtune.drafts import continued_folder
from glmtune.errors import UserError
from glmtune.models.chatglm.rows import row_rule
from glmtune.models.glm.encoder import of_folder

DRAFT = ".tokens.0.tmp"


class CharTokenizer:
    """An id per character."""

    gmask_token_id, bos_token_id, eos_token_id = 9001, 9004, 9005
    pad_token_id = 3
    vocab_hash = "5e" * 32
    special_names, allow_special, opens_thoughts = MappingProxyType({}), False, False
    revision = "v1.1"
    row_rule = property(row_rule)

    def encode_batch(self, texts, *, num_threads=None):
        return [list(map(ord, text)) for text in texts]

    encode_contexts = encode_batch


@pytest.fixture(autouse=True)
def _small_files(tmp_path, monkeypatch):
    """Files of a few rows, and a histogram that costs no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_files, "TOKENS_PER_FILE", 60)
    monkeypatch.setattr(row_files, "KEPT_CHARACTERS", 60)
    monkeypatch.setattr(tokenizing, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(tokenizing, "CONVERSATIONS_PER_BATCH", 3)
    monkeypatch.setattr(tokenizing, "plot_lengths", lambda path, **_: path.write_text("drawn"))


def pairs(number: int) -> list[dict]:
    """Rows of which some are empty, cut or dropped."""
    return [
        {"context": f"question {i} " * (i % 4), "target": "" if i % 7 == 3 else f"answer {i}"}
        for i in range(number)
    ]


def write(rows: list[dict], path: str = "a.jsonl") -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(rows: list[dict] | None = None, tokenizer=None, **settings):
    if rows is not None:
        write(rows)
    config = TokenizeSettings(
        jsonl_path="a.jsonl", **{"save_path": "tokens", "max_seq_length": 25} | settings
    )
    return tokenize(config, tokenizer or CharTokenizer(), "base")


def contents(folder: str = "tokens") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("kind", ["pairs", "talks"])
def test_several_files_hold_the_rows_of_one(monkeypatch, tmp_path, kind):
    tokenizer = CharTokenizer()
    rows = pairs(40)
    if kind == "talks":
        folder = write_folder(tmp_path / "glm4", "glm4", toy_tiktoken(), padded_vocab_size=70_000)
        tokenizer = of_folder(folder)
        said = ["q", "a", "why?", "so"]
        turns = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
        ]
        rows = [{"messages": turns[: 2 + 2 * (i % 2)]} for i in range(40)]
    summary = run(rows, tokenizer)
    names = sorted(Path("tokens").glob("*.arrow"))
    assert len(names) > 3
    assert names[0].name == f"data-00000-of-{len(names):05}.arrow"
    several = datasets.load_from_disk("tokens")
    monkeypatch.setattr(token_files, "TOKENS_PER_FILE", 1 << 24)
    whole = run(rows, tokenizer, save_path="whole")
    assert [file.name for file in Path("whole").glob("*.arrow")] == ["data-00000-of-00001.arrow"]
    assert several.to_list() == datasets.load_from_disk("whole").to_list()
    assert several.features == datasets.load_from_disk("whole").features
    assert summary.card == whole.card
    assert ("labels" in several.features) == (kind == "talks")


def test_memory_does_not_grow_with_the_file(monkeypatch):
    monkeypatch.setattr(tokenizing, "ROWS_PER_BATCH", 64)
    monkeypatch.setattr(token_files, "TOKENS_PER_FILE", 1 << 14)

    def peak(number):
        write([{"context": "question " * 20, "target": "answer " * 20}] * number)
        tracemalloc.start()
        try:
            run(max_seq_length=400)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    run(pairs(9))  # imports
    small = peak(500)
    assert peak(2000) < 1.3 * small


def kill_at(number: int, work) -> int | None:
    """Run in a child that dies before its n-th change of a folder; None where it came to an end."""
    child = os.fork()
    if not child:
        die_before_change(number)
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return None if status == 0 else number


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, which this system cannot")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_a_change_of_the_disk_it_goes_on_to_the_same_bytes(every, capsys):
    run(pairs(30), save_path="never-killed")
    expected = contents("never-killed")
    kills = resumed = 0
    while kill_at(1 + kills * every, run):
        kills += 1
        assert not Path("tokens").exists() or contents() == expected
        capsys.readouterr()
        run(resume=True)
        resumed += "goes on after" in capsys.readouterr().err
        assert contents() == expected
        assert sorted(os.listdir()) == ["a.jsonl", "never-killed", "tokens"]
        shutil.rmtree("tokens")
    assert kills > 30 // every, kills
    assert resumed > kills / 2, (resumed, kills)


@pytest.fixture
def interrupted(tmp_path, monkeypatch, capsys):
    """A command that was interrupted after some whole files."""
    write(pairs(40))
    with monkeypatch.context() as changed:
        batches = tokenizing.encode_batches

        def few(*args):
            for number, batch in enumerate(batches(*args)):
                if number == 9:
                    raise KeyboardInterrupt
                yield batch

        changed.setattr(tokenizing, "encode_batches", few)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert "rows are kept; --resume true goes on after them" in capsys.readouterr().err
    assert Path(DRAFT).is_dir()


def test_an_interrupted_command_is_continued(interrupted, capsys, monkeypatch):
    encoded = []
    encode = tokenizing.encode_rows
    monkeypatch.setattr(
        tokenizing, "encode_rows", lambda rows, *how: encoded.extend(rows) or encode(rows, *how)
    )
    run(resume=True)
    told = capsys.readouterr().err
    assert f"tokens: goes on after {40 - len(encoded)} rows that are there" in told
    assert 0 < len(encoded) < 30


@pytest.mark.parametrize("lost", [1, 40])
def test_a_last_entry_that_was_cut_off_does_not_count(interrupted, lost):
    run(save_path="whole")
    journal = Path(DRAFT, token_files.JOURNAL_FILE)
    os.truncate(journal, journal.stat().st_size - lost)
    Path(DRAFT, "data-00099.arrow").write_bytes(b"half of a file")
    run(resume=True)
    assert contents() == contents("whole")


def test_a_damaged_rest_is_refused_in_one_line(interrupted):
    os.unlink(Path(DRAFT, "data-00001.arrow"))
    with pytest.raises(UserError, match=r"tokens: cannot be resumed, .* damaged .*; leave resume"):
        run(resume=True)
    assert not Path("tokens").exists()


def test_what_was_made_from_something_else_is_not_continued(interrupted):
    with pytest.raises(UserError, match="since max_seq_length was 25 and is 26 now; make it the"):
        run(resume=True, max_seq_length=26)
    other = CharTokenizer()
    other.vocab_hash = "00"
    with pytest.raises(UserError, match='since sha256 of the vocabulary was "5e5e'):
        run(resume=True, tokenizer=other)
    write(pairs(41))
    with pytest.raises(UserError, match="since sha256 of jsonl_path was"):
        run(resume=True)
    write(pairs(40))
    run(save_path="whole")
    run(resume=True)  # none of these took away what was there
    assert contents() == contents("whole")


def test_without_resume_it_starts_over_and_says_so(interrupted, capsys):
    run()
    told = capsys.readouterr().err
    assert "what a stopped command had left of it is removed, since resume is false" in told
    assert not Path(DRAFT).exists()
    run(resume=True, save_path="other")
    assert "there is nothing to resume, it begins with the first row" in capsys.readouterr().err
    assert contents() == contents("other")


def test_what_another_process_writes_is_left_alone(interrupted):
    with continued_folder("tokens", lambda *_: True) as draft:
        journal = (draft / token_files.JOURNAL_FILE).read_bytes()
        with pytest.raises(UserError, match="tokens: another process is writing it; wait until"):
            run()
        assert (draft / token_files.JOURNAL_FILE).read_bytes() == journal


def test_a_file_that_changes_meanwhile_is_refused(monkeypatch):
    def grown(*how):
        write(pairs(41))
        return batches(*how)

    batches = tokenizing.encode_batches
    monkeypatch.setattr(tokenizing, "encode_batches", grown)
    with pytest.raises(UserError, match=r"a.jsonl: had 40 good rows and then 41; make sure that"):
        run(pairs(40))
    assert os.listdir() == ["a.jsonl"]
