"""A server's batch on a GPU: captured steps, fixed shapes, an adapter of its own for each row."""

import pytest
import torch
from separate import alone, questions, together
from serving import strong_adapters

from glmtune.bench.random_model import CONFIGS, random_model
from glmtune.generation import Decoder
from glmtune.generation.mixed import MixedAdapters
from glmtune.models.families import family_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("shape", ["small", "glm-small"])
def test_rows_are_what_they_are_alone_in_every_bit(shape, bits, overlaps):
    model = random_model(CONFIGS[shape], torch.device("cuda"), torch.bfloat16).eval()
    mixed = MixedAdapters()
    for number, adapted in enumerate(strong_adapters(model, (1, 2), 0.2), start=1):
        mixed.add(adapted, f"number {number}")
    decoder = Decoder(model, [], bits=bits, separate=True, adapters=mixed)
    assert decoder.captures
    rule = family_of(model.config).row_rule(model.config)
    asked = questions(16, 5, [special.id for special in rule.after_prompt], 3000)
    for question, found in zip(asked, together(decoder, asked, overlaps), strict=True):
        assert found == alone(decoder, question)
