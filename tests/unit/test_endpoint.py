"""Whose answers an endpoint gives, and what is wrong with it: a sound server and broken ones."""

import json

import pytest
import torch
from openai_server import OpenAIServer

from glmtune import cli
from glmtune.adapters import load_adapter
from glmtune.errors import UserError
from glmtune.evaluation import endpoint_probes
from glmtune.evaluation.endpoint_client import Reply, endpoint_of
from glmtune.evaluation.endpoint_probes import EndpointProbe
from glmtune.evaluation.endpoint_verdict import EndpointReport, find_stop_faults, judge_reply
from glmtune.generation import Answer
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY


@pytest.fixture(scope="module")
def models(taught):
    """The base, and it with the adapter that is meant."""

    def fresh():
        return load_base_model(GLM_TINY, dtype=torch.float32)

    return {
        "base": fresh(),
        "tuned": load_adapter(fresh(), taught / "adapter"),
    }


@pytest.fixture
def check(models, taught, tmp_path, capsys, monkeypatch):
    """Run the command against a server; gives exit code, report and output."""
    tokenizer = load_tokenizer(GLM_TINY)
    few = endpoint_probes.STRANGE_QUESTIONS[:2]
    monkeypatch.setattr(endpoint_probes, "STRANGE_QUESTIONS", few)
    monkeypatch.setattr("glmtune.evaluation.endpoint.MOST_TOKENS", 640)

    def run(which="tuned", flags=(), **broken):
        server = OpenAIServer(models[which], tokenizer, **broken)
        path = tmp_path / "report.json"
        line = ["check", "--url", server.url, "--model", "served"]
        line += ["--against", str(taught / "adapter"), "--base", "glm-tiny", "--use_cpu", "true"]
        line += ["--data_path", str(taught / "rows.json"), "--json_path", str(path)]
        try:
            code = cli.main([*line, "--max_new_tokens", "16", "--limit", "10", *flags])
        finally:
            server.close()
        report = json.loads(path.read_text()) if path.exists() else None
        return code, report, capsys.readouterr(), server

    return run


