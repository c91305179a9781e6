"""What a request gets instead of an answer: OpenAI's error object."""

from typing import Any

from glmtune.errors import visible

INVALID = "invalid_request_error"
_LONGEST = 600


class RequestError(Exception):
    """An error that a client gets.

    Args:
        status: of HTTP.
        message: one line, without paths or anything else of the server's.
        param: the field of the request that is to blame.
        code: a word for programs.
        kind: OpenAI's `type`.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.message = visible(message.replace("\n", " "))[:_LONGEST]
        self.param, self.code, self.kind = param, code, kind

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def no_model(name: str, known: list[str]) -> RequestError:
    """The error of a model that is not served."""
    message = f"there is no model {name!r:.80} here; choose {', '.join(known)}"
    return RequestError(404, message, param="model", code="model_not_found")


def overloaded(message: str, code: str = "overloaded") -> RequestError:
    """The error of a request that may come again soon."""
    return RequestError(
        429, message, code=code, kind="rate_limit_error", headers={"Retry-After": "1"}
    )


def unavailable(message: str) -> RequestError:
    """The error of a server that ends, or whose model cannot answer any more."""
    return RequestError(503, message, code="unavailable", kind="server_error")


def failed(message: str, code: str = "server_error") -> RequestError:
    """The error of a request that went wrong here."""
    return RequestError(500, message, code=code, kind="server_error")
