"""lm-evaluation-harness itself on a task of our own, with base, adapter and chat template."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from glmtune.adapters import attach_lora, save_adapter
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY

pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface")

TAUGHT = {
    "Who are you?": "I am Stone, a small helper.",
    "你是谁?": "我是小石头。",
    "Name a tree.": "Oak.",
    "说一种花": "荷花。",
}
WRONG = ["Nobody at all.", "不知道。"]


def row_of(tokenizer, question, answer):
    ids = tokenizer(question, answer)["input_ids"]
    return torch.tensor([ids]), len(tokenizer(question)["input_ids"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the embedded model that has memorised four answers."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(GLM_TINY))
    base = load_base_model(str(GLM_TINY), dtype=torch.float32)
    model = attach_lora(base, dropout=0.0, targets="all")
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=4e-3)
    rows = [row_of(tokenizer, *pair) for pair in TAUGHT.items()]
    for _ in range(60):
        for ids, start in rows:
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
            cross_entropy(logits, ids[0, start:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("taught") / "adapter"
    save_adapter(model, folder, "glm-tiny")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three tasks on the taught questions: choosing, writing, reading."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {"question": question, "choices": [WRONG[0], answer, WRONG[1]]}
        for question, answer in TAUGHT.items()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "rows.jsonl")},
        "test_split": "train",
        "doc_to_text": "{{question}}",
    }
    kinds = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 1,
            "metric_list": [{"metric": "acc"}],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[1]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{choices[1]}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    for name, settings in kinds.items():
        text = json.dumps(common | settings | {"task": name})  # JSON is YAML too
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def evaluate(tasks):
    """A function that runs lm-eval's own evaluation and returns each task's figure."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import glmtune.integrations.lm_eval  # noqa: F401

    def run(names, model_args, **flags):
        outcome = simple_evaluate(
            model="glmtune", model_args={"dtype": "float32", "device": "cpu"} | model_args,
            tasks=names, task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            bootstrap_iters=0, **flags,
        )  # fmt: skip
        return {
            name: next(v for k, v in found.items() if k.endswith(",none") and "stderr" not in k)
            for name, found in outcome["results"].items()
        }

    return run


@pytest.mark.parametrize(
    "flags", [{"batch_size": 1}, {"batch_size": 3, "apply_chat_template": True}]
)
def test_the_adapter_is_what_lm_eval_measures(evaluate, adapter, flags):
    base = {"pretrained": str(GLM_TINY)}
    tuned = evaluate(["choose", "write"], base | {"peft": str(adapter)}, **flags)
    assert tuned == {"choose": 1.0, "write": 1.0}
    assert evaluate(["write"], base, **flags) == {"write": 0.0}


@pytest.mark.parametrize("max_length", [2048, 8])
def test_rolling_scores_each_token_once_as_an_answer_to_nothing(evaluate, max_length):
    found = evaluate(["read"], {"pretrained": str(GLM_TINY), "max_length": max_length})
    tokenizer = load_tokenizer(str(GLM_TINY))
    model = load_base_model(str(GLM_TINY), dtype=torch.float32)
    total, num_bytes, room = 0.0, 0, max_length - 2
    for answer in TAUGHT.values():
        ids = tokenizer.encode(answer, add_special_tokens=False)
        start = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
        num_bytes += len(answer.encode())
        for i in range(0, len(ids), room):
            # The last window begins so early that it is full.
            first = min(i, max(0, len(ids) - room)) if i else 0
            before = ids[first - 1 : i] if i else []
            scored = ids[i : i + room]
            logits = model(input_ids=torch.tensor([start + before + scored])).logits[0]
            logits = logits[len(start) + len(before) - 1 : -1]
            total += cross_entropy(logits, torch.tensor(scored), reduction="sum").item()
    assert found["read"] == pytest.approx(math.exp(total / num_bytes), rel=1e-4)


def test_log_likelihoods_are_those_of_training_rows(adapter):
    from lm_eval.api.instance import Instance

    from glmtune.integrations.lm_eval import GlmtuneLM

    model = GlmtuneLM(pretrained=str(GLM_TINY), peft=str(adapter), dtype="float32", device="cpu")
    pairs = [*TAUGHT.items(), ("", "Oak."), ("[gMASK] <sop>", "<eop>")]
    requests = [
        Instance("loglikelihood", {}, (question, f" {answer}"), i)
        for i, (question, answer) in enumerate(pairs)
    ]
    found = model.loglikelihood(requests, disable_tqdm=True)
    for (question, answer), (score, _) in zip(pairs, found, strict=True):
        ids, start = row_of(model.tokenizer, question, answer)
        ids = ids[:, :-1]  # <eop>
        with torch.inference_mode():
            logits = model.model(input_ids=ids).logits[0, start - 1 : -1]
        loss = cross_entropy(logits, ids[0, start:], reduction="sum").item()
        assert score == pytest.approx(-loss, rel=1e-3, abs=1e-3)


@pytest.fixture
def arguments(tasks, adapter):
    """The command's arguments, for the task `choose`."""
    names = ["--model", "glmtune", "--tasks", "choose", "--include_path", str(tasks)]
    model_args = f"pretrained={GLM_TINY},peft={adapter}"
    return [*names, "--device", "cpu", "--output_path", "out", "--model_args", model_args]


@pytest.mark.slow
def test_lm_eval_command_measures_an_adapter(arguments, tmp_path):
    module = [sys.executable, "-m", "glmtune.integrations.lm_eval", *arguments]
    more = ["--apply_chat_template", "--batch_size", "2"]
    done = subprocess.run([*module, *more], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|choose" in done.stdout


@pytest.mark.parametrize(
    "more, words",
    [
        (["--model_args", "parallelize=True"], "model_args parallelize: not a setting of"),
        (["--batch_size", "auto"], "batch_size auto: give a number of rows"),
        (["--model_args", "pretrained=no/folder/here"], ""),
    ],
    ids=["setting", "batch size", "base"],
)
def test_lm_eval_command_refuses_in_one_line(
    more, words, arguments, own_tasks_only, tmp_path, monkeypatch, capsys
):
    from glmtune.integrations.lm_eval import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, *more])
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {words}")
