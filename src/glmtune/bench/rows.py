"""Random token rows for measurements, with a real data set's distribution of lengths."""

import numpy as np
from transformers import PreTrainedConfig

from glmtune.data.token_rows import TokenRows
from glmtune.models.families import family_of

# The 19,534 Chinese alpaca rows of at most 200 tokens have a median length of 57 and a mean of 66;
# a third of the tokens are the prompts'.
_MEDIAN, _MEAN, _SHORTEST, _LONGEST, _PROMPT = 57, 66, 15, 200, 1 / 3


def random_rows(config: PreTrainedConfig, num_rows: int, seed: int = 0) -> TokenRows:
    """Rows of random ids, as long as Chinese alpaca rows are (their lengths are lognormal)."""
    random = np.random.default_rng(seed)
    sigma = np.sqrt(2 * np.log(_MEAN / _MEDIAN))
    lengths = np.exp(random.normal(np.log(_MEDIAN), sigma, num_rows)).round()
    lengths_R = lengths.clip(_SHORTEST, _LONGEST).astype(np.int64)
    rule = family_of(config).row_rule(config)
    prompts_R = (lengths_R * _PROMPT).astype(np.int64).clip(min=rule.num_prompt_specials)
    starts_R1 = np.concatenate(([0], np.cumsum(lengths_R)))
    ids_T = random.integers(5, end_of_text_ids(config) - 1, starts_R1[-1])
    for place, special in enumerate(rule.before_prompt):
        ids_T[starts_R1[:-1] + place] = special.id
    ends = (rule.after_prompt, starts_R1[:-1] + prompts_R), (rule.end, starts_R1[1:])
    for specials, ends_R in ends:
        for back, special in enumerate(reversed(specials), start=1):
            ids_T[ends_R - back] = special.id
    return TokenRows(ids_T, starts_R1, prompts_R, rule)


def end_of_text_ids(config: PreTrainedConfig) -> int:
    """The first special id behind a vocabulary's text, which may have some before it as well."""
    rule = family_of(config).row_rule(config)
    return min(i for i in rule.special_ids.values() if 2 * i > config.vocab_size)
