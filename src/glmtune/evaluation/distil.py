"""`glmtune adapters distil`: a LoRA adapter that answers as a base with a prefix does.

The prefixed model answers the user's prompts; the adapter is then trained on these answers until it
finds the same tokens likely at each of their places (the Kullback-Leibler divergence of the two
distributions), since no product of two matrices equals columns of keys and values. How well that
went is reported on prompts that were held out: before, the base alone, and after.

Shapes: B rows of a batch, S tokens of the longest, L places of answers, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from glmtune.adapters import attach_lora, save_adapter
from glmtune.adapters.find import refuse_existing
from glmtune.config.settings import DistilSettings
from glmtune.data.files import new_file
from glmtune.errors import UserError
from glmtune.evaluation.answers import ModelChoice, fit_positions, prompt_of, read_questions
from glmtune.generation import (
    Decoder,
    EncodedPrompt,
    GenerationSettings,
    encode_prompts,
)
from glmtune.models.prefixed import PrefixedModel
from glmtune.models.resolve import base_name
from glmtune.runlog import Progress, print_pairs

DISTIL_FILE = "distil.json"
MOST_HELD_OUT = 64
"""Prompts held out at most: each is answered three times."""


class Row(NamedTuple):
    """A prompt, and what the prefixed model answers."""

    prompt: EncodedPrompt
    answer_ids: list[int]
    """With the id that ends it, unless it was cut."""


@dataclass(frozen=True)
class Agreement:
    """How near a model is to the prefixed one, on answers of the latter."""

    divergence: float
    """Kullback-Leibler divergence of the next token's distribution, in nats a token."""
    same_tokens: float
    """Percentage of places at which both find the same token likeliest."""
    same_answers: int
    """Prompts with the same greedy answer, token by token."""

    def __str__(self) -> str:
        return (
            f"divergence {self.divergence:.4f} nats a token, {self.same_tokens:.1f} % of tokens "
            f"alike, {self.same_answers} answers alike"
        )


@dataclass(frozen=True)
class Distilled:
    """What distilling gave, on held-out prompts, or on those trained on where none were."""

    num_trained: int
    num_held_out: int
    before: Agreement
    after: Agreement

    @property
    def is_nearer(self) -> bool:
        """Whether the adapter is nearer to the prefixed model than the base alone."""
        return self.after.divergence < self.before.divergence


def distil(settings: DistilSettings) -> Distilled:
    """Train a LoRA adapter to answer as the prefixed model, and write it as any other.

    Raises:
        UserError: prefix, base or rows cannot be used, fewer than two prompts are left, or the
            folder cannot be written.
    """
    refuse_existing(settings.output_dir)
    records = read_questions(settings)
    subject = ModelChoice.to_score(settings)
    records = fit_positions(records, settings, subject.base)[: settings.limit]
    if len(records) < 2:
        raise UserError(
            f"{settings.data_path}: one prompt alone cannot be trained on and held out as well; "
            "name a file of several"
        )
    teacher, tokenizer = subject.load(trains=True)
    assert isinstance(teacher, PrefixedModel), "early.check_distilling found a prefix"
    prompts = [prompt_of(record) for record in records]
    encoded = encode_prompts(teacher, tokenizer, prompts, settings.max_new_tokens)
    rows = _answered(teacher, encoded, settings)
    held_out, trained = _split(rows, settings)
    print(f"{len(rows):,} prompts answered with the prefix, {len(held_out):,} of them held out")

    torch.manual_seed(settings.seed)
    student = attach_lora(
        teacher.get_base_model(),
        rank=settings.lora_rank or 8,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=settings.lora_target or "all",
    )
    matching = Matching(teacher, student, tokenizer.row_rule.pad_id, settings)
    measured = held_out or trained[:MOST_HELD_OUT]
    before = matching.agreement(measured)
    matching.train(trained)
    found = Distilled(len(trained), len(held_out), before, matching.agreement(measured))
    save_adapter(student, settings.output_dir, base_name(subject.base))
    content = {"prefix": subject.adapter_name, "base": base_name(subject.base)} | asdict(found)
    with new_file(str(Path(settings.output_dir, DISTIL_FILE))) as file:
        file.write(json.dumps(content, indent=2) + "\n")
    print_pairs(
        f"On {len(measured)} {'held-out' if held_out else 'trained'} prompts, against "
        f"{subject.adapter_name}",
        {"base alone": str(found.before), "with the adapter": str(found.after)},
    )
    print(f"written: {settings.output_dir}, a LoRA adapter that every verb takes; {DISTIL_FILE}")
    return found


