"""Rows to tokens: what is kept, cut, dropped and reported, and the data card."""

import hashlib
import json
import os
import shutil

import datasets
import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
from matplotlib.colors import to_hex

from glmtune import __version__
from glmtune.config.settings import TokenizeSettings
from glmtune.data import lengths, tokenizing
from glmtune.data.dataset import (
    CARD_FILE,
    HISTOGRAM_FILE,
    DataCard,
    SetCard,
    check_data_card,
    load_dataset,
)
from glmtune.data.lengths import LengthStats, plot_lengths
from glmtune.data.tokenizing import tokenize
from glmtune.errors import UserError
from glmtune.models.chatglm.rows import row_rule
from glmtune.runlog import ACCENT, GONE

GMASK, BOS, EOS = 9001, 9004, 9005


class CharTokenizer:
    """An id per character; zero-width characters have none."""

    special_names, allow_special, opens_thoughts = {}, False, False
    gmask_token_id, bos_token_id, eos_token_id = GMASK, BOS, EOS
    pad_token_id = 3
    vocab_hash = "5e" * 32
    revision = "v1.1"
    row_rule = property(row_rule)

    def encode_batch(self, texts, *, num_threads=None):
        return [[ord(character) for character in text.replace("\u200b", "")] for text in texts]

    encode_contexts = encode_batch


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(rows: list[tuple[str, str]], **settings):
    with open("a.jsonl", "w", encoding="utf-8") as file:
        for context, target in rows:
            file.write(json.dumps({"context": context, "target": target}) + "\n")
    config = TokenizeSettings(jsonl_path="a.jsonl", save_path="tokens", **settings)
    summary = tokenize(config, CharTokenizer(), "THUDM/chatglm-6b")
    return summary, datasets.load_from_disk("tokens").to_list()


def token_row(prompt: str, answer: str) -> dict:
    prompt_ids = [*map(ord, prompt), GMASK, BOS]
    return {"input_ids": [*prompt_ids, *map(ord, answer), EOS], "seq_len": len(prompt_ids)}


def test_a_row_is_context_specials_target_eos(monkeypatch):
    monkeypatch.setattr(tokenizing, "ROWS_PER_BATCH", 2)
    texts = [("问一", "答"), ("问", "答二"), ("q", "a")]
    _, rows = run(texts)
    assert rows == [token_row(*text) for text in texts]


def test_context_and_target_are_cut_apart_and_told(capsys):
    summary, rows = run([("abcdefgh", "x"), ("a", "uvwxyz"), ("abcd", "uvw")], max_seq_length=5)
    cut = token_row("a", "uvwxy")
    assert cut["input_ids"].pop() == EOS
    assert rows == [token_row("abc", "x"), cut, token_row("abc", "uvw")]
    assert summary.card.rows_cut == {"context": [1, 3], "target": [2]}
    told = capsys.readouterr().out
    assert "2 kept, context cut to 5 tokens: rows 1, 3" in told
    assert "1 kept, target cut to 5 tokens: row 2" in told
    assert summary.card.num_targets_lost == 2  # z, and the end token, which a cut answer lacks
    assert "lost        2 target tokens (15.4%), cut off 1 answers" in told


def test_a_target_as_long_as_may_be_keeps_its_end(capsys):
    summary, rows = run([("a", "vwxyz")], max_seq_length=5)
    assert rows == [token_row("a", "vwxyz")]
    assert summary.card.num_targets_lost == 0
    assert "lost" not in capsys.readouterr().out


def test_cut_rows_of_an_older_version_taught_their_end():
    run([("a", "uvwxyz"), ("a", "b")], max_seq_length=5)
    change_card(num_targets_lost=None)
    lost = load_dataset("tokens")[1].describe_loss()
    assert "1 answers were cut to 5 tokens by a version that taught their end" in lost


def test_each_row_knows_its_row_in_the_source():
    summary, _ = run([("a", ""), ("b", "c"), ("d", ""), ("e", "f")])
    assert summary.card.source_rows().tolist() == [2, 4]
    assert summary.card.row_is_line
    with open("b.jsonl", "w", encoding="utf-8") as file:
        file.write('{"context": "a", "target": "b"}\n\n{"context": "c", "target": "b"}\n')
    config = TokenizeSettings(jsonl_path="b.jsonl", save_path="tokens")
    card = tokenize(config, CharTokenizer(), "base").card
    assert card.source_rows().tolist() == [1, 2]
    assert not card.row_is_line


def test_overlong_rows_are_dropped_only_when_asked(capsys):
    texts = [("a", "b"), ("ab", "c"), ("a", "bcdef")]  # 5, 6 and 9 ids
    assert len(run(texts, max_seq_length=5)[1]) == 3
    summary, rows = run(texts, max_seq_length=5, skip_overlength=True)
    assert rows == [token_row("a", "b")]
    assert summary.card.rows_out["overlength"] == [2, 3]
    assert "2 dropped, longer than 5 tokens: rows 2-3" in capsys.readouterr().out


