"""lm-evaluation-harness on the younger family: the figures of its own model type, and chats."""

import json
import sys

import pytest
import torch
from glm_folders import write_model
from torch.nn import functional as F

from glmtune.models.families import FAMILIES
from glmtune.models.resolve import GLM_TINY

pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface")

MODELS = {
    "chatglm2": ("ChatGLM2-6B", True, "glm3_tokenizer.model"),
    "chatglm3": ("ChatGLM3-6B", True, "glm3_tokenizer.model"),
    "glm4": ("GLM-4-9B", True, "glm/glm4_tokenizer.model"),
    "glm4-0414": ("GLM-4-0414", False, "glm/glm4_tokenizer.model"),
    "glm-edge": ("GLM-Edge", False, None),
}
PAIRS = [
    (f"{place}. Q: {question}\nA:{' ' * (place % 3 == 1)}", f"{' ' * (place % 3 != 1)}{answer}")
    for place, (question, answer) in enumerate(
        [("What is 3 + 14?", "17"), ("三加十四是多少？", "十七"), ("Name a tree.", "Oak or beech."),
         ("说一种花。", "荷花"), ("Who <|user|> are you?", "a helper\nof 17 words")] * 10
    )
]  # fmt: skip
CHAT = [{"role": "user", "content": "你好，说 17。"}]


def write(kind, shared, folder):
    name, published, vocabulary = MODELS[kind]
    family = next(family for family in FAMILIES if family.name == name)
    vocabulary = vocabulary and shared / "golden" / vocabulary
    return write_model(folder, family, vocabulary, published=published)


@pytest.fixture(scope="module", params=MODELS)
def folder(request, shared, tmp_path_factory):
    return write(request.param, shared, tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="module")
def ours(folder):
    from glmtune.integrations.lm_eval import GlmtuneLM

    return GlmtuneLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)


@pytest.fixture(scope="module")
def theirs(ours):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=ours.model, tokenizer=ours.tokenizer, batch_size=8, backend="causal")


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def test_contexts_are_scored_as_by_lm_evals_own_model_type(ours, theirs):
    assert len(PAIRS) == 50
    requests = [request("loglikelihood", *pair) for pair in PAIRS]
    found = ours.loglikelihood(requests, disable_tqdm=True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for (score, _), (wanted, _) in zip(found, expected, strict=True):
        assert score == pytest.approx(wanted, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len({round(score, 2) for score, _ in found}) > 40


def test_texts_are_generated_as_by_lm_evals_own_model_type(ours, theirs):
    until = {"until": ["。"], "max_gen_toks": 5, "do_sample": False}
    requests = [request("generate_until", context, dict(until)) for context, _ in PAIRS[:10]]
    found = ours.generate_until(requests, disable_tqdm=True)
    assert found == theirs.generate_until(requests, disable_tqdm=True)
    assert all(found)


def score_by_hand(model, context, answer):
    with torch.inference_mode():
        logits = model.model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


def test_an_answer_to_a_chat_is_scored_as_in_a_row_of_training(ours):
    context = ours.apply_chat_template(CHAT)
    tokenizer, rule = ours.tokenizer, ours.tokenizer.row_rule
    (question,) = tokenizer.encode_contexts([CHAT[0]["content"]])
    start = [special.id for special in rule.before_answer]
    prompt = rule.prompt(question) + start
    assert ours.tok_encode(context) == prompt
    (answer,) = tokenizer.encode_batch(["17 荷花"])
    requests = [request("loglikelihood", context, "17 荷花")]
    ((score, _),) = ours.loglikelihood(requests, disable_tqdm=True)
    if rule.after_prompt:  # else the answer's first piece has no blank, since text precedes it
        assert score == pytest.approx(score_by_hand(ours, prompt, answer), abs=1e-3)
    arguments = {"until": ["。"], "max_gen_toks": 3, "do_sample": False}
    (text,) = ours.generate_until([request("generate_until", context, arguments)], True)
    ids = torch.tensor([prompt])
    made = ours.model.generate(ids, max_new_tokens=3, do_sample=False)[0, len(prompt) :]
    assert text == tokenizer.decode(made, skip_special_tokens=True).split("。")[0]


@pytest.mark.parametrize("text", ["Oak. 荷花 17", ""])
def test_texts_behind_nothing_are_scored_behind_the_prefix(ours, text):
    prefix = ours.tokenizer.encode("")
    if not prefix:
        assert ours.tokenizer.revision == "glm-edge"
        prefix = [ours.tokenizer.eos_token_id]  # as lm-eval's own model type does
    (ids,) = ours.tokenizer.encode_batch([text or "Oak"])
    expected = score_by_hand(ours, prefix, ids)
    if text:
        (found,) = ours.loglikelihood_rolling([request("loglikelihood_rolling", text)], True)
    else:
        ((found, _),) = ours.loglikelihood([request("loglikelihood", "", "Oak")], True)
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_command_runs_a_task_with_the_chat_template(
    shared, own_tasks_only, tmp_path, monkeypatch, capsys
):
    from glmtune.integrations.lm_eval import main

    folder = write("chatglm3", shared, tmp_path / "base")
    lines = [{"question": "Name a tree.", "choices": ["Oak.", "17"]}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "trees", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "doc_to_text": "{{question}}", "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}", "doc_to_target": 0, "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "trees.yaml").write_text(json.dumps(task))
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "glmtune", "--model_args", f"pretrained={folder}", "--device", "cpu"]
    arguments += ["--tasks", "trees", "--include_path", str(tmp_path), "--apply_chat_template"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--batch_size", "2"])
    assert main() == 0
    assert "|trees" in capsys.readouterr().out


def test_what_the_embedded_model_reads_is_unchanged():
    from glmtune.integrations.lm_eval import GlmtuneLM

    model = GlmtuneLM(pretrained=str(GLM_TINY), dtype="float32", device="cpu")
    specials = [model.tokenizer.gmask_token_id, model.tokenizer.bos_token_id]
    assert model.tok_encode("") == specials
    assert model.tok_encode("Oak")[-2:] == specials
    context, answer = model._encode_pair("Name a tree.", " Oak.")
    assert context == model.tokenizer.encode("Name a tree.")
    assert answer == model.tokenizer.encode("Oak.", add_special_tokens=False)
