"""`glmtune check ADAPTER`: does it change the base, and does it change too much?

Shapes: O output rows of a linear, I inputs, R rank; A tokens of an answer, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from glmtune.adapters import read_adapter
from glmtune.adapters.lora import Update, split_lora
from glmtune.config import CheckConfig
from glmtune.config.training import ALL_LINEARS
from glmtune.data.files import write_json
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError, note
from glmtune.evaluation.answers import Subject
from glmtune.evaluation.probes import (
    Probe,
    Probes,
    choose_probes,
    held_out_probes,
    own_probes,
)
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings, answer_batch
from glmtune.models.quantised import frozen_of
from glmtune.ops.linear import Dense
from glmtune.ops.quantised import Quantised
from glmtune.runlog import print_pairs

NGRAM = 4
# Below both of these an adapter changes nothing that anyone would notice.
LEAST_DIVERGENCE, LEAST_OTHER_TOKENS = 1e-3, 1e-3
# Above one of these it changes too much; docs/reliability.md says why these.
MOST_RELATIVE_NORM = 1.0
MOST_WORSE_LOSS = 0.5
MOST_REPETITION = 0.3
LEAST_STOPPED = 0.5
# The short form, at the end of a run.
SHORT_ROWS, SHORT_ANSWER, ANSWERS_AT_A_TIME = 8, 64, 8


@dataclass(frozen=True)
class LayerChange:
    """What an adapter adds to one linear."""

    module: str
    norm: float
    """``||scale * B @ A||`` (Frobenius)."""
    relative: float | None
    """Over the norm of the weight; None where the weight's numbers cannot be read."""


@dataclass(frozen=True)
class Divergence:
    """How the tuned model's next tokens differ from the base's, over the tokens of answers."""

    kl: float
    """KL(tuned || base), in nats a token."""
    other_tokens: float
    """Share of the likeliest tokens that are others."""
    base_loss: float
    tuned_loss: float


@dataclass(frozen=True)
class Answers:
    """How one side answers."""

    stopped: float
    """Share that ended with the end token within max_new_tokens."""
    repetition: float
    """Share of an answer's 4-grams that it had said before, mean over the answers."""


@dataclass(frozen=True)
class Checkup:
    """What was found."""

    layers: list[LayerChange]
    num_linears: int
    """That the base has in its layers."""
    divergence: Divergence | None
    """None where there was nothing to compare: the adapter is zero."""
    tuned: Answers | None = None
    base: Answers | None = None
    num_probes: int = 0
    source: str = ""
    of_task: bool = False
    """Whether the questions are of what it was trained for; only then is a worse loss its fault."""

    @property
    def changes_nothing(self) -> bool:
        """Whether base and tuned model are the same for all that matters."""
        if self.divergence is None:
            return True
        kl, other = self.divergence.kl, self.divergence.other_tokens
        return kl < LEAST_DIVERGENCE and other < LEAST_OTHER_TOKENS

    @property
    def harms(self) -> list[str]:
        """What it does too much of, in words."""
        harms = []
        for layer in self.layers:
            if layer.relative is not None and not layer.relative <= MOST_RELATIVE_NORM:
                harms.append(
                    f"in {layer.module} it adds {layer.relative:.1f} times what the weight is"
                )
                break
        d = self.divergence
        if d is not None and self.of_task and not d.tuned_loss <= d.base_loss + MOST_WORSE_LOSS:
            harms.append(
                f"it makes these answers less likely: loss {d.tuned_loss:.2f}, "
                f"the base's is {d.base_loss:.2f}"
            )
        if self.tuned is not None:
            # Without the base's answers, only what no base does counts.
            base = self.base or Answers(stopped=1.0, repetition=0.0)
            if self.tuned.stopped < min(LEAST_STOPPED, base.stopped):
                harms.append(
                    f"only {self.tuned.stopped:.0%} of its answers come to an end (cut rows teach "
                    "none, and few steps too little of it)"
                )
            if self.tuned.repetition > max(MOST_REPETITION, base.repetition):
                harms.append(f"it repeats itself ({self.tuned.repetition:.0%} of 4-grams)")
        return harms

    @property
    def verdict(self) -> str:
        """In plain words."""
        if self.changes_nothing:
            return (
                "changes nothing: train for more steps, with a higher learning_rate, or look "
                "whether this is the adapter that you mean"
            )
        if self.harms:
            advice = "lower learning_rate, train fewer steps, or take an earlier checkpoint"
            return f"changes too much: {'; '.join(self.harms)}; {advice}"
        return "fine: it changes the base, and breaks nothing that was looked at"

    @property
    def is_fine(self) -> bool:
        """Neither nothing nor too much."""
        return not self.changes_nothing and not self.harms

    def as_json(self) -> dict[str, Any]:
        """All figures, and the verdict."""
        return {"verdict": self.verdict, "is_fine": self.is_fine, **asdict(self)}


