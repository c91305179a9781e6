"""Answers depend on their batch by rounding; `compare` does not show that as an effect."""

import json

import pytest
from torch import nn

from glmtune.adapters import attach_lora, save_adapter
from glmtune.config.settings import CompareSettings
from glmtune.data.templates import alpaca
from glmtune.demo.questions import held_out_questions
from glmtune.evaluation.compare import compare
from glmtune.generation import GenerationSettings, Prompt, generate_answers
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY

NUM_QUESTIONS = 8


@pytest.fixture(scope="module")
def idle_adapter(tmp_path_factory):
    """An adapter whose values are too small to change any sum; zeros would be refused."""
    model = attach_lora(load_base_model(GLM_TINY))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(weight, 1e-30)
    folder = tmp_path_factory.mktemp("idle") / "adapter"
    save_adapter(model, folder, "glm-tiny")
    return str(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "held_out.json"
    path.write_text(json.dumps([asked.record() for asked in held_out_questions(NUM_QUESTIONS)]))
    return str(path)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(
    "numbers",
    [{}, {"bf16": True}, {"decode_bits": "8"}, {"decode_bits": "4"}, {"do_sample": True}],
    ids=str,
)
def test_an_adapter_that_adds_nothing_changes_no_answer(
    numbers, size, idle_adapter, questions, tmp_path
):
    compared = compare(
        CompareSettings(
            data_path=questions, adapter=idle_adapter, base=GLM_TINY,
            output_dir=str(tmp_path / "compare"), per_device_eval_batch_size=size,
            max_new_tokens=12, use_cpu=True, general_set=False, **numbers,
        )
    )  # fmt: skip
    assert len(compared.pairs) == NUM_QUESTIONS
    for pair in compared.pairs:
        assert pair.base == pair.tuned


@pytest.mark.parametrize("do_sample", [False, True])
def test_in_float32_an_answer_does_not_depend_on_its_batch(do_sample):
    model, tokenizer = load_base_model(GLM_TINY), load_tokenizer(GLM_TINY)
    asked = held_out_questions(NUM_QUESTIONS)
    prompts = [Prompt(alpaca(q.instruction, q.input), number=i) for i, q in enumerate(asked)]
    settings = GenerationSettings(max_new_tokens=12, do_sample=do_sample)
    answers = [
        list(generate_answers(model, tokenizer, prompts, settings, size)) for size in (1, 3, 8)
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("numbers", [{"bf16": True}, {}], ids=str)
def test_a_broken_run_ends_with_the_answers_of_an_unbroken_one(
    numbers, idle_adapter, questions, tmp_path
):
    def answer(folder, **more):
        return compare(
            CompareSettings(
                data_path=questions, adapter=idle_adapter, base=GLM_TINY,
                output_dir=str(tmp_path / folder), per_device_eval_batch_size=3,
                max_new_tokens=12, use_cpu=True, general_set=False, **numbers, **more,
            )
        )  # fmt: skip

    whole = answer("whole")
    answer("broken", limit=4)
    file = tmp_path / "broken" / "compare.jsonl"
    *kept, last = file.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(kept) == 3
    again = json.loads(last) | {"tuned": {"text": "no", "num_tokens": 1, "stopped": True}}
    file.write_text("".join(kept) + json.dumps(again) + "\n", encoding="utf-8")
    broken = answer("broken")
    whole, broken = ([(p.number, p.base, p.tuned) for p in c.pairs] for c in (whole, broken))
    # In bfloat16 the fourth answer's batch was not finished, and is made again.
    assert (broken == whole) == bool(numbers)
    assert broken[:3] == whole[:3]
    assert (broken[3][2].text == "no") == (not numbers)
