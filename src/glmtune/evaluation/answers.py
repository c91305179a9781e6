"""What the answering verbs share: which model answers which records, and a resumable file."""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from glmtune.adapters.find import find_adapter, find_weights, is_prefix
from glmtune.config.serving import ServeSettings
from glmtune.config.settings import (
    ChatSettings,
    CheckSettings,
    CompareSettings,
    DialSettings,
    DistilSettings,
    EvaluateSettings,
    InferSettings,
    JudgingSettings,
    LedgerSettings,
)
from glmtune.data import questions
from glmtune.data.files import new_file, read_text
from glmtune.data.flaws import Flaw
from glmtune.data.questions import Question, question_in
from glmtune.data.records import BadRow, list_bad_rows
from glmtune.errors import UserError, note, value_words, visible
from glmtune.generation import Prompt, find_too_long
from glmtune.generation.prompts import prompt_ids
from glmtune.hardware import check_decoding, pick_device, pick_dtype
from glmtune.models.hubs import name_of_folder
from glmtune.models.loading import check_pair, load_base_model, load_config, load_tokenizer
from glmtune.models.resolve import base_name, resolve_base
from glmtune.run_files import CHECKPOINT_PREFIX

RecordSettings = InferSettings | JudgingSettings | DistilSettings


def read_questions(settings: RecordSettings) -> list[Question]:
    """The rows to answer; skipped bad rows and unused fields are reported on stderr.

    Raises:
        UserError: see `data.questions.read_questions`.
    """
    assert settings.data_path is not None, "without a file the run's held-out rows are asked"
    found, bad_rows, use = questions.read_questions(
        settings.data_path, settings.format, settings.on_bad_row, settings.encoding
    )
    for line in list_bad_rows(bad_rows):
        print(visible(f"skipped {line}"), file=sys.stderr)
    note(*(f"{settings.data_path}: {line}" for line in use.lines()))
    return found


def fit_positions(
    records: Sequence[Question], settings: RecordSettings, base: str
) -> list[Question]:
    """The rows that the family can ask, and whose prompts leave room for an answer.

    For the others see `on_bad_row`. Only tokenizer and config.json are needed, so this runs before
    any weights are loaded.

    Raises:
        UserError: a row cannot be asked or is too long and may not be skipped, or all are.
    """
    tokenizer, limit = load_tokenizer(base), load_config(base).max_position_embeddings
    tokenizer.allow_special = settings.allow_special
    prompts = prompt_ids(tokenizer, [record.asked for record in records])
    lengths = [0 if isinstance(ids, Flaw) else len(ids) for ids in prompts]
    found = {place: str(flaw) for place, flaw in enumerate(prompts) if isinstance(flaw, Flaw)}
    found = dict(sorted((found | find_too_long(lengths, settings.max_new_tokens, limit)).items()))
    if found and settings.on_bad_row == "fail":
        (first, reason), *others = found.items()
        more = f" ({len(others)} more cannot be asked either)" if others else ""
        raise UserError(
            f"{records[first].where}: {reason}; --on_bad_row skip leaves such rows out{more}"
        )
    if len(found) == len(records):
        raise UserError(
            f"{settings.data_path}: no row can be asked: {records[0].where}: {found[0]}"
        )
    long = [records[place] for place in found]
    rows = [BadRow(r.path, r.row, r.line, why) for r, why in zip(long, found.values(), strict=True)]
    for line in list_bad_rows(rows):
        print(visible(f"skipped {line}"), file=sys.stderr)
    return [record for place, record in enumerate(records) if place not in found]


def prompt_of(record: Question) -> Prompt:
    """A row as the model will see it, with its own random stream."""
    return Prompt(record.asked, record.where, record.row)


def name_of_adapter(folder: Path) -> str:
    """An adapter's folder name, for a checkpoint with its run's; never a private path."""
    folder = folder.resolve()
    is_checkpoint = folder.name.startswith(CHECKPOINT_PREFIX)
    return "/".join(folder.parts[-2:]) if is_checkpoint else name_of_folder(folder)


