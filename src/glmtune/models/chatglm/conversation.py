"""How ChatGLM-6B's own chat edits an answer.

Source: the published code of revision v1.1.
"""

import re

# The vocabulary lacks these full-width characters, so answers have the half-width ones instead.
FULL_WIDTH = dict(zip(",!:;?", "，！：；？", strict=True))
_BESIDE_CHINESE = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
# A placeholder for a date in the model's training data.
MARK, _MARKED = "[[训练时间]]", "2023年"


def with_date(text: str) -> str:
    """A text with a year for the placeholder, as the publisher's chats show it."""
    return text.replace(MARK, _MARKED)


def polish(text: str) -> str:
    """An answer as shown: full-width punctuation next to Chinese, a year for the placeholder."""
    return _BESIDE_CHINESE.sub(lambda mark: FULL_WIDTH[mark[0]], with_date(text))
