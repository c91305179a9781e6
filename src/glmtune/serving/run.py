"""`glmtune serve`: load the models, listen, and end after open answers."""

import asyncio
import signal
import socket
import sys
from contextlib import nullcontext
from typing import Any

import uvicorn

from glmtune.config.serving import ServeSettings
from glmtune.errors import UserError
from glmtune.runlog import print_pairs
from glmtune.serving.engine import Engine
from glmtune.serving.guards import check_address, key_of
from glmtune.serving.http import create_app
from glmtune.serving.load import load
from glmtune.signals import signal_handler

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
        run(create_app(engine, settings), engine, listener, settings.grace)


def bind(host: str, port: int) -> socket.socket:
    """Take a port before anything is loaded; nobody is answered yet.

    Raises:
        UserError: it is taken, or there is no such address.
    """
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind)
        try:
            if sys.platform != "win32":  # there it would share a port that is in use
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"--port {port} at --host {host}: cannot be listened at ({reason}); choose another, or "
            "end the program that has it"
        ) from error
    return listener


def _announce(engine: Engine, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    print_pairs(
        f"Serving {engine.loaded.base}",
        {
            "address": f"http://{place}:{port}/v1",
            "models": ", ".join(engine.models),
            "at a time": f"{len(engine.scheduler.slots.rows)} answers, "
            f"{engine.settings.max_waiting} may wait",
            "key": "needed" if key_of(engine.settings) else "none",
        },
    )
    sys.stdout.flush()


class Server(uvicorn.Server):
    """uvicorn's, whose signals are handled here."""

    def capture_signals(self) -> Any:
        """Leave signals to `run`."""
        return nullcontext()


def run(app: Any, engine: Engine, listener: socket.socket, grace: float) -> None:
    """Answer requests until a signal; a second one does not wait for open answers.

    Raises:
        KeyboardInterrupt: it was Ctrl+C.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(grace)),
        lifespan="on",
    )
    server = Server(config)
    received: list[int] = []

    def end(number: int, _: Any) -> None:
        received.append(number)
        if engine.is_ending:
            server.force_exit = True
            return
        engine.is_ending = server.should_exit = True
        if engine.open:
            print(f"ending after {len(engine.open)} open requests", file=sys.stderr, flush=True)

    sys.setswitchinterval(_SECONDS_OF_A_THREAD)
    with signal_handler(end, signal.SIGTERM, signal.SIGINT):
        asyncio.run(server.serve(sockets=[listener]))
    if signal.SIGINT in received:
        raise KeyboardInterrupt