def _answered(model: Any, prompts: Sequence[EncodedPrompt], settings: DistilSettings) -> list[Row]:
    """Each prompt with the greedy answer of a model as it is now."""
    how = GenerationSettings(max_new_tokens=settings.max_new_tokens)
    decoder, size = Decoder.of(model, how), settings.per_device_train_batch_size
    rows, progress = [], Progress(len(prompts), 0, "prompts answered")
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        answers: list[list[int]] = [[] for _ in batch]
        for more in decoder.stream(batch, how):
            for answer, ids in zip(answers, more, strict=True):
                answer += ids
        rows += [Row(*pair) for pair in zip(batch, answers, strict=True)]
        progress.tell(len(rows))
    return rows


def _split(rows: Sequence[Row], settings: DistilSettings) -> tuple[list[Row], list[Row]]:
    """Rows that are held out, at least one where any are, and those that are trained on."""
    order = np.random.default_rng(settings.seed).permutation(len(rows))
    num = min(round(settings.eval_ratio * len(rows)), MOST_HELD_OUT)
    if settings.eval_ratio:
        num = max(1, num)
    return [rows[i] for i in sorted(order[:num])], [rows[i] for i in order[num:]]


@dataclass(frozen=True)
class Matching:
    """A model with a new adapter beside the prefixed model of the same base."""

    teacher: PrefixedModel
    student: PeftModel
    pad_id: int
    settings: DistilSettings

    def train(self, rows: Sequence[Row]) -> None:
        """Move the adapter until its model's distributions are those of the prefixed model.

        Raises:
            UserError: a loss is not finite.
        """
        settings, size = self.settings, self.settings.per_device_train_batch_size
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate)
        steps_an_epoch = -(-len(rows) // size)
        num_steps = max(1, round(settings.num_train_epochs * steps_an_epoch))
        generator = np.random.default_rng(settings.seed)
        progress = Progress(num_steps, 0, "steps")
        self.student.train()
        order = np.zeros(0, dtype=int)
        for step in range(num_steps):
            if not len(order):
                order = generator.permutation(len(rows))
            batch, order = [rows[i] for i in order[:size]], order[size:]
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 - step / num_steps)
            wanted_LV, found_LV = self._log_probs(batch)
            loss = _divergence(wanted_LV, found_LV)
            if not loss.isfinite():
                raise UserError(
                    f"step {step + 1}: the divergence is not finite; lower learning_rate "
                    f"({settings.learning_rate:g}), or pass --bf16 true in place of --fp16 true"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.tell(step + 1)
        self.student.eval()

    @torch.no_grad()
    def agreement(self, rows: Sequence[Row]) -> Agreement:
        """How near the student is to the prefixed model, on answers of the latter."""
        self.student.eval()
        total, same, places = 0.0, 0, 0
        for row in rows:
            wanted_LV, found_LV = self._log_probs([row])
            total += float(_divergence(wanted_LV, found_LV)) * len(wanted_LV)
            same += int((wanted_LV.argmax(-1) == found_LV.argmax(-1)).sum())
            places += len(wanted_LV)
        answered = _answered(self.student, [row.prompt for row in rows], self.settings)
        num_alike = sum(
            one.answer_ids == row.answer_ids for one, row in zip(answered, rows, strict=True)
        )
        return Agreement(total / places, 100 * same / places, num_alike)

    def _log_probs(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Both models' log-probabilities where an answer's tokens come next: float32 ``(L, V)``."""
        ids = [row.prompt.ids + row.answer_ids for row in rows]
        longest = max(map(len, ids))
        padded = [[*row, *[self.pad_id] * (longest - len(row))] for row in ids]
        ids_BS = torch.tensor(padded, device=self.student.device)
        first = min(len(row.prompt.ids) for row in rows) - 1
        places = [
            (number, column - first)
            for number, row in enumerate(rows)
            for column in range(len(row.prompt.ids) - 1, len(ids[number]) - 1)
        ]
        row_L, column_L = torch.tensor(places, device=ids_BS.device).T

        def score(model: Any, **settings: Any) -> Tensor:
            # Padding is at the end, behind all that a token of an answer sees.
            mask_BS = torch.ones_like(ids_BS)
            kept = {"use_cache": False, "logits_to_keep": longest - first}
            given = {"attention_mask": mask_BS} | kept | settings
            logits_BSV = model(input_ids=ids_BS, **given).logits
            return logits_BSV[row_L, column_L].float().log_softmax(-1)

        with torch.no_grad(), self.student.disable_adapter():
            wanted_LV = score(self.teacher)
        return wanted_LV, score(self.student)


def _divergence(wanted_LV: Tensor, found_LV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of log-probabilities from those that are wanted, mean over L."""
    return F.kl_div(found_LV, wanted_LV, log_target=True, reduction="batchmean")
