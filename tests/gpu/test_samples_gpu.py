"""Sample answers of a run on a GPU, between captured or packed passes."""

import json

import pytest
import torch
from toys import draw_uneven_rows, save_rows, short_run

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.resolve import GLM_TINY
from glmtune.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("layout", ["packed", "exact"])
def test_they_are_made_and_change_no_loss(tmp_path, layout):
    rows = draw_uneven_rows(ChatGLMConfig.from_pretrained(GLM_TINY))
    folder, losses = save_rows(rows, tmp_path / "rows"), []
    for num in (0, 3):
        out = tmp_path / str(num)
        changes = {"layout": layout, "eval_ratio": 0.5, "eval_steps": 2, "use_cpu": False}
        result = train(short_run(folder, out, eval_answers=num, general_set=False, **changes))
        losses.append([record["loss"] for record in result.log_history if "loss" in record])
    assert losses[0] == losses[1]
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [len(json.loads(line)["answers"]) for line in lines] == [3, 3, 3]
