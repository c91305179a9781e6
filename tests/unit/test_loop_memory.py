"""What the training loop reports on memory, and does before its first step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toys import EXACT, NUM_ROWS, PACKED, ToyTokenizer, losses

from glmtune.data.dataset import load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.hardware import Card
from glmtune.training import loop, passes, prepare


class TestMemory:
    @pytest.fixture(params=["padded", "exact", "packed"])
    def layout(self, request):
        """Settings of each layout."""
        return {"padded": {}, "exact": EXACT, "packed": PACKED}[request.param]

    def test_a_run_says_its_forecast_first(self, tiny_run, capsys, monkeypatch):
        load, said = prepare.load_base_model, []

        def listen_and_load(*args, **settings):
            said.append(capsys.readouterr().out)
            return load(*args, **settings)

        monkeypatch.setattr(prepare, "load_base_model", listen_and_load)
        loop.train(tiny_run(max_steps=1))
        first, *lines = said[0].splitlines()
        assert first.startswith("Memory for chatglm-6b-tiny with rank 8")
        assert [line.split()[0] for line in lines[:7]] == [
            "lora", "at", "weights", "adapter", "optimiser", "activations", "logits",
        ]  # fmt: skip
        assert "fits" in lines[-1]

    def test_what_the_card_has_free_is_asked_once_before_the_weights_are_on_it(self, tiny_run, spy):
        """Later the weights would be counted as another program's memory."""
        calls = spy(Card, "of")
        spy(prepare, "load_base_model", calls)
        loop.train(tiny_run(max_steps=1))
        assert [call.name for call in calls] == ["of", "load_base_model"]

    def test_what_cannot_fit_is_refused_before_the_weights_are_loaded(self, tiny_run, monkeypatch):
        tiny = Card("a tiny card", 0.5, 0.5, (8, 0))
        monkeypatch.setattr(Card, "of", lambda device: tiny)
        monkeypatch.setattr(prepare, "load_base_model", lambda *a, **k: pytest.fail("loaded"))
        with pytest.raises(UserError, match=r"memory: 0\.\d GiB of 0\.5 .a tiny card.: does not"):
            loop.train(tiny_run(max_steps=1))
        assert not Path(tiny_run().output_dir).exists()

    def test_the_heaviest_pass_of_the_run_comes_first(self, tiny_run, layout, spy, monkeypatch):
        """It changes no result of the run, nor its random state."""
        asked = tiny_run(max_steps=8, lora_dropout=0.3, **layout)
        calls, check = [], loop.check_first_step

        def spy_and_check(run, state, step_pass):
            spy(type(step_pass), "run", calls)
            check(run, state, step_pass)
            assert all(weight.grad is None for weight in state.weights)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "check_first_step", lambda *args: None)
            wanted = losses(loop.train(asked))
        monkeypatch.setattr(loop, "check_first_step", spy_and_check)
        asked = asked.model_copy(update={"overwrite_output_dir": True})
        assert losses(loop.train(asked)) == wanted
        heaviest, *others = [call.args[1] for call in calls]
        rows = TokenRows.from_table(load_dataset(asked.dataset_path)[0], ToyTokenizer().row_rule)
        lengths_R = rows.lengths_R

        def weight(ids):
            if layout or not len(ids):
                return lengths_R[ids].sum()
            return lengths_R[ids].max() * len(ids)

        assert len(others) > 8
        if layout == PACKED:  # all packs but an epoch's last are full: the first stands for all
            seen = np.cumsum([len(ids) for ids in others])
            others = others[: np.searchsorted(seen, NUM_ROWS) + 1]
        assert weight(heaviest) == max(map(weight, others))

    def test_what_does_not_fit_is_told_with_advice_before_the_first_step(
        self, tiny_run, layout, monkeypatch
    ):
        def no_memory(*args, **settings):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(loop, "train_step", lambda *args: pytest.fail("a step was taken"))
        for cls in (passes.PaddedPass, passes.PackedPass):
            monkeypatch.setattr(cls, "run", no_memory)
        with pytest.raises(UserError, match=r"memory is too small for this: .* GiB"):
            loop.train(tiny_run(**layout))
