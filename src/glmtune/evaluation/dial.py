"""`glmtune adapters dial`: scales of one adapter, what each gains and what it costs.

The update of a LoRA adapter is multiplied by a scale s: 0 is the base, 1 the adapter as it was
trained, and nothing is trained. Each scale is scored on the same rows and the same general
questions, so that differences within a row count.

Shapes: N rows, G general questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from glmtune.adapters import read_adapter
from glmtune.adapters.scale import check_scalable, scaled, write_scaled
from glmtune.config.settings import DialSettings
from glmtune.data.files import write_json
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError, note
from glmtune.evaluation.answers import ModelChoice
from glmtune.evaluation.dial_plot import plot
from glmtune.evaluation.intervals import Interval, intervals
from glmtune.evaluation.labels import Text
from glmtune.evaluation.price import PartPrice, Price
from glmtune.evaluation.probes import record_probes
from glmtune.evaluation.source_run import read_rows
from glmtune.evaluation.text_scores import language_of_record, score_text
from glmtune.evaluation.verdict import LEAST_ROWS
from glmtune.general.items import find_general
from glmtune.general.scores import GeneralRows, GeneralScores
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings, answer_in_batches
from glmtune.models.families import family_of
from glmtune.models.likelihood import (
    packed_layers,
    packed_sums,
    padded_sums,
    rows_of,
)
from glmtune.models.packed import base_of
from glmtune.models.resolve import base_name
from glmtune.run_files import DIAL_FILE, DIAL_PLOT_FILE
from glmtune.runlog import Progress, print_pairs
from glmtune.training.planning.power import standard_error

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
ANSWERS_AT_A_TIME = 8
LONGEST = DialSettings.model_fields["max_new_tokens"].default
DIGITS = {"log_prob": 3, "chrf": 1}
UNITS = {
    "log_prob": Text("nat/词元", "nats a token"),
    "chrf": Text("分 chrF", "points of chrF"),
}


@dataclass(frozen=True)
class Setting:
    """One scale of the adapter, beside the base."""

    scale: float
    gains: dict[str, np.ndarray]
    """What each row's score has gained over the base, by measure: N each."""
    scores: dict[str, float]
    """Mean score of the rows, by measure."""
    price: Price | None

    def gain(self, measure: str) -> Interval | None:
        """The mean gain with its interval; None with too few rows."""
        return self.intervals.get(measure)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """See `gain`."""
        if len(next(iter(self.gains.values()))) < LEAST_ROWS:
            return {}
        found = intervals(np.stack(list(self.gains.values()), axis=1))
        return dict(zip(self.gains, found, strict=True))

    @property
    def cost(self) -> PartPrice | None:
        """The price over all general questions."""
        return self.price.parts["all"] if self.price else None

    @property
    def harms(self) -> bool:
        """Whether general ability was lost: the interval of its change is below 0."""
        change = self.cost.accuracy.interval if self.cost else None
        return change is not None and change.sign < 0

    def as_json(self) -> dict[str, Any]:
        """The figures, by the names of dial.json."""
        content: dict[str, Any] = {"scale": self.scale}
        for measure, gains in self.gains.items():
            found = self.gain(measure)
            bounds = (found.low, found.high) if found else (None, None)
            content[measure] = {
                "value": self.scores[measure],
                "gain": float(gains.mean()),
                "low": bounds[0],
                "high": bounds[1],
            }
        return content | {
            "price": self.price.as_json() if self.price else None,
            "general_lost": self.harms,
        }


