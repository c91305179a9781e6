"""Ask an OpenAI-shaped endpoint: one greedy answer, its usage, and how it renders messages."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from glmtune.config.serving import KEY_VARIABLE
from glmtune.errors import UserError

KEY_VARIABLES = (KEY_VARIABLE, "OPENAI_API_KEY")
"""Where a key is read from: in the environment, since a flag stays in the shell's history."""
SECONDS = 600.0
"""Longest time for an answer."""
_MOST_BYTES = 2**24


@dataclass(frozen=True)
class Reply:
    """An answer of an endpoint, or why there was none."""

    text: str = ""
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    """Tokens that the endpoint counts; None where it says nothing."""
    refusal: str | None = None
    """What it said in place of an answer."""


@dataclass(frozen=True)
class Endpoint:
    """An endpoint and the model that is asked there.

    Args:
        url: up to and with /v1.
        model: the name that requests give.
    """

    url: str
    model: str

    def ask(self, content: str, max_tokens: int) -> Reply:
        """The likeliest answer to a message of a user.

        Raises:
            UserError: nobody answers there, or not in this protocol.
        """
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        status, found = self._post(f"{self.url}/chat/completions", request)
        if status == 404 or status in (401, 403):
            raise UserError(
                f"--url {self.url}: {_message(found)} (status {status}); name a model that it has "
                f"({', '.join(self.models()) or 'it lists none'}) with --model, and its key in "
                f"the environment's {KEY_VARIABLES[0]}"
            )
        if status != 200:
            return Reply(refusal=f"{_message(found)} (status {status})")
        try:
            (choice, *_) = found["choices"]
            usage = found.get("usage") or {}
            count = usage.get("prompt_tokens")
            return Reply(
                str(choice["message"]["content"] or ""),
                choice.get("finish_reason"),
                count if isinstance(count, int) else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"--url {self.url}: answers /chat/completions in another form than OpenAI's "
                f"({str(found)[:80]!r}); name the address up to /v1 of such a server"
            ) from error

    def rendered(self, content: str) -> list[int] | str | None:
        """A user's message as the endpoint lays it out: token ids or text; None if not offered.

        vLLM and SGLang answer /tokenize with ids, llama.cpp's server /apply-template with text.
        """
        root = self.url.removesuffix("/v1")
        messages = [{"role": "user", "content": content}]
        request = {"model": self.model, "messages": messages, "add_generation_prompt": True}
        for path, name, kind in (("tokenize", "tokens", list), ("apply-template", "prompt", str)):
            status, found = self._post(f"{root}/{path}", request)
            if status == 200 and isinstance(found, dict) and isinstance(found.get(name), kind):
                return found[name]
        return None

    def writes_alpaca(self) -> bool:
        """Whether it puts questions into alpaca's template by itself, as `glmtune serve` does."""
        status, found = self._send(urllib.request.Request(f"{self.url}/models/{self.model}"))
        return status == 200 and isinstance(found, dict) and found.get("format") == "alpaca"

    def models(self) -> list[str]:
        """The names of its models, as far as it lists them."""
        status, found = self._send(urllib.request.Request(f"{self.url}/models"))
        try:
            return [str(one["id"]) for one in found["data"]] if status == 200 else []
        except (KeyError, TypeError):
            return []

    def _post(self, url: str, content: Mapping[str, Any]) -> tuple[int, Any]:
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(url, body, headers, method="POST"))

    def _send(self, request: urllib.request.Request) -> tuple[int, Any]:
        key = next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, _json(answer.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            return error.code, _json(error.read(_MOST_BYTES))
        except (OSError, ValueError) as error:  # refused, no such host, cut off, too slow
            reason = getattr(error, "reason", error)
            raise UserError(
                f"--url {self.url}: nobody answers there ({reason}); start the server, or name its "
                "address up to /v1"
            ) from error


def endpoint_of(url: str, model: str) -> Endpoint:
    """An endpoint by its address, with /v1 at its end or without.

    Raises:
        UserError: it is no address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--url {url}: is no address; it is like http://127.0.0.1:8000/v1")
    url = url.rstrip("/")
    return Endpoint(url if parts.path.strip("/") else f"{url}/v1", model)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data[:200].decode("utf-8", "replace")


def _message(found: Any) -> str:
    """What a server says of an error, in whatever form."""
    if isinstance(found, dict):
        error = found.get("error", found)
        found = error.get("message", error) if isinstance(error, dict) else error
    return str(found)[:200]
