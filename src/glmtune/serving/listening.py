"""A port, and the loop that answers there until a signal ends it."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import uvicorn

from glmtune.errors import UserError
from glmtune.signals import signal_handler


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


class Server(uvicorn.Server):
    """uvicorn's, whose signals are handled here."""

    def capture_signals(self) -> Any:
        """Leave signals to `run`."""
        return nullcontext()


def answer_until_signal(
    app: Any, listener: socket.socket, grace: float, begin_to_end: Callable[[], None]
) -> None:
    """Answer requests until a signal; a second one does not wait for open answers.

    Args:
        app: the application.
        listener: bound to the server's port.
        grace: seconds that open answers get to end.
        begin_to_end: called at the first signal.

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
        if server.should_exit:
            server.force_exit = True
            return
        server.should_exit = True
        begin_to_end()

    sys.stdout.flush()
    with signal_handler(end, signal.SIGTERM, signal.SIGINT):
        asyncio.run(server.serve(sockets=[listener]))
    if signal.SIGINT in received:
        raise KeyboardInterrupt


def url_of(listener: socket.socket) -> str:
    """The address of a server, for people."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