@dataclass(frozen=True)
class Dial:
    """All scales of an adapter, and the one that is recommended."""

    adapter: str
    base: str
    dtype: str
    source: str
    """Where the rows come from."""
    general_set: str | None
    settings: Sequence[Setting] = field(repr=False)

    @property
    def measure(self) -> str:
        """The measure that decides: chrF of answers where there are any."""
        return "chrf" if "chrf" in self.settings[0].gains else "log_prob"

    @property
    def recommended(self) -> Setting:
        """The smallest scale that gains as much as the best one, within one standard error.

        Scales that lose general ability do not count; scale 0, the base, loses none.
        """
        allowed = [one for one in self.settings if not one.harms]
        gains = [one.gains[self.measure] for one in allowed]
        best_N = max(gains, key=np.mean)
        behind = (best_N - gains_N for gains_N in gains)
        are_near = [float(each_N.mean()) <= standard_error(each_N) for each_N in behind]
        return allowed[are_near.index(True)]

    @property
    def sentence(self) -> Text:
        """What is recommended, and why."""
        one, measure = self.recommended, self.measure
        unit, digits, gain = UNITS[measure], DIGITS[measure], one.gain(measure)
        value = f"{float(one.gains[measure].mean()):+.{digits}f}"
        zh = f"建议缩放 {one.scale:g}：{value} {unit.zh}"
        en = f"Scale {one.scale:g} is recommended: {value} {unit.en}"
        if gain:
            low, high = f"{gain.low:+.{digits}f}", f"{gain.high:+.{digits}f}"
            zh += f"（95% 区间 {low} 至 {high}，{len(one.gains[measure])} 行）"
            en += f" (95 % interval {low} to {high}, {len(one.gains[measure])} rows)"
        if one.cost:
            cost = one.cost.accuracy
            zh += f"；通用题答对率从 {cost.base:.1f}% 变为 {cost.tuned:.1f}%"
            en += f"; general questions right: {cost.base:.1f} % before, {cost.tuned:.1f} % after"
        if lost := [f"{other.scale:g}" for other in self.settings if other.harms]:
            zh += f"；缩放 {'、'.join(lost)} 的通用能力有损失"
            en += f"; general ability was lost at {', '.join(lost)}"
        return Text(f"{zh}。", f"{en}.")

    def as_json(self) -> dict[str, Any]:
        """The content of dial.json."""
        return {
            "adapter": self.adapter,
            "base": self.base,
            "dtype": self.dtype,
            "rows": len(self.settings[0].gains["log_prob"]),
            "source": self.source,
            "general_set": self.general_set,
            "measure": self.measure,
            "recommended": self.recommended.scale,
            "sentence": self.sentence._asdict(),
            "scales": [one.as_json() for one in self.settings],
        }

    def print(self) -> None:
        """Print a line for each scale, and the recommendation."""
        pairs = {}
        for one in self.settings:
            words = []
            for measure, gains in one.gains.items():
                found, digits = one.gain(measure), DIGITS[measure]
                interval = (
                    f" ({found.low:+.{digits}f} to {found.high:+.{digits}f})" if found else ""
                )
                words.append(f"{UNITS[measure].en} {gains.mean():+.{digits}f}{interval}")
            if one.cost:
                words.append(f"general questions right {one.cost.accuracy.tuned:.1f} %")
            pairs[f"{one.scale:g}"] = ", ".join(words) + (", a loss" if one.harms else "")
        print_pairs(f"Scales of {self.adapter}, gain over the base", pairs)
        print(self.sentence.en)


def dial(settings: DialSettings) -> Dial:
    """Score scales of an adapter, write dial.json and dial.png, and recommend one.

    Raises:
        UserError: adapter, base, rows or general set cannot be used, the adapter cannot be scaled,
            or a file cannot be written.
    """
    subject = ModelChoice.to_score(settings)
    assert subject.adapter is not None, "DialSettings requires one"
    adapter = read_adapter(subject.adapter)
    check_scalable(adapter)
    if not settings.answers and settings.max_new_tokens != LONGEST:
        note(
            f"max_new_tokens {settings.max_new_tokens} has no effect: nothing is answered "
            "(--answers true)"
        )
    general = find_general(settings.general_set, subject.base)
    model, tokenizer = subject.load(computes=True)
    rows, row_ids, source = _rows(settings, subject, model, tokenizer)
    limit = model.config.max_position_embeddings
    scorer = Scorer(
        model,
        tokenizer,
        rows,
        row_ids,
        GeneralRows.of(general, tokenizer, limit) if general else None,
        GenerationSettings(max_new_tokens=settings.max_new_tokens) if settings.answers else None,
    )
    progress = Progress(len(SCALES), 0, "scales scored")
    found = []
    for scale in SCALES:
        found.append(scorer.at(scale))
        progress.tell(len(found))
    result = Dial(
        str(subject.adapter_name),
        base_name(subject.base),
        str(subject.dtype).removeprefix("torch."),
        source,
        general.name if general else None,
        [Setting(*one.against(found[0], scale)) for scale, one in zip(SCALES, found, strict=True)],
    )
    folder = Path(settings.output_dir) if settings.output_dir else subject.adapter
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir: {folder} cannot be written ({error.strerror}); name another folder"
        ) from error
    write_json(result.as_json(), folder / DIAL_FILE)
    plot(result, folder / DIAL_PLOT_FILE)
    result.print()
    print(f"written: {folder}/{DIAL_FILE}, {DIAL_PLOT_FILE}")
    if settings.write:
        write_scaled(adapter, result.recommended.scale, settings.write)
        print(f"written: {settings.write}, the adapter at scale {result.recommended.scale:g}")
    return result


