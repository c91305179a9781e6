"""lm-evaluation-harness gives the references of a comparison the same log-probabilities."""

import json

import pytest
import torch
from toys import randomise_adapter

from glmtune.adapters import attach_lora
from glmtune.evaluation.probes import from_texts
from glmtune.models.likelihood import packed_layers, score_references
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY

pytest.importorskip("lm_eval")
hflm = pytest.importorskip("lm_eval.models.huggingface").HFLM

NUM_PROMPTS = 50


def records(shared):
    """Half Chinese, half English, of very different lengths."""
    both = []
    for language in ("zh", "en"):
        path = shared / "data" / f"alpaca_data_{language}.json"
        data = json.loads(path.read_text(encoding="utf-8"))
        short = [r for r in data if r["output"] and len(r["instruction"] + r["output"]) < 150]
        both += [(r["instruction"], r["output"]) for r in short[: NUM_PROMPTS // 2]]
    return both


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_50_references_have_the_log_probabilities_of_lm_eval(shared, side):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(GLM_TINY)
    model = attach_lora(load_base_model(GLM_TINY, dtype=torch.float32), dropout=0.0)
    model = randomise_adapter(model, std=0.2 if side == "tuned" else 0.0).eval()
    probes = from_texts(tokenizer, records(shared))
    assert len(probes) == NUM_PROMPTS
    ours = score_references(model, probes, packed_layers(model))
    theirs = hflm(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=8)
    requests = [(None, probe.prompt_ids, probe.answer_ids) for probe in probes]
    found = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    for mine, (log_prob, _), probe in zip(ours, found, probes, strict=True):
        assert mine.num_tokens == len(probe.answer_ids)
        assert mine.log_prob == pytest.approx(log_prob, abs=1e-4, rel=1e-6)
