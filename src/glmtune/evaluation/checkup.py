"""`glmtune check ADAPTER`: does it change the base, and does it change too much?"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from peft import PeftModel

from glmtune.adapters import read_adapter
from glmtune.config.settings import CheckSettings
from glmtune.data.files import write_json
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError, note
from glmtune.evaluation.answers import ModelChoice
from glmtune.evaluation.changes import (
    Divergence,
    LayerChange,
    measure_divergence,
    measure_layers,
)
from glmtune.evaluation.collapse import Collapse, Sides, Taught, question_of
from glmtune.evaluation.findings import Answered, Finding, answer_findings
from glmtune.evaluation.probes import (
    Probe,
    Probes,
    held_out_probes,
    own_probes,
    record_probes,
    row_probes,
    strange_probes,
)
from glmtune.evaluation.source_run import RunRows, find_rows, find_template
from glmtune.evaluation.text_scores import repeated_share
from glmtune.generation import Answer, Decoder, EncodedPrompt, GenerationSettings, answer_in_batches
from glmtune.models.families import family_of
from glmtune.runlog import print_pairs

# Below both of these, an adapter has no noticeable effect.
LEAST_DIVERGENCE, LEAST_OTHER_TOKENS = 1e-3, 1e-3
# Above one of these, it changes too much; docs/reliability.md gives the reasons.
MOST_RELATIVE_NORM = 1.0
MOST_WORSE_LOSS = 0.5
MOST_REPETITION = 0.3
LEAST_STOPPED = 0.5
# The short check at the end of a run.
SHORT_ROWS, SHORT_ANSWER, ANSWERS_AT_A_TIME = 8, 64, 8


Said = dict[tuple[int, ...], Answer]
"""A side's answers by the ids of the prompts."""


@dataclass(frozen=True)
class Answers:
    """How one side answers."""

    stopped: float
    """Share of answers that ended with the end token within max_new_tokens."""
    repetition: float
    """Share of an answer's 4-grams that repeat earlier ones, mean over the answers."""


@dataclass(frozen=True)
class Checkup:
    """The results of a check."""

    layers: list[LayerChange]
    num_linears: int
    """Number of linears in the base's layers."""
    divergence: Divergence | None
    """None if there was nothing to compare, because the adapter is zero."""
    tuned: Answers | None = None
    base: Answers | None = None
    num_probes: int = 0
    source: str = ""
    of_task: bool = False
    """Whether the questions are of its own task; only then does a worse loss count against it."""
    collapse: Collapse | None = None
    findings: tuple[Finding, ...] = ()
    """Answers in another language than they should be, or empty."""

    @property
    def changes_nothing(self) -> bool:
        """Whether base and tuned model are the same for all practical purposes."""
        if self.divergence is None:
            return True
        kl, other = self.divergence.kl, self.divergence.other_tokens
        return kl < LEAST_DIVERGENCE and other < LEAST_OTHER_TOKENS

    @property
    def harms(self) -> list[str]:
        """What the adapter changes too much, as text."""
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
            # Without the base's answers for comparison, only what no base model does counts.
            base = self.base or Answers(stopped=1.0, repetition=0.0)
            if self.tuned.stopped < min(LEAST_STOPPED, base.stopped):
                harms.append(
                    f"only {self.tuned.stopped:.0%} of its answers come to an end (cut rows teach "
                    "none, and few steps too little of it)"
                )
            if self.tuned.repetition > max(MOST_REPETITION, base.repetition):
                harms.append(f"it repeats itself ({self.tuned.repetition:.0%} of 4-grams)")
        found = (*(self.collapse.findings if self.collapse else ()), *self.findings)
        return harms + [finding.sentence.en for finding in found]

    @property
    def verdict(self) -> str:
        """The verdict as a sentence."""
        if self.changes_nothing:
            return (
                "changes nothing: train for more steps, with a higher learning_rate, or look "
                "whether this is the adapter that you mean"
            )
        if self.harms:
            advice = "lower learning_rate, train fewer steps, or take an earlier checkpoint"
            if self.collapse and self.collapse.findings:
                advice += "; rows of many other kinds among yours keep it answering"
            return f"changes too much: {'; '.join(self.harms)}; {advice}"
        labels = ", and answers questions of other kinds with its labels"
        only = labels if self.collapse and self.collapse.gives_labels else ""
        return f"fine: it changes the base{only}, and breaks nothing that was looked at"

    @property
    def is_fine(self) -> bool:
        """Whether the adapter changes something, and not too much."""
        return not self.changes_nothing and not self.harms

    def as_json(self) -> dict[str, Any]:
        """All figures, and the verdict."""
        return {"verdict": self.verdict, "is_fine": self.is_fine, **asdict(self)}