def _rows(
    settings: DialSettings, subject: ModelChoice, model: PeftModel, tokenizer: Any
) -> tuple[TokenRows, np.ndarray, str]:
    """Rows to score, which of them, and where they come from.

    Raises:
        UserError: they cannot be read, or none can be scored.
    """
    assert subject.adapter is not None
    rule = family_of(base_of(model).config).row_rule(model.config)
    if settings.data_path:
        limit = settings.limit or 2**31
        probes = record_probes(
            settings.data_path, tokenizer, limit, settings.format, settings.encoding
        )
        rows = rows_of(probes.probes, rule)
        row_ids, source = np.arange(len(rows)), probes.source
    else:
        run = read_rows(subject.adapter, tokenizer)
        assert run is not None, "check_held_out found its recipe"
        rows, row_ids = replace(run.rows, rule=rule), run.held_out
        source = "rows that the run held out"
    fits = rows.lengths_R[row_ids] <= model.config.max_position_embeddings
    row_ids = row_ids[fits & (rows.num_labels_R[row_ids] > 0)][: settings.limit]
    if not len(row_ids):
        raise UserError(
            f"{settings.data_path or subject.adapter_name}: no row can be scored: too long, or "
            "without an answer; name others with --data_path"
        )
    if len(row_ids) < LEAST_ROWS:
        note(f"{len(row_ids)} rows are too few for an interval, which takes {LEAST_ROWS}")
    return rows, row_ids, source


@dataclass(frozen=True)
class Scores:
    """The scores of one scale."""

    rows: dict[str, np.ndarray]
    """Scores of N rows, by measure; more is better."""
    general: GeneralScores | None
    set_name: str

    def against(
        self, base: "Scores", scale: float
    ) -> tuple[float, dict[str, np.ndarray], dict[str, float], Price | None]:
        """The fields of a `Setting`."""
        gains = {name: scores_N - base.rows[name] for name, scores_N in self.rows.items()}
        means = {name: float(scores_N.mean()) for name, scores_N in self.rows.items()}
        price = None
        if self.general and base.general:
            price = Price.of(base.general, self.general, self.set_name)
        return scale, gains, means, price


@dataclass(frozen=True)
class Scorer:
    """Scores a loaded model at any scale of its adapter."""

    model: PeftModel
    tokenizer: Any
    rows: TokenRows
    row_ids: np.ndarray
    general: GeneralRows | None
    answering: GenerationSettings | None
    """How rows are answered; None where they are not."""

    def at(self, scale: float) -> Scores:
        """The scores at a scale; scale 0 is the base itself."""
        with scaled(self.model, scale):
            packed = packed_layers(self.model)
            score = packed_sums if packed else padded_sums
            sums_R = score(packed or self.model, self.rows, self.row_ids)  # type: ignore[arg-type]
            nums_N = self.rows.num_labels_R[self.row_ids]
            found = {"log_prob": sums_R[self.row_ids] / nums_N}
            general = self.general.score(self.model, packed) if self.general else None
            if self.answering:
                found["chrf"] = self._chrf(self.answering)
        return Scores(found, general, self.general.general.name if self.general else "")

    def _chrf(self, settings: GenerationSettings) -> np.ndarray:
        model, tokenizer, rows = self.model, self.tokenizer, self.rows
        lengths = rows.prompt_lengths_R
        more = [*getattr(tokenizer, "generation_ids", ())]
        prompts = [
            EncodedPrompt([*rows[row][: lengths[row]].tolist(), *more], place)
            for place, row in enumerate(self.row_ids)
        ]
        decoder = Decoder.of(model, settings)
        answers = answer_in_batches(model, tokenizer, prompts, settings, ANSWERS_AT_A_TIME, decoder)
        found = []
        for row, answer in zip(self.row_ids, answers, strict=True):
            asked, reference = (
                tokenizer.decode(part.tolist(), skip_special_tokens=True).strip()
                for part in (rows[row][: lengths[row]], rows[row][lengths[row] :])
            )
            language = language_of_record(asked, reference)
            found.append(score_text(answer.text, reference, language).chrf)
        return np.array(found)
