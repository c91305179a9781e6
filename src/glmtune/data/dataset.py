"""The tokenised data set on disk: a folder for datasets.load_from_disk, and its data card."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from glmtune.data.conversations import EncodedExample, Example
from glmtune.data.files import check_inside, read_json_object
from glmtune.data.flaws import Flaw
from glmtune.data.lengths import LengthStats
from glmtune.data.row_rule import RowRule
from glmtune.errors import UserError, note

if TYPE_CHECKING:
    import pyarrow as pa

CARD_FILE = "glmtune_data.json"
HISTOGRAM_FILE = "length_histogram.png"
SHARE_TO_TELL = 0.05
_PARTS = (CARD_FILE, HISTOGRAM_FILE, "dataset_info.json", "state.json", "*.arrow")
_COLUMNS = ("input_ids", "seq_len")


CONVERSATION = "conversation"
"""The template of rows whose family writes them as its chat models read conversations; a tokenizer
that does so has this as its attribute `template`."""


class RowTokenizer(Protocol):
    """What making rows requires of a tokenizer."""

    allow_special: bool
    """Whether names of special tokens in a text become their ids; else they are ordinary text."""

    @property
    def opens_thoughts(self) -> bool:
        """Whether answers begin with a thought, as the chat template of the folder has it."""

    @property
    def special_names(self) -> Mapping[str, Sequence[int]]:
        """Names that a text may spell, and the ids that each becomes with `allow_special`.

        A name without ids stays text even then.
        """

    @property
    def row_rule(self) -> RowRule:
        """The special ids of a row, and where they stand."""

    @property
    def vocab_hash(self) -> str:
        """The sha256 of the vocabulary file, in hex."""

    @property
    def revision(self) -> str:
        """The published revision the ids belong to, such as "v1.1"."""

    def encode_batch(self, texts: list[str], *, num_threads: int | None = None) -> list[list[int]]:
        """Encode texts without special ids."""

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of ids, without the special ones among them."""

    def encode_contexts(
        self, contexts: list[str], *, num_threads: int | None = None
    ) -> list[list[int]]:
        """Encode contexts: what stands between `before_prompt` and `after_prompt` of the rule.

        A family without a layout of its own for conversations encodes them as texts; others write
        the conversation that `data.templates.conversation_of` reads off a context.
        """

    def encode_examples(
        self, examples: Sequence[Example], *, num_threads: int | None = None
    ) -> list[EncodedExample | Flaw]:
        """Encode whole conversations, which have passed `Example.supervise`, as rows with labels.

        A conversation that the family cannot write has a Flaw in its place. A family without a
        layout of its own for conversations takes `data.conversations.encode_rounds`.
        """


@dataclass(frozen=True, slots=True)
class SetCard:
    """A file of which rows are in a data set; those of one file follow those of another."""

    path: str
    sha256: str
    format: str | None
    num_read: int
    num_taken: int
    """Rows that were chosen, each as often as it was."""
    num_kept: int
    num_tokens: int
    weight: float = 1
    is_replay: bool = False
    languages: Mapping[str, int] = field(default_factory=dict)
    """Rows taken that are Chinese and English, where that was asked for."""


