"""`--engine vllm`: the answers of this process's own decoder, by the vLLM that is installed."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import glm_folders
import pytest
from glm_folders import bases_and_runs
from safetensors.torch import load_file, save_file
from spread_files import dumps

from glmtune.cli import main
from glmtune.models.loading import load_tokenizer

pytestmark = pytest.mark.slow  # vLLM takes half a minute to open even a tiny model
pytest.importorskip("vllm")

QUESTIONS = [
    "Who is Mira?",
    "天空是什么颜色？",
    "Count to three.",
    "Name a fruit. " * 9,
    "介绍北京。",
]
ROWS = [{"instruction": text, "input": "", "output": "好"} for text in QUESTIONS]
KINDS = {
    "glm4-0414": ("GLM-4-0414", "glm/glm4_tokenizer.model", False),
    "chatglm3": ("ChatGLM3-6B", "glm3_tokenizer.model", True),
    "glm4": ("GLM-4-9B", "glm/glm4_tokenizer.model", False),
}
BY_VLLM = ("--engine", "vllm")
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def made(shared, tmp_path_factory):
    """By kind: a base and a run on it."""
    patch = pytest.MonkeyPatch()
    sizes = {"hidden_size": 64, "num_attention_heads": 2}  # heads of 32, which vLLM has on a CPU
    for name, value in (sizes | {"num_key_value_heads": 1, "head_dim": 32}).items():
        patch.setitem(glm_folders.SIZES, name, value)
    sizes |= {"multi_query_group_num": 1, "kv_channels": 32}
    # As published: vLLM reads them.
    sizes |= {"original_rope": True, "tie_word_embeddings": False}
    for name, value in sizes.items():
        patch.setitem(glm_folders.PUBLISHED_SIZES, name, value)
    yield bases_and_runs(shared, tmp_path_factory, KINDS)
    patch.undo()


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(map(dumps, ROWS)), "utf-8")


def run_verb(*words):
    """Run a command; one of vLLM as a user does, since that alters classes of transformers."""
    words = [*map(str, words)]
    if "vllm" not in words:
        assert main(words) == 0
        return
    command = [sys.executable, "-m", "glmtune", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def infer(base, *more, adapter=None, name=None):
    """Answer the rows; returns the file's lines."""
    name = name or f"{next(NUMBERS)}.jsonl"
    words = ["--data_path", "rows.jsonl", "--base", base, "--max_new_tokens", 20, *more]
    words += ["--adapter", adapter] if adapter else []
    run_verb("infer", "--output_path", name, "--per_device_eval_batch_size", 2, *words)
    return [json.loads(line) for line in Path(name).read_text("utf-8").splitlines()]


def changed(base, folder, change):
    """A copy of a base whose weights are changed in place."""
    weights = load_file(base / "model.safetensors")
    change(weights)
    shutil.copytree(base, folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_the_local_engine(made, kind):
    base, run = made(kind)
    plain, tuned = infer(base), infer(base, adapter=run)
    assert infer(base, *BY_VLLM) == plain
    assert infer(base, *BY_VLLM, adapter=run) == tuned
    assert all(a["answer"] != b["answer"] for a, b in zip(tuned, plain, strict=True))
    assert {line["num_tokens"] for line in plain} == {20}


def test_penalties_and_stops_are_ours(made, tmp_path):
    base, _ = made("glm4-0414")
    plain = infer(base)
    word = plain[1]["answer"][4:7]  # in the middle of an answer
    stopped = infer(base, "--stop_strings", word, *BY_VLLM)
    assert stopped == infer(base, "--stop_strings", word)
    assert stopped[1]["stopped"]
    penalised = infer(base, "--repetition_penalty", "1.3", *BY_VLLM)
    assert penalised == infer(base, "--repetition_penalty", "1.3")
    assert penalised != plain

    (ids,) = load_tokenizer(str(base)).encode_batch([plain[0]["answer"]])
    (stop,) = load_tokenizer(str(base)).row_rule.end

    def exchange(weights):
        head = weights["lm_head.weight"]
        head[[ids[5], stop.id]] = head[[stop.id, ids[5]]].clone()

    ending = changed(base, tmp_path / "ending", exchange)
    ended = infer(ending, *BY_VLLM)
    assert ended == infer(ending)
    assert ended[0]["stopped"]
    assert ended[0]["num_tokens"] < 20


def test_an_interrupted_run_goes_on_at_the_next_row(made):
    base, run = made("glm4-0414")
    sampling = ["--do_sample", "true", "--temperature", "1.5", *BY_VLLM]
    whole = infer(base, *sampling, adapter=run)
    assert infer(base, *sampling, "--limit", "3", adapter=run, name="cut.jsonl") == whole[:3]
    cut = Path("cut.jsonl").read_bytes()
    assert infer(base, *sampling, adapter=run, name="cut.jsonl") == whole
    assert Path("cut.jsonl").read_bytes().startswith(cut)


def test_each_setting_of_sampling_reaches_vllm(made):
    base, _ = made("glm4-0414")
    greedy, draws = infer(base), [*BY_VLLM, "--do_sample", "true"]
    drawn = infer(base, *draws)
    assert drawn != greedy
    assert infer(base, *draws, "--seed", "7") != drawn
    assert infer(base, *draws, "--temperature", "2") != drawn
    assert infer(base, *draws, "--top_k", "1") == greedy
    assert infer(base, *draws, "--top_p", "1e-9") == greedy


def test_evaluate_scores_as_the_local_engine_does(made, tmp_path):
    base, run = made("glm4-0414")
    doubled = tmp_path / "doubled"
    shutil.copytree(run, doubled)
    weights = load_file(run / "adapter_model.safetensors")
    twice = {key: t * (1 + ("lora_B" in key)) for key, t in weights.items()}
    save_file(twice, doubled / "adapter_model.safetensors")
    words = ["evaluate", "--data_path", "rows.jsonl", "--base", base, "--max_new_tokens", "12"]
    words += ["--adapter", f"{run},{doubled}", "--output_dir"]
    run_verb(*words, "by-us")
    run_verb(*words, "by-vllm", *BY_VLLM)
    files = ("base.jsonl", "run.jsonl", "doubled.jsonl")
    answers = {Path("by-us", name).read_bytes() for name in files}
    assert len(answers) == len(files)
    for name in files:
        assert Path("by-vllm", name).read_bytes() == Path("by-us", name).read_bytes()
    assert '"reference"' in Path("by-vllm/run.jsonl").read_text("utf-8")
    settings = json.loads(Path("by-vllm/evaluate.json").read_text("utf-8"))["settings"]
    assert settings["engine"] == "vllm"


def test_numbers_that_are_not_finite_are_refused(made, tmp_path):
    base, _ = made("glm4-0414")

    def spoil(weights):
        weights["model.norm.weight"][3] = float("nan")

    broken = changed(base, tmp_path / "broken", spoil)
    with pytest.raises(AssertionError, match=r"error: .*not finite"):
        infer(broken, *BY_VLLM)
