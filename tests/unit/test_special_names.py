"""What a chat's template and its messages may say, and when masks of answers can be had."""

import pytest

from glmtune.errors import UserError
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY
from glmtune.models.special_names import MARK, guard_chat, mark, pattern_of

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "wish", [{"tokenize": False}, {"return_dict": False}, {"continue_final_message": True}]
)
def test_a_mask_that_cannot_be_had_is_refused(wish):
    with pytest.raises(UserError, match="return_assistant_tokens_mask: needs tokenize=True"):
        load_tokenizer(GLM_TINY).apply_chat_template(
            CHAT, return_assistant_tokens_mask=True, **wish
        )


def test_names_in_everything_given_are_broken_up_and_no_others():
    names = pattern_of(["<sop>"])
    chat, given = guard_chat([{"content": "<sop>"}], [{"name": "<sop>"}], None, {"x": "<sop>"})
    assert given["documents"] is None
    for text in (chat[0]["content"], given["tools"][0]["name"], given["x"]):
        assert mark(f"<sop>{text}", names) == f"{MARK}<sop><sop>"


def test_no_tools_are_none():
    assert guard_chat([], [], None, {})[1]["tools"] is None


def test_a_function_is_a_tool_by_its_schema():
    def add(a: int) -> int:
        """Add one.

        Args:
            a: a number.
        """

    _, given = guard_chat([], [add], None, {})
    assert given["tools"][0]["function"]["name"] == "add"
