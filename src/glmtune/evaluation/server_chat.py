"""`glmtune chat --server URL`: a chat whose answers come from a server in OpenAI's protocol."""

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from glmtune.config.serving import KEY_VARIABLE
from glmtune.config.settings import ChatSettings
from glmtune.errors import UserError
from glmtune.evaluation.chat import Chat
from glmtune.evaluation.conversation import ALPACA, BASE, CHAT, TUNED

_SECONDS = 600


class TooLong(Exception):
    """The server says that a conversation leaves its model no room."""


class Server:
    """A server that is asked.

    Args:
        url: of the server, with or without /v1 at its end.
        key: that it wants; None for the environment's, if there is one.

    Raises:
        UserError: it is no URL of HTTP.
    """

    def __init__(self, url: str, key: str | None):
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--server {url}: is no address such as http://127.0.0.1:8000")
        self.url, self._parts = url, parts
        self._path = f"{parts.path.rstrip('/').removesuffix('/v1')}/v1"
        key = key or os.environ.get(KEY_VARIABLE)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def models(self) -> list[dict[str, Any]]:
        """What it serves.

        Raises:
            UserError: it does not answer, or refuses.
        """
        with closing(self._connect()) as connection:
            content = self._ask(connection, "GET", "/models").read()
        try:
            return [dict(model) for model in json.loads(content)["data"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"--server {self.url}: does not list models as OpenAI's do") from None

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """The pieces of an answer; closing the iterator ends the answer.

        Raises:
            TooLong: the conversation does not fit.
            UserError: the server does not answer, or refuses.
        """
        with closing(self._connect()) as connection:
            for line in self._ask(connection, "POST", "/chat/completions", body):
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise UserError(f"the server: {event['error'].get('message')}")
                for choice in event.get("choices") or ():
                    yield choice["delta"].get("content") or ""

    def _connect(self) -> http.client.HTTPConnection:
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        if self._parts.scheme == "https":
            kind = http.client.HTTPSConnection
        assert self._parts.hostname is not None
        return kind(self._parts.hostname, self._parts.port, timeout=_SECONDS)

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
    ) -> http.client.HTTPResponse:
        content = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if content is None else {"Content-Type": "application/json"})
        try:
            connection.request(method, self._path + path, content, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(
                f"--server {self.url}: does not answer ({reason}); start one with glmtune serve"
            ) from None
        if response.status == 200:
            return response
        try:
            said = dict(json.loads(response.read())["error"])
        except (KeyError, TypeError, ValueError):
            said = {"message": "no error in OpenAI's form"}
        if said.get("code") == "context_length_exceeded":
            raise TooLong(str(said.get("message")))
        raise UserError(f"the server: {said.get('message')} (HTTP {response.status})")


class ServerChat(Chat):
    """A chat whose answers come from a server.

    Args:
        settings: of the session.

    Raises:
        UserError: the server does not answer, or has nothing to ask.
    """

    no_adapter = "the server has no adapter; start it with --adapter NAME=FOLDER"

    def __init__(self, settings: ChatSettings):
        assert settings.server is not None
        self._begin(settings)
        self.server = Server(settings.server, settings.api_key)
        self.models = {
            str(model.get("id")): model
            for model in self.server.models()
            if model.get("kind", BASE) != "both"
        }
        if not self.models:
            raise UserError(f"--server {settings.server}: has no model")
        names = list(self.models)
        base = BASE if BASE in self.models else names[0]
        self.asked = {BASE: base}
        if adapters := [name for name in names if self.models[name].get("kind") == "adapter"]:
            self.asked[TUNED] = adapters[0]
        self.formats = {
            side: self.models[name].get("format", CHAT) for side, name in self.asked.items()
        }
        self.sides = (TUNED,) if TUNED in self.asked else (BASE,)
        self.commands["/model"] = (
            self._choose,
            f"{' or '.join(names)}: which model answers; alone, lists them",
        )
        self.greeting = (
            f"{self.asked[self.sides[0]]} answers at {settings.server}; /help lists the commands, "
            "/exit ends"
        )

    def _stream(self, side: str, question: str) -> tuple[str, bool]:
        """Print an answer as it arrives; return it, and whether it was completed."""
        said, shown, whole = "", "", True
        for first in range(self.num_forgotten, len(self.rounds) + 1):
            pieces = self.server.stream(self._body(side, first, question))
            try:
                for piece in pieces:
                    self.ctrl_c.raise_if_lost()
                    said += piece
                    shown = self._show(shown, said)
            except TooLong as error:
                if first == len(self.rounds) or self.formats[side] == ALPACA:
                    raise UserError(f"the server: {error}") from None
                self._forget(first + 1, self.models[self.asked[side]].get("max_model_len", 0))
                continue
            except KeyboardInterrupt:
                whole = False
            finally:
                pieces.close()  # type: ignore[attr-defined]
            break
        print("" if whole else " [stopped]", flush=True)
        return shown, whole

    def _body(self, side: str, first: int, question: str) -> dict[str, Any]:
        settings = self.settings
        earlier = [] if self.formats[side] == ALPACA else self.rounds[first:]
        messages = [
            message
            for round in earlier
            for message in (
                {"role": "user", "content": round.question},
                {"role": "assistant", "content": round.seen_by(side)},
            )
        ]
        body = {
            "model": self.asked[side],
            "messages": [*messages, {"role": "user", "content": question}],
            "stream": True,
            "max_tokens": settings.max_new_tokens,
            "temperature": (settings.temperature if settings.temperature is not None else 1.0)
            if settings.draws
            else 0,
            # Another one each time, so that the same question may get another answer.
            "seed": settings.seed + self.num_asked,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "repetition_penalty": settings.repetition_penalty,
            "stop": list(settings.stop_strings or ()) or None,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _choose(self, name: str) -> None:
        if name not in self.models:
            if name:
                raise UserError(f"/model: there is no {name}; choose {' or '.join(self.models)}")
            print(" ".join(self.models))
            return
        side = TUNED if self.models[name].get("kind") == "adapter" else BASE
        self.asked[side], self.sides = name, (side,)
        self.formats[side] = self.models[name].get("format", CHAT)
        print(f"{name} will answer")

    def _check(self, settings: ChatSettings) -> None:
        """Leave values to the server, which refuses what it cannot do."""

    def _identity(self) -> dict[str, Any]:
        return {"server": self.settings.server, "models": self.asked}


def chat_with_server(settings: ChatSettings) -> None:
    """Let a server answer each typed line, until /exit or the end of the input.

    Raises:
        UserError: the server does not answer, or has no model.
    """
    chat = ServerChat(settings)
    chat.run()
