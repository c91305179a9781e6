"""What a server refuses, limits and survives: keys, pages, sizes, queues, memory, signals."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import torch
from serving import client_of, question, serving, until

from glmtune.config.serving import ServeSettings
from glmtune.errors import UserError
from glmtune.generation import EncodedPrompt
from glmtune.generation.sampling import ChoiceSettings
from glmtune.generation.slots import Slots
from glmtune.serving.engine import Engine
from glmtune.serving.forms import ChatForm
from glmtune.serving.guards import check_address
from glmtune.serving.http import EventStream
from glmtune.serving.load import load
from glmtune.serving.run import bind
from glmtune.serving.scheduler import Scheduler, Work
from glmtune.serving.schema import ChatRequest

ENDLESS = {"max_tokens": 1500, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def loaded():
    return load(ServeSettings(base="glm-tiny", use_cpu=True))


def post(engine, body, **more):
    url = f"{engine.url}/v1/chat/completions"
    return httpx.post(url, json={"model": "base", "messages": question("hi")} | body, **more)


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for private in ("Traceback", "/home", "/tmp", "site-packages", ".py"):
        assert private not in error["message"]
    return response.status_code, error["code"]


def hold(engine, count=1):
    """Streams that go on until they are closed."""
    client = client_of(engine)
    streams = [
        client.completions.create(
            model="base", prompt="a", stream=True, max_tokens=1500, temperature=0,
            extra_body={"ignore_eos": True},
        )
        for _ in range(count)
    ]  # fmt: skip
    for stream in streams:
        next(iter(stream))
    return streams


def test_a_key_is_needed_for_all_but_probes_and_the_page(loaded):
    with serving(loaded, api_key="secret-key") as engine:
        for key in ("wrong", "secret-keys", "sécrèt"):
            given = {"Authorization": f"Bearer {key}".encode()}
            assert error_of(httpx.get(f"{engine.url}/v1/models", headers=given)) == (
                401,
                "invalid_api_key",
            )
        assert error_of(post(engine, {}))[0] == 401
        assert httpx.get(f"{engine.url}/metrics").status_code == 401
        assert httpx.get(f"{engine.url}/health").status_code == 200
        assert httpx.get(f"{engine.url}/ready").status_code == 200
        assert httpx.get(f"{engine.url}/").status_code == 404  # a page, where there is one
        assert len(client_of(engine, "secret-key").models.list().data) == 1


def test_the_key_may_come_from_the_environment(monkeypatch):
    other = ServeSettings(host="0.0.0.0")
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0.*GLMTUNE_API_KEY"):
        check_address(other)
    check_address(ServeSettings(host="0.0.0.0", insecure=True))
    check_address(ServeSettings(host="0.0.0.0", api_key="a"))
    check_address(ServeSettings())
    monkeypatch.setenv("GLMTUNE_API_KEY", "b")
    check_address(other)


def test_pages_of_other_origins_may_not_ask(loaded):
    evil, own = {"Origin": "https://evil.example"}, "https://own.example"
    with serving(loaded, allow_origin=(own,)) as engine:
        assert error_of(post(engine, {}, headers=evil)) == (403, "origin_not_allowed")
        assert error_of(post(engine, {}, headers={"Origin": "null"}))[0] == 403
        assert error_of(post(engine, {}, headers={"Host": "evil.example"})) == (
            403,
            "host_not_allowed",
        )
        same = post(engine, {"max_tokens": 1}, headers={"Origin": engine.url})
        assert same.status_code == 200
        assert "access-control-allow-origin" not in same.headers
        allowed = post(engine, {"max_tokens": 1}, headers={"Origin": own})
        assert allowed.headers["access-control-allow-origin"] == own
        asked = httpx.options(f"{engine.url}/v1/chat/completions", headers={"Origin": own})
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-headers"] == "authorization, content-type"


def test_bodies_and_prompts_have_limits(loaded):
    with serving(loaded, max_body_bytes=2000, max_prompt_tokens=20) as engine:
        big = {"messages": question("a" * 3000)}
        assert error_of(post(engine, big)) == (413, "body_too_large")
        pieces = (b"x" * 1000 for _ in range(9))
        url = f"{engine.url}/v1/completions"
        assert error_of(httpx.post(url, content=pieces)) == (413, "body_too_large")
        long = {"messages": question("a b c d " * 20)}
        assert error_of(post(engine, long)) == (400, "context_length_exceeded")
        assert post(engine, {"max_tokens": 1}).status_code == 200


BODIES = {
    "nothing": b"", "no JSON": b"{nope", "a list": b"[1]", "a number": b"5", "deep": b"[" * 900,
    "not UTF-8": b'{"model": "\xff"}', "NaN": b'{"model": "base", "temperature": NaN}',
    "half a character": b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a model": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
    "no messages": b'{"model": "base", "messages": []}',
    "an object in a message": b'{"model": "base", "messages": [{"role": "user", "content": {}}]}',
    "no content": b'{"model": "base", "messages": [{"role": "user"}]}',
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(loaded):
    with serving(loaded, slots=2, max_waiting=1) as engine:
        yield engine


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_cannot_be_read(plain, body):
    headers = {"Content-Type": "application/json"}
    found = httpx.post(f"{plain.url}/v1/chat/completions", content=body, headers=headers)
    assert error_of(found)[0] in (400, 404)


def test_paths_and_methods_that_are_not_there(plain):
    assert error_of(httpx.get(f"{plain.url}/v1/embeddings"))[0] == 404
    for found in (httpx.get(f"{plain.url}/models"), httpx.post(f"{plain.url}/chat/completions")):
        assert found.status_code == 404
        assert f"but /v1{found.url.path}; let the client" in found.json()["error"]["message"]
    assert "see /openapi.json" in httpx.get(f"{plain.url}/props").json()["error"]["message"]
    assert error_of(httpx.get(f"{plain.url}/v1/chat/completions"))[0] == 405
    assert error_of(httpx.get(f"{plain.url}/v1/models/nobody")) == (404, "model_not_found")


def test_a_full_queue_refuses(plain):
    streams = hold(plain, 2)
    waiting = threading.Thread(target=post, args=(plain, {"max_tokens": 1}))
    waiting.start()
    until(lambda: plain.scheduler.num_waiting == 1)
    full = post(plain, {})
    assert error_of(full) == (429, "queue_full")
    assert full.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    waiting.join()
    until(lambda: not plain.open)


def test_an_answer_that_takes_too_long_ends_with_an_error(loaded):
    with serving(loaded, max_seconds=0.3) as engine:
        assert error_of(post(engine, ENDLESS)) == (408, "timeout")
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            for _ in hold(engine)[0]:
                pass
        assert not engine.scheduler.running


def work(client, length=4, tokens=3):
    settings = ChoiceSettings(max_new_tokens=tokens)
    return Work(EncodedPrompt([5] * length + [2648, 2651], 0), settings, (), 0, client, 1e12)


def test_clients_have_equal_shares(loaded):
    """One that asks for much waits for others that ask later."""
    scheduler = Scheduler(loaded.decoder, 2, 99, lambda news: None)
    scheduler.submit([work("greedy") for _ in range(9)])
    scheduler.submit([work("late"), work("later")])
    order = []
    for _ in range(4):
        group = scheduler._next_group()
        order += [each.client for each in group]
        scheduler.running.clear()
    assert order[:2] == ["greedy", "late"]
    assert "later" in order[:4]


@pytest.mark.parametrize("overlaps", [False, True])
def test_prompts_are_read_before_the_last_ones_tokens_are_waited_for(loaded, monkeypatch, overlaps):
    """On a GPU; each answer is the same, also one of a single token."""
    asked = [work(f"client {n}", length=3 + n, tokens=1 + (n + 2) % 4) for n in range(6)]
    told, order = {each: [] for each in asked}, []

    def deliver(news):
        for each, update in news:
            told[each] += update.ids

    scheduler = Scheduler(loaded.decoder, 6, 99, deliver)
    scheduler.overlaps, slots = overlaps, scheduler.slots
    admit, read = slots.admit, slots.read
    slots.admit = lambda *given: (order.append("admit"), admit(*given))[1]
    slots.read = lambda notes: (order.append("read"), read(notes))[1]
    monkeypatch.setattr(loaded.decoder, "most_prompts", lambda _: 2)
    scheduler.submit(asked)
    scheduler.start()
    until(lambda: not scheduler.num_open)
    scheduler.close()
    beginning = ["admit", "admit", "read", "admit", "read"] if overlaps else ["admit", "read"] * 3
    assert order[: len(beginning)] == beginning
    for each in asked:
        slots = Slots(loaded.decoder, 1)
        slots.admit([0], [each.prompt], [each.settings], [()])
        expected = slots.look()[0]
        while slots.num_live:
            slots.step()
            expected += slots.look()[0]
        assert told[each] == expected
        assert len(expected) == each.settings.max_new_tokens


def test_who_follows_in_a_slot_does_not_get_the_last_ones_end(loaded):
    """On a GPU one more step is under way when an answer ends, and is noted for its slot too."""
    first, second = work("first", tokens=20), work("second", length=9, tokens=7)
    told = {first: [], second: []}

    def deliver(news):
        for each, update in news:
            told[each].append(update)

    slots = Slots(loaded.decoder, 1)
    slots.admit([0], [first.prompt], [first.settings], [()])
    made = slots.look()[0]
    while len(set(made)) < 2:
        slots.step()
        made += slots.look()[0]
    first.stop_ids = made[-1:]
    scheduler = Scheduler(loaded.decoder, 1, 99, deliver)
    scheduler.overlaps = True
    scheduler.submit([first, second])
    scheduler.start()
    until(lambda: not scheduler.num_open)
    scheduler.close()
    ids = {each: [id_ for update in news for id_ in update.ids] for each, news in told.items()}
    ends = [[update.finish for update in news if update.is_last] for news in told.values()]
    assert ids[first] == made
    assert len(ids[second]) == 7
    assert ends == [["stop"], ["length"]]


@pytest.mark.parametrize("waits", [True, False])
def test_who_submits_waits_while_a_pass_is_launched(loaded, monkeypatch, waits):
    """On a GPU, and not for longer than a launch takes: a pass may have to be captured first."""
    monkeypatch.setattr("glmtune.serving.scheduler._SECONDS_OF_A_LAUNCH", 600 if waits else 0)
    scheduler, order = Scheduler(loaded.decoder, 4, 99, lambda news: None), []
    scheduler.overlaps, admit = True, scheduler.slots.admit

    def submit_second():
        order.append("begins")
        scheduler.submit([work("second", tokens=2)])
        order.append("submitted")

    second = threading.Thread(target=submit_second)

    def launch(*given):
        if not second.ident:
            second.start()
            until(lambda: order)
            if not waits:
                second.join()
            else:
                time.sleep(0.1)
            order.append("launched")
        admit(*given)

    scheduler.slots.admit = launch
    scheduler.submit([work("first", tokens=2)])
    scheduler.start()
    until(lambda: second.ident and not second.is_alive() and not scheduler.num_open)
    scheduler.close()
    assert order == ["begins", *(["launched", "submitted"] if waits else ["submitted", "launched"])]


def test_answers_that_run_wait_for_fewer_passes_than_those_that_begin(loaded, monkeypatch):
    scheduler, order = Scheduler(loaded.decoder, 14, 99, lambda news: None), []
    slots = scheduler.slots
    admit, step = slots.admit, slots.step
    slots.admit = lambda *given: (order.append("pass"), admit(*given))[1]
    slots.step = lambda times: (order.append("step"), step(times))[1]
    monkeypatch.setattr(loaded.decoder, "most_prompts", lambda _: 1)
    scheduler.submit([work("one", tokens=9) for _ in range(14)])
    scheduler.start()
    until(lambda: not scheduler.num_open)
    scheduler.close()
    turns = "".join(each[0] for each in order).split("s")
    assert turns[:4] == ["p" * 8, "p" * 4, "p" * 2, ""]


def test_requests_that_arrive_together_are_read_together(loaded, monkeypatch):
    """Those that the event loop has in its hands; a pass of them does not begin with the first."""
    groups = []
    admit = Scheduler._admit
    monkeypatch.setattr(
        Scheduler, "_admit", lambda self, group: (groups.append(len(group)), admit(self, group))[1]
    )
    body = {"model": "base", "messages": question("hi"), "max_tokens": 1}

    async def ask(engine):
        engine.start()
        for number in range(5):
            if number:
                time.sleep(0.05)  # what reading a request takes, and the scheduler is idle
            opened = engine.chat(ChatRequest(**body), "somebody")
        assert not groups
        async for _ in opened.pieces():
            pass
        lone = engine.chat(ChatRequest(**body), "somebody")
        async for _ in lone.pieces():
            pass
        full = -(-512 // 64)
        for _ in range(full):
            opened = engine.chat(ChatRequest(**body), "somebody")
        until(lambda: sum(groups) == 6 + full)  # the event loop stands still meanwhile

    engine = Engine(loaded, ServeSettings(base="glm-tiny", use_cpu=True))
    asyncio.run(ask(engine))
    engine.close()
    assert groups == [5, 1, 8]


def test_events_that_are_known_together_are_sent_together(loaded):
    """Each send is a call of the system; an answer of one token is one."""
    body = {"model": "base", "messages": question("hi"), "stream": True, "temperature": 0}

    async def bodies(engine, num_tokens):
        opened = engine.chat(ChatRequest(**body, max_tokens=num_tokens, ignore_eos=True), "")
        sent = []

        async def send(message):
            sent.append(message)

        never = asyncio.Event()
        await EventStream(opened, {"id": "a"}, ChatForm(engine.texts))({}, never.wait, send)
        assert [message["type"] for message in sent[:1]] == ["http.response.start"]
        assert [message["more_body"] for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
        return [message["body"].count(b"data: ") for message in sent[1:]]

    async def ask():
        engine.start()
        assert await bodies(engine, 1) == [3]  # the role, the token, [DONE]
        first, *between, last = await bodies(engine, 40)
        assert (first, last) == (2, 2)
        assert set(between) == {1}

    engine = Engine(loaded, ServeSettings(base="glm-tiny", use_cpu=True))
    asyncio.run(ask())
    engine.close()


def test_without_memory_one_request_is_refused_and_others_go_on(plain, monkeypatch):
    streams = hold(plain)
    admit = plain.scheduler.slots.admit

    def without_memory(slots, prompts, *more):
        if max(len(prompt.ids) for prompt in prompts) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        admit(slots, prompts, *more)

    monkeypatch.setattr(plain.scheduler.slots, "admit", without_memory)
    assert error_of(post(plain, {"messages": question("a b c d e " * 30)})) == (
        500,
        "out_of_memory",
    )
    assert post(plain, {"max_tokens": 2}).status_code == 200
    assert next(iter(streams[0])).choices
    streams[0].close()
    until(lambda: not plain.open)


@pytest.mark.parametrize(
    "ids, words",
    [
        ([5, 6], "prompt: row 0 has no <sop>; encode prompts with this model's own tokenizer"),
        ([5, 2651], "prompt: row 0 has no [gMASK] before <sop>"),
        ([2651, 2648], "prompt: row 0 has no [gMASK] before <sop>"),
        ([], "prompt holds 0 texts"),
        ([3008], "prompt: ids have to be 0 to 3007"),
        ([-1], "prompt: ids have to be 0 to 3007"),
    ],
)
def test_ids_that_are_no_prompt_of_the_model_are_refused(plain, ids, words):
    def ask(prompt):
        body = {"model": "base", "prompt": prompt, "max_tokens": 2}
        return httpx.post(f"{plain.url}/v1/completions", json=body)

    assert error_of(ask(ids))[0] == 400
    assert words in ask(ids).json()["error"]["message"]
    assert ask([5, 6, 2648, 2651]).status_code == 200


def test_ids_that_end_as_the_familys_prompts_do_are_checked_without_torch(plain, monkeypatch):
    """As long as the event loop computes with torch, the thread that answers may hold it up."""
    asked, check = [], plain.loaded.decoder.block.layout

    def layout(ids_BK, config):
        asked.append(threading.current_thread().name)
        return check(ids_BK, config)

    block = plain.loaded.decoder.block._replace(layout=layout)
    monkeypatch.setattr(plain.loaded.decoder, "block", block)
    for prompt, threads in (
        ([5, 6, 2648, 2651], {"scheduler"}),
        ([5, 2651, 6, 2648, 2651], {"other"}),  # would be read as [5], without [gMASK]
        ([5, 2648, 2651, 6], {"scheduler", "other"}),
    ):
        body = {"model": "base", "prompt": prompt, "max_tokens": 2}
        response = httpx.post(f"{plain.url}/v1/completions", json=body)
        assert response.status_code == (200 if "scheduler" in threads else 400)
        assert {name if name == "scheduler" else "other" for name in asked} == threads
        asked.clear()


def test_what_no_request_should_bring_about_ends_that_request_alone(plain, monkeypatch, capfd):
    admit = plain.scheduler.slots.admit

    def fails(slots, prompts, *more):
        if max(len(prompt.ids) for prompt in prompts) > 60:
            raise KeyError("a mistake of ours")
        admit(slots, prompts, *more)

    monkeypatch.setattr(plain.scheduler.slots, "admit", fails)
    assert error_of(post(plain, {"messages": question("a b c d e " * 30)})) == (500, "server_error")
    assert post(plain, {"max_tokens": 2}).status_code == 200
    assert "a mistake of ours" in capfd.readouterr().err


def test_a_row_that_is_not_finite_ends_alone(plain):
    """Its neighbour goes on, and the slot answers again."""
    expected = post(plain, {"max_tokens": 8, "temperature": 0}).json()["choices"]
    stream = hold(plain)[0]
    slots = plain.scheduler.slots
    until(lambda: slots._buffers is not None and plain.scheduler.running)
    (slot,) = plain.scheduler.running
    with torch.inference_mode():
        slots._buffers.fault_B[slot] = torch.nan
    with pytest.raises(openai.APIError, match="not finite"):
        for _ in stream:
            pass
    assert post(plain, {"max_tokens": 8, "temperature": 0}).json()["choices"] == expected


def test_a_port_in_use_is_one_line():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}.*cannot be listened at"):
            bind("127.0.0.1", port)


def test_the_verb_ends_after_open_answers(tmp_path):
    """The command as a user starts it: SIGTERM lets an answer end, and no new one begins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"-m glmtune serve --chatglm_path glm-tiny --port {port} --use_cpu --grace 60"
    process = subprocess.Popen(
        [sys.executable, *line.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        said = [process.stdout.readline() for _ in range(3)]
        assert f"http://127.0.0.1:{port}/v1" in "".join(said)
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = {"model": "base", "prompt": "a", "stream": True, **ENDLESS, "max_tokens": 300}
        with httpx.stream("POST", url, json=body, timeout=None) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
            process.send_signal(signal.SIGTERM)
            rest = [each for each in lines if each]
        assert rest[-1] == "data: [DONE]"
        assert (
            json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
