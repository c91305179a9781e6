"""llama.cpp's answers to rows of ids, beside those of the same weights here."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glmtune.data.files import write_json
from glmtune.errors import UserError
from glmtune.export import llama_reader
from glmtune.export.reopening import same_tokens

NUM_TOKENS = 32
_SPARE = 16
TIES = {"f32": 1e-4, "f16": 1e-2, "q8_0": 5e-2}
"""Number type of the weights -> how far below the largest logit, as a share of the largest
magnitude, llama.cpp's token may be. In f16 and q8_0 it rounds activations as well."""


class Told(NamedTuple):
    """What llama.cpp told of a file."""

    version: str
    answers: list[list[int]]
    texts: list[list[int]]
    chat: list[int]

    @property
    def by(self) -> str:
        """The reader's name."""
        return f"llama.cpp (xllamacpp {self.version})"


def is_installed() -> bool:
    """Whether llama.cpp is here."""
    return find_spec("xllamacpp") is not None


def ask(
    model: Path,
    rows: Sequence[Sequence[int]],
    *,
    adapter: Path | None = None,
    texts: Sequence[str] = (),
    chat: Sequence[dict[str, str]] = (),
    num_tokens: int = NUM_TOKENS,
) -> Told:
    """Open a file in a process of its own.

    Args:
        model: a GGUF file.
        rows: ids to answer greedily.
        adapter: a GGUF file of an adapter on that model.
        texts: to be turned into ids.
        chat: messages to be written by the file's chat template.
        num_tokens: the most tokens of an answer.

    Raises:
        UserError: llama.cpp does not open it.
    """
    asked = {
        "model": str(model), "adapter": str(adapter) if adapter else None,
        "rows": [list(map(int, row)) for row in rows], "texts": list(texts), "chat": list(chat),
        "tokens": num_tokens, "context": max(map(len, rows), default=0) + num_tokens + _SPARE,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        questions = Path(place, "questions.json")
        write_json(asked, str(questions))
        command = [sys.executable, llama_reader.__file__, str(questions)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, errors="replace"
        )
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if "rror" in line or "fail" in line]
        last = (faults or done.stderr.splitlines() or ["no message"])[0].strip()
        raise UserError(f"--to gguf: llama.cpp does not open what was written ({last[:300]})")
    told = json.loads(done.stdout.splitlines()[-1])
    return Told(told["version"], told["answers"], told["texts"], told.get("chat", []))


def greedy(model: Any, row: Sequence[int], stops: Sequence[int], num_tokens: int) -> list[int]:
    """A model's likeliest tokens after a row of ids, without the one that ends them."""
    ids = torch.tensor([list(row)], device=model.device)
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=num_tokens, eos_token_id=list(stops), pad_token_id=stops[0],
        )[0, len(row) :].tolist()  # fmt: skip
    return found[:-1] if found and found[-1] in stops else found


def compare_answers(
    model: Any,
    rows: Sequence[Sequence[int]],
    told: Told,
    stops: Sequence[int],
    quant: str,
    num_tokens: int = NUM_TOKENS,
) -> str:
    """Compare llama.cpp's answers with a model's of the same weights; says how many tokens agree.

    Where they part the two tokens have to be equally likely but for rounding; what follows is not
    compared.

    Raises:
        UserError: they part elsewhere.
    """
    num_same, num_ties = 0, 0
    for row, theirs in zip(rows, told.answers, strict=True):
        theirs = theirs[:-1] if theirs and theirs[-1] in stops else theirs
        ours = greedy(model, row, stops, num_tokens)
        same = same_tokens(ours, theirs)
        num_same += same
        if ours == theirs:
            continue
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*row, *ours[:same]]])).logits[0, -1].float()
        token = theirs[same] if same < len(theirs) else max(stops, key=lambda i: float(logits[i]))
        gap = float((logits.max() - logits[token]) / logits.abs().max())
        if gap > TIES[quant]:
            raise UserError(
                f"--to gguf: {told.by} answers otherwise than these weights here, from token "
                f"{same + 1} on, by {gap:.1e} of the largest logit; report this with the command"
            )
        num_ties += 1
    ties = f"; {num_ties} then parted where two tokens are equally likely" if num_ties else ""
    return f"{num_same} greedy tokens of {len(rows)} answers are the same{ties}"
