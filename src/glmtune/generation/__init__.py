"""From prompts to answers.

`answers` puts prompts into batches, `slots` holds the rows of a running batch, `decoder` runs them
on the `weights` it has read, `sampling` chooses each token, `streaming` turns tokens into text as
they arrive; `reference` does the same through transformers' `generate`.
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
