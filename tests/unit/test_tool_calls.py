"""Tools of a request: rendered by the family's layout, and calls read back from answers."""

import json

import pytest
from glm_folders import write_model
from serving import client_of, serving

from glmtune.config.serving import ServeSettings
from glmtune.data.conversations import Example, Turn
from glmtune.generation.prompts import prompt_ids
from glmtune.generation.slots import Slots
from glmtune.models.families import FAMILIES
from glmtune.models.glm.calls import read_json_calls, read_python_calls
from glmtune.serving.load import load

NAMES = ("weather", "add")
JSON_ANSWERS = {
    'weather\n{"city": "北京"}': [("weather", '{"city": "北京"}')],
    'add\n{"a": 1, "b": 2}\nweather\n{"city": "x"}': [
        ("add", '{"a": 1, "b": 2}'), ("weather", '{"city": "x"}'),
    ],
    '<think>\nwhich?</think>\nadd\n{}': [("add", "{}")],
    "weather": None, "weather\n": None, 'weather\n{"city": ': None, "weather\n[1]": None,
    'other\n{"a": 1}': None, "The weather\nis fine": None, 'add\n{"a": 1} and': None, "": None,
}  # fmt: skip
PYTHON_ANSWERS = {
    "weather\n```python\ntool_call(city='北京', days=3)\n```": [
        ("weather", '{"city": "北京", "days": 3}')
    ],
    "add\ntool_call(a=-1, b=[1, {'c': None}])": [("add", '{"a": -1, "b": [1, {"c": null}]}')],
    "weather\n```python\ntool_call(city=open('/etc/passwd'))\n```": None,
    "weather\n```python\nimport os\n```": None, "weather\n```python\nother(a=1)\n```": None,
    "weather\n```python\ntool_call('x')\n```": None, "weather": None, "fine weather": None,
    "weather\n```python\ntool_call(**{'a': 1})\n```": None,
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ASKED = [{"role": "user", "content": "北京天气？"}]


@pytest.mark.parametrize("text, calls", JSON_ANSWERS.items())
def test_calls_with_json(text, calls):
    assert read_json_calls(text, NAMES) == calls


@pytest.mark.parametrize("text, calls", PYTHON_ANSWERS.items())
def test_calls_with_python(text, calls):
    assert read_python_calls(text, NAMES) == calls


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    family = next(family for family in FAMILIES if family.name == "GLM-4-0414")
    folder = write_model(tmp_path_factory.mktemp("glm4") / "base", family, None)
    with serving(load(ServeSettings(base=str(folder), use_cpu=True)), slots=2) as engine:
        yield engine


@pytest.fixture
def scripted(engine, monkeypatch):
    """Let the model say a text, whatever it would; a list of the prompts that it has read."""
    prompts, read, admit = [], Slots.read, Slots.admit
    script = []

    def say(text):
        ids = engine.tokenizer.encode_batch([text])[0]
        script[:] = [*ids, engine.tokenizer.ids["<|observation|>"]]

    def admitted(slots, places, given, settings, stop_ids, adapters):
        prompts.extend(prompt.ids for prompt in given)
        # What the model would say, at random, ends nothing.
        admit(slots, places, given, settings, [()] * len(given), adapters)

    def scripted_read(slots, notes):
        made = read(slots, notes)
        for slot in notes.rows:
            made[slot] = [script.pop(0)] if script else []
            if not script:
                slots.release(slot)
        return made

    monkeypatch.setattr(Slots, "read", scripted_read)
    monkeypatch.setattr(Slots, "admit", admitted)
    return say, prompts


def test_a_call_becomes_tool_calls(engine, scripted):
    say, prompts = scripted
    client = client_of(engine)
    more = {"model": "base", "messages": ASKED, "tools": TOOLS, "max_tokens": 90}
    more |= {
        "extra_body": {"ignore_eos": True, "stop_token_ids": list(engine.loaded.decoder.stop_ids)}
    }
    say('weather\n{"city": "北京"}')
    found = client.chat.completions.create(**more).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.content is None
    (call,) = found.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "北京"}

    example = Example((Turn("user", "北京天气？"),), tuple(TOOLS))
    assert prompts == prompt_ids(engine.tokenizer, [example])
    assert "weather" in engine.tokenizer.decode(prompts[0])

    say('weather\n{"city": "北京"}')
    chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **more)]
    deltas = [chunk.delta for chunk in chunks]
    assert not any(delta.content for delta in deltas)
    (calls,) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert calls[0].index == 0
    assert calls[0].function.name == "weather"
    assert chunks[-1].finish_reason == "tool_calls"

    say("Sunny.")
    plain = client.chat.completions.create(**more).choices[0]
    assert (plain.message.content, plain.finish_reason) == ("Sunny.", "stop")
    assert plain.message.tool_calls is None
    say('weather\n{"city": "北京"}')
    none = client.chat.completions.create(tool_choice="none", **more).choices[0]
    assert none.message.content.startswith("weather")
    assert '天气"' not in engine.tokenizer.decode(prompts[-1])


def test_a_result_of_a_tool_is_read_as_rows_have_it(engine, scripted):
    say, prompts = scripted
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "晴"},
    ]
    say("Fine.")
    client_of(engine).chat.completions.create(model="base", messages=messages, tools=TOOLS)
    turns = (
        Turn("user", "北京天气？"), Turn("assistant", "{}", "weather"), Turn("observation", "晴"),
    )  # fmt: skip
    assert prompts == prompt_ids(engine.tokenizer, [Example(turns, tuple(TOOLS))])