def test_one_length_is_not_advised_twice(capsys):
    """Of three rows, 95 % are all."""
    run([("a", "b"), ("a", "b" * 50), ("a", "b" * 50)], max_seq_length=8)
    told = capsys.readouterr().out
    assert told.count("--max_seq_length") == 1
    assert "1 of 3 rows are whole; --max_seq_length" in told


@pytest.mark.parametrize("skip", [False, True])
def test_the_advised_length_keeps_what_it_says(capsys, skip):
    """95 % of the rows, or all of them, uncut and not dropped."""
    texts = [("a" * (number % 17), "b" * (1 + number % 29)) for number in range(200)]
    texts += [("a" * 300, "b"), ("a", "b" * 300), ("a", "")]
    run(texts, max_seq_length=8, skip_overlength=skip)
    told = capsys.readouterr().out
    advice = next(line for line in told.splitlines() if line.startswith("  advice"))
    of_most, of_all = (int(part.split()[0]) for part in advice.split("--max_seq_length ")[1:])
    assert "keeps 95%" in advice
    for length, num_out in ((of_most, 10), (of_all, 0)):
        card = run(texts, max_seq_length=length, skip_overlength=skip)[0].card
        rows = [*card.rows_out["overlength"], *card.rows_cut["context"], *card.rows_cut["target"]]
        assert len(set(rows)) <= num_out
        shorter = run(texts, max_seq_length=length - 1, skip_overlength=skip)[0].card
        cut = [*shorter.rows_cut["context"], *shorter.rows_cut["target"]]
        assert len({*shorter.rows_out["overlength"], *cut}) > num_out
    capsys.readouterr()
    run(texts, max_seq_length=of_all, skip_overlength=skip)
    assert "advice" not in capsys.readouterr().out


def test_rows_that_were_dropped_are_told_again(capsys):
    """By training, which would not mention dropped rows otherwise."""
    run([("a", "b")] * 9 + [("a" * 9, "b")], max_seq_length=5, skip_overlength=True)
    dropped = load_dataset("tokens")[1].describe_dropped()
    assert "1 of 10 rows (10%) were dropped as longer than 5 tokens" in dropped
    run([("a", "b")] * 19 + [("a" * 9, "b")], max_seq_length=5, skip_overlength=True)
    assert load_dataset("tokens")[1].describe_dropped() is None


def test_empty_targets_are_dropped_unless_kept(capsys):
    texts = [("a", "b"), ("a", ""), ("a", " \n"), ("a", "\u200b")]
    summary, rows = run(texts)
    assert rows == [token_row("a", "b")]
    assert summary.card.rows_out["empty"] == [2, 3, 4]
    assert "3 dropped, empty target: rows 2-4" in capsys.readouterr().out
    assert run(texts, keep_empty=True)[1][1] == token_row("a", "")


def test_skipped_bad_rows_are_listed(capsys):
    with open("b.jsonl", "w", encoding="utf-8") as file:
        file.write('{"context": "a", "target": "b"}\n{"context": 1, "target": "b"}\n')
    config = TokenizeSettings(jsonl_path="b.jsonl", save_path="tokens", on_bad_row="skip")
    summary = tokenize(config, CharTokenizer(), "base")
    assert (summary.card.num_read, summary.card.num_kept) == (2, 1)
    assert summary.card.rows_out["bad"] == [2]
    assert 'b.jsonl:2 (row 2): field "context" is 1' in capsys.readouterr().out


def test_no_row_left_is_an_error_and_writes_nothing():
    with pytest.raises(UserError, match=r"a.jsonl: no row is left: 1 have .* 1 are longer than"):
        run([("a", ""), ("a", "bcdef")], max_seq_length=5, skip_overlength=True)
    assert os.listdir() == ["a.jsonl"]


def test_the_card_tells_where_the_data_comes_from(capsys):
    run([("Instruction: 问\nAnswer: ", "答"), ("Instruction: q\nAnswer: ", "abc")], num_threads=1)
    _, card = load_dataset("tokens")
    with open("a.jsonl", "rb") as file:
        sha256 = hashlib.sha256(file.read()).hexdigest()
    assert card == DataCard(
        num_kept=2,
        num_read=2,
        num_tokens=27 + 29,
        num_target_tokens=2 + 4,
        lengths=LengthStats(27, 27, 29, 29),
        special_ids={"gmask": GMASK, "bos": BOS, "eos": EOS},
        base_model="THUDM/chatglm-6b",
        tokenizer_sha256="5e" * 32,
        vocab_revision="v1.1",
        template="alpaca",
        flags={
            "max_seq_length": 200,
            "skip_overlength": False,
            "keep_empty": False,
            "on_bad_row": "fail",
            "allow_special": False,
        },
        source="a.jsonl",
        source_sha256=sha256,
        glmtune_version=__version__,
        rows_out={"bad": [], "empty": [], "overlength": []},
        rows_cut={"context": [], "target": []},
        num_targets_lost=0,
        row_is_line=True,
        sets=(SetCard("a.jsonl", sha256, "context/target", 2, 2, 2, card.num_tokens),),
        num_spelling=0,
    )
    assert "10.7% of them targets" in capsys.readouterr().out
    run([("问：q\n答：", "答")])
    assert load_dataset("tokens")[1].template == "custom"


