"""`--engine ray` while Ray starts: what the command does meanwhile, and ends before that.

Nothing of Ray may be left then: all of its processes inherit TMPDIR, in which its files are.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from serving import until
from spread_files import dumps, records

from glmtune import spread
from glmtune.cli import main
from glmtune.data import parts
from glmtune.errors import UserError
from glmtune.spread import over, running_ray

pytestmark = pytest.mark.slow  # as in test_ray.py
pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")


@pytest.fixture
def temporary(monkeypatch):
    """A folder for Ray's files; Ray's sockets leave no room for a long name."""
    folder = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [*records(6000)]
    rows[3000] = {"instruction": 1}
    Path("rows.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")


def started(folder):
    """The processes that have that folder for their files, but this one."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if one.pid != os.getpid() and one.environ().get("TMPDIR") == folder:
                found.append(one)
    return found


def is_clean(folder):
    """Whether nothing is left. Killed processes need a moment; workers that Ray ends, seconds."""
    for _ in range(20):
        if not started(folder):
            break
        time.sleep(0.1)
    return not started(folder) and os.listdir(folder) == []


def begin(*arguments):
    command = [sys.executable, "-m", "glmtune", *arguments]
    return subprocess.Popen(
        command, text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def slowly(item):
    time.sleep(0.2)
    yield item, os.getpid()


def test_a_command_that_ends_before_ray_has_started_says_all(temporary):
    """On stdout and stderr what the local engine does, but for the time and the memory."""
    Path("empty.json").write_text("[]", "utf-8")
    told = []
    for engine in ("local", "ray"):
        command = ["validate", "rows.json", "--held_out", "empty.json", "--engine", engine]
        process = begin(*command)
        out, err = process.communicate()
        told.append((process.returncode, out.rpartition("  checked in")[0], err))
        assert is_clean(temporary)
    assert told[0] == told[1]
    assert "note: empty.json" in told[0][2]
    assert "error: 1 of 6,000 rows" in told[0][2]


def test_items_are_done_while_ray_starts_and_by_it_from_then_on(temporary):
    found = []
    with running_ray(None):
        for result in over(slowly, range(10_000)):
            found.append(result)
            if [pid for _, pid in found[-5:]].count(os.getpid()) == 0:
                break
    assert [item for item, _ in found] == [*range(len(found))]
    here = [pid == os.getpid() for _, pid in found]
    assert here == [True] * (len(found) - 5) + [False] * 5
    assert here[0]
    assert is_clean(temporary)


@pytest.fixture
def by_workers_alone(monkeypatch):
    """A command that waits for Ray, and rows in several parts."""
    is_ready = spread._Ray.is_ready

    def is_ready_at_last(ray, work):
        until(lambda: is_ready(ray, work))
        return True

    monkeypatch.setattr(spread._Ray, "is_ready", is_ready_at_last)
    monkeypatch.setattr(spread, "SECONDS_WORTH_IT", 0.0)
    monkeypatch.setattr(parts, "PART_BYTES", 100_000)


@pytest.fixture
def cluster(temporary, monkeypatch):
    """The address of a cluster of this machine alone, which asks for a token."""
    Path(temporary, "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(Path(temporary, "token")))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # it stays on the loopback address
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    host, port = address.split(":")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--port", port, "--node-ip-address", host, "--num-cpus", "2"]
    command += ["--include-dashboard", "false", "--temp-dir", f"{temporary}/cluster"]
    search = os.pathsep.join(filter(None, sys.path))  # its workers import from here
    process = subprocess.Popen(
        command,
        env=os.environ | {"RAY_AUTH_MODE": "token", "PYTHONPATH": search},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(lambda: answers(address) or process.poll() is not None)
    yield address
    process.terminate()
    process.wait()
    for left in started(temporary):
        with suppress(psutil.Error):
            left.kill()


def answers(address):
    with suppress(UserError):
        spread.check_ray(address)
        return True
    return False


def test_workers_are_those_of_the_cluster(cluster, by_workers_alone, temporary, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with running_ray(cluster):
        for _, pid in over(slowly, range(5)):
            above = [" ".join(parent.cmdline()) for parent in psutil.Process(pid).parents()]
            assert any(f"{temporary}/cluster/" in line for line in above)


def test_a_cluster_does_the_rows_and_stays(cluster, by_workers_alone, monkeypatch, capsys):
    command = ["validate", "rows.json"]
    codes = [main(command)]
    told = [capsys.readouterr()]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    codes += [main([*command, "--engine", "ray", "--ray_address", cluster]) for _ in range(2)]
    told.append(capsys.readouterr())
    assert codes == [2, 2, 2]
    assert "1 of 6,000 rows" in told[0].err
    assert told[1].err == 2 * told[0].err


def test_a_cluster_that_asks_for_a_token_says_so(cluster, by_workers_alone, monkeypatch, capsys):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert main(["validate", "rows.json", "--engine", "ray", "--ray_address", cluster]) == 2
    told = capsys.readouterr().err
    assert f"error: ray_address {cluster}: Ray does not start" in told
    assert "if it asks for a token, set RAY_AUTH_MODE=token" in told


def test_a_ray_that_does_not_start_ends_the_command(
    temporary, by_workers_alone, monkeypatch, capsys
):
    too_long = Path(temporary, "a" * 100)  # for the names of Ray's sockets
    too_long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(too_long))
    Path("rows.jsonl").write_text("\n".join(map(dumps, records(6000))), "utf-8")
    command = ["tokenize", "--jsonl_path", "rows.jsonl", "--save_path", "tokens"]
    assert main([*command, "--base", "glm-tiny", "--engine", "ray"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert lines[0].startswith("error: engine ray: Ray does not start")
    assert os.listdir(too_long) == []
    assert not Path("tokens").exists()
    assert started(temporary) == []


def test_a_process_of_ray_that_dies_is_told_in_one_line(temporary):
    def kills():
        with running_ray(None):
            for _ in over(slowly, range(400)):
                spread._running[0]._process.kill()

    with pytest.raises(UserError, match="its process has ended"):
        kills()
    assert os.listdir(temporary) == []


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("when", ["at once", "as workers are there"])
def test_nothing_is_left_of_a_command_that_is_stopped(way, when, temporary):
    code = (
        "import sys; from glmtune.cli import main; from glmtune.spread import over, running_ray\n"
        f"import glmtune.data.convert; from {slowly.__module__} import slowly\n"
        "def work(settings):\n"
        "    with running_ray(None):\n"
        "        for _ in over(slowly, range(10_000)): print(_[1], flush=True)\n"
        "glmtune.data.convert.convert = work\n"
        "sys.exit(main(['convert', '--data_path', 'a', '--save_path', 'b']))"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    for line in process.stdout:
        if when == "at once" or int(line) != process.pid:
            break
    process.send_signal(way)
    process.communicate()
    assert process.returncode == (130 if way == signal.SIGINT else -way)
    assert is_clean(temporary) or way == signal.SIGKILL  # which leaves files
    assert started(temporary) == []
