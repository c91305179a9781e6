"""`glmtune tune`: from a file of rows to an adapter and a verdict on it.

Every stage is the verb of that name, and `tune.yaml` in the folder has a section for each, so that
any of them can be repeated alone. A complete stage is not run again.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from glmtune.config.groups import Settings
from glmtune.config.reading import write_sections
from glmtune.config.settings import (
    CheckSettings,
    CompareSettings,
    ConvertSettings,
    PlanSettings,
    TokenizeSettings,
    TrainSettings,
    TuneSettings,
    ValidateSettings,
)
from glmtune.data.convert import convert
from glmtune.data.dataset import CARD_FILE, DataCard, RowTokenizer, load_dataset
from glmtune.data.files import new_file, sha256_of
from glmtune.data.questions import as_question, lacks_answer
from glmtune.data.records import TEXT, AnyRow, TextRow, has_turns, read_typed
from glmtune.data.sources import find_source
from glmtune.data.split import GROUPS
from glmtune.data.token_rows import TokenRows
from glmtune.data.tokenizing import fit_length, tokenize
from glmtune.data.validation import validate
from glmtune.errors import UserError, note
from glmtune.evaluation.checkup import check
from glmtune.evaluation.compare import compare
from glmtune.general.items import find_general
from glmtune.hardware import free_memory
from glmtune.models.base_files import check_targets, load_row_tokenizer
from glmtune.models.loading import load_config
from glmtune.models.resolve import base_name, resolve_base
from glmtune.run_files import (
    COMPARE_FOLDER,
    RECIPE_FILE,
    TUNE_PAGE,
    TUNE_RUN,
    WEIGHTS_FILE,
    saved_steps,
)
from glmtune.training.loop import train
from glmtune.training.planning.preview import plan
from glmtune.training.saving.manifest import read_trainer_state
from glmtune.tune.folder import Journal, Key, check_folder, usable_folder
from glmtune.tune.sections import (
    CHECK_FILE,
    QUESTIONS_FILE,
    ROWS_FILE,
    ROWS_FOLDER,
    VERBS_FILE,
    Sections,
    changed,
)
from glmtune.tune.verdict import show_page, tell_verdict, write_page

STAGES = ("validate", "convert", "tokenize", "hold out", "plan", "train", "check", "compare")
NUM_BYTES = 16 * 2**20
"""Room for files other than rows and checkpoints, whose stages check for theirs."""


def tune(settings: TuneSettings) -> bool:
    """Validate, convert, tokenize, hold out, plan, train, check and compare, into one folder.

    A mistake in settings or rows is reported before anything is written. Called again with the
    same settings, it resumes where it stopped.

    Returns:
        Whether the check-up found nothing wrong with the adapter; also False if `max_hours`
        ended the training.

    Raises:
        UserError: what a verb refuses; a folder that it did not make; rows or settings that
            differ from those of the run in the folder.
        KeyboardInterrupt: a signal asked to stop.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            "tune is one process: start it without a launcher; on several GPUs launch "
            f"`glmtune train` with the section that it writes into {VERBS_FILE}"
        )
    tuning = Tuning.of(settings)
    try:
        return tuning.go()
    except KeyboardInterrupt:
        if tuning.journal.is_claimed:
            note("the same command resumes from here")
        raise


