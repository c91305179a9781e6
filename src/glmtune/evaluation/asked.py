"""What a comparison asks: the rows that the adapter's run held out, or the records of a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmtune.adapters.find import check_held_out
from glmtune.config.settings import JudgingSettings
from glmtune.data.questions import Question
from glmtune.errors import UserError, note
from glmtune.evaluation.answers import ModelChoice, fit_positions, prompt_of, read_questions
from glmtune.evaluation.collapse import question_of
from glmtune.evaluation.probes import probe_of, probe_of_row, strange_probes
from glmtune.evaluation.source_run import RunRows, read_rows
from glmtune.generation import EncodedPrompt, encode_prompts, find_too_long
from glmtune.models.likelihood import Probe
from glmtune.models.loading import load_config


@dataclass(frozen=True)
class Asked:
    """The records that are asked, in their order."""

    records: list[Question]
    probes: Mapping[int, Probe] = field(default_factory=dict)
    """Rows that are asked with ids as training has them, by row number."""
    run: RunRows | None = None
    """All rows of the run, where its held-out rows are asked."""

    @classmethod
    def of(cls, settings: JudgingSettings, subject: ModelChoice) -> "Asked":
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
    def _held_out(cls, settings: JudgingSettings, subject: ModelChoice) -> "Asked":
        assert subject.adapter is not None, "CompareSettings requires one"
        check_held_out(subject.adapter)
        tokenizer = subject.tokenizer
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

        numbered = {row + 1: probe for row, probe in found.items()}
        return cls._of_probes(numbered, tokenizer, f"{subject.adapter_name}, row", run)

    @classmethod
    def strange(cls, tokenizer: Any, template: str | None) -> "Asked":
        """Questions of our own, unrelated to any adapter's task; see `strange_probes`."""
        probes = strange_probes(tokenizer, template)
        numbered = dict(enumerate(probes, start=1))
        return cls._of_probes(numbered, tokenizer, "questions that come with glmtune, number")

    @classmethod
    def _of_probes(
        cls,
        probes: Mapping[int, Probe],
        tokenizer: Any,
        path: str,
        run: RunRows | None = None,
    ) -> "Asked":
        def read(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        records = []
        for row, probe in probes.items():
            text, expected = question_of(read(probe.prompt_ids)), read(probe.answer_ids).strip()
            fields = {"row": row, "instruction": text, "input": ""}
            records.append(Question(text, expected, None, fields, path, row, row, f"{path} {row}"))
        return cls(records, probes, run)

    def first(self, limit: int | None) -> list[Question]:
        """The records within a limit; a note says where that leaves some out."""
        if limit is not None and limit < len(self.records):
            note(f"{limit:,} of {len(self.records):,} records are asked (--limit none: all)")
        return self.records[:limit]

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
