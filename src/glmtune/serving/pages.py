"""The page at `/`, what it loads, and what it shows of a run.

Everything comes from this server: the content policy lets the page ask for nothing else. A page of
the run folder, such as its comparison, has scripts inside: it is shown in a sandbox, so that it
reaches neither the conversations nor the server.
"""

import hashlib
import re
from base64 import b64encode
from importlib import resources
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, Response

from glmtune.config.serving import ServeSettings
from glmtune.errors import visible
from glmtune.run_files import RECIPE_FILE, is_run, run_around
from glmtune.serving.errors import RequestError
from glmtune.serving.guards import COOKIE, key_of, session_of
from glmtune.serving.run_plots import LABELS, plots, run_files
from glmtune.serving.watch import RunWatch

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FILES = {
    **dict.fromkeys(("page.css", "language.js"), "glmtune.evaluation"),
    **dict.fromkeys(
        (
            "serving.css", "icon.svg", "main.js", "chat.js", "run.js", "server.js", "history.js",
            "parts.js",
        ),
        "glmtune.serving",
    ),
}  # fmt: skip
"""What the page loads, and which package holds it."""


def add_pages(
    app: FastAPI, settings: ServeSettings, *, has_model: bool, run: RunWatch | None = None
) -> None:
    """Add the page, and `/run` where there is a run to watch, to a server behind `Guards`.

    Args:
        app: the server.
        settings: of the server, for its key.
        has_model: whether it answers, so that the page shows the conversation.
        run: the run to watch.
    """
    app.include_router(_own_pages(has_model, run is not None))
    if run is not None:
        app.include_router(_run_pages(run, key_of(settings)))


def find_watch(settings: ServeSettings) -> RunWatch | None:
    """The run that a server shows: the one that is named, or that an adapter lies in.

    Raises:
        UserError: what is named is no run.
    """
    if settings.run is not None:
        return RunWatch.of(settings.run)
    for folder in settings.adapters.values():
        if is_run(around := run_around(Path(folder))):
            return RunWatch(around)
    return None


def _own_pages(has_model: bool, has_run: bool) -> APIRouter:
    """The page and what it loads: no secret is in them, so they need no key."""
    index = _content("glmtune.serving", "index.html")
    pages = APIRouter(include_in_schema=False)

    @pages.get("/")
    @pages.get("/run")
    def page() -> Response:
        return HTMLResponse(index, headers=HEADERS)

    @pages.get("/page/about.json")
    def about() -> Response:
        content = {"chat": has_model, "run": has_run}
        return JSONResponse(content, headers={**HEADERS, "Cache-Control": "no-store"})

    @pages.get("/page/{name}")
    def file(name: str) -> Response:
        if name not in FILES:
            return _no_file()
        return Response(_content(FILES[name], name), media_type=_type(name), headers=HEADERS)

    return pages


def _run_pages(run: RunWatch, key: str | None) -> APIRouter:
    """What is shown of a run."""
    pages = APIRouter(include_in_schema=False, prefix="/run")

    @pages.get("/status")
    def status(known: str = "") -> Response:
        return JSONResponse(run_status(run, known), headers={"Cache-Control": "no-store"})

    @pages.post("/session")
    def session() -> Response:
        answer = Response(status_code=204)
        if key is not None:  # which this request came with
            answer.set_cookie(
                COOKIE, session_of(key), path="/run", httponly=True, samesite="strict"
            )
        return answer

    @pages.get("/files/{name}")
    def file(name: str) -> Response:
        path = run_files(run.folder).get(name)
        return _no_file() if path is None else _run_file(path)

    return pages


def run_status(run: RunWatch, known: str = "") -> dict[str, Any]:
    """What the page shows of a run; curves and samples only if `known` is not their version."""
    version = run.version()
    files = [
        {"name": name, "zh": LABELS[name].zh, "en": LABELS[name].en}
        for name in run_files(run.folder)
    ]
    status = {**run.as_json(), "version": version, "files": files}
    if version == known:
        return status
    samples = [sample._asdict() for sample in run.samples]
    return {**status, "plots": [panel.html for panel in plots(run)], "samples": samples}


def _run_file(path: Path) -> Response:
    content = path.read_bytes()
    headers = {**HEADERS, "Content-Security-Policy": "default-src 'none'; sandbox"}
    if path.suffix == ".html":
        headers["Content-Security-Policy"] = _policy_of(content.decode("utf-8", "replace"))
    elif path.name == RECIPE_FILE:
        content = visible(content.decode("utf-8", "replace")).encode()
    return Response(content, media_type=_type(path.name), headers=headers)


def _policy_of(page: str) -> str:
    """What a page may do: run its own scripts, by hash, as a stranger to this server."""
    hashes = {
        kind: " ".join(
            f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        "sandbox allow-scripts allow-modals; default-src 'none'; base-uri 'none'; "
        f"form-action 'none'; script-src {hashes['script'] or chr(39) + 'none' + chr(39)}; "
        f"style-src {hashes['style'] or chr(39) + 'none' + chr(39)}"
    )


def _type(name: str) -> str:
    if name.endswith((".yaml", ".jsonl")):
        return "text/plain; charset=utf-8"
    if name.endswith(".js"):  # which some systems know by another name
        return "text/javascript; charset=utf-8"
    return guess_type(name)[0] or "application/octet-stream"


def _content(package: str, name: str) -> str:
    folder = resources.files(package)
    return (folder / "page" / name if package == "glmtune.serving" else folder / name).read_text(
        "utf-8"
    )


def _no_file() -> Response:
    """An error in OpenAI's form."""
    error = RequestError(404, "there is no such file")
    return JSONResponse(error.body(), status_code=error.status)
