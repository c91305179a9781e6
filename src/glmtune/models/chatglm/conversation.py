"""What ChatGLM-6B's own chat makes of an answer. Source: the published code of revision v1.1."""

import re

# The vocabulary has no full-width punctuation of these kinds, so answers come with the half-width.
FULL_WIDTH = dict(zip(",!:;?", "，！：；？", strict=True))
_BESIDE_CHINESE = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
# A mark that the model's training data had in the place of a date.
MARK, _MARKED = "[[训练时间]]", "2023年"


def polish(text: str) -> str:
    """An answer as it is shown: full-width punctuation beside Chinese, a year for its mark."""
    text = text.replace(MARK, _MARKED)
    return _BESIDE_CHINESE.sub(lambda mark: FULL_WIDTH[mark[0]], text)
