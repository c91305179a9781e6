"""`--engine ray`: the same results as from one process, and from workers that are killed."""

import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest
from serving import until
from spread_files import dumps, records, report, tokens_of

from glmtune import spread
from glmtune.cli import main
from glmtune.data import parts, spread_rows
from glmtune.errors import UserError
from glmtune.spread import over, running_ray

pytestmark = pytest.mark.slow  # Ray's processes need both cores of a small machine for themselves
pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")


@pytest.fixture(scope="module", autouse=True)
def _ray():
    """One Ray for all tests here: it takes seconds to start, and then works from the first item."""
    with running_ray(None):
        (ray,) = spread._running
        until(lambda: ray.is_ready(waits))
        yield


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "PART_BYTES", 100_000)
    monkeypatch.setattr(spread_rows, "CHARACTERS_PER_STRETCH", 20_000)
    Path("rows.json").write_text(json.dumps([*records(6000)], ensure_ascii=False), "utf-8")


def workers():
    """The processes of Ray that work on items, or wait for some."""
    of_items = ("ray::MapBatches", "ray::IDLE", "ray::Map")
    children = psutil.Process().children(recursive=True)
    return [one for one in children if " ".join(one.cmdline()).startswith(of_items)]


def kill_workers():
    killed = 0
    for one in workers():
        with suppress(ProcessLookupError):  # Ray ends those that wait for too long
            os.kill(one.pid, signal.SIGKILL)
            killed += 1
    return killed


