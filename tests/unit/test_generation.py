"""Answers do not depend on their batch, follow the sampling settings, and end at a stop id."""

import json
from types import SimpleNamespace

import pytest
import torch

from glmtune.config.settings import InferSettings
from glmtune.errors import UserError
from glmtune.generation import (
    Answer,
    Decoder,
    GenerationSettings,
    Prompt,
    find_stop_ids,
    generate_answers,
)
from glmtune.generation.weights import read_weights
from glmtune.models.families import ChatGLMConfig
from glmtune.models.loading import load_base_model

GREEDY = GenerationSettings(max_new_tokens=24)
DRAWN = GenerationSettings(max_new_tokens=12, do_sample=True, temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_base_model(str(tiny_folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def continuations(tiny_folder, model):
    """Greedy continuations of the published code, as the texts of prompt and answer."""
    pairs = []
    for row in json.loads((tiny_folder / "expected.json").read_text())["generate_greedy_24"]:
        sop = row.index(model.config.bos_token_id)
        pairs.append((row[: sop - 1], row[sop + 1 :]))
    return pairs


@pytest.fixture
def answer(model, word_tokenizer):
    def run(prompts, settings=GREEDY, batch_size=8, model=model):
        prompts = [
            prompt if isinstance(prompt, Prompt) else Prompt(spell(prompt), number=i)
            for i, prompt in enumerate(prompts)
        ]
        return list(generate_answers(model, word_tokenizer, prompts, settings, batch_size))

    return run


@pytest.fixture
def many_stops(model, monkeypatch):
    """More stop ids than the model's own, so that answers end at different lengths."""
    stops = [model.config.eos_token_id, 244, *range(300, 390)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", stops)
    return stops


def spell(ids):
    return " ".join(map(str, ids))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_greedy_continuations_of_the_published_code(answer, continuations, batch_size):
    answers = answer([prompt for prompt, _ in continuations], batch_size=batch_size)
    expected = [spell([i for i in ids if i < 1000]) for _, ids in continuations]
    assert [answer.text for answer in answers] == expected
    assert [answer.num_tokens for answer in answers] == [24] * len(answers)
    assert not any(answer.stopped for answer in answers)


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        DRAWN,
        GenerationSettings(max_new_tokens=10, num_beams=3),
        GenerationSettings(max_new_tokens=10, repetition_penalty=1.3),
    ],
)
@pytest.mark.usefixtures("many_stops")
def test_answers_do_not_depend_on_the_batch(answer, continuations, settings):
    prompts = [prompt for prompt, _ in continuations] * 2
    alone = answer(prompts, settings, batch_size=1)
    assert answer(prompts, settings, batch_size=3) == alone
    assert answer(prompts, settings, batch_size=99) == alone


def test_an_answer_ends_before_the_first_stop_token(answer, continuations, many_stops):
    answers = answer([prompt for prompt, _ in continuations])
    assert {answer.stopped for answer in answers} == {True, False}, "the test needs both"
    for (_, ids), answered in zip(continuations, answers, strict=True):
        ends = [i for i, token in enumerate(ids) if token in many_stops]
        kept = ids[: ends[0]] if ends else ids
        assert answered == Answer(spell(kept), len(kept), bool(ends))


def test_stop_ids_of_the_config_where_generation_config_has_none():
    config, silent = ChatGLMConfig(eos_token_id=7), SimpleNamespace(eos_token_id=None)
    assert find_stop_ids(SimpleNamespace(generation_config=silent, config=config)) == [7]


def test_what_ends_an_answer_is_looked_up_once(answer, continuations, monkeypatch):
    calls, to_dict = [], ChatGLMConfig.to_dict

    def counted(config):
        calls.append(config)
        return to_dict(config)

    monkeypatch.setattr(ChatGLMConfig, "to_dict", counted)
    prompts = [prompt for prompt, _ in continuations]
    answer(prompts[:1], batch_size=1)
    num_for_one = len(calls)
    answer(prompts * 2, batch_size=1)
    assert len(calls) == 2 * num_for_one


def test_a_drawn_answer_belongs_to_the_seed_and_the_number(answer, continuations):
    prompts = [Prompt(spell(continuations[0][0]), number=number) for number in range(4)]
    first = answer(prompts, DRAWN)
    assert answer(prompts[2:], DRAWN) == first[2:], "as when a broken run is resumed"
    assert len({answer.text for answer in first}) == 4
    other = GenerationSettings(max_new_tokens=12, do_sample=True, seed=43)
    assert answer(prompts, other) != first


def test_a_temperature_of_nothing_is_greedy(answer, continuations):
    prompts = [prompt for prompt, _ in continuations]
    draw = {"temperature": 0.0, "do_sample": True, "top_p": 0.5, "top_k": 7, "seed": 3}
    cold = GenerationSettings(max_new_tokens=8, **draw)
    assert cold.in_effect() == GenerationSettings(max_new_tokens=8).in_effect()
    assert answer(prompts, cold) == answer(prompts, GenerationSettings(max_new_tokens=8))


def test_a_draw_among_one_token_is_greedy(answer, continuations):
    prompts = [prompt for prompt, _ in continuations]
    settings = GenerationSettings(max_new_tokens=24, do_sample=True, top_k=1)
    assert answer(prompts, settings) == answer(prompts)


def test_a_prompt_beyond_the_positions_is_named(answer):
    prompts = [Prompt("5 6"), Prompt("7 " * 250, "data.json:9 (row 2)"), Prompt("7 " * 300)]
    with pytest.raises(UserError, match=r"data.json:9 \(row 2\): .* 252 tokens.* 256") as error:
        answer(prompts)
    assert "max_new_tokens to 4 at most" in str(error.value)
    assert "1 more" in str(error.value)
    answer([Prompt("7 " * 230)])  # 232 tokens and 24 new ones just fit


def test_all_prompts_are_checked_before_any_is_answered(model, word_tokenizer, monkeypatch):
    monkeypatch.setattr(Decoder, "stream", lambda *_: pytest.fail("nothing may be answered"))
    prompts = [Prompt("5"), Prompt("7 " * 300)]
    with pytest.raises(UserError):
        generate_answers(model, word_tokenizer, prompts, GREEDY, batch_size=1)


def test_logits_that_are_not_finite_are_refused(answer, tiny_folder):
    broken = load_base_model(str(tiny_folder), dtype=torch.float32)
    broken.transformer.final_layernorm.weight.data[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        answer([[5, 6]], model=broken)


def test_no_memory_is_told_with_the_batch_size(answer, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("glmtune.generation.reading.prefill", no_memory)
    with pytest.raises(UserError, match="per_device_eval_batch_size 2: no memory"):
        answer([[5, 6], [7]])


def test_settings_tell_what_has_effect():
    settings = InferSettings(data_path="x.json", do_sample=True, top_p=0.7, seed=1, num_beams=1)
    expected = {"max_new_tokens": 150, "num_beams": 1, "do_sample": True, "top_p": 0.7, "seed": 1}
    assert list(settings.in_effect().items()) == list(expected.items())
    assert GenerationSettings.of(settings) == GenerationSettings(do_sample=True, top_p=0.7, seed=1)
    assert "seed" not in GREEDY.in_effect()


def test_what_has_effect_reads_back_from_json_as_it_was():
    settings = GenerationSettings(stop_strings=("a", "b"), do_sample=True, temperature=0.5)
    assert json.loads(json.dumps(settings.in_effect())) == settings.in_effect()


def test_bits_are_told_where_there_are_fewer():
    settings = InferSettings(data_path="x.json", decode_bits="8", decode_compile=True)
    assert settings.decoder_bits == 8
    assert settings.in_effect()["decode_bits"] == 8
    assert "decode_compile" not in settings.in_effect()
    assert "decode_bits" not in GREEDY.in_effect()


def test_fewer_bits_are_used(answer, continuations, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "glmtune.generation.decoder.read_weights",
        lambda model, block, bits, **_: asked.append(bits) or read_weights(model, block),
    )
    answer([continuations[0][0]], GREEDY.model_copy(update={"decode_bits": "8"}))
    assert asked == [8]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_end_before_a_stop_string(answer, continuations, batch_size):
    prompts = [prompt for prompt, _ in continuations]
    whole = answer(prompts, DRAWN)
    stop = f" {' '.join(whole[0].text.split()[4:6])} "
    settings = DRAWN.model_copy(update={"stop_strings": (stop,)})
    first, *others = answer(prompts, settings, batch_size)
    assert first == Answer(whole[0].text.partition(stop)[0].strip(), 7, stopped=True)
    assert others == whole[1:]


def test_no_tokens_are_made_after_a_stop_string(answer, continuations, monkeypatch):
    made, stream = [], Decoder.stream

    def counted(*given):
        for rows in stream(*given):
            made.append(rows)
            yield rows

    monkeypatch.setattr(Decoder, "stream", counted)
    prompt, ids = continuations[0]
    (stopped,) = answer([prompt], GREEDY.model_copy(update={"stop_strings": (f" {ids[2]} ",)}))
    assert stopped == Answer(spell(ids[:2]), 4, stopped=True)
    assert len(made) == 4


def test_a_stop_string_that_cannot_occur_is_refused(answer):
    settings = GenerationSettings(max_new_tokens=24, stop_strings=(" 5 ", ""))
    with pytest.raises(UserError, match="stop string ''"):
        answer([[5, 6]], settings)
