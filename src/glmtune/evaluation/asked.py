"""What a comparison asks: the rows that the adapter's run held out, or the records of a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmtune.adapters.find import check_held_out
from glmtune.config.settings import CompareSettings
from glmtune.data.questions import Question
from glmtune.errors import UserError, note
from glmtune.evaluation.answers import ModelChoice, fit_positions, prompt_of, read_questions
from glmtune.evaluation.collapse import question_of
from glmtune.evaluation.probes import Probe, probe_of, probe_of_row
from glmtune.evaluation.source_run import read_rows
from glmtune.generation import EncodedPrompt, encode_prompts, find_too_long
from glmtune.models.loading import load_config, load_tokenizer


@dataclass(frozen=True)
class Asked:
    """The records that are asked, in their order."""

    records: list[Question]
    probes: Mapping[int, Probe] = field(default_factory=dict)
    """Rows that a run held out, by row number: asked with the ids that training would have seen."""

    @classmethod
    def of(cls, settings: CompareSettings, subject: ModelChoice) -> "Asked":
        """Read them; bad and too long ones are reported on stderr.

        Raises:
            UserError: they cannot be read; or there is no file, and the run held no row out.
        """
        if settings.data_path is None:
            return cls._held_out(settings, subject)
        records = read_questions(settings)
        if settings.on_bad_row == "skip":
            records = fit_positions(records, settings, subject.base)
        return cls(records)

    @classmethod
    def _held_out(cls, settings: CompareSettings, subject: ModelChoice) -> "Asked":
        assert subject.adapter is not None, "CompareSettings requires one"
        check_held_out(subject.adapter)
        tokenizer = load_tokenizer(subject.base)
        fix = "name a file of rows with --data_path"
        try:
            run = read_rows(subject.adapter, tokenizer)
        except UserError as error:
            raise UserError(f"{error}; {fix}") from error
        assert run is not None, "its recipe is there"
        found = {int(row): probe_of_row(run.rows, row) for row in run.held_out}
        numbers = list(found)
        limit = load_config(subject.base).max_position_embeddings
        lengths = [len(probe.prompt_ids) for probe in found.values()]
        for place in find_too_long(lengths, settings.max_new_tokens, limit):
            del found[numbers[place]]
        if len(found) < len(numbers):
            note(
                f"{len(numbers) - len(found):,} of {len(numbers):,} held-out rows leave no room "
                f"for max_new_tokens {settings.max_new_tokens} and are not asked"
            )
        if not found:
            raise UserError(
                f"{subject.adapter}: its run held out no row that leaves room for an answer; {fix}"
            )

        def read(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        def question(row: int, probe: Probe) -> Question:
            text = question_of(read(probe.prompt_ids))
            fields = {"row": row + 1, "instruction": text, "input": ""}
            expected, path = read(probe.answer_ids).strip(), f"{subject.adapter_name}, row"
            where = f"{path} {row + 1}"
            return Question(text, expected, None, fields, path, row + 1, row + 1, where)

        records = [question(row, probe) for row, probe in found.items()]
        return cls(records, {row + 1: probe for row, probe in found.items()})

    def check_positions(self, records: Sequence[Question], settings: Any, base: str) -> None:
        """Make sure that records of a file leave room for an answer, before weights are loaded.

        Raises:
            UserError: see `fit_positions`.
        """
        if not self.probes and settings.on_bad_row == "fail":
            fit_positions(records, settings, base)

    def prompts(
        self, model: Any, tokenizer: Any, records: Sequence[Question], max_new_tokens: int
    ) -> list[EncodedPrompt]:
        """The ids that are answered.

        Raises:
            UserError: see `encode_prompts`.
        """
        if not self.probes:
            asked = [prompt_of(record) for record in records]
            return encode_prompts(model, tokenizer, asked, max_new_tokens)
        more = [*getattr(tokenizer, "generation_ids", ())]
        rows = (record.row for record in records)
        return [EncodedPrompt([*self.probes[row].prompt_ids, *more], row) for row in rows]

    def references(self, tokenizer: Any, limit: int | None) -> list[Probe]:
        """Prompts and right answers as rows; an answer without ids where a record has none."""
        records = self.records[:limit]
        if self.probes:
            return [self.probes[record.row] for record in records]
        nothing = Probe([0], [])
        return [
            probe_of(record, tokenizer) if record.expected.strip() else nothing
            for record in records
        ]
