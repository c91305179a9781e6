"""Which rows of several files make up a data set: pure functions of numbers and a seed.

Shapes: R good rows of a file. An array of uses says how often each of them is taken.
"""

from collections.abc import Sequence

import numpy as np

from glmtune.data.characters import survey
from glmtune.errors import UserError

OTHER, CHINESE, ENGLISH = 0, 1, 2
"""Languages of a row, as numbers."""
LETTERS_PER_CHINESE = 4
"""English letters of a row for each of its Chinese characters, above which it is English."""
_STREAM = 3
"""A random stream of its own beside those of a run."""


def language_of(texts: Sequence[str]) -> int:
    """The language of a row's texts; other if they have no letter of either."""
    han, latin, _ = survey("\n".join(texts).encode("utf-8", "replace")).letters.tolist()
    if not han + latin:
        return OTHER
    return CHINESE if LETTERS_PER_CHINESE * han >= latin else ENGLISH


def uses_of(
    path: str, num_rows: int, num: int | None, weight: float, seed: int, number: int
) -> np.ndarray:
    """How often each row is taken, ``(R,)``: `num` of them, each `weight` times.

    What is left of a weight that is no whole number goes to as many rows as it makes.

    Args:
        path: what messages call the file.
        num_rows: its good rows.
        num: how many of them; None for all.
        weight: above 0.
        seed: of the draw.
        number: which file it is, so that each has a draw of its own.

    Raises:
        UserError: the file has fewer rows, or none is taken.
    """
    if num is not None and num > num_rows:
        raise UserError(
            f"{path}: has {num_rows:,} rows, and {num:,} are to be taken; lower the number behind "
            "#, or set a weight above 1, which repeats rows"
        )
    order = np.random.default_rng([seed, _STREAM, number]).permutation(num_rows)
    chosen = order[:num]
    whole, rest = divmod(round(weight * len(chosen)), len(chosen))
    uses = np.zeros(num_rows, np.int64)
    uses[chosen] = whole
    uses[chosen[:rest]] += 1
    if not uses.any():
        raise UserError(
            f"{path}: no row is taken, since weight {weight:g} of {len(chosen):,} rows is none; "
            "raise it, or leave the file out"
        )
    return uses


def share_languages(
    uses: Sequence[np.ndarray], languages: Sequence[np.ndarray], zh_share: float, seed: int
) -> list[np.ndarray]:
    """Leave rows out until Chinese ones are a share of those that are Chinese or English.

    As few as can be, drawn from all files together; rows of neither language stay.

    Args:
        uses: how often each row of each file is taken.
        languages: of the same rows.
        zh_share: above 0 and below 1.
        seed: of the draw.

    Raises:
        UserError: no row is of one of the languages.
    """
    all_uses, spoken = np.concatenate(uses), np.concatenate(languages)
    nums = {lang: int(all_uses[spoken == lang].sum()) for lang in (CHINESE, ENGLISH)}
    for language, name in ((CHINESE, "Chinese"), (ENGLISH, "English")):
        if not nums[language]:
            raise UserError(
                f"zh_share {zh_share:g}: no row is {name}, so there is nothing to share; leave it "
                "out, or add a file"
            )
    total = min(nums[CHINESE] / zh_share, nums[ENGLISH] / (1 - zh_share))
    wanted = {CHINESE: round(total * zh_share), ENGLISH: round(total * (1 - zh_share))}
    random = np.random.default_rng([seed, _STREAM, len(uses)])
    for language, num in wanted.items():
        rows = np.repeat(np.flatnonzero(spoken == language), all_uses[spoken == language])
        out = random.permutation(rows)[max(1, num) :]
        np.subtract.at(all_uses, out, 1)
    return np.split(all_uses, np.cumsum([len(one) for one in uses])[:-1])


def num_replayed(
    path: str, num_rows: int, num_others: int, share: float, repeats: bool = False
) -> int:
    """How many general rows make up a share of all rows.

    Args:
        path: what messages call their file.
        num_rows: its good rows.
        num_others: all other rows.
        share: above 0 and below 1.
        repeats: whether they may be used more than once.

    Raises:
        UserError: the file has fewer, or the share makes none.
    """
    num = round(share / (1 - share) * num_others)
    if num > num_rows and not repeats:
        most = num_rows / (num_rows + num_others)
        raise UserError(
            f"{path}: has {num_rows:,} rows, and a replay_share of {share:g} beside {num_others:,} "
            f"other rows asks for {num:,}; set replay_share {np.floor(most * 1e4) / 1e4:g} at "
            "most, or name a larger file"
        )
    if not num:
        raise UserError(
            f"{path}: a replay_share of {share:g} beside {num_others:,} other rows is no row; "
            "raise it, or leave replay out"
        )
    return num