def change_card(**fields):
    with open(f"tokens/{CARD_FILE}", encoding="utf-8") as file:
        card = json.load(file) | fields
    with open(f"tokens/{CARD_FILE}", "w", encoding="utf-8") as file:
        json.dump(card, file)


def test_a_card_of_a_later_version_is_read():
    run([("a", "b")])
    change_card(new=1)
    assert load_dataset("tokens")[1].num_kept == 1


def test_data_of_another_tokenizer_is_refused():
    run([("a", "b")])
    check_data_card(load_dataset("tokens")[1], CharTokenizer(), "tokens")
    change_card(tokenizer_sha256="99" * 32)
    with pytest.raises(UserError, match=r"tokens: .* THUDM/chatglm-6b \(vocabulary sha256 9999"):
        check_data_card(load_dataset("tokens")[1], CharTokenizer(), "tokens")
    change_card(special_ids={"gmask": 29001, "bos": 29004, "eos": 29005})
    with pytest.raises(UserError, match=r"its gmask id is 29001, the tokenizer has 9001"):
        check_data_card(load_dataset("tokens")[1], CharTokenizer(), "tokens")


def save_like_the_script_of_2023(rows: list[dict], path: str = "old") -> None:
    """Write a folder as datasets 2.x did: int32 lists, the feature type still called Sequence."""
    os.mkdir(path)
    types = {"input_ids": pa.list_(pa.int32()), "seq_len": pa.int32()}
    table = pa.Table.from_pylist(rows, schema=pa.schema(types.items()))
    with pa.ipc.new_stream(f"{path}/data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    value = {"dtype": "int32", "id": None, "_type": "Value"}
    sequence = {"feature": value, "length": -1, "id": None, "_type": "Sequence"}
    info = {"features": {"input_ids": sequence, "seq_len": value}}
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    for name, content in (("dataset_info.json", info), ("state.json", state)):
        with open(f"{path}/{name}", "w", encoding="utf-8") as file:
            json.dump(content, file)


def test_a_data_set_of_2023_is_read_with_a_notice(capsys):
    cut = token_row("abcde", "fgh")
    cut["input_ids"] = cut["input_ids"][:4]  # that script cut rows through the specials
    save_like_the_script_of_2023([token_row("a", "bc"), token_row("ab", "c"), cut])
    table, card = load_dataset("old", CharTokenizer().row_rule)
    assert table.to_pylist()[0] == token_row("a", "bc")
    assert card == DataCard(
        num_kept=3,
        num_tokens=6 + 6 + 4,
        num_target_tokens=3 + 2,
        lengths=LengthStats(4, 6, 6, 6),
        special_ids={"gmask": GMASK, "bos": BOS, "eos": EOS},
    )
    assert f"note: old has no {CARD_FILE}" in capsys.readouterr().err
    check_data_card(card, CharTokenizer(), "old")
    other = CharTokenizer()
    other.gmask_token_id = 29001
    with pytest.raises(UserError, match=r"old: tokenised with another tokenizer \(its gmask id"):
        check_data_card(card, other, "old")


def test_an_id_that_most_rows_do_not_share_is_not_taken_for_a_special():
    rows = [{"input_ids": [1, 2, 3, 4, last], "seq_len": 3} for last in (5, 6, 7)]
    save_like_the_script_of_2023(rows)
    assert load_dataset("old", CharTokenizer().row_rule)[1].special_ids == {
        "gmask": 2,
        "bos": 3,
        "eos": None,
    }


def test_what_is_no_data_set_of_token_rows_is_refused():
    run([("a", "b")])
    with pytest.raises(UserError, match=r"missing: no such folder; pass the folder"):
        load_dataset("missing")
    with pytest.raises(UserError, match=r"a.jsonl: a file; pass the folder"):
        load_dataset("a.jsonl")
    os.mkdir("empty")
    with pytest.raises(UserError, match=r"empty: cannot be opened as a data set"):
        load_dataset("empty")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("text")
    with pytest.raises(UserError, match=r"text: a data set, but not of token rows \(it has \['te"):
        load_dataset("text")
    datasets.Dataset.from_dict({"input_ids": ["a"], "seq_len": [1]}).save_to_disk("strings")
    with pytest.raises(UserError, match=r"strings: a data set, but not of token rows"):
        load_dataset("strings")
    rows = datasets.Dataset.from_list([token_row("a", "b")])
    datasets.DatasetDict(train=rows).save_to_disk("dict")
    with pytest.raises(UserError, match=r"dict: a data set, but not of token rows"):
        load_dataset("dict")
    rows.select([]).save_to_disk("none")
    with pytest.raises(UserError, match=r"none: "):
        load_dataset("none")


def test_a_damaged_folder_is_refused():
    run([("a", "b"), ("c", "d")])
    change_card(num_kept=3)
    with pytest.raises(UserError, match=r"lists 3 rows, the data has 2"):
        load_dataset("tokens")
    change_card(lengths=None)
    with pytest.raises(UserError, match=rf"tokens/{CARD_FILE}: is damaged"):
        load_dataset("tokens")
    with open("tokens/data-00000-of-00001.arrow", "r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"tokens: cannot be opened as a data set"):
        load_dataset("tokens")


def test_only_a_tokenised_data_set_is_replaced():
    run([("a", "b")])
    assert len(run([("a", "b"), ("c", "d")])[1]) == 2
    open("tokens/notes.txt", "w").close()
    with pytest.raises(UserError, match=r"^tokens: exists and holds notes.txt, no part of"):
        run([("e", "f")])
    assert len(datasets.load_from_disk("tokens")) == 2
    shutil.rmtree("tokens")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("tokens")
    with pytest.raises(UserError, match=r"^tokens: exists and holds data-00000-of-00001.arrow"):
        run([("e", "f")])
    shutil.rmtree("tokens")
    open("tokens", "w").close()
    with pytest.raises(UserError, match=r"^tokens: cannot become a folder \(Not a directory\)"):
        run([("e", "f")])
    os.remove("tokens")
    os.mkdir("tokens")
    assert len(run([("e", "f")])[1]) == 1
    shutil.rmtree("tokens")
    save_like_the_script_of_2023([token_row("a", "b")], "tokens")
    assert len(run([("e", "f")])[1]) == 1


def test_an_error_while_writing_leaves_the_earlier_data_set(monkeypatch):
    run([("a", "b")])

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizing, "plot_lengths", fail)
    with pytest.raises(UserError, match=r"tokens: cannot be written \(No space left on device\)"):
        run([("a", "b"), ("c", "d")])
    assert sorted(os.listdir()) == ["a.jsonl", "tokens"]
    assert load_dataset("tokens")[1].num_kept == 1


def draw_lengths(kept, dropped=()):
    """Axes of the histogram for a limit of 200 tokens, and where its named lines stand."""
    (axes,) = lengths._draw(kept, list(dropped), 200).axes
    names = [text.get_text() for text in axes.texts]
    return axes, dict(zip(names, [line.get_xdata()[0] - 0.5 for line in axes.lines], strict=True))


def test_the_histogram_draws_kept_and_dropped_rows():
    rng = np.random.default_rng(0)
    kept, dropped = rng.integers(10, 201, 1000), rng.integers(201, 900, 800)
    for rows, colours in (([], [ACCENT]), (dropped, [ACCENT, GONE])):
        axes, _ = draw_lengths(kept, rows)
        assert axes.get_title("left") == "Length of rows"
        drawn = [bars.patches for bars in axes.containers]
        assert [to_hex(bars[0].get_facecolor()) for bars in drawn] == colours
        heights = [sum(bar.get_height() for bar in bars) for bars in drawn]
        assert heights == [len(kept), len(rows)][: len(drawn)]


def test_the_line_that_keeps_95_percent_counts_dropped_rows_too():
    assert draw_lengths([*range(1, 101)])[1] == {
        "half of the rows within 51": 51, "95 % of the rows within 95": 95,
    }  # fmt: skip
    _, lines = draw_lengths([*range(101, 201)], [300] * 10)
    assert lines["95 % of the rows within 300"] == 300
    _, lines = draw_lengths([*range(101, 201)], [900] * 10)
    assert lines["95 % of the rows within 900"] == 400  # in the last bar, which is of longer ones
    assert lines["max_seq_length 200"] == 200


def test_the_histogram_is_written_under_a_chinese_name(tmp_path):
    path = tmp_path / "长度 分布.png"
    plot_lengths(path, kept=[5, 6], dropped=[], max_seq_length=200)
    assert matplotlib.image.imread(path).shape[0] > 300


def test_the_histogram_stands_beside_the_rows():
    run([("a", "b")])
    assert matplotlib.image.imread(f"tokens/{HISTOGRAM_FILE}").shape[0] > 300
