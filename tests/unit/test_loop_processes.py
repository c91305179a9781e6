"""The training loop in several processes computes what it does in one."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from together import in_processes, output
from toys import PACKED, ToyTokenizer, keep_only, losses, records, saved, short_run, stop_at

from glmtune.cli import main
from glmtune.data import split
from glmtune.data.conversations import IGNORED
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.training import gradients, loop, passes, prepare
from glmtune.training.processes import in_shares
from glmtune.training.saving import run_folder


class TestTwoProcesses:
    SETTINGS = {  # noqa: RUF012
        "max_steps": -1,
        "num_train_epochs": 2,
        "eval_ratio": 0.17,  # 19 rows to train on: the last step of an epoch has one for the two
        "eval_steps": 3,
        "general_set": False,
        "save_steps": 4,
    }
    LONG = {"bf16": True, "max_steps": 50, "eval_ratio": 0, "save_steps": 100}  # noqa: RUF012
    DEALT = {  # noqa: RUF012  (a global batch of 6 in three ways)
        "one process": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
        "two": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1},
        "two in passes": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    }

    @pytest.fixture(scope="class")
    def folder(self, tiny_rows, tiny_folder, tmp_path_factory):
        """The folder of two processes that ran `run_in_two_processes`, with their output."""
        folder = tmp_path_factory.mktemp("two")
        given = folder, tiny_rows, str(tiny_folder)
        codes = in_processes(2, run_in_two_processes, *given, folder=folder)
        assert codes == [0, 0], output(folder)
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
        assert losses(both) == pytest.approx(losses(single), abs=1e-6)
        assert losses(both, "eval_loss") == pytest.approx(losses(single, "eval_loss"), abs=1e-6)
        assert losses(both, "grad_norm") == pytest.approx(losses(single, "grad_norm"), rel=1e-4)

    def test_gradients_sent_during_the_backward_pass_are_those_sent_after_it(self, folder):
        """A bucket for each weight, of which all but the first layer's leave before the end."""
        assert records(folder / "buckets") == records(folder / "packs")
        sent = json.loads((folder / "sent.json").read_text())
        assert sent["early"] >= sent["buckets"] - 2 > 0
        assert "in 1 message(s)" in output(folder)
        assert f"in {sent['buckets']} message(s), all but the last while" in output(folder)

    def test_too_little_memory_in_one_process_saves_in_both(self, folder, tiny_run):
        """The step is undone in both; the run goes on from the step before it."""
        for rank in (0, 1):
            told = (folder / f"memory {rank}").read_text()
            assert "the device's memory is too small for this" in told
            assert "checkpoint-1 is whole: resume with `torchrun --nproc_per_node 2" in told
        assert records(folder / "memory") == records(folder / "packs")
        evaluated = json.loads((folder / "evaluated.json").read_text())
        assert evaluated == [True, "checkpoint-3"]

    def test_bfloat16_differs_from_one_process_by_no_drift(self, folder, tiny_run):
        """Over 50 steps the mean difference of the losses is zero within its standard error."""
        settings = self.SETTINGS | self.LONG | self.DEALT["two"]
        single = loop.train(tiny_run(**settings | {"gradient_accumulation_steps": 2}))
        apart = np.subtract(losses(folder / "long"), losses(single))
        assert len(apart) == 50
        error = apart.std(ddof=1) / len(apart) ** 0.5
        assert abs(apart.mean()) <= 3 * error + 1e-7
        assert abs(apart).max() < 0.05

    def test_a_signal_to_one_process_stops_both_and_both_go_on_as_if_unbroken(self, folder):
        stopped = json.loads((folder / "stopped.json").read_text())
        assert stopped == {"interrupted": True, "global_step": 4}  # agreed upon a step later
        assert records(folder / "stopped") == records(folder / "dropout")

    def test_each_looks_at_a_part_of_many_rows_for_those_that_are_alike(self, folder):
        told = [json.loads((folder / f"looked {rank}.json").read_text()) for rank in (0, 1)]
        found = split.group_rows(rows_alike(), lambda texts: ["".join(map(chr, t)) for t in texts])
        assert found.tolist() == [*[0, 1, 2, 3] * 3, 0, 1, 0]
        assert [of["groups"] for of in told] == [found.tolist()] * 2
        assert [of["read"] for of in told] == [7, 10], "questions, and one answer between two"

    def test_only_one_process_talks_and_each_keeps_its_own_random_state(self, folder):
        out = output(folder)
        assert out.count("has no glmtune_data.json") == 11  # once a run
        assert out.count("LoRA of rank 8") == 11
        assert out.count("trained on") == 9  # two failed
        command = "torchrun --nproc_per_node 2 -m glmtune train "
        assert out.count(command) == 1
        assert output(folder, 1) == ""
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
        patch.setattr(gradients, "BUCKET_BYTES", 1)
        count_early(patch, sent := {})
        loop.train(settings("buckets", lora_dropout=0, **PACKED))
    Path(folder, "sent.json").write_text(json.dumps(sent))
    run_out_of_memory(Path(folder), settings)
    loop.train(settings("long", **test.LONG))
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            stop_at(3, patch, signal.SIGTERM)
        result = loop.train(settings("stopped"))
    told = {"interrupted": result.interrupted, "global_step": result.global_step}
    Path(folder, "stopped.json").write_text(json.dumps(told))
    loop.train(settings("stopped", resume_from_checkpoint="true"))
    look_at_rows(Path(folder))