def test_nothing_is_reachable_from_elsewhere():
    assert [*over(waits, [1, 2])] == [2, 4]
    own = psutil.Process()
    places = [
        connection.laddr.ip
        for one in [own, *own.children(recursive=True)]
        for connection in one.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert places
    assert {
        place for place in places if not place.startswith(("127.", "::1", "::ffff:127."))
    } == set()


def waits(item):
    """Work that is not done before the test has looked for it."""
    for _ in range(3):
        time.sleep(0.2)
    yield item * 2


def test_results_come_in_the_order_of_the_items_though_workers_are_killed():
    found = []
    for result in over(waits, range(12)):
        if not found:
            assert kill_workers()
        found.append(result)
    assert found == [2 * number for number in range(12)]


@pytest.fixture(params=["all", "some", "none"])
def share(request, monkeypatch):
    """The command itself does all items, the first three of each pass, or none."""
    most = {"all": float("inf"), "some": 3, "none": 0}[request.param]
    seen = {}

    def is_ready(ray, work):
        seen[id(work)] = num, _ = seen.get(id(work), (-1, work))[0] + 1, work
        return num >= most

    monkeypatch.setattr(spread._Ray, "is_ready", is_ready)
    monkeypatch.setattr(spread, "SECONDS_WORTH_IT", 0)
    return most


def with_mistakes(item):
    if item % 5 == 4:
        raise UserError(f"item {item}")
    yield os.getpid()


def test_a_mistake_comes_in_the_order_of_the_items(share):
    results = over(with_mistakes, range(12))
    found = [next(results) for _ in range(4)]
    with pytest.raises(UserError, match=r"^item 4$"):
        next(results)
    assert [pid == os.getpid() for pid in found] == [place < share for place in range(4)]


def test_tokens_and_problems_are_those_of_the_local_engine(share, capsys):
    flags = ["--jsonl_path", "rows.json"]
    local = tokens_of(capsys, "local", *flags)
    assert local[0] == 0
    assert tokens_of(capsys, "ray", *flags, "--engine", "ray") == local
    assert report("rows.json") == report("rows.json", "--engine", "ray")


def test_tokens_are_the_same_though_a_worker_is_killed(monkeypatch, capsys):
    flags = ["--jsonl_path", "rows.json"]
    local = tokens_of(capsys, "local", *flags)
    killed = []

    def over_with_a_death(work, items):
        for number, result in enumerate(over(work, items)):
            if number == 0:
                killed.append(kill_workers())
            yield result

    monkeypatch.setattr(spread_rows, "over", over_with_a_death)
    code, told, notes, files = tokens_of(capsys, "ray", *flags, "--engine", "ray")
    assert (code, told, files) == (local[0], local[1], local[3])
    assert all(line.startswith("note: Ray: ") for line in notes)
    assert sum(killed)


ANSWERING = "--base glm-tiny --use_cpu true --max_new_tokens 5 --per_device_eval_batch_size 4"


def test_answers_are_those_of_the_local_engine_and_resumed(capsys):
    rows = [*records(20)]
    Path("asked.jsonl").write_text("\n".join(map(dumps, rows)), "utf-8")
    command = ["infer", "--data_path", "asked.jsonl", *ANSWERING.split(), "--output_path"]
    assert main([*command, "local.jsonl"]) == 0
    assert main([*command, "ray.jsonl", "--engine", "ray", "--limit", "7"]) == 0
    assert main([*command, "ray.jsonl", "--engine", "ray"]) == 0
    assert Path("ray.jsonl").read_bytes() == Path("local.jsonl").read_bytes()
    assert len(Path("ray.jsonl").read_text("utf-8").splitlines()) == 20


@pytest.mark.slow
def test_evaluate_scores_as_the_local_engine_does(capsys):
    Path("asked.jsonl").write_text("\n".join(map(dumps, records(9))), "utf-8")
    command = ["evaluate", "--data_path", "asked.jsonl", *ANSWERING.split(), "--output_dir"]
    assert main([*command, "local"]) == 0
    assert main([*command, "ray", "--engine", "ray"]) == 0
    assert Path("ray/base.jsonl").read_bytes() == Path("local/base.jsonl").read_bytes()
    capsys.readouterr()


@pytest.mark.slow
def test_the_ledger_is_that_of_the_local_engine(capsys):
    Path("few.jsonl").write_text("\n".join(map(dumps, records(60))), "utf-8")
    common = ["--base", "glm-tiny"]
    assert main(["tokenize", "--jsonl_path", "few.jsonl", "--save_path", "tokens", *common]) == 0
    train = ["train", "--dataset_path", "tokens", "--output_dir", "run", "--max_steps", "2"]
    assert main([*train, "--use_cpu", "true", *common]) == 0
    command = ["ledger", "run", "--use_cpu", "true", *common, "--json_path"]
    assert main([*command, "local.json"]) == 0
    assert main([*command, "ray.json", "--engine", "ray"]) == 0
    assert Path("ray.json").read_bytes() == Path("local.json").read_bytes()
    capsys.readouterr()


def test_a_mistake_in_a_worker_is_one_line(capsys):
    rows = [*records(1000)]
    rows[700] = {"messages": [{"role": "user", "content": "a"}]}
    Path("bad.jsonl").write_text("\n".join(map(dumps, rows)), "utf-8")
    local = tokens_of(capsys, "local", "--jsonl_path", "bad.jsonl")
    assert local[0] == 2
    assert tokens_of(capsys, "ray", "--jsonl_path", "bad.jsonl", "--engine", "ray") == local


@pytest.mark.parametrize("answers", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_cluster_that_is_not_there_is_refused(answers, capsys):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if answers:
            import threading

            server.listen()

            def answer():
                connection, _ = server.accept()
                connection.recv(100)
                connection.sendall(answers)
                connection.close()

            threading.Thread(target=answer, daemon=True).start()
        command = ["validate", "rows.json", "--engine", "ray", "--ray_address", address]
        assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: ray_address {address}: ")
    assert "cluster answers there" in line


def test_an_address_of_another_form_is_refused(monkeypatch, capsys):
    for address, told in (("auto", "HOST:PORT"), ("ray://a:10001", "Ray's client")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert main(["validate", "rows.json", "--engine", "ray"]) == 2
        assert told in capsys.readouterr().err
