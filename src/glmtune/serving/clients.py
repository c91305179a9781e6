"""Clients for a benchmark: each streams one answer after another over HTTP, and keeps the times."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
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


BROKEN_OFF = "the answer broke off"


class Client:
    """One client: its requests go over one connection, as those of OpenAI's client do."""

    def __init__(self) -> None:
        self._kept: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, asking: Asking, question: Question) -> Answered:
        """Stream one answer."""
        sent, first, num_tokens, parts, error = time.monotonic(), 0.0, 0, [], None
        ended = False
        try:
            status, reader = await self._post(asking.port, _body(asking, question))
            if not status.startswith(b"HTTP/1.1 200"):
                self.close()
                error = status.decode().strip() or BROKEN_OFF
                return Answered(question, sent, 0.0, time.monotonic(), 0, "", error)
            async for line in reader:
                if not line.startswith(b"data: "):
                    continue
                if ended := line.startswith(b"data: [DONE]"):
                    break
                event = orjson.loads(line[6:])
                if "error" in event:
                    error = event["error"]["message"]
                for choice in event.get("choices", ()):
                    first = first or time.monotonic()
                    parts.append(choice["text"])
                if usage := event.get("usage"):
                    num_tokens = usage["completion_tokens"]
            if ended and error is None:
                # The end of a body in chunks (RFC 9112, 7.1): then the next answer begins anew.
                with suppress(EOFError):
                    await reader.readuntil(b"0\r\n\r\n")
            else:
                self.close()
        except OSError as problem:
            self.close()
            error = repr(problem)
        if not ended and error is None:
            error = BROKEN_OFF
        return Answered(question, sent, first, time.monotonic(), num_tokens, "".join(parts), error)

    def close(self) -> None:
        """Hang up."""
        if self._kept is not None:
            self._kept[1].close()
            self._kept = None

    async def _post(self, port: int, body: bytes) -> tuple[bytes, asyncio.StreamReader]:
        """Send a body; the first line of what comes back, and the rest as it comes."""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        while True:
            is_new = self._kept is None
            if self._kept is None:
                self._kept = await asyncio.open_connection("127.0.0.1", port)
            reader, writer = self._kept
            writer.write(head.encode() + body)
            status = await reader.readline()
            if status or is_new:
                return status, reader
            self.close()  # the server has hung up in the meantime


def _body(asking: Asking, question: Question) -> bytes:
    return orjson.dumps(
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


async def _one_after_another(asking: Asking, questions: Sequence[Question]) -> list[Answered]:
    """Ask questions in turn until time is up; pauses are the same in every run."""
    draw, client = Random(repr(questions)), Client()
    answered: list[Answered] = []
    while True:
        wait = draw.expovariate(1 / asking.pause) if asking.pause else 0.0
        if (answered or wait) and time.monotonic() + wait >= asking.until:
            client.close()
            return answered
        if wait:
            await asyncio.sleep(wait)
        answered.append(await client.ask(asking, questions[len(answered) % len(questions)]))


def ask_all(asking: Asking, of_clients: Sequence[Sequence[Question]]) -> list[Answered]:
    """Let clients ask at once, each its own questions in turn, until time is up."""

    async def run() -> list[Answered]:
        clients = [_one_after_another(asking, questions) for questions in of_clients]
        return [one for answered in await asyncio.gather(*clients) for one in answered]

    return asyncio.run(run())
