"""Prompts in, answers out.

`answers` puts prompts into batches, `slots` holds the rows of one while they run on the `weights`
of a `decoder`, `sampling` chooses each token, `streaming` makes text of tokens while they come;
`reference` does the same through transformers' `generate`.
"""

from glmtune.config.groups import GenerationSettings
from glmtune.generation.answers import (
    TooLongError,
    answer_batch,
    answer_in_batches,
    encode_prompts,
    find_too_long,
    generate_answers,
)
from glmtune.generation.decoder import Decoder, find_stop_ids
from glmtune.generation.prompts import Answer, EncodedPrompt, Prompt

__all__ = [
    "Answer",
    "Decoder",
    "EncodedPrompt",
    "GenerationSettings",
    "Prompt",
    "TooLongError",
    "answer_batch",
    "answer_in_batches",
    "encode_prompts",
    "find_stop_ids",
    "find_too_long",
    "generate_answers",
]
