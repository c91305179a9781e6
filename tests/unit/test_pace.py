"""Tokens a second are those of steps: what evaluations and checkpoints take is not counted."""

import pytest

from glmtune.training import console, loop


@pytest.mark.parametrize("pause", ["save", "evaluate_if_due"])
def test_the_pace_leaves_out_what_is_no_step(pause, toy_run, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)
    step, slow = loop.train_step, getattr(loop, pause)

    def second_long_step(*args):
        now[0] += 1
        return step(*args)

    def slow_pause(run, state, *args):
        if state.global_step == 2:
            now[0] += 1000
        return slow(run, state, *args)

    monkeypatch.setattr(loop, "train_step", second_long_step)
    monkeypatch.setattr(loop, pause, slow_pause)
    settings = toy_run(save_steps=2, eval_ratio=0.2, eval_steps=2, logging_steps=3)
    records = [r for r in loop.train(settings).log_history if "loss" in r]
    assert [record["step"] for record in records] == [1, 3, 4]
    assert all(record["tokens_per_second"] > 10 for record in records)
