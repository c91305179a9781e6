"""`glmtune serve --run RUN` alone: a run is shown, and no model is loaded."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from glmtune.config.serving import ServeSettings
from glmtune.runlog import print_pairs
from glmtune.serving.errors import RequestError
from glmtune.serving.guards import Guards, check_address, key_of
from glmtune.serving.listening import answer_until_signal, bind, url_of
from glmtune.serving.pages import add_pages
from glmtune.serving.run_sentences import sentence
from glmtune.serving.watch import RunWatch

NO_MODEL = (
    "this server shows a run and has no model; start it with --base, or with --adapter NAME=FOLDER"
)


def serve_run(settings: ServeSettings) -> None:
    """Serve the page of a run until SIGTERM or Ctrl+C.

    Raises:
        UserError: there is no such run, the port is in use, or the address is unsafe.
    """
    check_address(settings)
    assert settings.run is not None, "that is what is served"
    watch = RunWatch.of(settings.run)
    with bind(settings.host, settings.port) as listener:
        listener.listen()
        key = "needed" if key_of(settings) else "none"
        page = {"page": f"{url_of(listener)}/run", "key": key}
        print_pairs(f"Showing {watch.folder}: {sentence(watch.condition()).en}", page)
        answer_until_signal(create_app(watch, settings), listener, settings.grace, lambda: None)


def create_app(watch: RunWatch, settings: ServeSettings) -> FastAPI:
    """The application: the page, and a word to clients that want a model."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guards, settings=settings)
    add_pages(app, settings, has_model=False, run=watch)

    @app.get("/health")
    @app.get("/ready")
    def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.api_route("/v1/{path:path}", methods=["GET", "POST"])
    def no_model(path: str) -> Response:
        error = RequestError(404, NO_MODEL, code="model_not_found")
        return JSONResponse(error.body(), status_code=error.status)

    return app
