"""`bench serve`: its figures agree, and every answer is that of its prompt alone."""

import asyncio
import json
from statistics import mean
from types import SimpleNamespace

import pytest

from glmtune.cli import main
from glmtune.serving import clients
from glmtune.serving.clients import Asking, Question


@pytest.mark.slow  # a server and its clients are processes of their own
def test_clients_are_answered_without_errors(tmp_path, capsys):
    line = "bench serve --shape small --clients 4 --slots 3 --seconds 1 --prompts 2 --adapters 2 "
    line += "--prompt_length 9 --max_new_tokens 6 --use_cpu --json_path"
    assert main([*line.split(), str(tmp_path / "figures.jsonl")]) == 0
    plain, mixed = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    assert (plain["adapters"], mixed["adapters"]) == (0, 2)
    for figures in (plain, mixed):
        assert figures["errors"] == figures["other_answers"] == 0
        assert figures["requests"] >= 8
        share = figures["tokens_per_second"] / figures["decoder_tokens_per_second"]
        assert figures["share_of_decoder"] == pytest.approx(share)
        assert 0 < figures["first_token_ms_p50"] <= figures["first_token_ms_p99"]
    printed = capsys.readouterr().out
    assert "mixing" in printed
    assert "4 that ask together" in printed


@pytest.mark.parametrize("pause", [0.0, 2.0])
def test_clients_that_pause_do_not_ask_together(monkeypatch, pause):
    """In a time of the test's own, in which an answer takes a second."""
    now, waits = [0.0], []

    async def ask(client, asking, question):
        now[0] += 1
        return question

    async def sleep(wait):
        waits.append(wait)
        now[0] += wait

    monkeypatch.setattr(clients.Client, "ask", ask)
    monkeypatch.setattr(clients, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(clients, "asyncio", SimpleNamespace(sleep=sleep))
    questions = [Question("base", 0), Question("base", 1)]
    answering = clients._one_after_another(Asking(0, [[]], 1, 600.0, pause), questions)
    answered = asyncio.run(answering)
    assert answered[:3] == [*questions, questions[0]]
    if not pause:
        assert not waits
        assert len(answered) == 600
    else:
        assert len(set(waits)) == len(waits) == len(answered)
        assert mean(waits) == pytest.approx(pause, rel=0.2)
        assert now[0] <= 601


EVENTS = b"".join(
    b"data: " + json.dumps(event).encode() + b"\n\n"
    for event in (
        {"choices": [{"text": "a"}]},
        {"choices": [], "usage": {"completion_tokens": 1}},
    )
)


@pytest.mark.parametrize("answers_of_a_connection", [1, 2, 99])
def test_a_client_keeps_its_connection_as_long_as_the_server_does(answers_of_a_connection):
    connections = []

    async def answer(reader, writer):
        connections.append(1)
        for _ in range(answers_of_a_connection):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"Content-Length: ")[1].split()[0]))
            body = EVENTS + b"data: [DONE]\n\n"
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
        writer.close()

    async def ask():
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            asking = Asking(server.sockets[0].getsockname()[1], [[5]], 1, 0.0)
            client = clients.Client()
            for _ in range(4):
                answered = await client.ask(asking, Question("base", 0))
                assert (answered.error, answered.text, answered.num_tokens) == (None, "a", 1)
                await asyncio.sleep(0.01)  # in which the server may hang up
            client.close()

    asyncio.run(ask())
    assert len(connections) == -(-4 // answers_of_a_connection)


def test_a_client_that_is_refused_does_not_wait_for_the_server_to_hang_up():
    hung_up = []

    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}")
        await reader.read()  # until the client has hung up
        hung_up.append(1)
        writer.close()

    async def ask():
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            asking = Asking(server.sockets[0].getsockname()[1], [[5]], 1, 0.0)
            answered = await clients.Client().ask(asking, Question("base", 0))
            assert answered.error == "HTTP/1.1 503 Service Unavailable"
            while not hung_up:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(ask(), 600))


@pytest.mark.slow
def test_a_pause_is_printed_and_kept(tmp_path, capsys):
    line = "bench serve --shape small --clients 2 --seconds 1 --prompts 2 --pause 0.25 "
    line += "--prompt_length 9 --max_new_tokens 6 --use_cpu --json_path"
    assert main([*line.split(), str(tmp_path / "figures.jsonl")]) == 0
    assert json.loads((tmp_path / "figures.jsonl").read_text())["pause"] == 0.25
    assert "2 that each wait 0.25 s on average" in capsys.readouterr().out
