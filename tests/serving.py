"""A server in a thread of the test's process, on a port of its own, and the official client."""

import contextlib
import threading
import time

import openai
import torch
import uvicorn

from glmtune.config.serving import ServeSettings
from glmtune.serving.engine import Engine
from glmtune.serving.http import create_app
from glmtune.serving.listening import Server, bind
from glmtune.serving.load import load


@contextlib.contextmanager
def serving(loaded=None, **settings):
    """Serve; yields the engine, whose `url` is the server's."""
    settings = ServeSettings(**{"base": "glm-tiny", "use_cpu": True, "port": 0} | settings)
    engine = Engine(loaded or load(settings), settings)
    listener = bind(settings.host, settings.port)
    listener.listen(256)
    engine.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = create_app(engine, settings)
    server = Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield engine
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def client_of(engine, key="none"):
    """The official client, which does not ask again."""
    return openai.OpenAI(base_url=f"{engine.url}/v1", api_key=key, max_retries=0)


def until(is_so):
    """Wait for something that comes sooner or later."""
    while not is_so():
        time.sleep(0.01)


def question(text):
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def strong_adapters(model, seeds, std=1.0):
    """Adapters that change answers, as `attach_lora` and `randomise_adapter` make them."""
    from toys import randomise_adapter

    from glmtune.adapters import attach_lora

    for seed in seeds:
        torch.manual_seed(seed)
        adapted = randomise_adapter(attach_lora(model, rank=2 + 2 * seed), std)
        yield adapted
        adapted.unload()
