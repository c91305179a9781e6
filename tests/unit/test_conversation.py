"""The text of a conversation as the model reads it, and how answers are shown."""

import pytest

from glmtune.evaluation.conversation import Round, polish, polish_beginning, write_prompt
from glmtune.models.families import DEFAULT

CHAT = DEFAULT.chat
ROUNDS = [Round("你好", {"base": "你好！"}), Round("1+1?", {"base": "2", "tuned": "two"})]


def test_a_first_question_stands_alone():
    assert write_prompt(CHAT, [], "晚上睡不着怎么办", "base") == "晚上睡不着怎么办"


def test_rounds_are_written_as_the_published_code_does():
    assert write_prompt(CHAT, ROUNDS, "why", "base") == (
        "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：1+1?\n答：2\n[Round 2]\n问：why\n答："
    )


def test_a_side_sees_its_own_answer_where_it_has_one():
    assert "答：你好！\n[Round 1]\n问：1+1?\n答：two\n" in write_prompt(
        CHAT, ROUNDS, "why", "tuned"
    )


@pytest.mark.parametrize(
    "text, shown",
    [
        ("你好,世界!", "你好，世界！"),
        ("a,b: c!", "a,b: c!"),
        ("是:a;b?好", "是：a;b？好"),
        (",好", "，好"),
        ("好,,好", "好，，好"),
        ("截至[[训练时间]]的数据", "截至2023年的数据"),
        ("[[训练]]", "[[训练]]"),
    ],
)
def test_answers_are_polished_and_nothing_shown_is_taken_back(text, shown):
    assert polish(CHAT, text) == shown
    for end in range(len(text)):
        assert shown.startswith(polish_beginning(CHAT, text[:end]))
    assert len(polish_beginning(CHAT, text)) >= len(shown) - 1, "only what could change waits"
