"""Clients for a benchmark: each streams one answer after another over HTTP, and keeps the times."""

import asyncio
import time
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import orjson


class Question(NamedTuple):
    """What a client asks: a model, and a prompt by its number."""

    model: str
    prompt: int


class Answered(NamedTuple):
    """A request that has ended: moments by `time.monotonic`, and what came."""

    question: Question
    sent: float
    first: float
    ended: float
    num_tokens: int
    text: str
    error: str | None


class Asking(NamedTuple):
    """What all clients have in common."""

    port: int
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    until: float
    """No request begins after this moment, by `time.monotonic`; but each client that does not pause
    asks once."""
    pause: float = 0.0
    """Mean seconds that a client waits before each request, so that they do not ask together."""


async def ask(asking: Asking, question: Question) -> Answered:
    """Stream one answer."""
    body = orjson.dumps(
        {
            "model": question.model,
            "prompt": list(asking.prompts[question.prompt]),
            "max_tokens": asking.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{asking.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    sent, first, num_tokens, parts, error = time.monotonic(), 0.0, 0, [], None
    ended = False
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", asking.port)
        writer.write(head.encode() + body)
        while line := await reader.readline():
            if line.startswith(b"HTTP/1.1 ") and not line.startswith(b"HTTP/1.1 200"):
                error = line.decode().strip()
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                ended = True
                break
            event = orjson.loads(line[6:])
            if "error" in event:
                error = event["error"]["message"]
            for choice in event.get("choices", ()):
                first = first or time.monotonic()
                parts.append(choice["text"])
            if usage := event.get("usage"):
                num_tokens = usage["completion_tokens"]
        writer.close()
    except OSError as problem:
        error = repr(problem)
    if not ended and error is None:
        error = "the answer broke off"
    return Answered(question, sent, first, time.monotonic(), num_tokens, "".join(parts), error)


async def _one_after_another(asking: Asking, questions: Sequence[Question]) -> list[Answered]:
    """Ask questions in turn until time is up; pauses are the same in every run."""
    draw = Random(repr(questions))
    answered: list[Answered] = []
    while True:
        wait = draw.expovariate(1 / asking.pause) if asking.pause else 0.0
        if (answered or wait) and time.monotonic() + wait >= asking.until:
            return answered
        if wait:
            await asyncio.sleep(wait)
        answered.append(await ask(asking, questions[len(answered) % len(questions)]))


def ask_all(asking: Asking, of_clients: Sequence[Sequence[Question]]) -> list[Answered]:
    """Let clients ask at once, each its own questions in turn, until time is up."""

    async def run() -> list[Answered]:
        clients = [_one_after_another(asking, questions) for questions in of_clients]
        return [one for answered in await asyncio.gather(*clients) for one in answered]

    return asyncio.run(run())