@dataclass(frozen=True, slots=True)
class DataCard:
    """Where a data set comes from and what is in it; None where an older data set does not say.

    `rows_out` lists by reason the 1-based rows of the source that were dropped, `rows_cut` those of
    which a part was cut to max_seq_length or that were split, and `rows_several` how many rows each
    of those became that became several. Target tokens are the ids after the prompt: the answer
    and its end; `num_targets_lost` more were cut off. `special_ids` holds the special ids of the
    family's `RowRule`, by name. `source` is a bare file name; where `row_is_line`, its row n is
    line n. `sets` lists the files in the order of their rows. `num_spelling` rows hold names of
    special tokens that somebody typed, which `spelled_specials` counts by row.
    """

    num_kept: int
    num_tokens: int
    num_target_tokens: int
    lengths: LengthStats
    special_ids: Mapping[str, int | None]
    base_model: str | None = None
    tokenizer_sha256: str | None = None
    vocab_revision: str | None = None
    template: str | None = None
    flags: Mapping[str, object] = field(default_factory=dict)
    source: str | None = None
    source_sha256: str | None = None
    glmtune_version: str | None = None
    num_read: int | None = None
    rows_out: Mapping[str, list[int]] = field(default_factory=dict)
    rows_cut: Mapping[str, list[int]] = field(default_factory=dict)
    rows_several: Mapping[str, int] = field(default_factory=dict)
    num_targets_lost: int | None = None
    row_is_line: bool | None = None
    sets: Sequence["SetCard"] = ()
    spelled_specials: Mapping[str, int] = field(default_factory=dict)
    num_spelling: int | None = None

    def describe_loss(self) -> str | None:
        """Say in one line what cutting took from the answers, and what that means; or None."""
        limit = self.flags.get("max_seq_length")
        if cut := self.rows_cut.get("turns"):
            lost = self.num_targets_lost or 0
            return (
                f"{lost:,} supervised tokens ({lost / (lost + self.num_target_tokens):.1%}) in the "
                f"last turns of {len(cut):,} rows, which end with an earlier answer; a larger "
                "max_seq_length keeps them"
            )
        if not (rows := self.rows_cut.get("target")):
            return None
        num_rows = len(rows)
        if self.num_targets_lost is None:
            return (
                f"{num_rows:,} answers were cut to {limit} tokens by a version that taught their "
                "end all the same; tokenize the data again"
            )
        share = self.num_targets_lost / (self.num_targets_lost + self.num_target_tokens)
        return (
            f"{self.num_targets_lost:,} target tokens ({share:.1%}), cut off {num_rows:,} answers, "
            "whose end is not taught; a larger max_seq_length keeps them"
        )

    def describe_dropped(self) -> str | None:
        """Say in one line that a large share of the rows was dropped as too long; or None."""
        num_dropped, num_read = len(self.rows_out.get("overlength", ())), self.num_read or 0
        if num_dropped <= num_read * SHARE_TO_TELL:
            return None
        return (
            f"{num_dropped:,} of {num_read:,} rows ({num_dropped / num_read:.0%}) were dropped as "
            f"longer than {self.flags.get('max_seq_length')} tokens; tokenize says which "
            "max_seq_length keeps them"
        )

    @property
    def num_kept_of_sets(self) -> list[int]:
        """How many rows of each set the data set holds."""
        return [one.num_kept for one in self.sets]

    def source_rows(self) -> np.ndarray | None:
        """The source's row number (from 1) of each row of the data set, where it is known."""
        if self.source is None or self.num_read is None:
            return None
        dropped = [row for rows in self.rows_out.values() for row in rows]
        kept = np.setdiff1d(np.arange(1, self.num_read + 1), dropped)
        kept = np.repeat(kept, [self.rows_several.get(str(row), 1) for row in kept.tolist()])
        return kept if len(kept) == self.num_kept else None

    def write(self, folder: Path) -> None:
        """Write the card into a data set's folder, one line a field."""
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in asdict(self).items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (folder / CARD_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "DataCard":
        """Read a card; unknown fields, as a later version may add them, are ignored.

        Raises UserError where it is damaged.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            content["lengths"] = LengthStats(**content["lengths"])
            content["sets"] = tuple(SetCard(**one) for one in content.get("sets", ()))
            return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: is damaged ({error}); run `glmtune tokenize` again"
            ) from error


def load_dataset(path: str, rule: RowRule | None = None) -> tuple["pa.Table", DataCard]:
    """Open a tokenised data set: columns input_ids (lists of int) and seq_len (prompt length).

    A data set without a card, as the script of 2023 left it, gets one inferred from its rows, with
    a notice on stderr.

    Args:
        path: its folder.
        rule: row rule of the model's family: where to look for special ids if there is no card.

    Raises:
        UserError: the folder is no such data set, or is damaged.
    """
    check_is_folder(path)
    folder = Path(path)
    state = _read_state(folder)
    from glmtune.data.arrow_files import read_dataset

    try:
        table = read_dataset(folder, state)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: cannot be opened as a data set ({reason}); run `glmtune tokenize` again"
        ) from error
    if table is None or not _is_of_token_rows(table.schema):
        columns = "splits" if table is None else table.column_names
        raise UserError(
            f"{path}: a data set, but not of token rows (it has {columns}, not "
            "input_ids and seq_len of integers); pass the folder that `glmtune tokenize` wrote"
        )
    if not len(table):
        raise UserError(f"{path}: holds no row; run `glmtune tokenize` again")
    if not (folder / CARD_FILE).exists():
        note(
            f"{path} has no {CARD_FILE} (tokenised by an older script?); "
            "its special ids are read off the rows, its tokenizer is not known"
        )
        return table, _card_of_rows(table, rule)
    card = DataCard.read(folder / CARD_FILE)
    if card.num_kept != len(table):
        raise UserError(
            f"{path}: {CARD_FILE} lists {card.num_kept} rows, the data has {len(table)}; "
            "the folder was mixed up: run `glmtune tokenize` again"
        )
    return table, card


def check_is_folder(path: str) -> None:
    """Raise UserError where a tokenised data set is no folder."""
    if not Path(path).is_dir():
        what = "a file" if Path(path).exists() else "no such folder"
        raise UserError(f"{path}: {what}; pass the folder that `glmtune tokenize` wrote")


def _read_state(folder: Path) -> dict[str, Any]:
    """The content of state.json, which may name files inside the folder only; empty without one."""
    if not (folder / "state.json").is_file():
        return {}  # datasets reports what is wrong with this folder
    state = read_json_object(folder / "state.json")
    entries = state.get("_data_files")
    for entry in entries if isinstance(entries, list) else ():
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(
                f"{folder / 'state.json'}: names {name!r}, no file in this folder; run `glmtune "
                "tokenize` again"
            )
        check_inside(folder / name)
    return state


def check_data_card(card: DataCard, tokenizer: RowTokenizer, path: str) -> None:
    """Raise UserError where the data set at `path` was tokenised for another tokenizer."""
    sha256 = card.tokenizer_sha256
    ids = tokenizer.row_rule.special_ids
    differing = [name for name, i in card.special_ids.items() if i not in (None, ids.get(name))]
    if differing:
        name = differing[0]
        what = f"its {name} id is {card.special_ids[name]}, the tokenizer has {ids.get(name)}"
    elif sha256 not in (None, tokenizer.vocab_hash):
        what = f"vocabulary sha256 {str(sha256)[:12]}..., not {tokenizer.vocab_hash[:12]}..."
    else:
        return
    base = f" of {card.base_model}" if card.base_model else ""
    raise UserError(
        f"{path}: tokenised with another tokenizer{base} ({what}); run `glmtune tokenize` "
        "with the --base that you train with"
    )


def check_replaceable(path: str) -> None:
    """Raise UserError where `path` exists and holds anything but a tokenised data set."""
    folder = Path(path)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{path}: cannot become a folder ({error.strerror}); choose another save_path"
        ) from error
    strange = [name for name in names if not any(fnmatch(name, part) for part in _PARTS)]
    if names and not strange and not _holds_token_rows(folder):
        strange = names
    if strange:
        raise UserError(
            f"{path}: exists and holds {strange[0]}, no part of a tokenised data set, "
            "so it is not replaced; choose another save_path"
        )


def _holds_token_rows(folder: Path) -> bool:
    try:
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        return set(_COLUMNS) <= set(info["features"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_of_token_rows(schema: "pa.Schema") -> bool:
    import pyarrow as pa

    if not set(_COLUMNS) <= set(schema.names):
        return False
    rows, lengths = (schema.field(name).type for name in _COLUMNS)
    is_list = pa.types.is_list(rows) or pa.types.is_large_list(rows)
    return is_list and pa.types.is_integer(rows.value_type) and pa.types.is_integer(lengths)


def _card_of_rows(table: "pa.Table", rule: RowRule | None) -> DataCard:
    """Infer a card from the rows: lengths, and the ids at the places of the special ids."""
    from glmtune.data.arrow_files import as_numpy

    prompt_lengths = as_numpy(table.column("seq_len"))
    lengths = np.zeros(len(table), np.int64)
    places = ((rule.after_prompt, prompt_lengths), (rule.end, lengths)) if rule else ()
    found: dict[str, list[np.ndarray]] = {}
    first = 0
    for part in table.column("input_ids").chunks:
        rows = slice(first, first + len(part))
        first = rows.stop
        tokens, lengths[rows] = as_numpy(part.flatten()), as_numpy(part.value_lengths())
        starts = np.cumsum(lengths[rows]) - lengths[rows]
        for specials, ends in places:
            for back, special in enumerate(reversed(specials), start=1):
                positions = ends[rows] - back
                inside = (positions >= 0) & (positions < lengths[rows])
                found.setdefault(special.name, []).append(tokens[(starts + positions)[inside]])

    def most_frequent(parts: Sequence[np.ndarray]) -> int | None:
        # Rows that were cut have other ids there; the most frequent id is the special one.
        ids, counts = np.unique(np.concatenate(parts), return_counts=True)
        return int(ids[counts.argmax()]) if 2 * counts.max(initial=0) > len(lengths) else None

    return DataCard(
        num_kept=len(table),
        num_tokens=int(lengths.sum()),
        num_target_tokens=int(np.maximum(lengths - prompt_lengths, 0).sum()),
        lengths=LengthStats.of(lengths),
        special_ids={name: most_frequent(parts) for name, parts in found.items()},
    )
