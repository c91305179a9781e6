"""The routes, in OpenAI's form."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

import glmtune
from glmtune.config.serving import ServeSettings
from glmtune.serving.engine import Engine, Open
from glmtune.serving.errors import INVALID, RequestError, failed
from glmtune.serving.forms import ChatForm, CompletionForm, Form
from glmtune.serving.guards import Guards
from glmtune.serving.metrics import CONTENT_TYPE
from glmtune.serving.schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    ModelList,
    ServedModel,
)

FINGERPRINT = f"glmtune-{glmtune.__version__}"
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "What is wrong, in OpenAI's form."}
}


class Json(Response):
    """A response that is JSON, whatever it holds."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the content."""
        return orjson.dumps(content)


def create_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """The server's application; pages are added to it by whoever has some.

    Paths that need no key even where the server has one: `guards.PUBLIC`.

    Args:
        engine: that answers; started and closed with the application.
        settings: of the server.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="glmtune",
        version=glmtune.__version__,
        description="A GLM and its adapters, in OpenAI's protocol.",
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.engine = engine
    app.add_middleware(Guards, settings=settings, metrics=engine.metrics)
    _answer_errors(app)

    @app.get("/health", summary="Whether the server lives")
    async def health() -> Response:
        if not engine.scheduler.is_alive:
            return Json({"status": "failed"}, 503)
        return Json({"status": "ok"})

    @app.get("/ready", summary="Whether requests are answered")
    async def ready() -> Response:
        if not engine.is_ready:
            return Json({"status": "ending" if engine.is_ending else "failed"}, 503)
        return Json({"status": "ready"})

    @app.get(
        "/metrics",
        summary="Counts and times in Prometheus' format",
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", response_model=ModelList, responses=_ERRORS)
    async def models() -> Response:
        return Json(ModelList(data=[_listed(engine, name) for name in engine.models]).model_dump())

    @app.get("/v1/models/{name}", response_model=ServedModel, responses=_ERRORS)
    async def model(name: str) -> Response:
        engine.model(name)
        return Json(_listed(engine, name).model_dump())

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(
            engine.chat(body, _client(request, body)), request, ChatForm(engine.texts)
        )

    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        found = engine.complete(body, _client(request, body))
        return await _answer(found, request, CompletionForm(engine.texts))

    return app


def _client(request: Request, body: ChatRequest | CompletionRequest) -> str:
    """Whose share of the slots a request takes: the address, and the user that it names."""
    user = body.user or getattr(body, "safety_identifier", None) or ""
    return f"{request.client.host if request.client else ''} {user}"


def _listed(engine: Engine, name: str) -> ServedModel:
    model = engine.models[name]
    return ServedModel(
        id=name,
        created=engine.created,
        kind=model.kind,
        sides=[side.name for side in model.sides],
        base=engine.loaded.base,
        adapter=model.sides[-1].folder,
        format=model.sides[-1].format,
        max_model_len=engine.num_positions,
    )


async def _answer(found: Open, request: Request, form: Form) -> Response:
    head = {
        "id": f"{form.prefix}-{secrets.token_hex(12)}",
        "object": form.part if found.request.stream else form.whole,
        "created": found.created,
        "model": found.request.model,
        "system_fingerprint": FINGERPRINT,
    }
    if found.request.stream:
        return EventStream(found, head, form)
    try:
        collecting = asyncio.create_task(_collect(found))
        gone = asyncio.create_task(_until_gone(request.receive))
        await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not collecting.done():
            collecting.cancel()
            return Response(status_code=499)  # nobody reads it
        collecting.result()
    finally:
        found.close()
    choices = [form.choice(choice) for choice in found.choices]
    return Json({**head, "choices": choices, "usage": found.usage})


async def _collect(found: Open) -> None:
    async for _ in found.pieces():
        pass


async def _until_gone(receive: Receive) -> None:
    """Wait until the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Answers as server-sent events, which end when the client hangs up."""

    media_type = "text/event-stream"

    def __init__(self, found: Open, head: dict[str, Any], form: Form):
        self.found, self.head, self.form = found, head, form
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    def render(self, content: Any) -> bytes:
        """Nothing is known beforehand."""
        return b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            sending = asyncio.create_task(self._send(send))
            gone = asyncio.create_task(_until_gone(receive))
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not sending.done():
                sending.cancel()
                return
            sending.result()
        finally:
            self.found.close()

    async def _send(self, send: Send) -> None:
        """Send the events; those that are known together in one piece, of which each costs time."""
        usage = {"usage": None} if self.found.request.wants_usage else {}
        ready: list[bytes] = []

        def add(content: bytes) -> None:
            ready.append(b"data: " + content + b"\n\n")

        async def send_ready(more: bool) -> None:
            body = b"".join(ready)
            ready.clear()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            for choice in self.found.choices:
                if (first := self.form.first(choice)) is not None:
                    add(orjson.dumps({**self.head, "choices": [first], **usage}))
            async for choice, piece in self.found.pieces():
                if (part := self.form.piece(choice, piece)) is not None:
                    add(orjson.dumps({**self.head, "choices": [part], **usage}))
                    if not self.found.has_ended:
                        await send_ready(more=True)
            if usage:
                add(orjson.dumps({**self.head, "choices": [], "usage": self.found.usage}))
            add(b"[DONE]")
        except RequestError as error:
            add(orjson.dumps(error.body()))
        await send_ready(more=False)


def _answer_errors(app: FastAPI) -> None:
    """Let all errors have OpenAI's form."""

    def said(error: RequestError) -> Response:
        return Json(error.body(), error.status, headers=error.headers)

    def handler(make: Callable[[Any, Request], RequestError]) -> Any:
        async def handle(request: Request, error: Exception) -> Response:
            return said(make(error, request))

        return handle

    app.add_exception_handler(RequestError, handler(lambda error, _: error))
    app.add_exception_handler(RequestValidationError, handler(_of_validation))
    app.add_exception_handler(HTTPException, handler(_of_http))
    app.add_exception_handler(Exception, handler(lambda *_: failed("something went wrong here")))


def _of_validation(error: RequestValidationError, _: Request) -> RequestError:
    """The first mistake of a body, by the name of its field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid" or first["loc"] == ("body",):
        return RequestError(400, "the body is no JSON object", code="invalid_json")
    path = [str(part) for part in first["loc"] if part != "body"]
    param = path[0] if path else None
    where = ".".join(path) or "the body"
    if first["type"] == "extra_forbidden":
        message = f"there is no field {where}; take it out"
        return RequestError(400, message, param=param, code="unknown_parameter")
    return RequestError(400, f"{where}: {first['msg']}", param=param)


def _of_http(error: HTTPException, request: Request) -> RequestError:
    meant = f"/v1{request.url.path}"
    is_known = any(getattr(route, "path", None) == meant for route in request.app.routes)
    words = {
        404: f"there is no such path, but {meant}; let the client's base_url end in /v1"
        if is_known
        else "there is no such path; see /openapi.json",
        405: "this path does not take that method",
    }
    message = words.get(error.status_code, "the request cannot be read")
    return RequestError(error.status_code, message, kind=INVALID, headers=dict(error.headers or {}))