@dataclass(frozen=True)
class ModelChoice:
    """The model that answers, known before it is loaded."""

    base: str
    adapter: Path | None
    device: torch.device
    """The device that answers."""
    dtype: torch.dtype
    rounds: bool
    """Whether a decoder answers with rounded copies of its weights."""
    bits: int | None
    """See `--quantization_bit`."""
    quantize_head: bool
    allow_special: bool = False
    """Whether names of special tokens in prompts become these tokens."""

    @classmethod
    def of(
        cls,
        settings: InferSettings | CompareSettings | EvaluateSettings | ChatSettings | CheckSettings,
    ) -> "ModelChoice":
        """Resolve a verb's settings to a model; of several adapters to the first.

        Raises:
            UserError: there is no such base or adapter, or the device lacks something.
        """
        named = settings.subject if isinstance(settings, CheckSettings) else settings.adapter
        first = named if isinstance(named, str) else next(iter(named or ()), None)
        found = cls._to_compute(settings, first)
        check_decoding(found.device, settings.decoder_bits, settings.decode_compile)
        rounds = settings.decoder_bits != 16
        return replace(found, rounds=rounds, allow_special=settings.allow_special)

    @classmethod
    def to_score(cls, settings: LedgerSettings | DialSettings | DistilSettings) -> "ModelChoice":
        """The model of a verb that scores rows, with an adapter, and needs no decoder.

        Raises:
            UserError: there is no such base or adapter, or the device lacks something.
        """
        return cls._to_compute(settings, settings.adapter)

    @classmethod
    def to_serve(cls, settings: ServeSettings, adapters: Iterable[Path]) -> "ModelChoice":
        """The base of a server, found beside its first adapter where none is named.

        Raises:
            UserError: there is no such base, or the device lacks something.
        """
        first = next(iter(adapters), None)
        found = cls._to_compute(settings, None if first is None else str(first))
        check_decoding(found.device, settings.decoder_bits, settings.decode_compile)
        return replace(found, adapter=None, rounds=settings.decoder_bits != 16)

    def with_adapter(self, folder: Path) -> "ModelChoice":
        """The same base with another adapter."""
        return replace(self, adapter=folder)

    @classmethod
    def _to_compute(cls, settings: Any, named: str | None) -> "ModelChoice":
        adapter = find_adapter(named) if named else None
        base, device = resolve_base(settings.base, named), pick_device(settings.use_cpu)
        dtype, caution = pick_dtype(device, settings.bf16, settings.fp16)
        if caution:
            note(caution)
        return cls(base, adapter, device, dtype, False, settings.bits, settings.quantize_head)

    def batch_to_fill(self, size: int) -> int | None:
        """The batch size, if an answer depends on its batch through rounding; else None.

        See `generate_answers` and `AnswerFile.to_answer`.
        """
        is_sensitive = self.dtype != torch.float32 or self.rounds or self.bits is not None
        return size if is_sensitive else None

    @property
    def adapter_name(self) -> str | None:
        """See `name_of_adapter`; None without an adapter."""
        return name_of_adapter(self.adapter) if self.adapter else None

    def identity(self) -> dict[str, Any]:
        """What distinguishes this model from others whose answers would differ.

        Raises:
            UserError: a file of the adapter cannot be read.
        """
        identity: dict[str, Any] = {
            "base": base_name(self.base),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.bits:
            identity["quantization_bit"] = self.bits
        if self.quantize_head:
            identity["quantize_head"] = True
        if self.allow_special:
            identity["allow_special"] = True
        if self.adapter is not None:
            identity["adapter"] = str(self.adapter_name)
            identity["adapter_sha256"] = _digest(self.adapter)
        return identity

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer, read once, which reads special tokens in prompts as is set.

        Raises:
            UserError: it cannot be read.
        """
        tokenizer = load_tokenizer(self.base)
        tokenizer.allow_special = self.allow_special
        return tokenizer

    def load(self, computes: bool = False, trains: bool = False) -> tuple[Any, Any]:
        """The model in evaluation mode, with its adapter if it has one, and the tokenizer.

        A model whose weights the decoder rounds stays in CPU memory, so that a small card holds
        only the decoder's copy; unless the model itself `computes` as well. Where a new adapter
        `trains` on it, weights of a published int8 or int4 folder are dequantised.

        Raises:
            UserError: base, tokenizer and adapter cannot be read or do not belong together.
        """
        with_adapter = f" with the adapter {self.adapter_name}" if self.adapter else ""
        print(f"loading {base_name(self.base)}{with_adapter}", file=sys.stderr)
        tokenizer = self.tokenizer
        in_cpu_memory = self.rounds and not computes
        model = load_base_model(
            self.base,
            dtype=self.dtype,
            device=torch.device("cpu") if in_cpu_memory else self.device,
            keep_integers=not trains,
            bits=self.bits,
            quantize_head=self.quantize_head,
        )
        check_pair(model, tokenizer)
        return self.attach(model), tokenizer

    def attach(self, base: Any) -> Any:
        """Put the adapter or prefix on a loaded base; without one the base is the model.

        Raises:
            UserError: the adapter cannot be read, or does not fit the base.
        """
        if self.adapter is None:
            return base
        from glmtune.adapters import load_adapter, load_prefix  # PEFT is imported for nothing else

        load = load_prefix if is_prefix(self.adapter) else load_adapter
        return load(base, self.adapter)


class AnswerFile:
    """JSON lines, one per record in their order, with which an interrupted run can resume.

    A file beside it, `NAME.settings.json`, keeps what the answers depend on. As a context manager
    it opens the file to append lines, or to start over with `overwrite`.

    Args:
        path: the file of answers.
        records: all records that could be answered, regardless of the limit.
        settings: what the answers depend on: the kind of lines, the model, how it answers.
        overwrite: discard what the file holds.
        elsewhere: the flag that names another file, for messages.

    Raises:
        UserError: the file cannot be written, or holds answers to other records, of another model
            or with other settings.
    """

    def __init__(
        self,
        path: Path,
        records: Sequence[Question],
        settings: dict[str, Any],
        *,
        overwrite: bool,
        elsewhere: str,
    ):
        self.path = path
        self.records = records
        self.settings_path = path.with_suffix(".settings.json")
        self.settings = settings
        self.fix = f"--overwrite_output true to answer anew, or another {elsewhere}"
        self.lines: list[dict[str, Any]] = []
        self._sizes: list[int] = []  # bytes of each line
        self._file: TextIO | None = None
        try:
            self._check_writable()
            if not overwrite and path.exists() and path.stat().st_size:
                self._read()
        except OSError as error:
            raise self._unwritable(error) from error

    def _check_writable(self) -> None:
        # Checked before a model is loaded; nothing is written yet.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():
            raise IsADirectoryError(errno.EISDIR, "it is not a file")
        for place in (self.path, self.path.parent):
            if place.exists() and not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def _read(self) -> None:
        self._check_settings()
        *lines, cut = self.path.read_bytes().split(b"\n")
        if cut:
            print(f"{self.path}: its last line was cut off and is dropped", file=sys.stderr)
        self._sizes = [len(line) + 1 for line in lines]
        self.lines = [self._read_line(number, line) for number, line in enumerate(lines, start=1)]

    def _check_settings(self) -> None:
        if not self.settings_path.is_file():
            raise UserError(
                f"{self.path}: exists, and no {self.settings_path.name} beside it says what its "
                f"answers depend on; pass {self.fix}"
            )
        try:
            earlier = dict(json.loads(read_text(str(self.settings_path))))
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.settings_path}: not a JSON object; pass {self.fix}") from error
        for name in earlier | self.settings:
            before, now = earlier.get(name), self.settings.get(name)
            if before != now:
                raise UserError(
                    f"{self.path}: its answers were made with {name} {value_words(before)}, this "
                    f"run has {value_words(now)}; pass the same as before, or {self.fix}"
                )

    def _read_line(self, number: int, data: bytes) -> dict[str, Any]:
        where = f"{self.path}:{number}"
        try:
            line = json.loads(data)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); pass {self.fix}") from error
        if number > len(self.records):
            raise UserError(
                f"{where}: answers more records than the {len(self.records)} of this run; "
                f"pass {self.fix}"
            )
        record = self.records[number - 1]
        if not isinstance(line, dict) or question_in(line) != record.as_line:
            raise UserError(f"{where}: is no answer to the record {record.where}; pass {self.fix}")
        return line

    @property
    def date(self) -> str:
        """When the newest answer was written, as pages show it; there is one."""
        changed = datetime.fromtimestamp(self.path.stat().st_mtime)
        return changed.strftime("%Y-%m-%d %H:%M")

    def to_answer(self, limit: int | None, batch_size: int | None) -> Sequence[Question]:
        """The records without an answer, among the first `limit`.

        Args:
            limit: number of records, answered ones included; None for all.
            batch_size: given where answers depend on their batch: an unfinished batch is answered
                again, so that the file becomes what an uninterrupted run makes.
        """
        wanted = self.records[:limit]
        if batch_size and len(self.lines) < len(wanted):
            kept = len(self.lines) - len(self.lines) % batch_size
            del self.lines[kept:], self._sizes[kept:]
        return wanted[len(self.lines) :]

    def __enter__(self) -> "AnswerFile":
        num_bytes = sum(self._sizes)
        try:
            if not self.lines:
                self.path.unlink(missing_ok=True)  # before new settings describe it wrongly
                with new_file(str(self.settings_path)) as file:
                    file.write(json.dumps(self.settings, ensure_ascii=False, indent=2) + "\n")
            elif self.path.stat().st_size > num_bytes:
                os.truncate(self.path, num_bytes)
            self._file = open(self.path, "a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._unwritable(error) from error
        if self.lines:
            print(f"{self.path}: resuming after {len(self.lines)} answers", file=sys.stderr)
        return self

    def append(self, record: Question, answer: dict[str, Any]) -> None:
        """Write one more line and flush it to the system at once.

        Raises:
            UserError: no space is left, or the file was removed.
        """
        assert self._file is not None, "use the file as a context"
        line = record.as_line | answer
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        self.lines.append(line)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()
        if kind is not None and self.lines:
            print(
                f"{self.path}: {len(self.lines)} answers are kept; run the same command again to "
                "resume",
                file=sys.stderr,
            )

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: cannot be written ({error.strerror or error}); check the path, its "
            "permissions and the free space"
        )


def _digest(adapter: Path) -> str:
    """The beginning of a sha256 over the adapter's settings and weights."""
    digest = hashlib.sha256()
    files = {*adapter.glob("adapter_*.*"), *filter(None, [find_weights(adapter)])}
    for file in sorted(files):
        try:
            digest.update(file.read_bytes() if file.is_file() else b"")
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}); check its permissions"
            ) from error
    return digest.hexdigest()[:16]
