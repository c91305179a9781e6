"""What processes of a run tell each other, here as threads with one store."""

import threading
import time

import numpy as np
import pytest
from torch.distributed import HashStore

from glmtune.errors import UserError
from glmtune.training import peers as room
from glmtune.training.peers import Peers


@pytest.fixture
def store():
    return HashStore()


@pytest.fixture
def quick(monkeypatch):
    """Seconds become hundredths, and a process that would end at once is noted instead."""
    ended = []
    for name in ("POLL_SECONDS", "QUICK_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(room, name, getattr(room, name) / 100)
    monkeypatch.setattr(room, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(room.os, "_exit", ended.append)
    return ended


def group(store, size=2):
    return [
        Peers(number, size, lambda **_: store, "rows", "out/metrics.jsonl")
        for number in range(size)
    ]


def until(is_so):
    while not is_so():
        time.sleep(0.01)


class TestCompare:
    def test_equal_facts_pass(self, store):
        first, second = group(store)
        first.compare("packages", {"torch": "2.13.0", "steps": 3})
        second.compare("packages", {"torch": "2.13.0", "steps": 3})

    @pytest.mark.parametrize("facts", [{"torch": "2.11.0"}, {}, {"torch": "2.13.0", "peft": "1"}])
    def test_other_facts_are_named(self, store, facts):
        first, second = group(store)
        first.compare("packages", {"torch": "2.13.0"})
        with pytest.raises(
            UserError, match=r"process 1 of 2 on .* differs from process 0 on .* in its packages: "
        ):
            second.compare("packages", facts)

    def test_one_process_alone_compares_nothing(self):
        Peers(0, 1).compare("packages", {"torch": "2.13.0"})


class TestFailure:
    def test_a_mistake_of_one_is_told_to_all_with_its_process(self, store, quick, capsys):
        first, second = group(store)
        told = r"process 1 of 2 on .*: the disk is full"
        with pytest.raises(UserError, match=told), second.watched():
            raise UserError("the disk is full")
        with pytest.raises(UserError, match="process 1 of 2"), first.watched():
            raise RuntimeError("Connection closed by peer")

    def test_a_mistake_of_all_is_told_once_as_it_is(self, store, quick):
        told = []

        def fail(peers):
            with pytest.raises(UserError) as error, peers.watched():
                raise UserError("no such folder")
            told.append(str(error.value))

        threads = [threading.Thread(target=fail, args=[peers]) for peers in group(store)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told == ["no such folder"] * 2

    def test_an_error_of_no_other_stays_what_it_is(self, store, quick):
        first, second = group(store)
        with pytest.raises(ZeroDivisionError), first.watched():
            raise ZeroDivisionError("division by zero")
        told = "ZeroDivisionError: division by zero"
        with pytest.raises(UserError, match=told), second.watched():
            raise RuntimeError("Connection closed by peer")

    def test_who_waits_for_a_failed_process_is_ended(self, store, quick, capsys):
        first, second = group(store)
        with pytest.raises(UserError), second.watched():
            raise UserError("the disk is full")
        with first.watched():
            until(lambda: quick)
        assert quick == [2]
        assert capsys.readouterr().err.count("the disk is full") == 1


class TestRestart:
    def test_the_last_signs_of_life_are_noted_by_the_first(self, store, quick, monkeypatch, capsys):
        first, second = group(store)
        second.beat(4, np.arange(2))
        for peers in (second, first):
            with peers.watched():
                until(lambda peers=peers: store.check([f"beat {peers._number}"]))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
        for peers in group(store):
            peers.tell_restart()
        told = capsys.readouterr().err.splitlines()
        assert told[0] == "note: torchrun has started all processes again (restart 2)"
        assert told[1].startswith("note: before: process 1 of 2 (pid ")
        assert "last heard of in step 5, at rows 1, 2 of rows" in told[1]
        assert "process 0 of 2" in told[2]
        assert len(told) == 3

    def test_a_first_start_notes_nothing(self, store, capsys):
        group(store)[0].tell_restart()
        assert capsys.readouterr().err == ""


class TestSilence:
    def test_the_silent_process_its_step_rows_and_what_is_kept_are_named(
        self, store, quick, capsys
    ):
        first, second = group(store)
        second.beat(11, np.arange(4, 11))
        with second.watched():
            until(lambda: store.check(["beat 1"]))
        store.delete_key("done 1")  # as if it had been killed
        first.begin(lambda: "checkpoint-10 is whole")
        with first.watched():
            until(lambda: quick)
        told = capsys.readouterr().err
        assert told.startswith("error: process 1 of 2 (pid ")
        assert "in step 12, at rows 5, 6, 7, 8 and 3 more of rows; log: out/metrics.jsonl" in told
        assert told.endswith("it is gone; checkpoint-10 is whole\n")

    def test_a_process_that_has_ended_well_is_not_missed(self, store, quick):
        first, second, third = group(store, 3)
        for done in (second, third):
            with done.watched():
                until(lambda done=done: store.check([f"beat {done._number}"]))
        first.begin(lambda: "nothing")
        with first.watched():
            time.sleep(1)
        assert quick == []

    def test_a_process_that_says_it_is_there_is_not_missed(self, store, quick):
        first, second = group(store)
        first.begin(lambda: "nothing")
        with second.watched(), first.watched():
            time.sleep(1)
        assert quick == []
