"""What a launcher says of its processes, and the store that they share."""

import socket
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore
from torch.distributed.rendezvous import rendezvous
from toys import short_run

from glmtune import launched
from glmtune.cli import main
from glmtune.errors import UserError, note
from glmtune.training import launch


@pytest.fixture
def as_process(monkeypatch):
    """Let this process be one of two, of a launcher at a port."""

    def set_number(number, port, *, has_store=True, restart=0):
        values = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
        values |= {"TORCHELASTIC_RESTART_COUNT": restart, "MASTER_ADDR": "127.0.0.1"}
        values["TORCHELASTIC_USE_AGENT_STORE"] = has_store
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setattr(launched, "_OWN", [])
    return set_number


@pytest.fixture
def store():
    """A launcher's store, which is there while this is kept."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def port(store):
    return store.port


def test_a_process_alone_has_no_store_and_says_all():
    assert launched.connect("run 0") is None
    assert launched.is_first_to_say("no such folder")
    assert launched.is_first_to_say("no such folder")


def test_a_line_is_said_once_by_all_processes_of_a_start(as_process, port):
    as_process(1, port)
    assert launched.is_first_to_say("no such folder")
    as_process(0, port)
    assert not launched.is_first_to_say("no such folder")
    assert launched.is_first_to_say("the disk is full")
    as_process(0, port, restart=1)
    assert launched.is_first_to_say("no such folder")


def test_processes_that_start_again_meet_apart_from_those_that_are_gone(as_process, port):
    def meet(number, restart):
        as_process(number, port, restart=restart)
        return next(rendezvous(f"{launch._MEETING}://", timeout=timedelta(seconds=60)))

    (gone, *place), (again, *_), (other, *_) = meet(1, 0), meet(0, 1), meet(1, 1)
    assert place == [1, 2]
    gone.set("address of 1", "old")
    assert not again.check(["address of 1"])
    other.set("address of 1", "new")
    assert again.get("address of 1") == b"new"


def test_a_mistake_of_both_is_printed_by_one(as_process, port, capsys):
    for number in (0, 1):
        as_process(number, port)
        assert main(["train", "--dataset_path", "no/rows", "--output_dir", "out"]) == 2
    assert capsys.readouterr().err.count("error: no/rows: no such folder") == 1


def test_purposes_have_keys_of_their_own(as_process, port):
    as_process(0, port)
    launched.connect("run 0").set("key", "of run 0")
    assert launched.connect("run 0").get("key") == b"of run 0"
    assert not launched.connect("run 1").check(["key"])
    as_process(0, port, restart=1)
    assert not launched.connect("run 0").check(["key"])
    assert launched.connect("run 0", restart=0).get("key") == b"of run 0"


def test_without_a_launchers_store_process_0_has_one(as_process):
    with socket.socket() as one, socket.socket() as two:  # a port with a free one behind it
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        two.bind(("127.0.0.1", port + 1))
    as_process(0, port, has_store=False)
    launched.connect("run 0").set("key", "of process 0")
    as_process(1, port, has_store=False)
    assert launched.connect("run 0", seconds=5).get("key") == b"of process 0"


def test_only_the_first_process_prints_notes(as_process, port, capsys):
    as_process(1, port)
    note("of all")
    note("its own", of_each_process=True)
    assert capsys.readouterr().err == "note: its own\n"


def test_a_process_without_a_card_is_refused(as_process, port, monkeypatch):
    as_process(2, port)
    monkeypatch.setattr(launch, "pick_device", lambda use_cpu: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 2 of this machine has no card: it has 2, and"):
        launch.start_accelerator(short_run("rows", "out"))