def look_at_rows(folder):
    """Group some rows as many are grouped; writes what each process found and how much it read."""
    read = []

    def decode(texts):
        read.extend(texts)
        return ["".join(map(chr, ids)) for ids in texts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "MOST_COMPARED", 0)
        groups = split.group_rows(rows_alike(), decode, None, partial(in_shares, Accelerator()))
    told = json.dumps({"groups": groups.tolist(), "read": len(read)})
    Path(folder, f"looked {os.environ['RANK']}.json").write_text(told)


def rows_alike():
    """15 rows, of which every fourth asks the same; the last has the first one's question twice."""
    asked = [[97 + row % 4] for row in range(14)] + [[97, 98, 97]]
    labels = [[IGNORED]] * 14 + [[IGNORED, 98, IGNORED]]
    ids, marks = ([[*of, 120] for of in rows] for rows in (asked, labels))
    starts = np.cumsum([0, *map(len, ids)])
    return TokenRows(np.concatenate(ids), starts, np.ones(15, int), None, np.concatenate(marks))


def count_early(patch, sent):
    """Count the buckets of the last step, and those of them that left during its backward pass."""
    send = gradients.GradientSums.send

    def counted(self, numbers):
        sent.update(buckets=self.num_buckets, early=len(self._works))
        send(self, numbers)

    patch.setattr(gradients.GradientSums, "send", counted)


def run_out_of_memory(folder, settings):
    """In the second process alone: in a step, and in an evaluation; then the run goes on."""
    is_second = os.environ["RANK"] == "1"

    def short(of, number):
        calls = iter(range(1, 10**6))

        def pass_or_fail(*args):
            if next(calls) == number and is_second:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return of(*args)

        return pass_or_fail

    given = {"lora_dropout": 0, **PACKED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.PackedPass, "run", short(passes.PackedPass.run, 3))
        with pytest.raises(UserError) as error:
            loop.train(settings("memory", **given))
    Path(folder, f"memory {os.environ['RANK']}").write_text(str(error.value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.PackedPass, "row_losses", short(passes.PackedPass.row_losses, 1))
        with pytest.raises(UserError) as error:
            loop.train(settings("memory", resume_from_checkpoint="auto", **given))
    told = ["too small" in str(error.value), max(saved(folder / "memory"))]
    Path(folder, "evaluated.json").write_text(json.dumps(told))
    loop.train(settings("memory", resume_from_checkpoint="auto", **given))


def test_a_loss_that_is_not_finite_in_one_process_ends_both(tiny_rows, tiny_folder, tmp_path):
    given = tmp_path, tiny_rows, str(tiny_folder)
    in_processes(2, run_into_nan, *given, folder=tmp_path)
    for rank in (0, 1):
        assert "the loss is nan" in (tmp_path / f"told {rank}").read_text()


def run_into_nan(folder, dataset_path, base):
    """The second pass of the second process has a loss of NaN, and gradients as they should be."""
    prepare.load_tokenizer = lambda base: ToyTokenizer()
    run, numbers = passes.PaddedPass.run, []

    def one_is_nan(self, *args):
        loss = run(self, *args)
        numbers.append(len(numbers))
        return loss * torch.nan if os.environ["RANK"] == "1" and len(numbers) == 3 else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.PaddedPass, "run", one_is_nan)
        with pytest.raises(UserError) as error:
            loop.train(
                short_run(
                    dataset_path=dataset_path, output_dir=f"{folder}/run", base=base, max_steps=6
                )
            )
    Path(folder, f"told {os.environ['RANK']}").write_text(str(error.value))


