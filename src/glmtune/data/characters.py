"""Which characters a text is made of, found in bulk from its UTF-8 bytes.

A block of rows is treated as an array of bytes, with a few operations for all of them, because a
loop over characters takes Python longer than reading the file.
"""

import re
from typing import NamedTuple

import numpy as np

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
"""Characters that no text should hold: controls other than tab and line ends, and U+FFFD, which
marks a character that an earlier decoding lost."""

LANGUAGES = ("Chinese", "English", "other")

_LOWER = bytes(range(256)).lower()
_DELETED = b" \t\r\n!\"'(),.:;?@[]`{}_~\xff"
# The last two bytes of U+FF01 to U+FF5E, the full-width forms, as their ASCII characters; else 0.
_HALF_WIDTH = np.zeros((256, 256), np.uint8)
for _code in range(0x21, 0x7F):
    _, _second, _third = chr(_code + 0xFEE0).encode()
    _HALF_WIDTH[_second, _third] = _code


class Survey(NamedTuple):
    """What UTF-8 text is made of.

    `bare` is the text without white space and punctuation, Chinese and English, in lower case,
    full-width forms as their ASCII characters; control characters stay, and signs of arithmetic,
    which change what a question asks. `letters` counts letters by LANGUAGES, `num_controls` the
    matches of CONTROL.
    """

    bare: bytes
    letters: np.ndarray
    num_controls: int


def survey(data: bytes) -> Survey:
    """Analyse UTF-8 text.

    Letters are classified by first bytes, which stand for blocks of characters: E4 to E9 for U+4000
    to U+9FFF. Rare Han characters outside these count as other, as do kana and accented letters.
    """
    bare, han, other, num_controls = data, 0, 0, 0
    if not data.isascii():
        codes = np.frombuffer(data, np.uint8).copy()
        first, second, third = codes[:-2], codes[1:-1], codes[2:]
        han = _count(codes - 0xE4 < 6)
        # U+00C0 to U+1FFF, U+A000 to U+DFFF, from U+10000; of U+3000 to U+3FFF the kana and more.
        other = _count((codes - 0xC3 < 0x1F) | (codes - 0xEA < 4) | (codes >= 0xF0))
        # U+2000 to U+203F and U+3000 to U+303F: spaces, quotes, dashes, stops and brackets.
        is_mark = (second == 0x80) & (first - 0xE2 < 2)
        other += _count(first == 0xE3) - _count(is_mark & (first == 0xE3))
        at = np.flatnonzero(first == 0xEF)
        num_controls = _count((second[at] == 0xBF) & (third[at] == 0xBD))
        halves = _HALF_WIDTH[second[at], third[at]]
        controls_at = np.flatnonzero(codes[:-1] == 0xC2)
        num_controls += _count(codes[1:][controls_at] < 0xA0)
        mask = np.negative(is_mark.view(np.uint8))  # 0xFF, which UTF-8 never holds, at each mark
        for part in (first, second, third):
            part |= mask
        at, halves = at[halves > 0], halves[halves > 0]
        first[at], second[at], third[at] = 0xFF, 0xFF, halves
        bare = codes.tobytes()
    bare = bare.translate(_LOWER, _DELETED)
    codes = np.frombuffer(bare, np.uint8)
    num_controls += _count(codes < 0x20) + _count(codes == 0x7F)
    latin = _count(codes - ord("a") < 26)
    return Survey(bare, np.array([han, latin, other]), num_controls)


def _count(is_so: np.ndarray) -> int:
    return int(np.count_nonzero(is_so))
