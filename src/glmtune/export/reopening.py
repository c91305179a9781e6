"""Open what was written again, and compare it with what it was written from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glmtune.adapters.lora import load_adapter
from glmtune.adapters.merge import compare_logits, probe
from glmtune.errors import UserError
from glmtune.models.loading import load_base_model

OURS = "glmtune"
TEXTS = (
    "Hello, people of the world!", "  two  blanks,\ttab\n\nand lines\n",
    "中文和 English 混排，１２３。",
    "def f(x):\n    return {'a': x ** 2}  # 平方", "3.14159 1234567 🤗 é ß \u3000全角",
    "What's the boss's    opinion?\r\n", "",
)  # fmt: skip
"""Texts whose ids tell tokenizers apart: blanks, line breaks, digits, quotes, rare characters."""
CHAT = (
    {"role": "user", "content": "Why is it 17?"},
    {"role": "assistant", "content": "因为 3 + 14 = 17。"},
    {"role": "user", "content": "再说一遍，people。"},
)


class Reopened(NamedTuple):
    """How an export was opened again, and what it gave."""

    by: str
    """The reader, with its version."""
    is_targets: bool
    """Whether it is the target's own reader; else ours."""
    found: str
    """What was compared, in one line."""
    notes: tuple[str, ...] = ()
    """What differs and is no fault."""

    @property
    def line(self) -> str:
        """All of it in one line."""
        whose = "the target's own reader" if self.is_targets else "our own reader"
        return f"opened again by {self.by} ({whose}): {self.found}"


def check_logits(found: Tensor, expected: Tensor, by: str) -> str:
    """Compare the logits of a probe row; says by how much they differ.

    Raises:
        UserError: by more than rounding.
    """
    difference, is_same = compare_logits(found, expected)
    if not is_same:
        raise UserError(
            f"what was written gives other logits, opened by {by}: they differ by {difference:.1e} "
            "from those of base and adapter, so it is not kept; report this with the command"
        )
    return f"the logits of a row of {found.shape[1]} tokens differ by {difference:.1e} at most"


def reopen_adapter(base: str, adapter: str, written: str) -> str:
    """Load a written adapter as ours are, and compare its logits with the original's.

    Args:
        base: of both.
        adapter: the original's folder.
        written: the folder that was written.

    Raises:
        UserError: it gives other logits.
    """
    found = _probe_with(base, written)
    return check_logits(found, _probe_with(base, adapter), OURS)


def _probe_with(base: str, adapter: str) -> Tensor:
    return probe(load_adapter(load_base_model(base, dtype=torch.float32), adapter))


def same_tokens(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens two answers have in common from the beginning."""
    pairs = zip(found, expected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