class TestOtherNumbers:
    """A run that one number of processes began and another goes on with; four processes."""

    SETTINGS = {  # noqa: RUF012
        "passes_per_step": 4, "gradient_accumulation_steps": 1, "max_steps": 6, "save_steps": 1,
        "logging_steps": 2,
        "general_set": False, "eval_answers": 0, "lora_dropout": 0.1, **PACKED,
    }  # fmt: skip

    @pytest.fixture(scope="class")
    def folder(self, tiny_rows, tiny_folder, tmp_path_factory):
        folder = tmp_path_factory.mktemp("four")
        for number, work in ((4, begin_in_four), (2, go_on_in_two)):
            codes = in_processes(number, work, folder, tiny_rows, str(tiny_folder), folder=folder)
            assert codes == [0] * number, output(folder)
        return folder

    def test_four_train_as_one(self, folder, tiny_run):
        single = loop.train(tiny_run(**self.SETTINGS))
        assert losses(folder / "four") == pytest.approx(losses(single), abs=1e-6)

    def test_two_go_on_where_four_stopped(self, folder):
        """In the middle of two steps that are logged together."""
        assert records(folder / "four, then two") == [
            pytest.approx(record, abs=1e-6) for record in records(folder / "four")
        ]

    def test_one_goes_on_where_four_stopped(self, folder, tiny_run, capsys):
        keep_only(folder / "four", 3, folder / "four, then one")
        settings = self.SETTINGS | {"passes_per_step": None}
        how = {"output_dir": folder / "four, then one", "resume_from_checkpoint": "true"}
        loop.train(tiny_run(**settings | how))
        assert losses(folder / "four, then one") == pytest.approx(losses(folder / "four"), abs=1e-6)
        told = capsys.readouterr().err
        assert "is of 4 process(es): each of 1 now has 4 pass(es) of a step" in told

    def test_a_number_that_divides_no_step_is_refused(self, folder, capsys):
        settings = short_run("rows", folder, **self.SETTINGS)
        with pytest.raises(UserError, match="3 processes cannot have equal parts of 4 passes"):
            settings.passes_of_all(3)
        checkpoint = folder / "four" / "checkpoint-3"
        alone = settings.model_copy(update={"passes_per_step": None})
        with pytest.raises(UserError, match=r"is 4 passes, of which 3 .*: start 1, 2 or 4 of them"):
            run_folder.same_step(alone, 3, checkpoint)
        words = (
            "--passes_per_step 4 --gradient_accumulation_steps 2 --dataset_path a --output_dir b"
        )
        assert main(["train", *words.split()]) == 2
        assert "passes_per_step counts the passes of all processes" in capsys.readouterr().err


def begin_in_four(folder, dataset_path, base):
    """What each of four processes does: a run, and one that stops after its third step."""
    prepare.load_tokenizer = lambda base: ToyTokenizer()
    given = TestOtherNumbers.SETTINGS
    loop.train(short_run(dataset_path, f"{folder}/four", base=base, **given))


def go_on_in_two(folder, dataset_path, base):
    """What each of two processes does: go on with the run of four."""
    prepare.load_tokenizer = lambda base: ToyTokenizer()
    again = Path(folder, "four, then two")
    if os.environ["RANK"] == "0":
        keep_only(Path(folder, "four"), 3, again)
    given = TestOtherNumbers.SETTINGS | {"resume_from_checkpoint": "true"}
    loop.train(short_run(dataset_path, again, base=base, **given))
