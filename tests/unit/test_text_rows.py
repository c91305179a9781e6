"""Texts alone: every token supervised, an end only where the text ends, and what is refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from glm_folders import toy_tiktoken, write_folder

from glmtune.cli import main
from glmtune.config.settings import TokenizeSettings
from glmtune.data.conversations import IGNORED
from glmtune.data.dataset import load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.data.tokenizing import tokenize
from glmtune.errors import UserError
from glmtune.models.base_files import load_row_tokenizer
from glmtune.models.families import FAMILIES
from glmtune.models.glm.encoder import of_folder
from glmtune.models.resolve import GLM_TINY

FOLDERS = {
    "glm4": ("glm4", {"padded_vocab_size": 70_000}, "tokenizer.model"),
    "glm4-0414": ("glm4-0414", {"vocab_size": 70_000}, "tokenizer.model"),
}


@pytest.fixture(scope="module", params=["chatglm", *FOLDERS])
def tokenizer(request, tmp_path_factory):
    if request.param == "chatglm":
        return load_row_tokenizer(str(GLM_TINY))
    variant, config, name = FOLDERS[request.param]
    folder = tmp_path_factory.mktemp("toy") / variant
    return of_folder(write_folder(folder, variant, toy_tiktoken(), name=name, **config))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(tokenizer, *texts, **settings):
    lines = (json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts)
    Path("a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = TokenizeSettings(jsonl_path="a.jsonl", save_path="tokens", **settings)
    summary = tokenize(config, tokenizer, "base")
    return summary, datasets.load_from_disk("tokens").to_list()


def expected(tokenizer, text):
    rule = tokenizer.row_rule
    return [*tokenizer.encode_batch([text])[0], *rule.text_end]


TEXTS = ("从前有一座山。", "Once upon a time <sop> there was <|user|> a hill.", "x")


def test_a_text_is_a_row_in_which_every_token_is_supervised(tokenizer, capsys):
    summary, rows = run(tokenizer, *TEXTS)
    prefix = tokenizer.row_rule.text_prefix
    for text, row in zip(TEXTS, rows, strict=True):
        ids = expected(tokenizer, text)
        assert row["input_ids"] == prefix + ids
        assert row["labels"] == [IGNORED] * len(prefix) + ids
        assert row["seq_len"] == len(prefix) == 2
    told = capsys.readouterr().out
    names = " ".join(special.text for special in tokenizer.row_rule.before_text)
    assert f"texts alone, each behind {names} and, where it is whole, before <" in told
    assert '3 with a field "id", which is not used' in told
    assert summary.card.template == "text"
    table, _ = load_dataset("tokens", tokenizer.row_rule)
    token_rows = TokenRows.from_table(table, tokenizer.row_rule)
    token_rows.check(200_000, "tokens")
    assert token_rows.num_labels_R.tolist() == [len(row["input_ids"]) - 2 for row in rows]
    seen = token_rows.prefix_lengths_R.tolist()
    assert set(seen) == {int(tokenizer.row_rule.prompt_sees_all)}, "no text sees what follows"


def test_the_published_beginnings_and_ends():
    """The tokenizers' own prefix before any text, and their end of text behind it."""
    found = {}
    for family in FAMILIES:
        rule = family.row_rule(family.read_settings(family.published_settings))
        found[family.name] = (rule.text_prefix, rule.text_end)
    assert found["ChatGLM2-6B"] == found["ChatGLM3-6B"] == ([64790, 64792], [2])
    assert found["GLM-4-9B"] == found["GLM-4-0414"] == ([151331, 151333], [151329])
    assert found["GLM-Edge"] == ([], [59246])
    assert found["ChatGLM-6B"] == ([130001, 130004], [130005])


def test_a_long_text_is_split_without_a_token_lost_or_an_end_that_is_none(tokenizer, capsys):
    long = " ".join(f"word {i}" for i in range(30))
    summary, rows = run(tokenizer, "short", long, max_seq_length=40)
    whole, end = expected(tokenizer, long), tokenizer.row_rule.text_end[0]
    parts = [row["input_ids"][2:] for row in rows[1:]]
    assert [id_ for part in parts for id_ in part] == whole
    assert len(parts) >= 2
    assert [len(part) for part in parts[:-1]] == [38] * (len(parts) - 1)
    assert [part[-1] == end for part in parts] == [False] * (len(parts) - 1) + [True]
    assert summary.card.source_rows().tolist() == [1] + [2] * len(parts)
    assert summary.card.rows_cut == {"text": [], "split": [2]}
    assert "1 split into rows of at most 40 tokens: row 2" in capsys.readouterr().out


def test_an_end_that_would_be_a_row_by_itself_is_left_out(tokenizer):
    text = "abcdefgh"
    num = len(tokenizer.encode_batch([text])[0])
    (row,) = run(tokenizer, text, "x", max_seq_length=num + 2)[1][:1]
    assert row["input_ids"][2:] == expected(tokenizer, text)[:-1]
    assert len(run(tokenizer, text, "x", max_seq_length=num + 2)[1]) == 2
    assert run(tokenizer, text, "x", max_seq_length=num + 3)[1][0]["input_ids"][-1:] == (
        tokenizer.row_rule.text_end
    )


