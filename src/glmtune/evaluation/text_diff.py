"""Where two answers differ: words are compared whole, Chinese character by character."""

import re
from itertools import pairwise

MIN_SIMILARITY = 0.25
"""Texts with less in common are not marked: what they share is chance."""
MIN_MATCH = 3
"""A match of fewer letters than this inside a change does not split the change."""
_WORDS = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|\s+|.", re.DOTALL)


def split_differences(base: str, tuned: str) -> tuple[list[str], list[str]]:
    """Both texts in pieces, by turns in both and in one of them; a piece may be empty.

    Each list joined is its text. Texts that are the same, or have little in common, are one piece.
    """
    from rapidfuzz.distance import LCSseq

    if base == tuned:
        return [base], [tuned]
    words_a, words_b = _WORDS.findall(base), _WORDS.findall(tuned)
    ends = len(words_a), len(words_b)
    # Each match with its start and end on both sides; empty ones at both ends.
    matches = [(0, 0, 0, 0)]
    for code in LCSseq.opcodes(words_a, words_b):
        place = code.src_start, code.src_end, code.dest_start, code.dest_end
        if code.tag != "equal":
            continue
        is_at_an_end = place[0] == place[2] == 0 or (place[1], place[3]) == ends
        if is_at_an_end or len("".join(words_a[place[0] : place[1]]).strip()) >= MIN_MATCH:
            matches.append(place)
    matches.append((ends[0], ends[0], ends[1], ends[1]))
    num_common = sum(len("".join(words_a[a:b])) for a, b, _, _ in matches)
    if 2 * num_common < MIN_SIMILARITY * (len(base) + len(tuned)):
        return [base], [tuned]
    return (
        _pieces(words_a, [(a, b) for a, b, _, _ in matches]),
        _pieces(words_b, [(a, b) for _, _, a, b in matches]),
    )


def _pieces(words: list[str], matches: list[tuple[int, int]]) -> list[str]:
    places = [place for match in matches for place in match]
    return ["".join(words[start:end]) for start, end in pairwise(places)]