def check(settings: CheckSettings) -> Checkup:
    """Check an adapter, print the results, and write them as JSON if requested.

    Raises:
        UserError: adapter, base or records cannot be used.
    """
    subject = ModelChoice.of(settings)
    assert subject.adapter is not None, "CheckSettings requires one"
    if not _has_effect(subject):
        found = Checkup(layers=[], num_linears=0, divergence=None)
    else:
        model, tokenizer = subject.load(computes=True)
        rows = find_rows(subject.adapter, tokenizer)
        if settings.data_path:
            asked = record_probes(
                settings.data_path, tokenizer, settings.limit, settings.format, settings.encoding
            )
        else:
            of_run = held_out_probes(rows.rows, rows.held_out, settings.limit) if rows else None
            asked = of_run or own_probes(tokenizer, settings.limit)
        how = GenerationSettings.of(settings)
        template = find_template(subject.adapter)
        found = examine(model, tokenizer, asked, how, rows, template, with_base=True)
    report(found, f"Check-up of {subject.adapter_name}")
    if settings.json_path:
        write_json(_without_nan(found.as_json()), settings.json_path)
    return found


def check_after_training(
    model: PeftModel,
    tokenizer: Any,
    rows: TokenRows,
    held_out: np.ndarray,
    data_path: str | None = None,
) -> None:
    """Run the short check on the model in memory when its training has ended.

    The run is finished and saved: a failure here is reported, and does not fail the run.

    Args:
        model: base and adapter.
        tokenizer: the model's tokenizer.
        rows: rows of the run.
        held_out: numbers of the held-out rows.
        data_path: records to ask instead of them.
    """
    try:
        if data_path:
            asked = record_probes(data_path, tokenizer, SHORT_ROWS)
        else:
            of_run = held_out_probes(rows, held_out, SHORT_ROWS)
            asked = of_run or own_probes(tokenizer, SHORT_ROWS)
        settings = GenerationSettings(max_new_tokens=SHORT_ANSWER)
        found = examine(model, tokenizer, asked, settings, RunRows(rows, held_out))
        report(found, "Check-up")
    except (RuntimeError, UserError) as error:  # such as out of memory
        reason = str(error).partition("\n")[0]
        note(f"no check-up ({reason}); `glmtune check` makes it")


def examine(
    model: PeftModel,
    tokenizer: Any,
    asked: Probes,
    settings: GenerationSettings,
    run: RunRows | None = None,
    template: str | None = None,
    with_base: bool = False,
) -> Checkup:
    """Compare a model with its adapter and without.

    Args:
        model: is left in evaluation mode.
        tokenizer: of the model.
        asked: the questions.
        settings: how answers are generated.
        run: the rows that the adapter was trained on, if they are known.
        template: template of those rows; see `strange_probes`.
        with_base: let the base answer as well; otherwise only if the tuned answers look like a
            collapse.
    """
    model.eval()
    layers = measure_layers(model)
    divergence = measure_divergence(model, asked.probes)
    taught = Taught.of(tokenizer, run) if run else None
    strange = strange_probes(tokenizer, template)
    task = asked.probes if asked.of_task else []
    if run and taught and taught.of_labels and not task:
        task = row_probes(run.rows, run.trained_on, len(strange))

    def ask(probes: Sequence[Probe]) -> Said:
        return give_answers(model, tokenizer, probes, settings)

    def look(tuned: Said, base: Said) -> tuple[Collapse, tuple[Finding, ...]]:
        of_strange, of_task = (_sides(tokenizer, some, tuned, base) for some in (strange, task))
        found = Collapse.of(of_strange, of_task, taught)
        answered = [] if found.of_labels else _answered(strange, of_strange, tuned, base)
        answered += _answered(task, of_task, tuned, base)
        # Whether answers end, `Checkup.harms` tells.
        return found, tuple(f for f in answer_findings(answered) if f.what != "no_end")

    tuned, base = ask([*asked.probes, *strange, *task]), Said()
    collapse, findings = look(tuned, base)
    if with_base or collapse.findings or findings:
        with model.disable_adapter():
            base = ask([*(asked.probes if with_base else []), *strange, *task])
        collapse, findings = look(tuned, base)
    shape = family_of(model.config).shape(model.config)
    return Checkup(
        layers,
        num_linears=shape.num_layers * len(shape.linears),
        divergence=divergence,
        tuned=measure_answers(tokenizer, asked.probes, tuned),
        base=measure_answers(tokenizer, asked.probes, base) if with_base else None,
        num_probes=len(asked.probes),
        source=asked.source,
        of_task=asked.of_task,
        collapse=collapse,
        findings=findings,
    )