def check(config: CheckConfig) -> Checkup:
    """Look an adapter over, print what was found, and write it as JSON where that is asked for.

    Raises:
        UserError: adapter, base or records cannot be used.
    """
    subject = Subject.of(config)
    assert subject.adapter is not None, "CheckConfig requires one"
    if not _has_effect(subject):
        found = Checkup(layers=[], num_linears=0, divergence=None)
    else:
        model, tokenizer = subject.load(computes=True)
        asked = choose_probes(config, subject.adapter, tokenizer)
        settings = GenerationSettings.from_config(config)
        found = examine(model, tokenizer, asked, settings, with_base=True)
    report(found, f"Check-up of {subject.adapter_name}")
    if config.json_path:
        write_json(_without_nan(found.as_json()), config.json_path)
    return found


def check_after_training(
    model: PeftModel, tokenizer: Any, rows: TokenRows, held_out: np.ndarray
) -> None:
    """The short form, on the model as it stands in memory when its training has ended.

    The run is over and saved: what fails here is told, and fails nothing.
    """
    try:
        asked = held_out_probes(rows, held_out, SHORT_ROWS) or own_probes(tokenizer, SHORT_ROWS)
        settings = GenerationSettings(max_new_tokens=SHORT_ANSWER)
        report(examine(model, tokenizer, asked, settings, with_base=False), "Check-up")
    except (RuntimeError, UserError) as error:  # no memory is left, say
        reason = str(error).partition("\n")[0]
        note(f"no check-up ({reason}); `glmtune check` makes it")


def examine(
    model: PeftModel,
    tokenizer: Any,
    asked: Probes,
    settings: GenerationSettings,
    with_base: bool,
) -> Checkup:
    """Compare a model with its adapter and without.

    Args:
        model: is left in evaluation mode.
        tokenizer: of the model.
        asked: the questions.
        settings: how answers are generated.
        with_base: let the base answer as well.
    """
    model.eval()
    probes = asked.probes
    layers = measure_layers(model)
    divergence = measure_divergence(model, probes)
    tuned = measure_answers(model, tokenizer, probes, settings)
    base = None
    if with_base:
        with model.disable_adapter():
            base = measure_answers(model, tokenizer, probes, settings)
    names = (name.rpartition(".")[2] for name, _ in model.named_modules())
    num_linears = sum(name in ALL_LINEARS for name in names)
    return Checkup(
        layers, num_linears, divergence, tuned, base, len(probes), asked.source, asked.of_task
    )


def measure_layers(model: PeftModel) -> list[LayerChange]:
    """The norm of what the adapter adds to each linear; only those that it changes."""
    changes = []
    for name, module in model.get_base_model().named_modules():
        linear, updates = split_lora(module)
        if updates and (norm := _norm_of(updates)):
            weight = _weight_norm(linear)
            relative = norm / weight if weight else None
            changes.append(LayerChange(name, norm, relative))
    return changes


