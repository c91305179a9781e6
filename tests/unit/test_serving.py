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
    endless = {"stream": True, "max_completion_tokens": 2000, "extra_body": {"ignore_eos": True}}
    stream = ask(client, "both", "你好", **endless)
    next(iter(stream))
    assert len(engine.scheduler.running) == 2
    steps = engine.scheduler.num_steps
    stream.close()
    until(lambda: not engine.scheduler.running and not engine.open)
    assert engine.scheduler.num_steps - steps < 1500
    assert ask(client, "base", "你好").choices[0].message.content


def test_stop_strings_and_ids_end_an_answer_before_them(client, expected, engine):
    whole = expected["base"][1]
    stop = whole[4:6]
    found = ask(client, "base", QUESTIONS[1], stop=[stop, "never"])
    assert found.choices[0].message.content == whole[: whole.index(stop)].rstrip()
    assert found.choices[0].finish_reason == "stop"
    texts, ends, _ = streamed(ask(client, "base", QUESTIONS[1], stop=stop, stream=True))
    assert (texts, ends) == ([found.choices[0].message.content], ["stop"])

    plain = client.completions.create(
        model="base", prompt="The cat", temperature=0, max_tokens=9, logprobs=0
    ).choices[0]
    tokens = engine.tokenizer.encode_batch([plain.text])[0]
    more = {"stop_token_ids": tokens[2:3]}
    cut = client.completions.create(
        model="base", prompt="The cat", temperature=0, max_tokens=9, extra_body=more
    )
    assert plain.text.startswith(cut.choices[0].text)
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < len(plain.logprobs.tokens)


def test_seed_and_n_draw_answers_that_can_be_repeated(client):
    def drawn(**more):
        found = ask(client, "base", "写一首诗", **{"temperature": 1.5, "top_p": 1} | more)
        return [choice.message.content for choice in found.choices]

    three = drawn(seed=7, n=3)
    assert len(set(three)) > 1
    assert drawn(seed=7, n=3) == three
    assert drawn(seed=7) == three[:1]
    assert drawn(seed=8, n=3) != three
    assert drawn(n=3) != drawn(n=3)
    assert drawn(seed=7, extra_body={"top_k": 1}) == drawn(temperature=0)


def test_penalties_change_what_is_repeated(client, expected):
    model, place = next(
        (model, place)
        for model in "ab"
        for place, text in enumerate(expected[model])
        if "to to to" in text
    )
    plain = expected[model][place]

    def answer(**more):
        return ask(client, model, QUESTIONS[place], **more).choices[0].message.content

    assert answer(frequency_penalty=0) == plain
    assert answer(frequency_penalty=2) != plain
    assert answer(presence_penalty=2) != plain
    assert answer(extra_body={"repetition_penalty": 5}) != plain


def test_temperature_and_top_p_shape_the_draw(client):
    def drawn(**more):
        return ask(client, "base", "写一首诗", seed=3, **more).choices[0].message.content

    likeliest = drawn(temperature=0)
    assert drawn(temperature=2, top_p=1) != likeliest
    assert drawn(temperature=2, top_p=0) == likeliest
    assert drawn(temperature=0.01, top_p=1) == likeliest


def test_probabilities_are_the_models_own(client, engine):
    whole = ask(client, "base", "你好", logprobs=True, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert token.token == token.top_logprobs[0].token
        assert bytes(token.bytes).decode() == token.token
        logs = [each.logprob for each in token.top_logprobs]
        assert logs == sorted(logs, reverse=True)
        assert len(logs) == 3
        assert logs[0] <= 0
    parts = []
    for chunk in ask(client, "base", "你好", logprobs=True, top_logprobs=3, stream=True):
        for choice in chunk.choices:
            parts += choice.logprobs.content if choice.logprobs else []
    assert parts == content
    assert (
        ask(client, "base", "你好", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    )
    assert ask(client, "base", "你好").choices[0].logprobs is None
    old = client.completions.create(
        model="base", prompt="The", temperature=0, max_tokens=4, logprobs=2
    ).choices[0]
    assert "".join(old.logprobs.tokens).strip() == old.text
    assert [len(listed) for listed in old.logprobs.top_logprobs] == [2] * len(old.logprobs.tokens)
    assert old.logprobs.text_offset[0] == 0


def test_a_text_may_begin_with_its_prompt(client):
    plain = client.completions.create(model="base", prompt="The cat", temperature=0, max_tokens=4)
    echoed = client.completions.create(
        model="base", prompt="The cat", temperature=0, max_tokens=4, echo=True
    )
    assert echoed.choices[0].text == "The cat" + plain.choices[0].text


NEUTRAL = {
    "response_format": {"type": "text"}, "logit_bias": {}, "store": False, "metadata": {},
    "service_tier": "auto", "modalities": ["text"], "parallel_tool_calls": True,
}  # fmt: skip
UNSUPPORTED = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
    "logit_bias": {"5": 1}, "store": True, "metadata": {"a": "b"}, "service_tier": "flex",
    "modalities": ["text", "audio"], "audio": {"voice": "a", "format": "wav"},
    "prediction": {"type": "content", "content": "a"}, "reasoning_effort": "low",
    "verbosity": "low", "prompt_cache_key": "a", "web_search_options": {},
    "functions": [{"name": "a"}], "function_call": "auto", "tool_choice": "required",
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_taken(client):
    assert ask(client, "base", "hi", **NEUTRAL).choices


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_nothing_acts_on_are_refused_by_name(client, name):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "base", "hi", **{name: UNSUPPORTED[name]})
    assert error.value.param == name
    assert error.value.code == "unsupported_parameter"
    assert name in error.value.body["message"]


def test_every_field_of_openais_client_acts_or_is_refused():
    """What the official client can send is in the schema: nothing falls through."""
    import inspect

    from glmtune.serving.schema import ChatRequest, CompletionRequest

    for create, schema in (
        (openai.resources.chat.completions.Completions.create, ChatRequest),
        (openai.resources.completions.Completions.create, CompletionRequest),
    ):
        ours = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
        sent = set(inspect.signature(create).parameters) - ours
        assert sent <= set(schema.model_fields)


def test_it_is_counted(engine, client):
    import httpx

    before = httpx.get(f"{engine.url}/metrics").text
    ask(client, "base", "你好")
    after = httpx.get(f"{engine.url}/metrics").text

    def number(text, name):
        return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])

    tokens = "glmtune_generated_tokens_total"
    assert number(after, tokens) > number(before, tokens)
    assert number(after, "glmtune_first_token_seconds_count") >= 1
    assert number(after, "glmtune_slots") == 5
    path = 'glmtune_requests_total{path="/v1/chat/completions",status="200"}'
    assert number(after, path) == number(before, path) + 1
    assert httpx.get(f"{engine.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{engine.url}/ready").json() == {"status": "ready"}
