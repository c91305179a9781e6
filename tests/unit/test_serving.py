"""The server's answers, asked for by the official client over HTTP."""

import openai
import pytest
import torch
from serving import client_of, question, serving, strong_adapters, until

from glmtune.adapters import save_adapter
from glmtune.data.conversations import Example, Turn
from glmtune.evaluation.conversation import polish
from glmtune.generation import GenerationSettings, Prompt, generate_answers
from glmtune.models.families import DEFAULT
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY

QUESTIONS = [
    "你好",
    "What is the capital of France?",
    "3 + 4 = ?",
    "写一首诗",
    "1",
    "猫的英文是什么？",
]
LONGEST = 24


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters of different ranks that change most answers."""
    folder = tmp_path_factory.mktemp("adapters")
    base = load_base_model(GLM_TINY, dtype=torch.float32)
    for number, model in enumerate(strong_adapters(base, (1, 2))):
        save_adapter(model, folder / "ab"[number], "glm-tiny")
    return {name: folder / name for name in "ab"}


@pytest.fixture(scope="module")
def engine(adapters):
    given = tuple(f"{name}={folder}" for name, folder in adapters.items())
    with serving(adapter=given, slots=5) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    return client_of(engine)


@pytest.fixture(scope="module")
def expected(adapters):
    """Each side's answers by the verbs' own decoder, one adapter on the model at a time."""
    from glmtune.adapters import load_adapter

    base, tokenizer = load_base_model(GLM_TINY, dtype=torch.float32), load_tokenizer(GLM_TINY)
    prompts = [Prompt(Example((Turn("user", text),))) for text in QUESTIONS]
    how = GenerationSettings(max_new_tokens=LONGEST)

    def answers(model):
        found = generate_answers(model, tokenizer, prompts, how, 3)
        return [polish(DEFAULT.chat, answer.text) for answer in found]

    made = {"base": answers(base)}
    for name, folder in adapters.items():
        model = load_adapter(base, folder)
        made[name] = answers(model)
        model.unload()
    return made


def ask(client, model, text, **more):
    more = {"temperature": 0, "max_completion_tokens": LONGEST} | more
    return client.chat.completions.create(model=model, messages=question(text), **more)


def streamed(chunks):
    """The texts, ends and usage that the chunks of a stream add up to."""
    texts, ends, usage = {}, {}, None
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        usage = chunk.usage or usage
    return [texts[i] for i in sorted(texts)], [ends[i] for i in sorted(ends)], usage


def test_each_model_answers_as_it_does_alone(client, expected):
    assert len({tuple(answers) for answers in expected.values()}) == 3
    for model, answers in expected.items():
        for text, answer in zip(QUESTIONS, answers, strict=True):
            assert ask(client, model, text).choices[0].message.content == answer


def test_adapters_and_base_answer_in_one_batch(engine, client, expected):
    """All at once, so that every batch is mixed, also with rows that join and leave."""
    asked = [(model, place) for place in range(len(QUESTIONS)) for model in expected]
    before = engine.scheduler.num_steps
    streams = [ask(client, model, QUESTIONS[place], stream=True) for model, place in asked]
    found = [streamed(stream)[0] for stream in streams]
    assert found == [[expected[model][place]] for model, place in asked]
    num_tokens = sum(len(text) for (text,) in found)
    assert engine.scheduler.num_steps - before < num_tokens / 2


def test_both_answers_by_base_and_adapter(client, expected):
    for model, sides in {"both": "a", "both:a": "a", "both:b": "b"}.items():
        for place, text in enumerate(QUESTIONS[:2]):
            wanted = [expected["base"][place], expected[sides][place]]
            whole = ask(client, model, text)
            assert [choice.message.content for choice in whole.choices] == wanted
            options = {"include_usage": True}
            texts, ends, usage = streamed(
                ask(client, model, text, stream=True, stream_options=options)
            )
            assert texts == wanted
            assert ends == [choice.finish_reason for choice in whole.choices]
            assert usage == whole.usage


def test_models_are_listed(client, engine):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["base", "a", "b", "both", "both:a", "both:b"]
    assert [model.kind for model in listed] == ["base", "adapter", "adapter", *["both"] * 3]
    assert listed[-1].sides == ["base", "b"]
    assert client.models.retrieve("both:a").id == "both:a"


def test_length_and_stop_end_an_answer(client):
    assert ask(client, "base", "你好", max_completion_tokens=2).choices[0].finish_reason == "length"
    whole = ask(client, "base", "你好", max_completion_tokens=60)
    assert whole.choices[0].finish_reason == "stop"


def test_a_text_is_continued(client):
    found = client.completions.create(model="base", prompt=["The", "一"], max_tokens=5)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage.completion_tokens <= 10


MISTAKES = {
    "a model": (404, "model", {"model": "nobody"}),
    "a role": (400, "role", {"messages": [{"role": "wizard", "content": "hi"}]}),
    "no question": (400, "messages", {"messages": [{"role": "system", "content": "hi"}]}),
    "a long prompt": (400, "messages", {"messages": question("a " * 3000)}),
    "a long answer": (400, "messages", {"max_completion_tokens": 5000}),
    "JSON": (400, "response_format", {"response_format": {"type": "json_object"}}),
    "a field": (400, "colour", {"extra_body": {"colour": 1}}),
    "a kind": (400, "n", {"extra_body": {"n": "two"}}),
    "two sides, twice": (400, "n", {"model": "both", "n": 2}),
}


@pytest.mark.parametrize("status, param, body", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_get_openais_error(client, status, param, body):
    body = {"model": "base", "messages": question("hi")} | body
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**body)
    assert (error.value.status_code, error.value.param) == (status, param)
    assert error.value.type == "invalid_request_error"
    assert "\n" not in error.value.body["message"]


def test_who_hangs_up_frees_the_slots(engine, client):
    stream = ask(client, "both", "你好", stream=True, max_completion_tokens=2000,
                 extra_body={"ignore_eos": True})  # fmt: skip
    next(iter(stream))
    assert len(engine.scheduler.running) == 2
    stream.close()
    until(lambda: not engine.scheduler.running and not engine.open)
    assert ask(client, "base", "你好").choices[0].message.content
