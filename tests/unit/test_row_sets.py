"""`glmtune tokenize` on several files: what is taken of each, and what is said of it."""

import json
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

import pytest

from glmtune.config.reading import read_config
from glmtune.config.settings import TokenizeSettings
from glmtune.data import token_files, tokenizing
from glmtune.data.conversations import encode_rounds
from glmtune.data.dataset import CARD_FILE, DataCard, load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.data.tokenizing import tokenize
from glmtune.errors import UserError
from glmtune.models.chatglm.rows import row_rule


class CharTokenizer:
    """An id per character."""

    gmask_token_id, bos_token_id, eos_token_id = 90_001, 90_004, 90_005
    pad_token_id = 3
    vocab_hash, revision = "5e" * 32, "v1.1"
    special_names, allow_special, opens_thoughts = MappingProxyType({}), False, False
    row_rule = property(row_rule)

    def encode_batch(self, texts, *, num_threads=None):
        return [list(map(ord, text)) for text in texts]

    encode_contexts = encode_batch

    def encode_examples(self, examples, *, num_threads=None):
        return encode_rounds(self, examples, lambda rounds, question: f"{rounds}{question}")


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizing, "plot_lengths", lambda path, **_: path.write_text("drawn"))
    write("zh.jsonl", [pair(f"这是第{i}个问题吗", "是的") for i in range(30)])
    write("en.jsonl", [pair(f"is this question {i}", "yes") for i in range(20)])
    write("general.jsonl", [pair(f"general {i}", "so") for i in range(10)])
    share = [{"from": "human", "value": "who"}, {"from": "gpt", "value": "me"}]
    write("share.jsonl", [{"conversations": share}] * 2)


def pair(question, answer):
    return {"context": question, "target": answer}


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(text, **flags):
    """Tokenise by a recipe; the questions on disk in their order, and the summary."""
    Path("r.yaml").write_text(f"tokenize:\n  save_path: rows\n{text}", encoding="utf-8")
    summary = tokenize(read_config(TokenizeSettings, "r.yaml", flags), CharTokenizer(), "base")
    rows = TokenRows.from_table(load_dataset("rows")[0], CharTokenizer().row_rule)
    texts = ["".join(map(chr, rows[i][: rows.prompt_lengths_R[i] - 2])) for i in range(len(rows))]
    return texts, str(summary)


BOTH = "  datasets:\n    - zh.jsonl\n    - path: en.jsonl\n"


def test_rows_of_one_file_follow_those_of_another():
    texts, told = make(BOTH)
    assert texts == [f"这是第{i}个问题吗" for i in range(30)] + [
        f"is this question {i}" for i in range(20)
    ]
    assert "zh.jsonl + en.jsonl -> rows" in told
    assert "set         zh.jsonl: context/target, 30 rows, 30 taken, 30 kept (60.0%)" in told
    by_flag = make("", datasets="zh.jsonl,en.jsonl")[0]
    assert by_flag == texts


def test_a_number_and_a_weight_of_rows():
    texts, told = make("  datasets:\n    - path: zh.jsonl#10\n      weight: 2\n    - en.jsonl#5\n")
    chinese = [text for text in texts if text[0] == "这"]
    assert len(chinese) == 20
    assert len(set(chinese)) == 10
    assert chinese[::2] == chinese[1::2]  # one after the other, in the order of the file
    assert len({*texts} - {*chinese}) == 5
    assert "zh.jsonl: context/target, 30 rows, 20 taken (weight 2), 20 kept" in told
    assert make("", datasets="zh.jsonl#10,en.jsonl#5", seed="7")[0][::2] != chinese[::2]


def test_a_number_of_rows_of_a_single_file():
    texts, told = make("  jsonl_path: zh.jsonl#10\n")
    assert len({*texts}) == len(texts) == 10
    assert "zh.jsonl: context/target, 30 rows, 10 taken" in told
    assert DataCard.read(Path("rows", CARD_FILE)).source_rows() is None
    Path("zh.jsonl").rename("zh.jsonl#10")
    assert len(make("  jsonl_path: zh.jsonl#10\n")[0]) == 30  # a file of that very name


def test_rows_that_become_several_are_counted_as_often_as_they_are_taken():
    """`kept as` was less than `kept`, and rows were `dropped` that had been written twice."""
    said = [{"from": "human", "value": "who"}, {"from": "gpt", "value": "me"}]
    write("two.jsonl", [{"conversations": said * 2}] * 4)
    texts, told = make("  datasets: [{path: two.jsonl, weight: 1.5}, zh.jsonl]\n", learn="each")
    assert len(texts) == 6 * 2 + 30
    assert "rows        36 taken, 36 kept as 42, 0 dropped" in told
    write("empty.jsonl", [{"conversations": said}, {"conversations": said[:1]}])
    recipe = "  datasets: [{path: empty.jsonl, weight: 2}, zh.jsonl]\n"
    told = make(recipe, on_bad_row="skip")[1]
    assert "rows        32 taken, 32 kept, 0 dropped" in told
    assert "1 bad, skipped:" in told


def test_a_share_of_chinese_and_of_general_rows():
    texts, told = make(BOTH + "  zh_share: 0.3\n  replay: general.jsonl\n  replay_share: 0.1\n")
    nums = [sum(text.startswith(start) for text in texts) for start in ("这", "is", "general")]
    assert nums == [9, 20, 3]  # 0.3 of 29, and 0.1 of 32
    assert "20 taken (0 zh, 20 en)" in told
    assert "replay      general.jsonl: context/target, 10 rows, 3 taken" in told
    assert len(make(BOTH)[0]) == 50


