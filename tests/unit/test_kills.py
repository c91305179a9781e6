"""Kill -9 while a run saves: every checkpoint is whole or absent, and the last good one loads.

A server process imports and builds everything once; each kill meets a child forked from it, which
resumes as a run does and then saves in a loop, with `saving.save` and all that lies beneath.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from toys import child_environment, die_before_change


def few_or(number_of_all, few):
    """A few in the ordinary tests, all of them in those marked slow."""
    return [few, pytest.param(number_of_all, marks=pytest.mark.slow)]


def run_server(mode, number, folder, base):
    done = subprocess.run(
        [sys.executable, __file__, mode, str(number), str(folder), str(base)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, which this system cannot")
class TestKills:
    @pytest.mark.parametrize("num_kills", few_or(200, 20))
    def test_kills_at_random_instants(self, tmp_path, tiny_folder, num_kills):
        told = run_server("random", num_kills, tmp_path / "run", tiny_folder)
        assert told["kills"] == num_kills
        assert told["in_a_save"] > num_kills / 4, told
        assert told["last_step"] > num_kills / 10, told

    @pytest.mark.parametrize("every", few_or(1, 7))
    def test_kills_before_each_call_that_changes_the_disk(self, tmp_path, tiny_folder, every):
        """Each fsync, rename and deletion of a save with its rotation, one after the other."""
        told = run_server("each", every, tmp_path / "run", tiny_folder)
        assert told["kills"] > 30 // every, told
        assert told["in_a_save"] > 20 // every, told


class Server:
    """What a child inherits: a run on the tiny model, with the optimiser state of one step."""

    def __init__(self, folder, base):
        import torch

        from glmtune.config.settings import TrainSettings
        from glmtune.training.launch import start_accelerator
        from glmtune.training.run import Run, adapt, build_state

        torch.set_num_threads(1)
        self.folder = Path(folder)
        self.config = TrainSettings(
            dataset_path="rows",
            output_dir=str(folder),
            save_total_limit=2,
            max_steps=10**6,
            use_cpu=True,
        )
        from glmtune.models.loading import load_base_model

        accelerator, dtype = start_accelerator(self.config)
        model = adapt(load_base_model(base, dtype=dtype), self.config)
        self.run = Run.of(self.config, accelerator, some_rows(), model, "chatglm-6b-tiny")
        self.state = build_state(self.run, model)
        for weight in self.state.weights:
            weight.grad = torch.ones_like(weight)
        self.state.optimizer.step()
        self.log = SimpleNamespace(history=[], plot_loss=lambda path: None)

    def child(self, num_saves):
        """What a run does between loading its model and being killed."""
        import torch

        from glmtune.training.saving import checkpoints, run_folder
        from glmtune.training.saving import save as saving

        state = self.state
        if list(self.folder.glob("checkpoint-*")):
            found, _ = run_folder.find_checkpoint(self.folder)
            run_folder.claim_output_dir(self.config, found)
            checkpoints.load_checkpoint(found, state, self.run.accelerator)
        else:
            run_folder.claim_output_dir(self.config, None)
        for _ in range(num_saves):
            state.global_step += 1
            with torch.no_grad():
                for weight in state.weights:
                    weight.fill_(state.global_step)
                    state.optimizer.state[weight]["exp_avg"].fill_(state.global_step)
            saving.save(self.run, state, self.log)

    def fork(self, num_saves, before=lambda: None):
        child = os.fork()
        if not child:
            code = 1
            try:
                before()
                self.child(num_saves)
                code = 0
            finally:
                os._exit(code)
        return child

    def look(self, last_step, child=0):
        """Check all that a killed child left; gives the newest step, and whether it was saving."""
        from safetensors.torch import load_file

        from glmtune.run_files import saved_steps
        from glmtune.training.saving import checkpoints, run_folder
        from glmtune.training.saving.manifest import find_fault

        names = [entry.name for entry in self.folder.iterdir()]
        steps = saved_steps(self.folder)
        for step in steps:
            checkpoint = self.folder / f"checkpoint-{step}"
            assert find_fault(checkpoint) is None, find_fault(checkpoint)
            weights = load_file(checkpoint / "adapter_model.safetensors")
            assert all((weight == step).all() for weight in weights.values())
        if not steps:
            assert last_step == 0
            return 0, False
        found, notes = run_folder.find_checkpoint(self.folder)
        assert notes == []
        checkpoints.load_checkpoint(found, self.state, self.run.accelerator)
        step = self.state.global_step
        assert step == max(steps) >= last_step, (steps, last_step)
        moments = self.state.optimizer.state_dict()["state"].values()
        assert all((moment["exp_avg"] == step).all() for moment in moments)
        for name in ("trainer_state.json", "adapter_config.json"):
            if (self.folder / name).exists():
                json.loads((self.folder / name).read_text())
        if (self.folder / "adapter_model.safetensors").exists():
            load_file(self.folder / "adapter_model.safetensors")
        return step, any(f".{child}." in name for name in names)


def some_rows():
    import numpy as np
    from toys import ToyTokenizer

    from glmtune.data.token_rows import TokenRows

    return TokenRows(np.arange(6), np.array([0, 6]), np.array([4]), ToyTokenizer().row_rule)


def kill_at_random(server, num_kills):
    randomly = random.Random(0)
    start = time.monotonic()
    assert os.waitpid(server.fork(10), 0)[1] == 0
    seconds_a_save = (time.monotonic() - start) / 10
    step, num_saving = server.look(10)[0], 0
    for _ in range(num_kills):
        child = server.fork(10**6)
        time.sleep(randomly.uniform(0, 3 * seconds_a_save))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        step, is_saving = server.look(step, child)
        num_saving += is_saving
    return {
        "kills": num_kills,
        "in_a_save": num_saving,
        "last_step": step,
        "seconds_a_save": round(seconds_a_save, 4),
        "seconds": round(time.monotonic() - start, 1),
    }


def kill_before_each_call(server, every):
    assert os.waitpid(server.fork(3), 0)[1] == 0
    step, num_saving = server.look(3)[0], 0
    for kills, number in enumerate(range(1, 1000, every)):
        child = server.fork(1, before=lambda number=number: die_before_change(number))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return {"kills": kills, "in_a_save": num_saving, "last_step": step}
        assert code == -signal.SIGKILL
        step, is_saving = server.look(step, child)
        num_saving += is_saving
    raise AssertionError("a save has no end")


if __name__ == "__main__":
    mode, number, *places = sys.argv[1:]
    kill = kill_at_random if mode == "random" else kill_before_each_call
    print(json.dumps(kill(Server(*places), int(number))))
