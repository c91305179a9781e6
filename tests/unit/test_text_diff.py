"""Where two answers differ."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune.evaluation.text_diff import split_differences


@pytest.mark.parametrize(
    "base, tuned, pieces",
    [
        (
            "The car sped quickly.",
            "The car raced quickly.",
            (["The car ", "sped", " quickly."], ["The car ", "raced", " quickly."]),
        ),
        (
            "三原色是红黄蓝。",
            "三原色是红绿蓝。",
            (["三原色是红", "黄", "蓝。"], ["三原色是红", "绿", "蓝。"]),
        ),
        ("same", "same", (["same"], ["same"])),
        ("yes", "yes, indeed", (["yes"], ["yes", ", indeed"])),
        ("好的。", "完全 different", (["好的。"], ["完全 different"])),
        ("", "a", ([""], ["a"])),
    ],
)
def test_differences_are_split_by_word_and_by_chinese_letter(base, tuned, pieces):
    found = split_differences(base, tuned)
    assert tuple([piece for piece in side if piece] or [""] for side in found) == pieces


texts = st.text("ab 好的。<&\n")


@given(texts, texts)
def test_splitting_loses_no_letter_and_keeps_what_is_common_in_step(base, tuned):
    found = split_differences(base, tuned)
    assert tuple(map("".join, found)) == (base, tuned)
    if min(map(len, found)) > 1:
        assert found[0][::2] == found[1][::2]