@torch.inference_mode()
def measure_divergence(model: PeftModel, probes: Sequence[Probe]) -> Divergence:
    """Read each answer with the adapter and without, and compare the next tokens."""
    sums = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    for probe in probes:
        with model.disable_adapter():
            base_AV = _answer_logits(model, probe)
        tuned_AV = _answer_logits(model, probe)
        targets_A = torch.tensor(probe.answer_ids, device=tuned_AV.device)
        log_base, log_tuned = base_AV.log_softmax(-1), tuned_AV.log_softmax(-1)
        numbers = (
            F.kl_div(log_base, log_tuned, reduction="sum", log_target=True),
            (base_AV.argmax(-1) != tuned_AV.argmax(-1)).sum(),
            F.nll_loss(log_base, targets_A, reduction="sum"),
            F.nll_loss(log_tuned, targets_A, reduction="sum"),
        )
        sums += torch.stack([number.double().cpu() for number in numbers])
        num_tokens += len(probe.answer_ids)
    return Divergence(*(sums / num_tokens).tolist())


def measure_answers(
    model: PeftModel, tokenizer: Any, probes: Sequence[Probe], settings: GenerationSettings
) -> Answers:
    """Answer the probes' questions, and see how the answers end and whether they go in circles."""
    decoder = Decoder.of(model, settings)
    prompts = [EncodedPrompt(probe.prompt_ids, i) for i, probe in enumerate(probes)]
    answers = [
        answer
        for start in range(0, len(prompts), ANSWERS_AT_A_TIME)
        for answer in answer_batch(
            model, tokenizer, prompts[start : start + ANSWERS_AT_A_TIME], settings, decoder
        )
    ]
    ids = tokenizer.encode_batch([answer.text for answer in answers])
    return Answers(
        stopped=float(np.mean([answer.stopped for answer in answers])),
        repetition=float(np.mean([repeated_share(answer_ids) for answer_ids in ids])),
    )


def repeated_share(ids: Sequence[int], size: int = NGRAM) -> float:
    """Share of the n-grams of a text that stood in it before."""
    ngrams = list(zip(*(ids[start:] for start in range(size)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def report(found: Checkup, title: str) -> None:
    """Print what was found."""
    pairs = {}
    if found.layers:
        largest = max(found.layers, key=lambda layer: layer.relative or layer.norm)
        size = f"{largest.norm:.3g}"
        if largest.relative is not None:
            size = f"{largest.relative:.1%} of the weight's norm"
        pairs["changed"] = f"{len(found.layers)} of {found.num_linears} linears, at most by {size}"
        pairs[""] = f"({largest.module})"
    if (d := found.divergence) is not None:
        pairs["asked"] = f"{found.num_probes} {found.source}"
        pairs["divergence"] = (
            f"{d.kl:.3g} nats a token from the base; {d.other_tokens:.1%} of the likeliest tokens "
            "are others"
        )
        pairs["loss"] = f"{d.tuned_loss:.3f}, the base's is {d.base_loss:.3f}"
    for name, what in (("stopped", "end by themselves"), ("repetition", "4-grams repeated")):
        if found.tuned is not None:
            base = f", the base's {getattr(found.base, name):.0%}" if found.base else ""
            pairs[what] = f"{getattr(found.tuned, name):.0%}{base}"
    pairs["verdict"] = found.verdict
    print_pairs(title, pairs)


def _has_effect(subject: Subject) -> bool:
    """Whether an adapter's numbers can do anything at all."""
    assert subject.adapter is not None
    weights = read_adapter(subject.adapter).weights
    return any(tensor.any() for key, tensor in weights.items() if ".lora_A." not in key)


def _answer_logits(model: PeftModel, probe: Probe) -> Tensor:
    """Logits of an answer's tokens, ``(A, V)`` float32."""
    ids = torch.tensor([probe.prompt_ids + probe.answer_ids], device=model.device)
    num_answer = len(probe.answer_ids)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=num_answer + 1).logits
    return logits[0, :-1].float()


def _norm_of(updates: Sequence[Update]) -> float:
    """Frobenius norm of ``scale * B @ A``, summed over updates, without that ``(O, I)`` matrix."""
    a_RI = torch.cat([update.a_RI for update in updates]).double()
    b_OR = torch.cat([update.b_OR * update.scale for update in updates], dim=1).double()
    square = ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().item()
    return math.sqrt(max(0.0, square))


def _weight_norm(linear: nn.Module) -> float | None:
    frozen = frozen_of(linear)
    if isinstance(frozen, Dense):
        return frozen.weight_NK.float().norm().item()
    return frozen.weight(torch.float32).norm().item() if isinstance(frozen, Quantised) else None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
