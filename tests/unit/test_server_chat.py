"""The chat in a terminal that a server answers."""

import json

import pytest
from serving import serving

from glmtune.cli import main
from glmtune.config.serving import ServeSettings
from glmtune.config.settings import ChatSettings
from glmtune.evaluation.chat import chat
from glmtune.evaluation.server_chat import chat_with_server
from glmtune.serving.load import load

QUESTIONS = ("What is the colour of the apple?", "你好")


@pytest.fixture(scope="module")
def loaded(strange_adapter):
    return load(ServeSettings(base="glm-tiny", use_cpu=True, adapter=(f"mine={strange_adapter}",)))


@pytest.fixture(scope="module")
def engine(loaded):
    with serving(loaded, api_key="key") as engine:
        yield engine


@pytest.fixture
def talk(engine, monkeypatch, capsys):
    def run(*lines, how=chat_with_server, **settings):
        left = list(lines)

        def type_line(_):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", type_line)
        if how is chat_with_server:
            settings |= {"server": engine.url, "api_key": "key"}
        how(ChatSettings(**({"max_new_tokens": 12, "do_sample": False} | settings)))
        return capsys.readouterr().out.splitlines()[1:]

    return run


def test_a_server_answers_as_a_model_loaded_here(talk, strange_adapter):
    here = talk(*QUESTIONS, how=chat, base="glm-tiny", use_cpu=True)
    assert talk("/base", *QUESTIONS)[1:] == here
    both = talk("/both", QUESTIONS[0])
    tuned = both[both.index("[tuned]") + 1 :]
    assert both[1:3] == ["[base]", here[0]]
    assert tuned != here[:1]
    assert talk("/model mine", QUESTIONS[0])[1:] == tuned
    assert talk(QUESTIONS[0]) == tuned


@pytest.mark.parametrize("word", ["exit", "quit", "stop", "退出", "/exit"])
def test_words_that_end(talk, word):
    assert talk(word, "never") == ["the chat has ended"]


def test_what_was_said_is_sent_cleared_and_saved(talk, tmp_path, engine, monkeypatch):
    sent = []
    monkeypatch.setattr(
        engine,
        "chat",
        lambda body, _, chat=engine.chat: sent.append(body.messages) or chat(body, _),
    )
    path = str(tmp_path / "said.json")
    printed = talk("/base", "a", "b", "/undo", "c", f"/save {path}", "clear", "d")
    said = [[message["content"] for message in messages] for messages in sent]
    assert said == [["a"], ["a", printed[1], "b"], ["a", printed[1], "c"], ["d"]]
    saved = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert [round["question"] for round in saved["rounds"]] == ["a", "c"]
    assert saved["models"] == {"base": "base", "tuned": "mine"}


def test_a_long_conversation_forgets_its_oldest_rounds(talk):
    long = "word " * 700
    printed = talk("/base", long, long, long, "/set max_new_tokens 5")
    told = [line for line in printed if line.startswith("[the oldest")]
    assert told == ["[the oldest round is forgotten: the model holds 2,048 tokens]"]
    printed = talk("/base", "word " * 2100)
    assert printed[1].startswith("error: the server: the prompt has")


def test_settings_reach_the_server(talk):
    shorter = talk("/base", QUESTIONS[0], max_new_tokens=2)
    assert talk("/base", QUESTIONS[0])[1].startswith(shorter[1])
    assert talk("/base", "/set max_new_tokens 2", QUESTIONS[0])[2] == shorter[1]
    assert "error: the server: stop" in talk("/base", "/set stop_strings <n>", "a")[2]


def test_mistakes_are_one_line(engine, capsys):
    for line, words in (
        ("--server ftp://a", "is no address such as"),
        ("--server http://127.0.0.1:1", "does not answer"),
        (f"--server {engine.url}", "the key is missing or wrong"),
        (f"--server {engine.url} --use_cpu true", "use_cpu is for a model that is loaded here"),
        ("--api_key a", "api_key is for a server"),
    ):
        assert main(["chat", *line.split()]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
