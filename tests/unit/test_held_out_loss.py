"""The loss on held-out rows needs a base, an adapter and rows, and no training run."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from glmtune.adapters import load_adapter
from glmtune.data.dataset import load_dataset
from glmtune.data.split import split_rows
from glmtune.data.token_rows import TokenRows
from glmtune.models.families import family_of
from glmtune.models.likelihood import padded_sums
from glmtune.models.loading import load_base_model
from glmtune.models.packed import PackedModel
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop
from glmtune.training.held_out import row_losses
from glmtune.training.interrupt import CutShort
from glmtune.training.passes import PackedPass, PaddedPass
from glmtune.training.plan import evaluation_parts


@pytest.fixture
def trained(toy_run, monkeypatch):
    """The settings of a run, and the evaluation loss that it recorded at its end."""
    monkeypatch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)
    settings = toy_run(eval_ratio=0.3, per_device_eval_batch_size=2, learning_rate=1e-2)
    return settings, loop.train(settings).log_history[-1]["eval_loss"]


@pytest.mark.parametrize("pack_length", [None, 64], ids=["padded", "packed"])
def test_without_a_run_it_is_what_training_recorded(trained, pack_length):
    settings, recorded = trained
    accelerator = Accelerator(cpu=True)
    model = load_adapter(load_base_model(GLM_TINY, dtype=torch.float32), settings.output_dir)
    config = model.get_base_model().config
    family = family_of(config)
    rule = family.row_rule(config)
    rows = TokenRows.from_table(load_dataset(settings.dataset_path, rule)[0], rule)
    _, row_ids = split_rows(len(rows), settings.eval_ratio, settings.seed)
    parts = evaluation_parts(rows.lengths_R, row_ids, pack_length, batch_size=2)
    assert sorted(np.concatenate(parts)) == row_ids.tolist()
    if pack_length:
        packed = PackedModel(model, family.native().packed, compiled=False)
        step_pass = PackedPass(accelerator, packed, rows, 0.0, pack_length)
    else:
        step_pass = PaddedPass(accelerator, model, rows)
    num_labels = int(rows.num_labels_R[row_ids].sum())
    losses_E = row_losses(step_pass, parts, row_ids, accelerator)
    alone = padded_sums(model, rows, row_ids)
    assert losses_E == pytest.approx(-alone[row_ids], rel=1e-5)
    loss = losses_E.sum() / num_labels
    assert loss == pytest.approx(recorded, rel=1e-6 if pack_length is None else 1e-5)
    with pytest.raises(CutShort):
        row_losses(step_pass, parts, row_ids, accelerator, wants_stop=lambda: True)
