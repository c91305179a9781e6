"""Several files of rows as one data set: which rows of each are taken, and what is said of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, repeat

import numpy as np

from glmtune.config.settings import RowSettings, TokenizeSettings
from glmtune.data.dataset import SetCard
from glmtune.data.encoded_rows import RowCounts
from glmtune.data.fields import FieldUse
from glmtune.data.mixing import CHINESE, ENGLISH, num_replayed, share_languages, uses_of
from glmtune.data.records import Conversation, Row, TextRow
from glmtune.data.row_files import RowFile, look_through
from glmtune.data.sources import find_source

REPLAY_SHARE = 0.05
"""Where replay_share is not set."""


@dataclass
class RowSet:
    """A file that has been looked through, and how often each of its good rows is taken."""

    file: RowFile
    sha256: str
    uses: np.ndarray
    weight: float = 1
    is_replay: bool = False
    counts: RowCounts = field(default_factory=RowCounts)
    """What became of the rows that are taken, once they are encoded."""

    @property
    def num_taken(self) -> int:
        """Rows that are taken, each as often as it is."""
        return int(self.uses.sum())

    def rows(self) -> Iterator[Row | Conversation | TextRow]:
        """The rows that are taken, in their order; one that is taken twice comes twice in a row."""
        if (self.uses == 1).all():
            yield from self.file.rows()
            return
        for row, num in compress(zip(self.file.rows(), self.uses.tolist()), self.uses > 0):  # noqa: B905
            yield from repeat(row, num)

    def card(self) -> SetCard:
        """What the data card says of it."""
        counts = self.counts
        languages = {}
        if self.file.languages is not None:
            spoken = np.frombuffer(self.file.languages, np.uint8)
            names = {"zh": CHINESE, "en": ENGLISH}
            languages = {name: int(self.uses[spoken == n].sum()) for name, n in names.items()}
        return SetCard(
            path=self.file.path,
            sha256=self.sha256,
            format=self.file.format,
            num_read=self.file.num_rows,
            num_taken=self.num_taken,
            num_kept=len(counts.lengths),
            num_tokens=counts.num_tokens,
            weight=self.weight,
            is_replay=self.is_replay,
            languages=languages,
        )


def look_through_sets(
    settings: TokenizeSettings,
    look: Callable[..., RowFile] = look_through,
    opens_thoughts: bool = False,
) -> list[RowSet]:
    """Look through all files, and choose rows: first each file's own, then by language, then the
    general rows beside them.

    Args:
        settings: which files.
        look: `row_files.look_through`, or what does the same.
        opens_thoughts: whether the base begins answers with a thought, see `RowFile.talks`.

    Raises:
        UserError: as `look_through`; or there are too few rows for what is wanted.
    """
    sets: list[RowSet] = []
    for number, (name, one) in enumerate(settings.named_sets):
        is_replay = name == "replay"
        is_own = is_replay and settings.has_own_rows
        file = look(
            one.file,
            one.format or (None if is_own else settings.format),
            settings.on_bad_row,
            one.encoding or (None if is_own else settings.encoding),
            with_languages=settings.zh_share is not None,
        )
        num, weight = one.num, one.weight
        if is_replay:  # it is the last
            if settings.zh_share is not None:
                _share_languages(sets, settings)
            num_others = sum(other.num_taken for other in sets)
            most = file.num_good if num is None else min(num, file.num_good)
            share = settings.replay_share or REPLAY_SHARE
            wanted = num_replayed(one.file, most, num_others, share, settings.has_own_rows)
            num = wanted
            if wanted > file.num_good:
                num, weight = None, wanted / file.num_good
        uses = uses_of(one.file, file.num_good, num, weight, settings.seed, number)
        sets.append(RowSet(file, find_source(one.file).digest, uses, weight, is_replay))
    if settings.zh_share is not None and not sets[-1].is_replay:
        _share_languages(sets, settings)
    # Rows with labels and rows without do not go together.
    has_labels = any(one.file.talks(opens_thoughts) or one.file.is_text for one in sets)
    for one_set in sets:
        one_set.file.has_turns = has_labels and not one_set.file.is_text
    return sets


def _share_languages(sets: Sequence[RowSet], settings: TokenizeSettings) -> None:
    """Leave rows of the language out of which there are too many."""
    assert settings.zh_share is not None
    spoken = [np.frombuffer(one.file.languages or b"", np.uint8) for one in sets]
    uses = [one.uses for one in sets]
    for one, shared in zip(
        sets, share_languages(uses, spoken, settings.zh_share, settings.seed), strict=True
    ):
        one.uses = shared


def joined(sets: Sequence[RowSet]) -> tuple[RowFile, RowCounts]:
    """All files as if they were one, rows numbered through all of them, and what became of rows."""
    if len(sets) == 1 and (sets[0].uses == 1).all():
        return sets[0].file, sets[0].counts
    main = next((one.file for one in sets if not one.file.is_text), sets[0].file)
    file = replace(main, fields=FieldUse(), bad_rows=[], num_good=0)
    counts, offset = RowCounts(), 0
    for one in sets:
        counts.add(one.counts.numbered_from(offset))
        file.bad_rows += [replace(bad, row=bad.row + offset) for bad in one.file.bad_rows]
        file.fields.add(one.file.fields)
        file.num_good += one.num_taken
        file.row_is_line = False
        if one.file.template != file.template:
            file.template = "custom"
        offset += one.file.num_rows
    return file, counts


def describe(sets: Sequence[RowSet]) -> list[str]:
    """A line for each file; none for a single one that is taken whole."""
    if len(sets) == 1 and (sets[0].uses == 1).all():
        return []
    total = sum(len(one.counts.lengths) for one in sets)
    lines = []
    for one in sets:
        card = one.card()
        how = f"{card.num_taken:,} taken"
        if one.weight != 1:
            how += f" (weight {one.weight:g})"
        if card.languages:
            how += f" ({', '.join(f'{num:,} {name}' for name, num in card.languages.items())})"
        lines.append(
            f"{'replay' if one.is_replay else 'set':<10}  {card.path}: {card.format}, "
            f"{card.num_read:,} rows, {how}, {card.num_kept:,} kept "
            f"({card.num_kept / max(total, 1):.1%}), {card.num_tokens:,} tokens"
        )
    return lines


def name_of(sets: Sequence[RowSet]) -> str:
    """What messages call all files together."""
    return " + ".join(one.file.path for one in sets)


def settings_of(settings: RowSettings, one: RowSet) -> RowSettings:
    """The settings of one file, by which messages name it."""
    return settings.model_copy(update={"jsonl_path": one.file.path})
