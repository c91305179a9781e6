"""torchrun itself: a process that is killed, and torchrun's restart of all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import child_environment, draw_uneven_rows, losses, save_rows, short_run

from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop

RUN = {
    "max_steps": 12, "save_steps": 2, "per_device_train_batch_size": 1, "layout": "exact",
    "gradient_accumulation_steps": 1, "general_set": False, "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}  # fmt: skip
SLOWLY = """
import sys, time
from glmtune import cli
from glmtune.training import passes
run = passes.PackedPass.run
passes.PackedPass.run = lambda *given: (time.sleep(0.3), run(*given))[1]
sys.exit(cli.main())
"""
"""glmtune with steps long enough to be killed in."""


def launch(folder, rows, *, restarts):
    script = folder / "slowly.py"
    script.write_text(SLOWLY)
    settings = short_run(rows, folder / "out", **RUN).model_dump(exclude_unset=True)
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    how = ["--standalone", "--nproc_per_node", "2", "--max_restarts", str(restarts)]
    with (folder / "told").open("w") as told:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *how, str(script), "train", *words],
            stdout=told,
            stderr=subprocess.STDOUT,
            env=child_environment(),
        )


def kill_one(launcher, folder, step):
    """Kill the second process once a checkpoint is there."""
    while not (folder / "out" / f"checkpoint-{step}").is_dir():
        assert launcher.poll() is None, (folder / "told").read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    of_ours = [
        int(child)
        for child in children
        if "slowly.py" in Path(f"/proc/{child}/cmdline").read_text()
    ]
    os.kill(max(of_ours), signal.SIGKILL)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    specials = load_tokenizer(GLM_TINY)
    return save_rows(draw_uneven_rows(specials), tmp_path_factory.mktemp("toys") / "rows")


@pytest.mark.slow
def test_torchrun_restarts_all_after_one_is_killed_twice(rows, tmp_path):
    launcher = launch(tmp_path, rows, restarts=2)
    for step in (2, 6):
        kill_one(launcher, tmp_path, step)
    told = tmp_path / "told"
    assert launcher.wait(300) == 0, told.read_text()
    for number in (1, 2):
        assert f"torchrun has started all processes again (restart {number})" in told.read_text()
    assert told.read_text().count("out: resumed") == 2
    assert "before: process 1 of 2 (pid " in told.read_text()
    alone = {"output_dir": tmp_path / "alone", "gradient_accumulation_steps": 2}
    single = loop.train(short_run(rows, **RUN | alone))
    assert losses(tmp_path / "out") == pytest.approx(losses(single), abs=1e-5)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_its_place(rows, tmp_path):
    launcher = launch(tmp_path, rows, restarts=0)
    kill_one(launcher, tmp_path, 4)
    assert launcher.wait(300) == 1
    told = (tmp_path / "told").read_text()
    assert told.count("error: process 1 of 2 (pid ") == 1
    assert "it is gone; checkpoint-4 is whole: resume with `torchrun --nproc_per_node 2" in told
    assert told.count("Traceback") == 1  # torchrun's own
