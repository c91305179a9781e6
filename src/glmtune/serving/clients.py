"""Clients for a benchmark: each streams one answer after another over HTTP, and keeps the times."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
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


class Client:
    """One client: its requests go over one connection, as those of OpenAI's client do."""

    def __init__(self) -> None:
        self._kept: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, asking: Asking, question: Question) -> Answered:
        """Stream one answer."""
        sent, first, num_tokens, parts, error = time.monotonic(), 0.0, 0, [], None
        ended = False
        try:
            lines = await self._post(asking.port, _body(asking, question))
            async for line in lines:
                if line.startswith(b"HTTP/1.1 ") and not line.startswith(b"HTTP/1.1 200"):
                    error = line.decode().strip()
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
                await self._read_last_chunk(lines)
            else:
                self.close()
        except OSError as problem:
            self.close()
            error = repr(problem)
        if not ended and error is None:
            error = "the answer broke off"
        return Answered(question, sent, first, time.monotonic(), num_tokens, "".join(parts), error)

    def close(self) -> None:
        """Hang up."""
        if self._kept is not None:
            self._kept[1].close()
            self._kept = None

    async def _post(self, port: int, body: bytes) -> AsyncIterator[bytes]:
        """Send a body; the lines of what comes back."""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        for is_new in (self._kept is None, True):
            if self._kept is None:
                self._kept = await asyncio.open_connection("127.0.0.1", port)
            reader, writer = self._kept
            writer.write(head.encode() + body)
            line = await reader.readline()
            if line or is_new:
                break
            self.close()  # the server has hung up in the meantime
        return _lines(line, reader)

    async def _read_last_chunk(self, lines: AsyncIterator[bytes]) -> None:
        """Read what ends a body in chunks (RFC 9112, 7.1), so that the next answer begins anew."""
        async for line in lines:
            if line == b"0\r\n":
                await anext(lines)
                return
        self.close()


async def _lines(line: bytes, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line:
        yield line
        line = await reader.readline()


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