@dataclass(frozen=True)
class Tuning:
    """A file, a folder and a base, and the stages from one to the other."""

    settings: TuneSettings
    out: Path
    sections: Sections
    tokenizer: RowTokenizer
    data_sha256: str
    journal: Journal

    @classmethod
    def of(cls, settings: TuneSettings) -> "Tuning":
        """Check all files and settings; nothing is written."""
        base = resolve_base(settings.base)
        check_targets(settings.lora_target, base)
        digest = find_source(settings.data_path).digest
        out = Path(settings.out)
        with usable_folder(out):
            journal = Journal.of(out, STAGES)
            if not journal.is_claimed:  # nothing in a folder of ours is deleted, whosever it is
                check_folder(out, False, (), NUM_BYTES, "tune")
        sections = Sections(settings, base)
        return cls(settings, out, sections, load_row_tokenizer(base), digest, journal)

    def go(self) -> bool:
        """Run all stages in order; see `tune`."""
        self._refuse_other_run()
        self._prepare_rows()
        self._hold_out()
        self._write_recipe()
        if not self._train():
            note("max_hours is over; the same command resumes the training")
            return False
        self._judge()
        is_fine = tell_verdict(self.sections)
        show_page(self.sections)
        return is_fine

    # --- what stages depend on ---

    def _key(self, cls: type[Settings], **reads: str | None) -> Key:
        return {"settings": self.sections.in_effect(cls), "reads": reads}

    def _sha256(self, *parts: str) -> str | None:
        """The sha256 of a file in the folder; None if there is none."""
        path = self.out.joinpath(*parts)
        return sha256_of(path) if path.is_file() else None

    def _rows_sha256(self) -> str | None:
        """A hash of what the token rows were made from; None if there are none."""
        if not (self.out / ROWS_FOLDER / CARD_FILE).is_file():
            return None
        card = self._card
        made_of = [card.source_sha256, card.tokenizer_sha256, dict(card.flags), GROUPS]
        return sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def _convert_key(self) -> Key:
        return self._key(ConvertSettings, data=self.data_sha256)

    def _tokenize_key(self) -> Key:
        reads = {ROWS_FILE: self._sha256(ROWS_FILE), "vocabulary": self.tokenizer.vocab_hash}
        return self._key(TokenizeSettings, **reads)

    def _hold_out_key(self) -> Key:
        ratio, seed = self.settings.eval_ratio, self.settings.seed
        reads = {"rows": self._rows_sha256()}
        return {"settings": {"eval_ratio": ratio, "seed": seed}, "reads": reads}

    def _train_key(self) -> Key:
        key = self._key(TrainSettings, rows=self._rows_sha256())
        more = {"eval_ratio": self.settings.eval_ratio, "base": self.sections.base}
        return {**key, "settings": {**key["settings"], **more}}

    @property
    def _card(self) -> DataCard:
        return DataCard.read(self.out / ROWS_FOLDER / CARD_FILE)

    @property
    def _run(self) -> Path:
        return self.out / TUNE_RUN

    @property
    def _has_run(self) -> bool:
        return self._run.is_dir() and bool(saved_steps(self._run))

    # --- rows ---

    def _refuse_other_run(self) -> None:
        """Check that no training would be thrown away unasked.

        Raises:
            UserError: rows or settings differ from those of the run in the folder.
        """
        if self.settings.overwrite_output_dir or self.settings.resume_anyway or not self._has_run:
            return
        keys = {
            "convert": self._convert_key(),
            "tokenize": self._tokenize_key(),
            "train": self._train_key(),
        }
        changes = [line for stage, key in keys.items() for line in self.journal.changes(stage, key)]
        if changes:
            named = "; ".join(dict.fromkeys(changes))
            raise UserError(
                f"{self._run}: was trained with other settings or rows ({named}); "
                "--overwrite_output_dir true trains anew, or let --out name another folder"
            )

    @cached_property
    def _rows(self) -> list[AnyRow]:
        """The rows that `convert` writes, in their order."""
        given = self.settings
        return read_typed(given.data_path, given.format, given.on_bad_row, given.encoding)[0]

    def _refuse_empty_outputs(self) -> None:
        if all(map(lacks_answer, self._rows)):
            raise UserError(
                f"{self.settings.data_path}: the answer or text of every row is empty, so there is "
                "nothing to train on; fill them in, or name another file"
            )

    def _prepare_rows(self) -> None:
        """Validate, convert and tokenize; the folder is made only once the rows are valid."""
        key = self._key(ValidateSettings, data=self.data_sha256)
        self.journal.do("validate", key, (), self._validate)
        key = self._convert_key()
        if not self.journal.is_whole("convert", key, [ROWS_FILE]):
            self._refuse_empty_outputs()
        if not self.journal.is_claimed:
            with usable_folder(self.out):
                self.journal.claim()
        self.journal.do("convert", key, [ROWS_FILE], lambda: convert(self.sections.convert()))
        self.journal.do("tokenize", self._tokenize_key(), [ROWS_FOLDER], self._tokenize)

    def _validate(self) -> None:
        try:
            validate(self.sections.validate())
        except UserError as error:
            if self.settings.on_bad_row == "fail":
                raise
            note(str(error))  # convert leaves such rows out, and lists them

    def _tokenize(self) -> None:
        base, length = self.sections.base, self.settings.max_seq_length
        are_texts = isinstance(self._rows[0], TextRow)
        if length is None:
            most = load_config(base).max_position_embeddings
            settings = fit_length(self.sections.tokenize(most, are_texts), self.tokenizer)
        else:
            settings = self.sections.tokenize(length, are_texts)
        tokenize(settings, self.tokenizer, base_name(base))

    def _hold_out(self) -> None:
        """Write the rows that are held out of the training, to be asked afterwards."""
        self.journal.do("hold out", self._hold_out_key(), [QUESTIONS_FILE], self._write_questions)

    def _write_questions(self) -> None:
        card = self._card
        source_rows = card.source_rows()
        assert source_rows is not None, "tokenize has written the card"
        ratio = self.sections.eval_ratio(card.num_kept)
        trained_on, held_out = self._split(card, ratio)
        asked = np.unique(source_rows[held_out if len(held_out) else trained_on])
        turns = has_turns(self._rows)
        records = [as_question(self._rows[row - 1], turns) for row in asked]
        with new_file(self.sections.path(QUESTIONS_FILE)) as file:
            file.write(json.dumps(records, ensure_ascii=False, indent=1) + "\n")
        if len(held_out):
            print(f"{len(held_out):,} of {card.num_kept:,} rows are held out of the training")
        else:
            note("no row is held out, so the adapter is judged by rows that it was trained on")

    def _split(self, card: DataCard, ratio: float) -> tuple[np.ndarray, np.ndarray]:
        """The rows to train on and those to hold out, as the run will have them."""
        if not ratio:
            return np.arange(card.num_kept), np.arange(0)
        rule = self.tokenizer.row_rule
        table, _ = load_dataset(str(self.out / ROWS_FOLDER), rule)
        rows = TokenRows.from_table(table, rule, card.num_kept_of_sets)
        rows = rows.grouped(self.tokenizer.decode_batch, card.source_rows())
        return rows.split(ratio, self.settings.seed)

    def _write_recipe(self) -> None:
        """Write the settings of each verb into its section of `tune.yaml`."""
        card, sections = self._card, self.sections
        length = card.flags["max_seq_length"]
        assert isinstance(length, int)
        verbs = (
            sections.validate(),
            sections.convert(),
            sections.tokenize(length, card.template == TEXT),
            PlanSettings(),  # reads the section of training
            sections.train(card.num_kept),
            sections.check(card.num_kept),
            sections.compare(),
        )
        write_sections(verbs, sections.path(VERBS_FILE))

    # --- training ---

    def _train(self) -> bool:
        """Plan and train, or resume; return whether the training reached its last step."""
        key, writes = self._train_key(), [f"{TUNE_RUN}/{WEIGHTS_FILE}"]
        settings = self.sections.train(self._card.num_kept)
        self.journal.do("plan", key, (), lambda: _plan(settings))
        # A run with other settings, or one that the stopped command was about to replace.
        recipe = self._run / RECIPE_FILE
        claimed_at = recipe.stat().st_mtime_ns if recipe.is_file() else None
        replaces = self.journal.entries.get("train", {}).get("replaces")
        is_other = bool(self.journal.changes("train", key)) or (
            replaces is not None and replaces == claimed_at
        )
        starts_anew = not self._has_run or (is_other and self.settings.overwrite_output_dir)

        def work() -> bool:
            if not is_other and self._is_trained():
                return True
            way = (
                {"overwrite_output_dir": True}
                if starts_anew
                else {"resume_from_checkpoint": "true"}
            )
            ended: list[bool] = []
            result = train(changed(settings, way), at_end=lambda *_: ended.append(True))
            if result.interrupted:
                raise KeyboardInterrupt
            free_memory()  # the next stages load the base themselves
            return bool(ended)

        marks = {"replaces": claimed_at} if starts_anew and self._has_run else {}
        return self.journal.do("train", key, writes, work, **marks)

    def _is_trained(self) -> bool:
        """Whether the run has done its last step, and the evaluation after it."""
        if not (self._run / WEIGHTS_FILE).is_file():
            return False
        try:
            state = read_trainer_state(self._run)
        except UserError:  # damaged: the last checkpoint makes it whole again
            return False
        last = [r for r in state["log_history"] if r["step"] == state.get("max_steps")]
        wanted = "eval_loss" if self.sections.eval_ratio(self._card.num_kept) else "loss"
        return any(wanted in record for record in last)

    # --- the verdict ---

    def _judge(self) -> None:
        """Check, compare and write the page."""
        reads = {"adapter": self._sha256(TUNE_RUN, WEIGHTS_FILE)}
        key = self._key(CheckSettings, **reads)
        settings = self.sections.check(self._card.num_kept)
        self.journal.do("check", key, [CHECK_FILE], lambda: check(settings))
        free_memory()
        reads |= {name: self._sha256(name) for name in (QUESTIONS_FILE, CHECK_FILE)}
        general = find_general(self.sections.compare().general_set, self.sections.base)
        reads["general set"] = general.digest if general else "none"
        key = self._key(CompareSettings, **reads)
        anew = {"overwrite_output": bool(self.journal.changes("compare", key))}

        def work() -> None:
            comparison = compare(changed(self.sections.compare(), anew))
            write_page(comparison, self.sections)

        self.journal.do("compare", key, [COMPARE_FOLDER, TUNE_PAGE], work)


def _plan(settings: TrainSettings) -> None:
    if plan(changed(PlanSettings(), settings.model_dump(exclude_unset=True)))["cannot_fit"]:
        raise UserError(
            "memory: training does not fit here; add one of the changes above to the same command"
        )
