"""What the folder of a run says about the adapter in it: its rows, its course, what it took."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.config.reading import read_config
from glmtune.config.settings import TrainSettings
from glmtune.data.dataset import CARD_FILE, DataCard
from glmtune.errors import UserError, note
from glmtune.evaluation.labels import Text
from glmtune.evaluation.run_records import DialRecord, LedgerRecord, read_record
from glmtune.run_files import (
    DIAL_FILE,
    LEDGER_FILE,
    RECIPE_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    find_around,
)
from glmtune.runlog import format_seconds
from glmtune.training.saving.manifest import read_trainer_state

ROWS = Text("训练数据", "Trained on")
SETTINGS = Text("训练设置", "Trained with")
TRAINING = Text("训练", "Training")
COPYING = 10
"""Seconds that the files of a folder may lie apart because it was copied."""


@dataclass(frozen=True)
class RunFacts:
    """The records of a run."""

    history: Sequence[Mapping[str, Any]] = ()
    """What it logged, see `runlog`."""
    num_tokens: int = 0
    """Tokens that it trained on, each as often as it was read."""
    num_steps: int = 0
    recipe: TrainSettings | None = None
    card: DataCard | None = None
    """The card of its rows; None where they are not there any more."""
    dial: DialRecord | None = None
    ledger: LedgerRecord | None = None

    @classmethod
    def of(cls, adapter: Path) -> "RunFacts | None":
        """Read them; None where an adapter has nothing of its run beside it.

        A note names what is damaged, or of another program, which is left out: it is no obstacle
        to a comparison.
        """
        found: dict[str, Any] = {}
        for name, read in ((STATE_FILE, _read_state), (RECIPE_FILE, _read_recipe)):
            for file in find_around(adapter, name)[:1]:
                found |= _if_whole(read, file)
        # These are of this very adapter, not of another checkpoint of its run.
        for name, read in ((DIAL_FILE, _read_dial), (LEDGER_FILE, _read_ledger)):
            if (file := adapter / name).is_file():
                if _is_older(file, adapter):
                    note(f"{file}: is older than the adapter and left out; make it again")
                else:
                    found |= _if_whole(read, file)
        return cls(**found) if found else None

    @property
    def seconds(self) -> float | None:
        """About how long its steps took, by the speeds that it logged; None without those."""
        speeds = [(r["step"], r["tokens_per_second"]) for r in self.history if _has_speed(r)]
        if not speeds or not self.num_steps:
            return None
        starts = [0, *(step for step, _ in speeds[:-1])]
        steps_a_speed = zip(starts, speeds, strict=True)
        tokens_a_step = self.num_tokens / self.num_steps
        return sum((end - start) * tokens_a_step / speed for start, (end, speed) in steps_a_speed)

    @property
    def trained(self) -> dict[Text, str | Text]:
        """What was trained on what, and how: label -> value."""
        facts: dict[Text, str | Text] = {}
        if self.card is not None:
            facts[ROWS] = _rows(self.card, self.recipe)
        elif self.recipe is not None:
            facts[ROWS] = Path(self.recipe.dataset_path).name
        if (run := self.recipe) is not None:
            bits = f", {run.quantization_bit} bit" if run.quantization_bit else ""
            facts[SETTINGS] = (
                f"LoRA rank {run.lora_rank}, alpha {run.lora_alpha}, "
                f"rate {run.learning_rate:g}, seed {run.seed}{bits}"
            )
        return facts

    @property
    def cost(self) -> dict[Text, Text]:
        """What training took: label -> value; empty where that was not logged."""
        if not self.num_steps:
            return {}
        steps = "step" if self.num_steps == 1 else "steps"
        zh, en = [f"{self.num_steps:,} 步"], [f"{self.num_steps:,} {steps}"]
        if self.seconds is not None:
            zh.insert(0, f"约 {format_seconds(self.seconds)}")
            en.insert(0, f"about {format_seconds(self.seconds)}")
        zh.append(f"{self.num_tokens:,} 个词元")
        en.append(f"{self.num_tokens:,} tokens")
        memory = [r["memory_gib"] for r in self.history if r.get("memory_gib")]
        if memory:
            zh.append(f"内存至多 {max(memory):.1f} GiB")
            en.append(f"at most {max(memory):.1f} GiB")
        return {TRAINING: Text("，".join(zh), ", ".join(en))}


def _rows(card: DataCard, recipe: TrainSettings | None) -> Text:
    names = ", ".join(Path(one.path).name for one in card.sets) or card.source or ""
    counted: dict[str, int] = {}
    for one in card.sets:
        for language, num in one.languages.items():
            counted[language] = counted.get(language, 0) + num
    of = ", ".join(f"{language} {num:,}" for language, num in counted.items())
    of = f" ({of})" if of else ""
    share = recipe.eval_ratio if recipe else 0
    held_zh, held_en = (f"，留出 {share:.0%}", f", {share:.0%} held out") if share else ("", "")
    return Text(
        f"{card.num_kept:,} 行{of}，{card.num_tokens:,} 个词元{held_zh} · {names}",
        f"{card.num_kept:,} rows{of}, {card.num_tokens:,} tokens{held_en} · {names}",
    )


def _if_whole(read: Callable[[Path], dict[str, Any]], file: Path) -> dict[str, Any]:
    try:
        return read(file)
    except UserError as error:
        note(f"the page has less about the run ({error})")
        return {}


def _has_speed(record: Mapping[str, Any]) -> bool:
    return bool(record.get("tokens_per_second"))


def _read_state(file: Path) -> dict[str, Any]:
    state = read_trainer_state(file.parent)
    return {
        "history": state["log_history"],
        "num_tokens": state["num_input_tokens_seen"],
        "num_steps": state["global_step"],
    }


def _is_older(file: Path, adapter: Path) -> bool:
    """Whether a file was made before the adapter beside it was trained on."""
    weights = adapter / WEIGHTS_FILE
    return weights.is_file() and file.stat().st_mtime + COPYING < weights.stat().st_mtime


def _read_recipe(file: Path) -> dict[str, Any]:
    recipe = read_config(TrainSettings, str(file), {})
    card = Path(recipe.dataset_path, CARD_FILE)
    return {"recipe": recipe, "card": DataCard.read(card) if card.is_file() else None}


def _read_dial(file: Path) -> dict[str, Any]:
    return {"dial": read_record(file, DialRecord)}


def _read_ledger(file: Path) -> dict[str, Any]:
    return {"ledger": read_record(file, LedgerRecord)}
