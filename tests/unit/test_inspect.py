"""`glmtune inspect`: rows as the model sees them, by the collators of training."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from glm_folders import toy_tiktoken, write_folder

from glmtune.cli import main
from glmtune.config.settings import InspectSettings
from glmtune.data.conversations import IGNORED
from glmtune.data.dataset import load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.evaluation import inspect as inspecting
from glmtune.evaluation.row_view import view_rows
from glmtune.models.glm.encoder import of_folder
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY
from glmtune.training.batches import collate

TINY = ["--base", str(GLM_TINY)]
TOKEN = re.compile(r"^ +(\d+) +(\d+) +([\d,]+) ([*= ]) (.+)$")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*rows, name="a.jsonl"):
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return name


def talk(*texts, **of_last):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    turns[-1] |= of_last
    return {"messages": turns}


def shown(capsys, *arguments):
    """The heads of the rows, and for each row its tokens: place, id, positions, mark, text."""
    capsys.readouterr()
    assert main(["inspect", *arguments, *TINY]) == 0
    heads, rows = [], []
    for line in capsys.readouterr().out.splitlines()[1:]:
        if found := TOKEN.match(line):
            rows[-1].append(found.groups())
        elif not line.startswith(" "):
            heads.append(line)
            rows.append([])
    return heads, rows


def test_rows_of_a_file_are_those_that_tokenize_writes(capsys):
    path = write(talk("Name a tree.", "Oak."), talk("Hello", "Hi", "And?", "Well."), talk("a", "b"))
    heads, rows = shown(capsys, path, "--limit", "2")
    assert heads == ["a.jsonl:1 (row 1)", *(f"a.jsonl:2 (row 2), part {n} of 2" for n in (1, 2))]
    assert main(["tokenize", path, "--save_path", "rows", *TINY]) == 0
    for tokens, row in zip(rows, load_dataset("rows")[0].to_pylist(), strict=False):
        assert [int(place) for place, *_ in tokens] == list(range(len(row["input_ids"])))
        assert [int(id_) for _, id_, *_ in tokens] == row["input_ids"]
        marks = [mark == "*" for *_, mark, _ in tokens]
        assert marks == [label != IGNORED for label in row["labels"]]
        prefix = [mark for *_, mark, _ in tokens].count("=")
        assert prefix == row["seq_len"] - 1
        # Two streams: the first stays where the prompt ends, the second counts from there.
        assert tokens[-1][2] == f"{prefix - 1},{len(tokens) - prefix}"
    assert [text for *_, mark, text in rows[0] if mark == "*"][-1] == "<eop>"
    heads, of_folder = shown(capsys, "rows", "--limit", "2")
    assert heads == ["rows (row 1)", "rows (row 2)"]
    assert of_folder == rows[:2]


def test_rows_of_a_context_and_a_target_are_shown_as_well(capsys):
    ((_,), (tokens,)) = shown(capsys, write({"context": "a", "target": "b"}))
    tokenizer = load_tokenizer(str(GLM_TINY))
    rule = tokenizer.row_rule
    (context,), (target,) = (tokenizer.encode_batch([text]) for text in "ab")
    assert [int(id_) for _, id_, *_ in tokens] == rule.prompt(context) + rule.answer(target)
    assert [text for *_, text in tokens if text.startswith(("[", "<"))] == [
        "[gMASK]", "<sop>", "<eop>"
    ]  # fmt: skip


def test_rows_that_are_left_out_say_why(capsys):
    tools = talk("a", "b") | {"tools": [{"name": "f"}]}
    path = write(talk("a", "b", loss=False), talk("a", "b " * 99), talk("a", "b"), tools)
    flags = ["--max_seq_length", "40", "--limit", "9", "--on_bad_row", "skip"]
    heads, rows = shown(capsys, path, *flags)
    assert heads[:3] == [
        "a.jsonl:1 (row 1): dropped, nothing is supervised",
        "a.jsonl:2 (row 2): dropped, too long",
        "a.jsonl:3 (row 3)",
    ]
    assert heads[3].startswith("a.jsonl:4 (row 4): bad, tools, which this base knows none of")
    assert [bool(tokens) for tokens in rows] == [False, False, True, False]


def test_a_folder_of_another_tokenizer_is_refused(capsys):
    path = write(talk("a", "b"))
    assert main(["tokenize", path, "--save_path", "rows", *TINY]) == 0
    card = Path("rows", "glmtune_data.json")
    card.write_text(
        re.sub(r'"tokenizer_sha256": ".{8}', '"tokenizer_sha256": "00000000', card.read_text())
    )
    assert main(["inspect", "rows", *TINY]) == 2
    assert "tokenised with another tokenizer" in capsys.readouterr().err


def test_what_is_shown_is_what_the_passes_get(tmp_path):
    """Ids, labels and padding of the padded batch; positions of the pack, which count per row."""
    encoder = of_folder(
        write_folder(tmp_path / "glm4", "glm4", toy_tiktoken(), padded_vocab_size=70_000)
    )
    encoder.decode = encoder.byte_pairs.decode
    ids = [encoder.conversation_ids([]), encoder.encode_batch(["你好, 哪个"])[0]]
    lengths = [len(row) for row in ids]
    rows = TokenRows(
        ids_T=np.concatenate(ids),
        starts_R1=np.cumsum([0, *lengths]),
        prompt_lengths_R=np.array([1, 1]),
        rule=encoder.row_rule,
    )
    batch = collate(rows, np.array([0, 1]))
    found = view_rows([("one", None), ("out", "why"), ("two", None)], rows, encoder)
    assert [(row.where, row.fate) for row in found] == [
        ("one", None),
        ("out", "why"),
        ("two", None),
    ]
    for place, row in enumerate([found[0], found[2]]):
        assert [token.id for token in row.tokens] == ids[place]
        labels = [t.id if t.is_supervised else IGNORED for t in row.tokens]
        assert labels + [IGNORED] * row.padding == batch["labels"][place].tolist()
        assert [t.positions for t in row.tokens] == [(i,) for i in range(lengths[place])]
    assert [row.start for row in found] == [0, 0, lengths[0]]
    texts = [token.text for token in found[2].tokens]
    assert "".join(texts) == "你好, 哪个"
    assert "\ufffd" not in texts
    assert "" in texts


def test_figures_of_all_rows(capsys):
    rows = [talk("q", "An answer."), talk("问", "答案。", "再问", "<think>\n想\n</think>好的")]
    path = write(*rows, talk("q", "no", loss=False))
    assert main(["inspect", path, "--limit", "1", "--stats", "true", *TINY]) == 0
    told = capsys.readouterr().out
    assert "rows        3; 3 teach the end of an answer, 1 a thought" in told
    assert "languages   2 Chinese, 1 English, 0 other" in told
    assert "turns       2 in 1 rows, 4 in 1 rows of the file" in told
    assert "answers     1 in 3 rows" in told
    assert "tools       in 0 rows of the file" in told
    assert "1 answers begin with a thought, which is text to this base" in told
    assert main(["tokenize", path, "--save_path", "rows", *TINY]) == 0
    capsys.readouterr()
    assert main(["inspect", "rows", "--stats", "true", "--json_path", "b.json", *TINY]) == 0
    told = capsys.readouterr().out
    assert "languages   2 Chinese, 1 English, 0 other" in told
    assert "turns" not in told
    report = json.loads(Path("b.json").read_text())
    dataset = load_dataset("rows")[0].to_pylist()
    assert [row["input_ids"] for row in report["rows"]] == [row["input_ids"] for row in dataset]
    assert [row["labels"] for row in report["rows"]] == [row["labels"] for row in dataset]
    assert report["stats"]["num_ends"] == 3
    assert report["stats"]["supervised_share"] == pytest.approx(
        sum(label != IGNORED for row in dataset for label in row["labels"])
        / sum(len(row["labels"]) for row in dataset)
    )


def test_rows_that_teach_hardly_anything_are_refused_by_every_door(capsys):
    """Of a data set made elsewhere, with labels and without."""
    reason = "no row teaches the end of an answer"
    path = write({"context": "a", "target": "b" * 300}, {"context": "a", "target": "c" * 300})
    flags = ["--max_seq_length", "8", *TINY]
    assert main(["tokenize", path, "--save_path", "rows", *flags]) == 2
    assert reason in capsys.readouterr().err
    assert main(["inspect", path, "--stats", "true", *flags]) == 0
    assert f"refused     by tokenize and train: {reason}" in capsys.readouterr().out
    assert (
        main(["tokenize", write(talk("a", "b"), name="b.jsonl"), "--save_path", "rows", *TINY]) == 0
    )
    dataset = load_dataset("rows")[0].to_pylist()
    whole = dataset[0]["input_ids"]
    for rows in (
        [{"input_ids": whole[:-1] + more, "seq_len": dataset[0]["seq_len"]} for more in ([], [9])],
        [dataset[0] | {"labels": [IGNORED] * (len(whole) - 1) + [IGNORED]}],
    ):
        save(rows)
        train = "train --dataset_path elsewhere --output_dir out --max_steps 1 --report_to none"
        assert main([*train.split(), "--use_cpu", "true", *TINY]) == 2
        assert f"elsewhere: {reason}" in capsys.readouterr().err
        assert not Path("out").exists()
        assert main(["inspect", "elsewhere", *TINY]) == 0
        assert f"refused     by tokenize and train: {reason}" in capsys.readouterr().out
    long = {"input_ids": [whole[0]] * 600 + whole, "seq_len": dataset[0]["seq_len"] + 600}
    save([long])
    assert main([*train.split(), "--use_cpu", "true", *TINY]) == 2
    assert "are supervised, so a run would teach little" in capsys.readouterr().err


def save(rows):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk("elsewhere")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


HOSTILE = '<script>alert(1)</script> "><img src=x onerror=alert(2)> \x1b[31mred \u202e <sop>'


def test_the_page_holds_the_same_tokens_and_no_record_acts(capsys):
    path = write(talk(HOSTILE, f"{HOSTILE} 好"), talk("q", "a"), talk("q", "x", loss=False))
    flags = ["--limit", "9", "--html_path", "p.html", "--json_path", "p.json"]
    assert main(["inspect", path, *flags, *TINY]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\u202e" not in told
    page, report = Page(Path("p.html").read_text("utf-8")), json.loads(Path("p.json").read_text())
    tokens = [attrs for tag, attrs in page.tags if tag == "i" and "data-n" in attrs]
    assert [int(t["data-n"]) for t in tokens] == [
        id_ for row in report["rows"] for id_ in row["input_ids"]
    ]
    taught = ["s" in t.get("class", "").split() for t in tokens]
    assert taught == [i != IGNORED for row in report["rows"] for i in row["labels"]]
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1
    assert "img" not in names
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    assert "dropped, nothing is supervised" in page.text
    assert "Rows as the model sees them" in page.text
    assert "模型眼中的训练数据" in page.text
    assert "spells special tokens as text: <sop> 1" in page.text


def test_the_page_says_that_rows_are_refused():
    path = write({"context": "a", "target": "b" * 99})
    flags = ["--max_seq_length", "8", "--html_path", "p.html", *TINY]
    assert main(["inspect", path, *flags]) == 0
    text = Path("p.html").read_text("utf-8")
    assert '<p class="verdict alarm">' in text
    assert "Refused by tokenize and train: no row teaches the end of an answer" in text
    flags = ["--skip_overlength", "true", *flags]
    assert main(["inspect", path, *flags]) == 0
    assert "No row is kept." in Path("p.html").read_text("utf-8")


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_gets_colours_unless_it_wants_none(plain, capsys, monkeypatch):
    path = write(talk("q \x1b[31m", "a"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1" if plain else "")
    inspecting.inspect(InspectSettings(jsonl_path=path, base=str(GLM_TINY)))
    told = capsys.readouterr().out
    assert ("\x1b[32m" in told) == (not plain)
    assert "\x1b[31m" not in told


def test_rows_are_not_written_over(capsys):
    path = write(talk("q", "a"))
    for flags in (["--html_path", path], ["--html_path", "x", "--json_path", "x"]):
        assert main(["inspect", path, *flags, *TINY]) == 2
        assert "html_path and json_path have to differ" in capsys.readouterr().err
    assert Path(path).read_text() == json.dumps(talk("q", "a"))


def test_each_row_of_a_conversation_that_became_several_is_shown(capsys):
    path = write(talk("q", "a", "r", "b"), talk("q", "no", loss=False), talk("s", "c"))
    assert main(["inspect", path, "--json_path", "a.json", *TINY]) == 0
    told = capsys.readouterr().out
    assert "a.jsonl:1 (row 1), part 1 of 2\n" in told
    report = json.loads(Path("a.json").read_text())
    places = [row["where"].partition(" ")[2] for row in report["rows"]]
    assert places == ["(row 1), part 1 of 2", "(row 1), part 2 of 2", "(row 2)", "(row 3)"]
    assert main(["tokenize", path, "--save_path", "rows", *TINY]) == 0
    trained = [row["input_ids"] for row in load_dataset("rows")[0].to_pylist()]
    assert [row["input_ids"] for row in report["rows"] if not row["left_out"]] == trained


def test_what_is_cut_or_left_out_is_told(capsys):
    """With each row that is shown, and of all rows as tokenize tells it."""
    rows = [talk("q", "a", "r", "b " * 40), talk("q " * 60, "a"), talk("q", "a")]
    rows[2]["messages"][0]["role"] = "nobody"
    path = write(*rows)
    flags = ["--max_seq_length", "30", "--on_bad_row", "skip", "--html_path", "p.html"]
    assert main(["inspect", path, *flags, *TINY]) == 0
    told = capsys.readouterr().out
    assert "a.jsonl:1 (row 1), turns cut\n" in told
    assert "a.jsonl:2 (row 2): dropped, too long" in told
    lines = ("1 dropped, longer than 30 tokens: row 2", "1 bad, skipped: row 3")
    for line in (*lines, "1 kept, turns cut or left out to be within 30 tokens: row 1"):
        assert f"  {line}\n" in told
        assert line in Path("p.html").read_text("utf-8")
    path = write({"instruction": "q", "output": "a " * 40})
    assert main(["inspect", path, "--max_seq_length", "30", "--stats", "true", *TINY]) == 0
    told = capsys.readouterr().out
    assert "a.jsonl:1 (row 1), target cut\n" in told
    assert "1 kept, target cut to 30 tokens: row 1" in told


def test_a_file_of_which_no_row_is_kept_is_refused(capsys):
    path = write(talk("q", "a", loss=False))
    assert main(["inspect", path, "--stats", "true", *TINY]) == 0
    told = capsys.readouterr().out
    assert "1 dropped, nothing is supervised: row 1" in told
    assert "refused     by tokenize and train: a.jsonl: no row is left: 0 have an empty" in told
    assert main(["tokenize", path, "--save_path", "rows", *TINY]) == 2
    assert capsys.readouterr().err.strip().removeprefix("error: ") in told


def test_the_advice_for_rows_with_long_questions_is_of_use(capsys):
    """A smaller max_seq_length cuts the question of a record, and drops a conversation."""
    path = write({"instruction": "q " * 900, "output": "a"})
    command = ["tokenize", path, "--save_path", "rows", *TINY]
    assert main([*command, "--max_seq_length", "1024"]) == 2
    assert "cut what stands before them with a smaller --max_seq_length" in capsys.readouterr().err
    assert main([*command, "--max_seq_length", "64"]) == 0
    write(talk("q " * 900, "a"))
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "--learn each, or shorten what stands before them, and" in told
    assert "max_seq_length" not in told
