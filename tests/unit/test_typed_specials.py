"""Names of special tokens that somebody typed: text, unless `allow_special` says otherwise."""

import json
from pathlib import Path

import pytest
from glm_folders import encoder_of, toy_tiktoken, write_folder

from glmtune.cli import main
from glmtune.config.settings import TokenizeSettings
from glmtune.data.conversations import Example, Turn
from glmtune.data.dataset import DataCard, load_dataset
from glmtune.data.spelled import Spelled
from glmtune.data.tokenizing import tokenize
from glmtune.generation.prompts import prompt_ids
from glmtune.models.base_files import load_row_tokenizer
from glmtune.models.families import FAMILIES, special_names
from glmtune.models.glm.encoder import of_folder
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY

TINY = ["--base", str(GLM_TINY)]
NAMES = ["<sop>", "<eop>", "[gMASK]", "[MASK]", "<|user|>", "<|endoftext|>", "<|observation|>"]
TYPED = " and ".join(NAMES)
TOOL = {"name": "f", "description": TYPED, "parameters": {"type": "object"}}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def toy(root, variant):
    """A folder of bytes in a younger layout."""
    rows = {"padded_vocab_size": 70_000} if variant == "glm4" else {"vocab_size": 70_000}
    return of_folder(write_folder(root / variant, variant, toy_tiktoken(), **rows))


@pytest.fixture(scope="module", params=["chatglm-6b", "chatglm2", "chatglm3", "glm4", "glm4-0414"])
def tokenizer(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("typed")
    if request.param == "chatglm-6b":
        return load_row_tokenizer(str(GLM_TINY))
    if request.param.startswith("glm4"):
        return toy(root, request.param)
    return encoder_of(request.getfixturevalue("shared"), root, request.param)


def specials_in(tokenizer, ids):
    meant = {id_ for ids in tokenizer.special_names.values() for id_ in ids}
    meant |= set(tokenizer.row_rule.special_ids.values()) - set(newline_ids(tokenizer))
    return [id_ for id_ in ids if id_ in meant]


def newline_ids(tokenizer):
    return getattr(tokenizer, "newline_ids", ())


def talk(text):
    turns = [("system", text), ("user", text), ("assistant", text), ("user", text)]
    turns = [Turn(*turn) for turn in [*turns, ("assistant", text)]]
    return Example(tuple(turns)).supervise("each")


def test_no_field_makes_a_special_id(tokenizer):
    """Of a conversation, of an alpaca record's context and target, and of a prompt."""
    rule = tokenizer.row_rule
    (typed,), (plain,) = (tokenizer.encode_examples([talk(text)]) for text in (TYPED, "a"))
    assert specials_in(tokenizer, typed.input_ids) == specials_in(tokenizer, plain.input_ids)
    assert specials_in(tokenizer, plain.input_ids)
    assert not specials_in(tokenizer, tokenizer.encode_batch([TYPED])[0])
    prompts = [rule.prompt(ids) for ids in tokenizer.encode_contexts([TYPED, "a"])]
    prompts += prompt_ids(tokenizer, [TYPED, "a"])
    found = [specials_in(tokenizer, ids) for ids in prompts]
    assert found[0] == found[1] == found[2] == found[3] != []


@pytest.mark.parametrize("variant", ["glm4-0414", "chatglm3"])
def test_neither_tools_nor_calls_nor_results_make_one(variant, request, tmp_path):
    encoder = (
        encoder_of(request.getfixturevalue("shared"), tmp_path, variant)
        if variant == "chatglm3"
        else toy(tmp_path, variant)
    )

    def row(text):
        turns = (
            Turn("user", "a"),
            Turn("assistant", json.dumps({"x": text}), text),
            Turn("observation", text),
            Turn("assistant", "b"),
        )
        example = Example(turns, ({**TOOL, "description": text},)).supervise("each")
        return specials_in(encoder, encoder.encode_examples([example])[0].input_ids)

    assert row(TYPED) == row("a") != []


def test_allow_special_makes_each_its_id(tokenizer):
    names = {name: ids for name, ids in tokenizer.special_names.items() if ids}
    assert names
    tokenizer.allow_special = True
    try:
        for name, ids in names.items():
            (row,) = tokenizer.encode_batch([f"one{name}two"])
            assert specials_in(tokenizer, row) == ids
            (context,) = tokenizer.encode_contexts([f"one{name}two"])
            assert [id_ for id_ in context if id_ in ids] == ids
        whole = tokenizer.encode_batch([TYPED, "one two", ""])
        assert tokenizer.encode_batch(["", "one two"]) == [[], whole[1]]
    finally:
        tokenizer.allow_special = False
    assert tokenizer.encode_batch(["one two"]) == [whole[1]]


def test_the_names_of_the_list_are_those_of_the_tokenizers(tokenizer):
    assert set(tokenizer.special_names) <= set(special_names())
    assert {"[gMASK]", "<|user|>", "<sop>"} <= set(special_names())
    assert all(family.special_names for family in FAMILIES)


def test_what_ends_a_prompt_stays_text_where_it_may_stand_once(tmp_path):
    """Else the row would be one that training refuses."""
    Path("a.jsonl").write_text(json.dumps({"instruction": "<sop> [MASK]", "output": "[gMASK]"}))
    line = ["tokenize", "a.jsonl", "--save_path", "rows", "--allow_special", "true", *TINY]
    assert main(line) == 0
    (row,) = load_dataset("rows")[0].to_pylist()
    tokenizer = load_row_tokenizer(str(GLM_TINY))
    ids = tokenizer.row_rule.special_ids
    assert row["input_ids"].count(ids["bos"]) == row["input_ids"].count(ids["gmask"]) == 1
    assert tokenizer.id_of("[MASK]") in row["input_ids"]
    train = f"train --dataset_path rows --output_dir out --max_steps 1 --report_to none {TINY[0]}"
    assert main([*train.split(), TINY[1], "--use_cpu", "true"]) == 0


RECORDS = [
    {"instruction": "What is <|user|> and [MASK]?", "output": "a token"},
    {"instruction": "And this?", "output": "<sop>, I think"},
    {"instruction": "Nothing.", "output": "Nothing <at all> [here]"},
    {"instruction": "<|user|>", "output": "<|user|>"},
]
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": r["instruction"]},
                  {"role": "assistant", "content": r["output"]}]}
    for r in RECORDS
]  # fmt: skip


