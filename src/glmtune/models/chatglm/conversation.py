"""How ChatGLM-6B's own chat writes rounds and edits an answer.

Source: the published code of revision v1.1.
"""

import re

from glmtune.data import templates

# The vocabulary lacks these full-width characters, so answers have the half-width ones instead.
FULL_WIDTH = dict(zip(",!:;?", "，！：；？", strict=True))
_BESIDE_CHINESE = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
# A placeholder for a date in the model's training data.
MARK, _MARKED = "[[训练时间]]", "2023年"


def written(rounds: list[tuple[str, str]], question: str) -> str:
    """Earlier rounds and a question as the model reads them; a first question as it stands."""
    return templates.rounds(rounds, question) if rounds else question


def polish(text: str) -> str:
    """An answer as shown: full-width punctuation next to Chinese, a year for the placeholder."""
    text = text.replace(MARK, _MARKED)
    return _BESIDE_CHINESE.sub(lambda mark: FULL_WIDTH[mark[0]], text)