def test_a_long_text_may_be_cut_and_then_has_no_end(tokenizer, capsys):
    summary, rows = run(tokenizer, "some words " * 20, "x", max_seq_length=20, too_long="truncate")
    assert rows[0]["input_ids"][2:] == expected(tokenizer, "some words " * 20)[:18]
    assert summary.card.rows_cut == {"text": [1]}
    assert summary.card.num_targets_lost == len(expected(tokenizer, "some words " * 20)) - 18
    assert "1 kept, text cut to 20 tokens: row 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row teaches the end of a text, since all are cut; set"):
        run(tokenizer, "some words " * 20, max_seq_length=20, too_long="truncate")
    assert run(tokenizer, "some words " * 20, max_seq_length=20, too_long="split")[1]


@pytest.mark.parametrize("settings", [{"too_long": "drop"}, {"skip_overlength": True}])
def test_a_long_text_may_be_dropped(tokenizer, settings):
    summary, rows = run(tokenizer, "some words " * 20, "x", max_seq_length=20, **settings)
    assert len(rows) == 1
    assert summary.card.rows_out["overlength"] == [1]


def test_a_long_text_may_be_an_error(tokenizer):
    with pytest.raises(UserError, match=r"a.jsonl:2 \(row 2\): has \d+ tokens, more than max_seq"):
        run(tokenizer, "x", "some words " * 20, max_seq_length=20, too_long="error")


def test_blank_texts_are_dropped_and_counted(tokenizer):
    summary, rows = run(tokenizer, " \n", "x")
    assert (len(rows), summary.card.rows_out["empty"]) == (1, [1])


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"learn": "last"}, "learn last is for conversations"),
        ({"keep_empty": True}, "keep_empty is for rows of a question"),
    ],
)
def test_settings_without_effect_on_texts_are_refused(tokenizer, settings, what):
    with pytest.raises(UserError, match=what):
        run(tokenizer, "x", **settings)


def test_a_layout_without_prefix_begins_with_the_text_whose_first_token_nothing_predicts():
    from glmtune.models.glm.layouts import LAYOUTS

    rule = LAYOUTS["glm-edge"].row_rule()
    assert (rule.text_prefix, rule.text_start) == ([], 1)
    ids = np.array([7, 8, 59246])
    rows = TokenRows(ids, np.array([0, 3]), np.array([1]), rule, np.array([IGNORED, 8, 59246]))
    rows.check(59264, "tokens")
    assert rows.num_labels_R.tolist() == [2]


def test_texts_are_shown_validated_and_converted(capsys):
    run(load_row_tokenizer(str(GLM_TINY)), *TEXTS)
    capsys.readouterr()
    base = ["--base", str(GLM_TINY)]
    assert main(["inspect", "a.jsonl", "--limit", "1", *base]) == 0
    told = capsys.readouterr().out
    assert told.count(' * "') + told.count(" * <") == told.count("\n   ") - 2, (
        "all but the two ids of the prefix"
    )
    assert main(["validate", "a.jsonl"]) == 0
    assert "usable, but look at\n    1 special token as text\n" in capsys.readouterr().out
    assert main(["convert", "--data_path", "a.jsonl", "--save_path", "b.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("b.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"text": text} for text in TEXTS]


def test_a_question_without_an_answer_is_no_text(capsys):
    Path("a.jsonl").write_text('{"instruction": "q", "text": "t"}\n' * 2, encoding="utf-8")
    assert main(["validate", "a.jsonl"]) == 2
    assert 'field "output" is missing' in capsys.readouterr().out


def test_special_tokens_that_a_text_spells_are_counted_and_become_ids_on_demand(tokenizer, capsys):
    name = "[MASK]"
    (id_,) = tokenizer.special_names[name]
    _, (row,) = run(tokenizer, f"a {name} b")
    assert f"1 row spells special tokens as text: {name} 1" in capsys.readouterr().out
    summary, (special,) = run(tokenizer, f"a {name} b", allow_special=True)
    assert id_ in special["labels"]
    assert id_ not in row["labels"]
    assert summary.card.spelled_specials == {name: 1}
    assert "which become their ids (allow_special)" in capsys.readouterr().out
    run(tokenizer, "x")
    assert not tokenizer.allow_special


def test_thoughts_are_for_conversations(tokenizer):
    with pytest.raises(UserError, match="thoughts is for conversations, and in these texts"):
        run(tokenizer, "x", thoughts="drop")


def test_texts_whose_last_parts_are_their_ends_alone_teach_no_end(tokenizer):
    """Such a part is left out, as an end by itself says nothing of where texts end."""
    text = "some words " * 20
    length = 2 + len(tokenizer.encode_batch([text])[0])
    with pytest.raises(UserError, match=r"no row teaches the end of a text, .* cut; raise max_seq"):
        run(tokenizer, text, max_seq_length=length)
    assert len(run(tokenizer, text, "x", max_seq_length=length)[1]) == 2