def _answered(probes: Sequence[Probe], texts: Sides, tuned: Said, base: Said) -> list[Answered]:
    """Questions with the answers of both sides."""
    keys = [tuple(probe.prompt_ids) for probe in probes]
    return [
        Answered(question, expected, tuned[key], base.get(key))
        for key, question, expected in zip(keys, texts.questions, texts.expected, strict=True)
    ]


def _sides(tokenizer: Any, probes: Sequence[Probe], tuned: Said, base: Said) -> Sides:
    """Questions and answers as text."""

    def read(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return Sides(
        [question_of(read(probe.prompt_ids)) for probe in probes],
        [read(probe.answer_ids) for probe in probes],
        [tuned[tuple(probe.prompt_ids)].text for probe in probes],
        [base[tuple(probe.prompt_ids)].text for probe in probes] if base else (),
    )


def give_answers(
    model: PeftModel, tokenizer: Any, probes: Sequence[Probe], settings: GenerationSettings
) -> Said:
    """Answer the probes' questions, each of them once."""
    decoder = Decoder.of(model, settings)
    prompts = list(dict.fromkeys(tuple(probe.prompt_ids) for probe in probes))
    encoded = [EncodedPrompt(list(ids), number) for number, ids in enumerate(prompts)]
    answers = answer_in_batches(model, tokenizer, encoded, settings, ANSWERS_AT_A_TIME, decoder)
    return dict(zip(prompts, answers, strict=True))


def measure_answers(tokenizer: Any, probes: Sequence[Probe], said: Said) -> Answers:
    """Measure how the answers to some probes end, and how much they repeat themselves."""
    answers = [said[tuple(probe.prompt_ids)] for probe in probes]
    ids = tokenizer.encode_batch([answer.text for answer in answers])
    return Answers(
        stopped=float(np.mean([answer.stopped for answer in answers])),
        repetition=float(np.mean([repeated_share(answer_ids) for answer_ids in ids])),
    )


def report(found: Checkup, title: str) -> None:
    """Print the results."""
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
        whose = "" if found.of_task else "; it was not trained for these, so this decides nothing"
        pairs["loss"] = f"{d.tuned_loss:.3f}, the base's is {d.base_loss:.3f}{whose}"
    for name, what in (("stopped", "end by themselves"), ("repetition", "4-grams repeated")):
        if found.tuned is not None:
            base = f", the base's {getattr(found.base, name):.0%}" if found.base else ""
            pairs[what] = f"{getattr(found.tuned, name):.0%}{base}"
    if found.collapse:
        pairs |= found.collapse.as_pairs()
    pairs["verdict"] = found.verdict
    print_pairs(title, pairs)


def _has_effect(subject: ModelChoice) -> bool:
    """Whether an adapter's weights can have any effect."""
    assert subject.adapter is not None
    weights = read_adapter(subject.adapter).weights
    return any(tensor.any() for key, tensor in weights.items() if ".lora_A." not in key)


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