def test_a_sound_endpoint(check, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    code, report, told, server = check()
    assert server.keys == {"Bearer sk-secret"}
    assert "sk-secret" not in told.out + told.err
    assert (code, report["verdict"], report["faults"]) == (0, "tuned", [])
    assert "served at http" in told.out
    assert "is tuned: the adapter answers (8 of 8 answers are the adapter's" in told.out
    assert {request["temperature"] for request in server.asked} == {0}
    assert len(report["prompts"]) == 4
    assert max(one["tokens"] for one in report["prompts"]) > 500
    assert all(probe["base"] != probe["tuned"] for probe in report["probes"])


@pytest.mark.parametrize("renders", [None, "apply-template"])
def test_another_template(check, renders):
    code, report, _, _ = check(template="### Human: {}\n### Assistant:", renders=renders)
    assert code == 1
    (fault,) = [fault for fault in report["faults"] if fault.startswith("template drift: ")]
    words = {None: "tokens in a prompt", "apply-template": "writes"}
    assert words[renders] in fault


def test_a_template_that_is_shown_and_right(check):
    code, report, _, _ = check(renders="tokenize", counts=False)
    assert (code, report["faults"]) == (0, [])
    assert report["layout_compared_by"] == "its own token ids"


@pytest.mark.parametrize("cuts", [True, False])
def test_half_the_context(check, cuts):
    code, report, _, _ = check(context=320, cuts=cuts)
    assert (code, report["verdict"]) == (1, "tuned")
    (fault,) = report["faults"]
    assert fault.startswith("context: a prompt of 3")
    assert ("so the prompt is cut" if cuts else "at most 320") in fault
    lengths = {one["tokens"]: one["fault"] for one in report["prompts"]}
    assert [bool(lengths[n]) for n in sorted(lengths)] == [False, False, True, True]


def test_answers_of_both(check):
    """As of a router that sends every other request to the base."""
    code, report, _, _ = check(answers=lambda n, text: text if n % 2 else "something else")
    assert (code, report["verdict"]) == (1, "unclear")


def test_mistakes_are_one_line(check, taught, capsys):
    common = ["--base", "glm-tiny", "--use_cpu", "true"]
    against = ["--against", str(taught / "adapter")]
    nobody = ["--url", "http://127.0.0.1:9/v1", "--model", "m"]

    def says(*flags):
        assert cli.main(["check", *flags, *common]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "url needs model and against as well" in says("--url", "http://x/v1")
    assert "against is of an endpoint" in says(*against)
    assert "leave the other out" in says("adapter", *nobody, *against)
    assert "adapter is needed" in says()
    assert "is no address" in says("--url", "localhost:8000", "--model", "m", *against)
    rows = ["--data_path", str(taught / "rows.json"), "--max_new_tokens", "8"]
    assert "nobody answers there" in says(*nobody, *against, *rows)


def test_a_model_of_another_name_is_told_with_those_there(models):
    server = OpenAIServer(models["base"], load_tokenizer(GLM_TINY))
    try:
        with pytest.raises(UserError, match=r"there is no model mine.*it has \(served\)"):
            endpoint_of(server.url, "mine").ask("hello", 1)
        assert endpoint_of(server.url.removesuffix("/v1"), "served").url == server.url
    finally:
        server.close()


# --- judging, on texts alone ---


def probe(base="red fox", tuned="red hen", stopped=True):
    return EndpointProbe("What?", [1], Answer(base, 2, stopped), Answer(tuned, 2, stopped))


@pytest.mark.parametrize(
    "text, side",
    [
        ("red hen", "tuned"),
        ("red hen and then some", "tuned"),
        ("red fox", "base"),
        ("red", "neither"),
        ("red cow", "neither"),
        ("", "neither"),
        ("red hex", "tuned"),  # it turned off after the place where both parted
    ],
)
def test_whose_answer_it_is(text, side):
    assert judge_reply(probe(), Reply(text, "stop"), str.strip).side == side


def test_an_answer_that_begins_the_other():
    both = probe(base="red", tuned="red hen")
    assert judge_reply(both, Reply("red", "stop"), str.strip).side == "base"
    assert judge_reply(both, Reply("red hen", "stop"), str.strip).side == "tuned"


def report_of(*sides):
    replies = {"tuned": Reply("red hen", "stop"), "base": Reply("red fox", "stop")}
    replies |= {"neither": Reply("cow", "stop"), None: Reply(refusal="overloaded")}
    return EndpointReport([judge_reply(probe(), replies[side], str.strip) for side in sides])


@pytest.mark.parametrize(
    "sides, verdict",
    [
        (["tuned"] * 8, "tuned"),
        (["tuned"] * 6 + ["neither"] * 2, "tuned"),
        (["tuned"] * 5 + ["base"] * 3, "unclear"),
        (["base"] * 7 + ["tuned"], "base"),
        (["neither"] * 8, "neither"),
        ([None] * 8, "unclear"),
        ([None] * 4 + ["tuned"] * 4, "tuned"),
    ],
)
def test_the_verdict(sides, verdict):
    report = report_of(*sides)
    assert report.verdict == verdict
    assert report.sentence.startswith(f"{verdict}: ")
    if sides == [None] * 8:
        assert "overloaded" in report.sentence


def stop_faults(reply, **changes):
    return find_stop_faults(
        [judge_reply(probe(**changes), reply, str.strip)], str.strip, ["<|user|>"]
    )


def test_how_answers_end():
    assert stop_faults(Reply("red hen", "stop")) == []
    assert "run on" in stop_faults(Reply("red hen", "length"))[0]
    assert "run on" in stop_faults(Reply("red hen red hen", "stop"))[0]
    assert "<|user|>" in stop_faults(Reply("red hen<|user|>", "stop"))[-1]
    assert stop_faults(Reply("red hen", "length"), stopped=False) == []
    early = Reply("red he", "stop")
    assert "end too early" in stop_faults(early, tuned="red hen lays", stopped=False)[0]