def test_the_card_says_what_went_in():
    make(BOTH.replace("en.jsonl", "en.jsonl#5"))
    card = DataCard.read(Path("rows", CARD_FILE))
    assert (card.source, card.source_rows(), card.num_kept_of_sets) == (None, None, [30, 5])
    first, second = map(asdict, card.sets)
    assert (first["path"], first["format"], first["num_taken"]) == (
        "zh.jsonl", "context/target", 30,
    )  # fmt: skip
    assert len(first["sha256"]) == 64
    assert (second["num_read"], second["num_taken"], second["num_kept"]) == (20, 5, 5)
    assert first["num_tokens"] + second["num_tokens"] == card.num_tokens


def test_rows_are_numbered_through_all_files():
    write("en.jsonl", [pair("is it", ""), {"context": 7, "target": "x"}, pair("is it so", "yes")])
    make(BOTH + "  on_bad_row: skip\n")
    card = DataCard.read(Path("rows", CARD_FILE))
    assert card.rows_out == {"bad": [32], "empty": [31], "overlength": []}
    assert (card.num_read, card.num_kept) == (33, 31)


def test_each_file_has_its_own_format():
    texts, told = make(BOTH + "    - path: share.jsonl\n      format: sharegpt\n")
    assert texts[-1] == "[]who"
    assert texts[0] == "[]这是第0个问题吗"  # beside a conversation, all are
    assert "share.jsonl: sharegpt, 2 rows" in told
    with pytest.raises(UserError, match='field "conversations" is missing'):
        make(BOTH + "    - path: general.jsonl\n      format: sharegpt\n")


def test_a_killed_command_goes_on_in_the_right_file(monkeypatch):
    monkeypatch.setattr(token_files, "TOKENS_PER_FILE", 60)
    monkeypatch.setattr(tokenizing, "ROWS_PER_BATCH", 3)
    recipe = BOTH.replace("en.jsonl", "en.jsonl#7\n      weight: 1.5")
    whole = make(recipe)[0]
    card = Path("rows", CARD_FILE).read_text()
    encode_rows, calls = tokenizing.encode_rows, []

    def killed(rows, *others):
        calls.append(rows)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return encode_rows(rows, *others)

    monkeypatch.setattr(tokenizing, "encode_rows", killed)
    write("unrelated.jsonl", [])
    with pytest.raises(KeyboardInterrupt):
        make(recipe)
    monkeypatch.setattr(tokenizing, "encode_rows", encode_rows)
    assert make(recipe, resume="true")[0] == whole
    assert Path("rows", CARD_FILE).read_text() == card


def test_a_file_that_has_changed_is_not_gone_on_with(monkeypatch):
    monkeypatch.setattr(token_files, "TOKENS_PER_FILE", 60)
    monkeypatch.setattr(token_files.TokenFiles, "close", lambda self: 1 / 0)
    monkeypatch.setattr(tokenizing, "stays", lambda *_: True)
    with pytest.raises(ZeroDivisionError):
        make(BOTH)
    write("en.jsonl", [pair("another", "one")])
    with pytest.raises(UserError, match=r"rows: cannot be resumed, since sha256 of en\.jsonl was"):
        make(BOTH, resume="true")


def test_messages_name_all_files():
    write("zh.jsonl", [pair("问", "")])
    write("en.jsonl", [pair("ask", "")])
    with pytest.raises(UserError, match=r"zh\.jsonl \+ en\.jsonl: no row is left: 2 have"):
        make(BOTH)


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("  datasets: [zh.jsonl#0]", "zh.jsonl#0 takes no row"),
        ("  datasets: [zh.jsonl#-5]", "zh.jsonl#-5: -5 behind # is no number of rows; tokenize"),
        ("  datasets: ['zh.jsonl#']", "nothing behind # is no number of rows.* as zh.jsonl#500"),
        ("  datasets: [zh.jsonl#31]", "zh.jsonl: has 30 rows, and 31 are to be taken"),
        ("  datasets: [zh.jsonl, ./zh.jsonl]", "zh.jsonl is named twice"),
        ("  datasets: [zh.jsonl]\n  replay: zh.jsonl", "zh.jsonl is named twice"),
        ("  datasets: [zh.jsonl, rows]", "save_path would overwrite rows"),
        ("  datasets: [zh.jsonl]\n  jsonl_path: en.jsonl", "both name the rows: set one"),
        ("  datasets: [zh.jsonl]\n  replay_share: 0.1", "no effect without a file: set replay 0.1"),
        ("  datasets: [zh.jsonl]\n  zh_share: 0.5", "no row is English"),
        ("  datasets: [zh.jsonl]\n  zh_share: 1.5", "zh_share '1.5' should be a number, above 0"),
        (
            "  datasets: [zh.jsonl]\n  replay: general.jsonl\n  replay_share: 0.5",
            r"set replay_share 0\.25 at most",
        ),
        (
            "  datasets:\n    - path: zh.jsonl\n      weight: 0",
            r"r\.yaml:3: datasets, entry 1: weight '0' should be a number, above 0",
        ),
        (
            "  datasets:\n    - zh.jsonl\n    - path: en.jsonl\n      wieght: 2",
            "entry 2: knows no wieght; did you mean weight",
        ),
        ("  datasets:\n    - weight: 2", "entry 1: lacks its path"),
        (
            "  datasets:\n    - path: en.jsonl\n      format: csv",
            "entry 1: format 'csv' should be messages",
        ),
        ("  datasets:\n    - path: en.jsonl\n      encoding: latin0", "'latin0' is not known"),
        ("  datasets:\n    - [a]", "an entry is a text, or lines"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(recipe, message):
    with pytest.raises(UserError, match=message) as error:
        make(recipe + "\n")
    assert "\n" not in str(error.value)
    assert not Path("rows").exists()
