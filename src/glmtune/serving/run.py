"""`glmtune serve`: load the models, listen, and end after open answers."""

import socket
import sys
from typing import Any

from glmtune.config.serving import ServeSettings
from glmtune.runlog import print_pairs
from glmtune.serving.engine import Engine
from glmtune.serving.guards import check_address, key_of
from glmtune.serving.http import create_app
from glmtune.serving.listening import answer_until_signal, bind, url_of
from glmtune.serving.load import load
from glmtune.serving.pages import add_pages, find_watch

BACKLOG = 1024
"""Connections that may wait for the server to take them."""
_SECONDS_OF_A_THREAD = 1e-4
"""After this long Python lets another thread run: the scheduler's must not wait for texts."""


def serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl+C.

    Raises:
        UserError: the port is in use, base or an adapter cannot be used, or the address is unsafe.
    """
    check_address(settings)
    listener = bind(settings.host, settings.port)
    with listener:
        engine = Engine(load(settings), settings)
        listener.listen(BACKLOG)
        _announce(engine, listener)
        app = create_app(engine, settings)
        add_pages(app, settings, has_model=True, run=find_watch(settings))
        run(app, engine, listener, settings.grace)


def _announce(engine: Engine, listener: socket.socket) -> None:
    print_pairs(
        f"Serving {engine.loaded.base}",
        {
            "address": f"{url_of(listener)}/v1",
            "page": f"{url_of(listener)}/",
            "models": ", ".join(engine.models),
            "at a time": f"{len(engine.scheduler.slots.rows)} answers, "
            f"{engine.settings.max_waiting} may wait",
            "key": "needed" if key_of(engine.settings) else "none",
        },
    )


def run(app: Any, engine: Engine, listener: socket.socket, grace: float) -> None:
    """Answer requests until a signal; a second one does not wait for open answers.

    Raises:
        KeyboardInterrupt: it was Ctrl+C.
    """

    def begin_to_end() -> None:
        engine.is_ending = True
        if engine.open:
            print(f"ending after {len(engine.open)} open requests", file=sys.stderr, flush=True)

    sys.setswitchinterval(_SECONDS_OF_A_THREAD)
    answer_until_signal(app, listener, grace, begin_to_end)
