"""Every verb on every model of the younger family: tiny weights, real vocabularies."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from glm_folders import PUBLISHED_SIZES, write_folder, write_model

from glmtune.cli import main
from glmtune.data.dataset import load_dataset
from glmtune.general.items import own_set
from glmtune.general.scores import GeneralRows
from glmtune.models.families import FAMILIES, find_family
from glmtune.models.loading import load_base_model, load_tokenizer

# Name of the entry, whose layout, and the vocabulary in ../shared/golden; None for one of bytes.
MODELS = {
    "chatglm2-6b": ("ChatGLM2-6B", True, "glm3_tokenizer.model"),
    "chatglm3-6b": ("ChatGLM3-6B", True, "glm3_tokenizer.model"),
    "glm-4-9b": ("GLM-4-9B", True, "glm/glm4_tokenizer.model"),
    "glm-4-9b-hf": ("GLM-4-9B", False, "glm/glm4_tokenizer.model"),
    "glm-4-9b-0414": ("GLM-4-0414", False, "glm/glm4_tokenizer.model"),
    "glm-edge-1.5b": ("GLM-Edge", False, None),
}
RECORDS = [
    {"instruction": f"把数字写两遍：{i}" if i % 2 else f"Write the number twice: {i}", "input": "",
     "output": f"{i} {i}"}
    for i in range(24)
]  # fmt: skip
ROWS = {
    "chatglm2-6b": (["[gMASK]", "sop"], [2]),
    "chatglm3-6b": (["[gMASK]", "sop", "<|user|>"], [2]),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    name, published, vocabulary = MODELS[request.param]
    family = next(family for family in FAMILIES if family.name == name)
    folder = tmp_path_factory.mktemp(f"{request.param}_") / "base"
    if vocabulary is not None:
        vocabulary = request.getfixturevalue("shared") / "golden" / vocabulary
    return write_model(folder, family, vocabulary, published=published)


@pytest.fixture
def few_questions(monkeypatch):
    """Eleven of the 408 general questions: with 151,552 logits a token, all take most of a test."""
    whole = own_set()
    few = replace(whole, items=whole.items[:: len(whole.items) // 10])
    monkeypatch.setattr("glmtune.general.items.own_set", lambda: few)


@pytest.fixture
def here(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.json").write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
    return str(model)


def glmtune(line, base):
    assert main([*line.split(), "--base", base]) == 0


def test_from_records_to_an_adapter_and_on(here, capsys):
    assert main(["convert", "--data_path", "data.json", "--save_path", "rows.jsonl"]) == 0
    glmtune("tokenize --jsonl_path rows.jsonl --save_path rows", here)
    assert "'s own conversations; words that convert puts around" in capsys.readouterr().out
    table, card = load_dataset("rows")
    tokenizer = load_tokenizer(here)
    rule = tokenizer.row_rule
    for row in table.to_pylist():
        prompt, answer = row["input_ids"][: row["seq_len"]], row["input_ids"][row["seq_len"] :]
        assert prompt[: len(rule.before_prompt)] == [s.id for s in rule.before_prompt]
        assert answer[-1:] == rule.end_ids
        assert answer[: len(rule.before_answer)] == [s.id for s in rule.before_answer]
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert text.split()[0] == text.split()[1]
        assert "Instruction:" not in tokenizer.decode(prompt)
    assert card.tokenizer_sha256 == tokenizer.vocab_hash
    assert card.template == "conversation"

    losses = {}
    for layout, more in (("padded", ""), ("packed", " --tokens_per_step 1024")):
        line = f"train --dataset_path rows --output_dir {layout} --layout {layout}{more} "
        line += "--max_steps 4 --learning_rate 0.02 --lora_dropout 0 --logging_steps 1 "
        line += "--per_device_train_batch_size 24 --use_cpu true --report_to none "
        glmtune(line + "--lora_target all --eval_ratio 0", here)
        lines = Path(layout, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[layout] = [json.loads(line)["loss"] for line in lines if "loss" in line]
    assert losses["packed"] == pytest.approx(losses["padded"], abs=1e-4)
    assert losses["packed"][-1] < losses["packed"][0] - 0.5
    capsys.readouterr()

    answering = "--max_new_tokens 4 --use_cpu true"
    glmtune(f"infer --data_path data.json --adapter packed --limit 3 {answering}", here)
    glmtune(
        f"compare --data_path data.json --adapter packed --limit 3 --general_set false {answering}",
        here,
    )
    assert main(["check", "packed", "--base", here, "--use_cpu", "true", "--limit", "2"]) in (0, 1)
    glmtune("merge --adapter packed --save_path merged", here)
    merged = load_base_model("merged")
    assert (
        find_family(merged.config.to_dict()).name
        == find_family(load_base_model(here).config.to_dict()).name
    )
    assert load_tokenizer("merged").row_rule == rule


def test_plan_and_doctor(here, capsys):
    glmtune("plan --card 4090 --num_rows 100 --row_length 64", here)
    assert "fits" in capsys.readouterr().out
    main(["doctor", "--base", here, "--use_cpu", "true"])
    assert "0 problem(s)" in capsys.readouterr().out


def test_a_chat_is_asked_in_the_models_own_layout(here, monkeypatch, capsys):
    lines = iter(["你好", "/format", "再说一遍", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    glmtune("chat --max_new_tokens 3 --use_cpu true", here)
    out = capsys.readouterr().out
    assert "base is asked in the format chat" in out


def test_all_general_questions_become_rows(here):
    base = load_base_model(here)
    rows = GeneralRows.of(own_set(), load_tokenizer(here), base.config.max_position_embeddings)
    assert len(rows.general.items) == 408
    assert (rows.rows.num_labels_R > 0).all()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_each_recipe_runs(here, root, model, few_questions, monkeypatch, language, capsys):
    """The two commands in a recipe's head, with this base, few steps, and short answers."""
    name = model.parent.name.rpartition("_")[0]
    if name.endswith("-hf"):
        pytest.skip("the same recipe runs on the other layout")
    recipe = root / "recipes" / f"{name}-alpaca-{language}.yaml"
    sections = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    os.makedirs(os.path.dirname(sections["tune"]["data_path"]))
    os.rename("data.json", sections["tune"]["data_path"])
    few = ["--base", here, "--use_cpu", "true", "--max_new_tokens", "3"]
    tune = ["--max_steps", "1", "--limit", "1", "--per_device_train_batch_size", "4"]
    assert main(["tune", str(recipe), *few, *tune]) in (0, 1)
    out = capsys.readouterr().out
    assert Path(sections["tune"]["out"], "tune.html").is_file(), out
    lines = iter(["你好", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", str(recipe), *few]) == 0
    assert "tuned is asked in the format chat, as its run taught it" in capsys.readouterr().out


def test_a_template_that_differs_is_shown_before_anything_starts(
    shared, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    template = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    vocabulary = (shared / "golden/glm/glm4_tokenizer.model").read_bytes()
    write_folder(Path("base"), "glm4", vocabulary, template=template, **PUBLISHED_SIZES)
    Path("rows.jsonl").write_text('{"context": "q", "target": "a"}\n')
    glmtune("tokenize --jsonl_path rows.jsonl --save_path rows", "base")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "note: chat template: differs from the rows at token 4 of one turn:"
    assert told[1].startswith("note:   rows:     151331 '[gMASK]' 151333 '<sop>' 151336")
    assert r"198 '\n' 10229 'Why'" in told[1]
    assert "151336 '<|user|>' 10229 'Why'" in told[2]
    assert len(told) == 3
