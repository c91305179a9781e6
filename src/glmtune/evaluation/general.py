"""Both sides on a general set, kept beside the answers so that a rerun loads no model."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peft import PeftModel

from glmtune.data.files import new_file, read_text
from glmtune.errors import UserError
from glmtune.evaluation.price import Price
from glmtune.general.items import NUM_CHOICES, GeneralSet
from glmtune.general.scores import GeneralRows, GeneralScores
from glmtune.models.packed import base_of

GENERAL_FILE = "compare.general.json"
"""In the folder of a comparison: the scores of every item, and what they depend on."""


class BothScores(NamedTuple):
    """The scores of both sides, and the seconds that they took."""

    base: GeneralScores
    tuned: GeneralScores
    seconds: float

    @classmethod
    def of(cls, model: PeftModel, general: GeneralSet, tokenizer: Any) -> "BothScores":
        """Score a loaded model with its adapter off and on.

        Raises:
            UserError: see `GeneralRows.of`.
        """
        started = time.monotonic()
        rows = GeneralRows.of(general, tokenizer, base_of(model).config.max_position_embeddings)
        tuned = rows.score(model)
        with model.disable_adapter():
            base = rows.score(model)
        return cls(base, tuned, time.monotonic() - started)


class GeneralFile:
    """The file of both sides' scores; scores of another model or set in it are made anew.

    Args:
        folder: of the comparison.
        general: the set.
        identity: what distinguishes the model, see `ModelChoice.identity`.
        overwrite: score anew in any case.
    """

    def __init__(
        self, folder: Path, general: GeneralSet, identity: Mapping[str, Any], *, overwrite: bool
    ):
        self._path, self._general = folder / GENERAL_FILE, general
        self._made_with = {**identity, "general_set": general.digest}
        self.scores = None if overwrite else self._read()

    def _read(self) -> BothScores | None:
        if not self._path.is_file():
            return None
        try:
            kept = json.loads(read_text(str(self._path)))
            if kept["made_with"] != self._made_with:
                return None
            num_tokens_N = np.array(kept["num_tokens"], dtype=np.int64)
            base_NC, tuned_NC = (
                np.array(kept[side], dtype=np.float64) for side in ("base", "tuned")
            )
            seconds = float(kept["seconds"])
        except (UserError, ValueError, KeyError, TypeError):  # damaged: it is only a copy
            return None
        items, shape = self._general.items, (len(self._general.items), NUM_CHOICES)
        if len(num_tokens_N) != shape[0] or {base_NC.shape, tuned_NC.shape} != {shape}:
            return None
        base, tuned = (GeneralScores(items, side, num_tokens_N) for side in (base_NC, tuned_NC))
        return BothScores(base, tuned, seconds)

    @property
    def price(self) -> Price | None:
        """What the tuning cost; None before it has been measured."""
        found = self.scores
        return found and self.price_of(found.base, found.tuned)

    def price_of(self, before: GeneralScores, after: GeneralScores) -> Price:
        """Two sides' scores on this set, compared."""
        return Price.of(before, after, self._general.name)

    def measure(self, model: PeftModel, tokenizer: Any) -> None:
        """Score both sides of a loaded model and keep what they score.

        Raises:
            UserError: see `GeneralRows.of`; or the file cannot be written.
        """
        print(f"scoring {len(self._general.items):,} general questions on both sides", flush=True)
        self.scores = found = BothScores.of(model, self._general, tokenizer)
        content = {
            "made_with": self._made_with,
            "seconds": found.seconds,
            "num_tokens": found.base.num_tokens_N.tolist(),
            "base": found.base.log_probs_NC.tolist(),
            "tuned": found.tuned.log_probs_NC.tolist(),
        }
        with new_file(str(self._path)) as file:
            file.write(json.dumps(content) + "\n")