@pytest.mark.parametrize("rows", [RECORDS, CONVERSATIONS])
def test_the_summary_and_the_card_name_them(rows, tmp_path, capsys):
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoder = toy(tmp_path, "glm4")
    settings = TokenizeSettings(jsonl_path="a.jsonl", save_path="rows")
    tokenize(settings, encoder, "base")
    told = "3 rows spell special tokens as text: <|user|> 2, [MASK] 1, <sop> 1\n"
    assert told in capsys.readouterr().out
    card = DataCard.read(Path("rows", "glmtune_data.json"))
    assert card.spelled_specials == {"<|user|>": 2, "[MASK]": 1, "<sop>": 1}
    assert (card.num_spelling, card.flags["allow_special"]) == (3, False)
    plain = load_dataset("rows")[0].to_pylist()
    tokenize(settings.model_copy(update={"allow_special": True}), encoder, "base")
    told = "3 rows spell special tokens, which become their ids (allow_special): <|user|> 2"
    assert told in capsys.readouterr().out
    special = load_dataset("rows")[0].to_pylist()
    assert special[0]["input_ids"].count(encoder.ids["<|user|>"]) == 3
    assert plain[0]["input_ids"].count(encoder.ids["<|user|>"]) == 2
    assert special[2] == plain[2]
    assert DataCard.read(Path("rows", "glmtune_data.json")).flags["allow_special"]


def test_validate_names_them_too(capsys):
    Path("a.jsonl").write_text("\n".join(map(json.dumps, CONVERSATIONS)))
    Path("b.json").write_text(json.dumps(RECORDS))
    assert main(["validate", "a.jsonl", "b.json", "--json_path", "report.json"]) == 0
    told = capsys.readouterr().out
    listed = "3 rows spell special tokens as text: <|user|> 2, [MASK] 1, <sop> 1"
    assert told.count(listed) == 2
    assert "a.jsonl:1 (row 1): the row spells <|user|>, [MASK], which is text" in told
    report = json.loads(Path("report.json").read_text())
    assert report["counts"]["special token as text"] == 6
    kind = "special token as text"
    found = [(p["file"], p["row"]) for p in report["problems"] if p["kind"] == kind]
    assert found == [(file, row) for file in ("a.jsonl", "b.json") for row in (1, 2, 4)]
    assert report["files"][0]["spelled_specials"]["<|user|>"] == 2


def test_answers_depend_on_it(capsys):
    """`infer` encodes prompts with it, and a file of answers made without it is not continued."""
    Path("a.jsonl").write_text(json.dumps({"instruction": "a [MASK] b", "output": "c"}))
    line = "infer --data_path a.jsonl --output_path out.jsonl --max_new_tokens 1 --use_cpu true"
    assert main([*line.split(), *TINY]) == 0
    assert main([*line.split(), *TINY, "--allow_special", "true"]) == 2
    assert "allow_special not set, this run has True" in capsys.readouterr().err
    more = ["--allow_special", "true", "--overwrite_output", "true"]
    assert main([*line.split(), *TINY, *more]) == 0
    assert json.loads(Path("out.settings.json").read_text())["allow_special"] is True


def test_prompts_hold_the_ids_where_a_verb_allows_it(monkeypatch):
    from glmtune.config.settings import ChatSettings, CheckSettings
    from glmtune.evaluation.answers import ModelChoice

    for cls, more in ((ChatSettings, {}), (CheckSettings, {"data_path": "a", "adapter": "b"})):
        for allowed in (False, True):
            settings = cls(base=str(GLM_TINY), use_cpu=True, allow_special=allowed, **more)
            settings = settings.model_copy(update={"adapter": None})
            _, tokenizer = ModelChoice.of(settings).load()
            (ids,) = prompt_ids(tokenizer, ["a [MASK] b"])
            assert (tokenizer.id_of("[MASK]") in ids) == allowed


def test_it_is_refused_where_it_has_no_effect(capsys):
    assert main(["check", "adapter", "--allow_special", "true", *TINY]) == 2
    assert "allow_special is for the records of data_path" in capsys.readouterr().err
    for line in ("train --dataset_path a --output_dir b", "merge --adapter a --save_path b"):
        assert main([*line.split(), "--allow_special", "true"]) == 2
        assert "allow_special" in capsys.readouterr().err


def test_both_classes_of_a_tokenizer_agree():
    of_rows, of_clients = load_row_tokenizer(str(GLM_TINY)), load_tokenizer(str(GLM_TINY))
    for allowed in (False, True):
        of_rows.allow_special = of_clients.allow_special = allowed
        assert of_rows.encode_batch([TYPED]) == of_clients.encode_batch([TYPED])


def test_the_longest_name_counts():
    spelled = Spelled(["<a>", "<a><b>", "<b>"])
    assert spelled.find(["<a><b>", "<b>", "<b>"]) == ["<a><b>", "<b>"]
    assert Spelled().find(["<a>"]) == []
