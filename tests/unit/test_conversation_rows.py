"""`glmtune tokenize` on conversations: rows with labels, cut at turns, and what is refused."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from glm_folders import toy_tiktoken, write_folder

from glmtune.cli import main
from glmtune.config.settings import TokenizeSettings
from glmtune.data import tokenizing
from glmtune.data.conversations import IGNORED
from glmtune.data.dataset import DataCard, load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.data.tokenizing import tokenize
from glmtune.errors import UserError
from glmtune.models.base_files import load_row_tokenizer
from glmtune.models.glm.encoder import of_folder
from glmtune.models.resolve import GLM_TINY


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """GLM-4's layout with a vocabulary of bytes."""
    folder = tmp_path_factory.mktemp("toy") / "glm4"
    return of_folder(write_folder(folder, "glm4", toy_tiktoken(), padded_vocab_size=70_000))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def talk(*texts, **fields):
    """Question and answer by turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, **fields}


def write(*rows, name="a.jsonl"):
    Path(name).write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    return name


def run(tokenizer, *rows, **settings):
    config = TokenizeSettings(jsonl_path=write(*rows), save_path="tokens", **settings)
    summary = tokenize(config, tokenizer, "base")
    return summary, datasets.load_from_disk("tokens").to_list()


def taught(tokenizer, row):
    """The texts that are supervised, in which ends are strokes."""
    ids = [label for label in row["labels"] if label != IGNORED]
    names = {id_: "|" for name, id_ in tokenizer.ids.items()}
    text, run = "", []
    for id_ in [*ids, None]:
        if id_ is None or id_ in names:
            text += tokenizer.byte_pairs.decode(run) + names.get(id_, "")
            run = []
        else:
            run.append(id_)
    return text.replace("\n", "")


@pytest.mark.parametrize(
    ("learn", "text"), [("each", "hi|fine|"), ("last", "fine|"), ("marked", "hi|")]
)
def test_a_conversation_is_one_row_with_labels(toy, capsys, learn, text):
    talked = talk("hello", "hi", "how?", "fine")
    talked["messages"][1]["loss"] = True
    summary, (row,) = run(toy, talked, learn=learn)
    assert taught(toy, row) == text
    assert all(
        label in (id_, IGNORED) for id_, label in zip(row["input_ids"], row["labels"], strict=True)
    )
    assistant = toy.ids["<|assistant|>"]
    assert row["input_ids"][row["seq_len"] - 1] == assistant
    assert assistant not in row["input_ids"][row["seq_len"] :]
    assert summary.card.template == "conversation"
    assert summary.card.num_target_tokens == sum(label != IGNORED for label in row["labels"])
    assert summary.card.flags["learn"] == learn
    rows = TokenRows.from_table(load_dataset("tokens")[0], toy.row_rule)
    rows.check(70_000, "tokens")
    assert rows.num_labels_R.tolist() == [summary.card.num_target_tokens]
    assert "of them supervised" in capsys.readouterr().out


def test_batches_do_not_change_the_rows(toy, monkeypatch):
    talks = [talk(*["some words"] * 2 * (1 + i % 4)) for i in range(9)]
    settings = {"max_seq_length": 60}
    whole = run(toy, *talks, **settings)[1]
    monkeypatch.setattr(tokenizing, "CONVERSATIONS_PER_BATCH", 2)
    assert run(toy, *talks, **settings)[1] == whole
    assert len(whole) == 9


def test_a_row_that_is_too_long_loses_turns_and_ends_with_a_whole_answer(toy, capsys):
    short, long = talk("q", "a"), talk("q", "a", "q", "b", "q", "c" * 40)
    summary, rows = run(toy, short, long, short, max_seq_length=30)
    assert [taught(toy, row) for row in rows] == ["a|", "a|b|", "a|"]
    assert rows[1]["input_ids"][-1] == toy.row_rule.end_ids[0]
    assert len(rows[1]["input_ids"]) == len(rows[1]["labels"]) <= 30
    assert summary.card.rows_cut == {"turns": [2]}
    told = capsys.readouterr().out
    assert "1 kept, turns cut or left out to be within 30 tokens: row 2" in told
    assert "42 supervised tokens" in told  # 40 of the text, the newline and the end
    assert "--max_seq_length 60 keeps all of them" in told
    assert summary.card.source_rows().tolist() == [1, 2, 3]
    assert len(run(toy, short, long, short, max_seq_length=60)[0].card.rows_cut["turns"]) == 0


@pytest.mark.parametrize("num_kept", range(1, 9))
def test_as_many_turns_are_kept_as_fit(toy, num_kept):
    long = talk(*(f"turn {i}" for i in range(18)))
    (whole,) = run(toy, talk(*(f"turn {i}" for i in range(2 * num_kept))))[1]
    length = len(whole["input_ids"])
    for limit in (length, length + 1):
        assert run(toy, long, max_seq_length=limit)[1] == [whole]
    with_less = {"max_seq_length": length - 1}
    if num_kept == 1:
        with pytest.raises(UserError, match="no row is left: 0 have an empty answer"):
            run(toy, long, **with_less)
    else:
        assert len(run(toy, long, **with_less)[1][0]["input_ids"]) < length


def test_the_last_answer_that_is_kept_is_the_last(toy):
    long = talk("q", "a", "q", "b", "q", "c" * 40)
    assert taught(toy, run(toy, long, max_seq_length=30, learn="last")[1][0]) == "b|"


def test_a_call_whose_result_is_cut_is_cut_too(toy):
    turns = talk("q", "a", "q")["messages"]
    call = {"role": "assistant", "content": "{}", "metadata": "f"}
    result = {"role": "observation", "content": "x" * 40}
    row = {"messages": [*turns, call, result, {"role": "assistant", "content": "done"}]}
    assert taught(toy, run(toy, row, max_seq_length=40)[1][0]) == "a|"
    assert taught(toy, run(toy, row)[1][0]) == "a|f{}|done|"


@pytest.mark.parametrize("settings", [{"too_long": "drop"}, {"skip_overlength": True}])
def test_a_row_that_is_too_long_may_be_dropped(toy, capsys, settings):
    short, long = talk("q", "a"), talk("q", "a", "q", "b" * 40)
    summary, rows = run(toy, long, short, max_seq_length=30, **settings)
    assert len(rows) == 1
    assert summary.card.rows_out["overlength"] == [1]
    told = capsys.readouterr().out
    assert "1 dropped, longer than 30 tokens: row 1" in told
    assert "45 supervised tokens stood in the rows that are dropped" in told
    assert summary.card.source_rows().tolist() == [2]


def test_a_row_that_is_too_long_may_be_an_error(toy):
    short, long = talk("q", "a"), talk("q", "a", "q", "b" * 40)
    with pytest.raises(UserError, match=r"a.jsonl:2 \(row 2\): has 54 tokens, more than max_seq"):
        run(toy, short, long, max_seq_length=30, too_long="error")
    assert len(run(toy, short, long, max_seq_length=54, too_long="error")[1]) == 2


def test_rows_may_be_longer_than_those_of_contexts(toy):
    long = talk("q", "word " * 100)
    assert not run(toy, long)[0].card.rows_cut["turns"]
    with pytest.raises(UserError, match="longer than max_seq_length 2048"):
        run(toy, talk("q", "word " * 2000))


def test_rows_in_which_nothing_is_supervised_are_left_out_and_counted(toy, capsys):
    silent = talk("q", "a")
    silent["messages"][1]["loss"] = False
    summary, rows = run(toy, silent, talk("q", "b"))
    assert [taught(toy, row) for row in rows] == ["b|"]
    assert summary.card.rows_out["unsupervised"] == [1]
    assert "1 dropped, nothing is supervised: row 1" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 have no supervised answer, .*; set learn each"):
        run(toy, silent)


def test_a_data_set_that_teaches_next_to_nothing_is_refused(toy):
    with pytest.raises(UserError, match=r"only 3 of 1,008 tokens \(0.30%\) are supervised"):
        run(toy, talk("w" * 1000, "a"))
    assert run(toy, talk("w" * 200, "a"))[1]


def test_a_data_set_that_teaches_no_end_is_refused(toy):
    turns = talk("q", "a")["messages"]
    turns[1]["loss"] = True
    turns += [{"role": "assistant", "content": "{}", "metadata": "f"}]
    with pytest.raises(UserError, match="no row teaches the end of an answer"):
        run(toy, {"messages": turns}, learn="marked")
    assert run(toy, {"messages": turns}, learn="each")[1]


def test_settings_of_conversations_are_refused_for_other_rows(toy):
    row = {"context": "a", "target": "b"}
    with pytest.raises(UserError, match="too_long is for conversations"):
        run(toy, row, too_long="drop")
    with pytest.raises(UserError, match="learn marked is for conversations"):
        run(toy, row, learn="marked")
    assert set(run(toy, row, learn="last")[1][0]) == {"input_ids", "seq_len"}


def test_two_settings_that_exclude_each_other_are_refused(capsys):
    line = ["tokenize", write(talk("q", "a")), "--save_path", "tokens", "--skip_overlength"]
    assert main([*line, "true", "--too_long", "error"]) == 2
    assert "too_long is error, and skip_overlength drops long rows" in capsys.readouterr().err


def test_what_a_family_cannot_write_is_refused_by_row_or_skipped(tmp_path, capsys):
    data = toy_tiktoken()
    edge = of_folder(write_folder(tmp_path / "edge", "glm-edge", data, vocab_size=70_000))
    with_tools = talk("q", "a", tools=[{"name": "f"}])
    with pytest.raises(UserError, match=r"a.jsonl:2 \(row 2\): tools, which neither glm-edge"):
        run(edge, talk("q", "a"), with_tools)
    summary, rows = run(edge, talk("q", "a"), with_tools, on_bad_row="skip")
    assert len(rows) == 1
    assert summary.card.rows_out["bad"] == [2]
    assert "a.jsonl:2 (row 2): tools, which" in capsys.readouterr().out


def test_thoughts_are_left_out_and_counted(toy, capsys):
    talked = talk("q", "a")
    talked["messages"][1]["reasoning_content"] = "hm"
    (row,) = run(toy, talked)[1]
    assert taught(toy, row) == "a|"
    assert "1 answers had a thought before them, left out" in capsys.readouterr().out


def test_an_empty_answer_of_a_record_is_dropped_unless_kept(toy):
    record = {"instruction": "q", "output": "", "history": [["x", "y"]]}
    good = record | {"output": "z"}
    summary, rows = run(toy, record, good)
    assert summary.card.rows_out["empty"] == [1]
    assert [taught(toy, row) for row in rows] == ["y|z|"]
    assert len(run(toy, record, good, keep_empty=True)[1]) == 2


def test_the_first_family_has_a_row_for_each_answer_and_says_so(capsys):
    """The row of an answer is that of the conversation up to it."""
    shorter, whole, other = talk("你好", "好"), talk("你好", "好", "再见", "再会"), talk("a", "b")
    tokenizer = load_row_tokenizer(str(GLM_TINY))
    expected = run(tokenizer, shorter, whole, other, learn="last")[1]
    capsys.readouterr()
    rows = run(tokenizer, whole, other)[1]
    assert rows == expected
    told = capsys.readouterr().out
    assert "2 read, 2 kept as 3, 0 dropped" in told
    more = len(expected[0]["input_ids"])
    assert "2 answers are rows of their own, since the base reads earlier ones as part" in told
    assert f"that takes {more:,} tokens more" in told
    table, card = load_dataset("tokens")
    for row in table.to_pylist():
        start = row["seq_len"] - 1
        assert row["labels"] == [IGNORED] * start + row["input_ids"][start:]
    assert isinstance(card, DataCard)
    assert card.source_rows().tolist() == [1, 1, 2]
    run(tokenizer, whole, other, learn="last")
    assert "rows of their own" not in capsys.readouterr().out


def test_of_the_first_family_answers_that_are_too_long_are_cut_as_turns_are(capsys):
    tokenizer, long = load_row_tokenizer(str(GLM_TINY)), talk("a", "b", "c", "d " * 60)
    (kept,) = run(tokenizer, talk("a", "b"))[1]
    summary, rows = run(tokenizer, long, talk("x", "y"), max_seq_length=40)
    assert rows[0] == kept
    assert summary.card.rows_cut == {"turns": [1]}
    summary, rows = run(tokenizer, long, talk("x", "y"), max_seq_length=40, too_long="drop")
    assert len(rows) == 1
    assert summary.card.rows_out["overlength"] == [1]


def test_a_row_that_is_too_long_may_be_split_where_a_question_follows_an_answer(toy, capsys):
    texts = [f"turn {i}" for i in range(18)]
    long = {"messages": [{"role": "system", "content": "brief"}, *talk(*texts)["messages"]]}
    whole = run(toy, long)[1][0]
    limit = len(whole["input_ids"]) // 3
    summary, rows = run(toy, long, talk("q", "a"), max_seq_length=limit, too_long="split")
    assert len(rows) >= 4
    assert max(len(row["input_ids"]) for row in rows) <= limit
    assert "".join(taught(toy, row) for row in rows[:-1]) == taught(toy, whole)
    system = toy.ids["<|system|>"]
    assert all(row["input_ids"].count(system) == 1 for row in rows[:-1])
    assert all(row["input_ids"][-1] == toy.row_rule.end_ids[0] for row in rows)
    assert summary.card.rows_cut == {"turns": [], "split": [1]}
    assert summary.card.source_rows().tolist() == [1] * (len(rows) - 1) + [2]
    told = capsys.readouterr().out
    assert f"2 read, 2 kept as {len(rows)}, 0 dropped" in told
    assert f"1 split into rows of at most {limit} tokens: row 1" in told


def test_a_round_that_no_row_holds_is_left_out_of_a_split_and_counted(toy, capsys):
    long = talk("q", "a", "q", "b" * 80, "q", "c", "q", "d")
    summary, rows = run(toy, long, max_seq_length=40, too_long="split")
    assert [taught(toy, row) for row in rows] == ["a|", "c|d|"]
    assert summary.card.rows_cut == {"turns": [1], "split": [1]}
    assert "82 supervised tokens" in capsys.readouterr().out


def test_a_split_never_parts_a_call_from_its_result_or_a_word_from_its_call(toy):
    call = {"role": "assistant", "content": "{}", "metadata": "f"}
    said = {"role": "assistant", "content": "let me see"}
    turns = [*talk("q", "a", "q")["messages"], said, call]
    turns += [{"role": "observation", "content": "x"}, {"role": "assistant", "content": "done"}]
    whole = run(toy, {"messages": turns[2:]})[1][0]
    limit = len(whole["input_ids"])
    rows = run(toy, {"messages": turns}, max_seq_length=limit, too_long="split")[1]
    assert [taught(toy, row) for row in rows] == ["a|", "let me see|f{}|done|"]
    cut = run(toy, {"messages": turns}, max_seq_length=limit)[1]
    assert [taught(toy, row) for row in cut] == ["a|"], "no end is taught before the call"


def test_labels_of_another_convention_are_refused_before_training(toy):
    run(toy, talk("hello", "hi"))
    columns = load_dataset("tokens")[0].to_pydict()
    columns["labels"] = [[*labels[1:], IGNORED] for labels in columns["labels"]]
    rows = TokenRows.from_table(pa.table(columns), toy.row_rule)
    with pytest.raises(UserError, match=r"row 1 has the label .* and a label is the id itself or"):
        rows.check(70_000, "tokens")


def test_what_a_conversation_spells_is_counted_once_however_many_rows_it_becomes(toy):
    row = talk("a [MASK]", "b", "c", "d <sop>", "e", "f")
    for tokenizer, more in (
        (load_row_tokenizer(str(GLM_TINY)), {}),
        (toy, {"max_seq_length": 16, "too_long": "split"}),
    ):
        summary, rows = run(tokenizer, row, **more)
        assert len(rows) == 3
        assert summary.card.spelled_specials == {"[MASK]": 1, "<sop>": 1}
        assert summary.card.num_spelling == 1


def test_a_cut_is_told_where_the_last_answer_that_is_left_is_the_longer_one(toy):
    """So that no fewer tokens are supervised than in the whole row."""
    row = talk("a", "a long answer", "b " * 20, "c")
    summary, _ = run(toy, row, learn="last", max_seq_length=40)
    assert summary.card.rows_cut["turns"] == [1]
    assert summary.card.num_targets_lost == 0


def test_a_split_tells_of_the_rounds_that_are_too_long_by_themselves(toy):
    summary, rows = run(
        toy, talk("a", "b", "c " * 40, "d", "e", "f"), too_long="split", max_seq_length=20
    )
    assert [taught(toy, row) for row in rows] == ["b|", "f|"]
    assert summary.card.rows_cut == {"turns": [1], "split": [1]}
    assert summary.card.num_targets_lost == 3


def test_where_the_base_can_write_no_row_it_says_why(tmp_path, monkeypatch, capsys):
    """keep_empty would change nothing."""
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    Path("a.jsonl").write_text(json.dumps(row | {"tools": [{"name": "f"}]}), encoding="utf-8")
    command = ["tokenize", "a.jsonl", "--save_path", "rows", "--base", str(GLM_TINY)]
    assert main([*command, "--on_bad_row", "skip"]) == 2
    told = capsys.readouterr().err
    assert "1 cannot be written, 0 are longer than max_seq_length 2048; tools, which" in told
    assert "keep_empty" not in told
