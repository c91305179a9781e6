"""A run in a process of its own, which says when it reaches a stage, and waits there for a signal.

The process is forked from a server that has imported all that a run needs: importing it takes ten
times as long as the run.
"""

import os
import select
import signal
import sys
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from unittest.mock import patch

from toys import child_environment

from glmtune.cli import main
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY
from glmtune.training import passes, prepare
from glmtune.training.gradients import GradientSums
from glmtune.training.saving import checkpoints


def start(moment, rows, folder, out, err) -> BaseProcess:
    """Start the process.

    Args:
        moment: the stage at which it writes "now MOMENT".
        rows: the data set.
        folder: the run's folder.
        out: file for what it writes.
        err: file for its errors.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=be_stopped, args=(moment, *map(str, (rows, folder, out, err))))
    # Before Python 3.14 the server finds modules by the environment alone.
    with patch.dict(os.environ, child_environment()):
        process.start()
    return process


class FromCall:
    """True from the n-th call on."""

    def __init__(self, number):
        self.left = number

    def __call__(self, *_):
        self.left -= 1
        return self.left <= 0


def be_stopped(moment, rows, folder, out, err):
    """The process to stop."""
    for name, stream in ((out, sys.stdout), (err, sys.stderr)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())

    signalled, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)

    def dwell(seconds):
        """Stay until a signal has come."""
        print(f"now {moment}", flush=True)
        select.select([signalled], [], [], seconds)

    def slow(call, seconds, at=lambda *_: True):
        def slowed(*args, **how):
            if at(*args):
                dwell(seconds)
            return call(*args, **how)

        return slowed

    if moment == "loading":
        prepare.load_base_model = slow(load_base_model, 40)
    elif moment == "stepping":
        GradientSums.receive = slow(GradientSums.receive, 2, FromCall(3))
    elif moment == "evaluating":  # 20 s for its four rows
        passes.PaddedPass.row_losses = slow(passes.PaddedPass.row_losses, 5)
    elif moment == "saving":
        checkpoints.write_manifest = slow(checkpoints.write_manifest, 2)
    else:  # of four passes, which take 20 s
        passes.PaddedPass.run = slow(passes.PaddedPass.run, 5, FromCall(9))
    flags = {
        "dataset_path": rows, "output_dir": folder, "base": GLM_TINY, "use_cpu": "true",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 10000,
        "per_device_eval_batch_size": 1, "eval_ratio": 0.17, "eval_steps": 2, "save_steps": 2,
        "report_to": "none",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    sys.exit(main(["train", *words]))
