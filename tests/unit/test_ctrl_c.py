"""Ctrl+C interrupts only inside the block that waits for it, and only once."""

import signal
import threading
from contextlib import suppress

import pytest

from glmtune.evaluation.ctrl_c import CtrlC


def press():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_between_two_blocks_waits_for_the_second():
    ctrl_c = CtrlC()
    reached = []
    with suppress(KeyboardInterrupt), ctrl_c.heard():
        with ctrl_c.awaited():
            reached.append("first")
        press()
        reached.append("between")
        with suppress(KeyboardInterrupt), ctrl_c.awaited():
            reached.append("second")
        with ctrl_c.awaited():
            reached.append("third")
    assert reached == ["first", "between", "third"]


def test_ctrl_c_leaves_what_mends_a_block_in_peace():
    ctrl_c = CtrlC()
    reached = []
    with suppress(KeyboardInterrupt), ctrl_c.heard(), ctrl_c.awaited():
        try:
            press()
            reached.append("after the press")
        finally:
            press()
            reached.append("mended")
    assert reached == ["mended"]


def test_ctrl_c_is_heard_where_the_parent_ignores_it_and_ignored_again_after():
    ctrl_c = CtrlC()
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ctrl_c.heard(), pytest.raises(KeyboardInterrupt), ctrl_c.awaited():
            press()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_a_conversation_in_another_thread_goes_on_without_ctrl_c():
    done = []

    def talk():
        ctrl_c = CtrlC()
        with ctrl_c.heard(), ctrl_c.awaited():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=talk)
    thread.start()
    thread.join()
    assert done == [signal.getsignal(signal.SIGINT)]
