"""The training loop in two processes computes what it does in one."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from toys import PACKED, ToyTokenizer, in_two_processes, losses, records, short_run, stop_at

from glmtune.training import loop, prepare


class TestTwoProcesses:
    SETTINGS = {  # noqa: RUF012
        "max_steps": -1,
        "num_train_epochs": 2,
        "eval_ratio": 0.17,  # 19 rows to train on: the last step of an epoch has one for the two
        "eval_steps": 3,
        "general_set": False,
        "save_steps": 4,
    }
    DEALT = {  # noqa: RUF012  (a global batch of 6 in three ways)
        "one process": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
        "two": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1},
        "two in passes": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    }

    @pytest.fixture(scope="class")
    def folder(self, tiny_rows, tiny_folder, tmp_path_factory):
        """The folder of two processes that ran `run_in_two_processes`, with their output."""
        folder = tmp_path_factory.mktemp("two")
        done = in_two_processes(__file__, folder, tiny_rows, tiny_folder)
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)
        return folder

    @pytest.mark.parametrize("dealt", ["two", "two in passes"])
    def test_two_processes_train_as_one(self, folder, tiny_run, dealt):
        """They see the rows that one process sees, and end at the same losses."""
        single = loop.train(tiny_run(lora_dropout=0, **self.SETTINGS, **self.DEALT["one process"]))
        both = folder / dealt
        assert len(losses(single)) == 8
        assert losses(both) == pytest.approx(losses(single), abs=1e-5)
        assert losses(both, "eval_loss") == pytest.approx(losses(single, "eval_loss"), abs=1e-5)
        assert losses(both, "grad_norm") == pytest.approx(losses(single, "grad_norm"), rel=1e-4)

    def test_dropout_is_the_same_whichever_process_makes_a_pass(self, folder, tiny_run):
        """Two processes of a pass each drop what one of two passes drops."""
        dealt = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        single = loop.train(tiny_run(**self.SETTINGS, **dealt))
        both = folder / "dropout"
        assert losses(both) == pytest.approx(losses(single), abs=1e-5)
        without = loop.train(
            tiny_run(lora_dropout=0, overwrite_output_dir=True, **self.SETTINGS, **dealt)
        )
        assert losses(without) != pytest.approx(losses(single), abs=1e-4)

    def test_packs_are_shared_out(self, folder, tiny_run):
        """Two processes with a pack each train as one with two passes."""
        single = loop.train(
            tiny_run(
                lora_dropout=0, gradient_accumulation_steps=2, **self.SETTINGS,
                **PACKED,
            )
        )  # fmt: skip
        both = folder / "packs"
        assert len(losses(single)) > 4
        assert losses(both) == pytest.approx(losses(single), abs=1e-5)
        assert losses(both, "eval_loss") == pytest.approx(losses(single, "eval_loss"), abs=1e-5)
        assert losses(both, "grad_norm") == pytest.approx(losses(single, "grad_norm"), rel=1e-4)

    def test_a_signal_to_one_process_stops_both_and_both_go_on_as_if_unbroken(self, folder):
        stopped = json.loads((folder / "stopped.json").read_text())
        assert stopped == {"interrupted": True, "global_step": 4}  # agreed upon a step later
        assert records(folder / "stopped") == records(folder / "dropout")

    def test_only_one_process_talks_and_each_keeps_its_own_random_state(self, folder):
        out, err = (folder / "stdout").read_text(), (folder / "stderr").read_text()
        assert err.count("has no glmtune_data.json") == 6  # once a run
        assert out.count("LoRA of rank 8") == out.count("trained on") == 6
        command = "torchrun --nproc_per_node 2 -m glmtune train "
        assert out.count(command) == 1
        states = [folder / "dropout" / "checkpoint-4" / f"rng_state_{rank}.pth" for rank in (0, 1)]
        generators = [torch.Generator(), torch.Generator()]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(torch.load(state, weights_only=True)["cpu"])
        assert [generator.initial_seed() for generator in generators] == [42, 43]


def run_in_two_processes(folder, dataset_path, base):
    """What each of two launched processes does: four runs, and one that is stopped and resumed."""
    prepare.load_tokenizer = lambda base: ToyTokenizer()
    test = TestTwoProcesses

    def settings(name, **changes):
        paths = {"dataset_path": dataset_path, "output_dir": f"{folder}/{name}"}
        dealt = test.SETTINGS | test.DEALT["two"] | changes
        return short_run(**paths, base=base, **dealt)

    loop.train(settings("two", lora_dropout=0))
    loop.train(settings("two in passes", lora_dropout=0, **test.DEALT["two in passes"]))
    loop.train(settings("dropout"))
    loop.train(settings("packs", lora_dropout=0, **PACKED))
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            stop_at(3, patch, signal.SIGTERM)
        result = loop.train(settings("stopped"))
    told = {"interrupted": result.interrupted, "global_step": result.global_step}
    Path(folder, "stopped.json").write_text(json.dumps(told))
    loop.train(settings("stopped", resume_from_checkpoint="true"))


if __name__ == "__main__":
    run_in_two_processes(*sys.argv[1:])
