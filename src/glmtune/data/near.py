"""Questions that are nearly the same: `validate` and the split of held-out rows use this one rule.

Two texts, bare of case, width, punctuation and white space (`characters.survey`), are near-equal
when they are equal, or when they hold the same numbers, share `SHARE` of their pieces, and share
`RARE_SHARE` of the rare ones. A piece is eight bytes in a row: eight letters, or two and a half
Chinese characters. Rare is what few other texts have: a template that many rows have in common
says nothing about their likeness.

Pairs are found, not tried: of two texts that share half of their rare pieces, one must be among the
rarest half of each (prefix filtering: Bayardo, Ma and Srikant, "Scaling up all pairs similarity
search", 2007). That misses none; but where a text has more than `MOST_PIECES` pieces, those with
the least hashes stand for all of them, and of a text of more than `MOST_BYTES` its end does.
"""

import re
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

SHARE, RARE_SHARE = 0.7, 0.5
MOST_PIECES, MOST_BYTES = 256, 1 << 16
_PIECE_BYTES = 8
# A number with the signs around it: 1+2 is another question than 1-2.
_NUMBERS = re.compile(rb"[^a-z\x80-\xff]*\d[^a-z\x80-\xff]*")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / the golden ratio (Fibonacci hashing)
_CHUNK_BYTES, _CHUNK = 1 << 20, 1 << 14
_MOST_TEXTS = 1 << 20
_LOW = np.uint64(0xFFFFFFFF)


def hashes_of(texts: Collection[bytes]) -> array:
    """64 bits of each text, the same in every process, as Python's own hashes are not."""
    numbers = np.fromiter(map(xxh3_64_intdigest, texts), np.uint64, len(texts))
    return array("q", numbers.tobytes())


class Pieces:
    """Bare texts as sets of pieces: 32-bit hashes end to end, and a hash of what must be equal."""

    def __init__(self) -> None:
        self.hashes, self.counts = array("I"), array("I")
        self.same = array("q")

    def __len__(self) -> int:
        return len(self.counts)

    def add(self, texts: Sequence[bytes], before: Iterable[bytes] | None = None) -> None:
        """Take bare texts; `before` holds what stands before each, and has to be equal."""
        numbers = (b" ".join(_NUMBERS.findall(text)) for text in texts)
        before = repeat(b"", len(texts)) if before is None else before
        self.same += hashes_of([b"%b\0%b" % pair for pair in zip(numbers, before, strict=True)])
        for chunk in _chunks(texts):
            hashes, counts = _pieces_of(chunk)
            self.hashes.frombytes(hashes.tobytes())
            self.counts.frombytes(counts.tobytes())

    def extend(self, others: "Pieces") -> None:
        """Take the texts of others after its own."""
        self.hashes += others.hashes
        self.counts += others.counts
        self.same += others.same


def _chunks(texts: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The texts, as much of them at a time as is worth an array."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text[-MOST_BYTES:])
        size += len(chunk[-1])
        if size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _pieces_of(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pieces of each text, ascending, and how many these are."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    data = b"".join(texts) + bytes(_PIECE_BYTES)
    windows = np.ndarray(len(data) - _PIECE_BYTES, "<u8", data, strides=(1,))
    hashes = ((windows ^ (windows >> np.uint64(29))) * _MULTIPLIER) >> np.uint64(32)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(windows))
    text_of = np.repeat(np.arange(len(texts), dtype=np.uint64), lengths)
    keys = _distinct((text_of << np.uint64(32) | hashes)[left >= _PIECE_BYTES])
    text_of = (keys >> np.uint64(32)).astype(np.int64)
    counts = np.bincount(text_of, minlength=len(texts))
    is_kept = np.arange(len(keys)) - (np.cumsum(counts) - counts)[text_of] < MOST_PIECES
    return keys[is_kept].astype(np.uint32), np.minimum(counts, MOST_PIECES).astype(np.uint32)


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Sorted and each once, in a fifth of the time of `np.unique`, which makes a hash table."""
    ranked = np.sort(numbers)
    return ranked[np.concatenate((np.ones(min(len(ranked), 1), bool), ranked[1:] != ranked[:-1]))]


class _Sets(NamedTuple):
    """Sets of pieces: the pieces of all texts end to end, and how many each text has."""

    hashes: np.ndarray
    counts: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where the pieces of each text begin."""
        return np.cumsum(self.counts) - self.counts

    def likeness(self, pairs: np.ndarray) -> np.ndarray:
        """The share of their pieces that both texts of a pair have, for each (Jaccard's index)."""
        starts, found = self.starts, np.zeros(len(pairs))
        for first in range(0, len(pairs), _CHUNK):
            sides = pairs[first : first + _CHUNK].T
            pair = np.arange(len(sides[0]), dtype=np.uint64) << np.uint64(32)
            of_sides = [
                np.repeat(pair, self.counts[side])
                | self.hashes[_spans(starts[side], self.counts[side])]
                for side in sides
            ]
            keys = np.sort(np.concatenate(of_sides))
            both = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
            shared = np.bincount(both.astype(np.int64), minlength=len(pair))
            total = self.counts[sides[0]] + self.counts[sides[1]] - shared
            found[first : first + _CHUNK] = shared / np.maximum(total, 1)
        return found


def _spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The places of spans, end to end."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def near_pairs(pieces: Pieces, texts: np.ndarray | None = None) -> np.ndarray:
    """Every two texts that are near-equal and not equal, as ``(pairs, 2)``, the earlier one first.

    Args:
        pieces: of the texts.
        texts: numbers of those to compare, ascending, if not of all; no two of them are equal.
    """
    counts = np.asarray(pieces.counts, np.int64)
    texts = np.arange(len(counts)) if texts is None else texts
    assert len(texts) < _MOST_TEXTS
    is_compared = np.zeros(len(counts), bool)
    is_compared[texts] = True
    hashes = np.asarray(pieces.hashes, np.uint32)[np.repeat(is_compared, counts)]
    every = _Sets(hashes, counts[texts])
    keys = _rare_pieces(every, _most_with_a_rare_piece(len(texts)))
    text_of = (keys >> np.uint64(44)).astype(np.int32)
    rare = _Sets((keys & _LOW).astype(np.uint32), np.bincount(text_of, minlength=len(texts)))
    del keys
    last = rare.starts + ((1 - RARE_SHARE) * rare.counts).astype(np.int64)
    is_first = np.arange(len(text_of), dtype=np.int32) <= last.astype(np.int32)[text_of]
    pairs = _sharing(rare.hashes[is_first], text_of[is_first])
    same = np.asarray(pieces.same)[texts]
    pairs = pairs[same[pairs[:, 0]] == same[pairs[:, 1]]]
    for sets, share in ((every, SHARE), (rare, RARE_SHARE)):
        pairs = pairs[sets.likeness(pairs) >= share]
    return texts[pairs]


def _most_with_a_rare_piece(num_texts: int) -> int:
    """How many may have it: ten; of few texts a quarter, of many a thousandth."""
    return max(3, min(10, num_texts // 4), num_texts // 1000)


def _rare_pieces(sets: _Sets, most: int) -> np.ndarray:
    """Pieces that `most` texts have, as numbers: 20 bits of the text, 12 of how many texts have it,
    32 of the piece. So sorted, each text has them in the one order of all texts, rarest first.
    """
    most = min(most, (1 << 12) - 1)
    keys = sets.hashes.astype(np.uint64) << np.uint64(32)
    keys |= np.repeat(np.arange(len(sets.counts), dtype=np.uint64), sets.counts)
    keys.sort()
    hashes = (keys >> np.uint64(32)).astype(np.uint32)
    nums = np.diff(np.flatnonzero(hashes[1:] != hashes[:-1]), prepend=-1, append=len(keys) - 1)
    nums = np.repeat(np.minimum(nums, most + 1).astype(np.uint16), nums) if len(keys) else hashes
    is_rare = nums <= most
    hashes, nums, keys = hashes[is_rare], nums[is_rare], keys[is_rare]
    keys <<= np.uint64(12)
    keys |= nums.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= hashes.astype(np.uint64)
    keys.sort()
    return keys


def _sharing(hashes: np.ndarray, text_of: np.ndarray) -> np.ndarray:
    """Every two texts with a piece in common, once each, as ``(pairs, 2)``."""
    keys = np.sort(hashes.astype(np.uint64) << np.uint64(32) | text_of.astype(np.uint64))
    hashes, text_of = keys >> np.uint64(32), keys & _LOW
    found = [np.zeros(0, np.uint64)]
    for distance in range(1, len(keys)):
        is_shared = hashes[distance:] == hashes[:-distance]
        if not is_shared.any():
            break
        pairs = text_of[:-distance][is_shared] << np.uint64(32) | text_of[distance:][is_shared]
        found.append(_distinct(pairs))
    pairs = _distinct(np.concatenate(found))
    return np.stack([pairs >> np.uint64(32), pairs & _LOW], axis=1).astype(np.int64)


def group(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Join groups: those of the two members of each pair become one.

    Args:
        labels: the group of each member, by the number of its first one.
        pairs: numbers of members, ``(pairs, 2)``.

    Returns:
        The group of each member, by the number of its first one.
    """
    parents: dict[int, int] = {}

    def root(label: int) -> int:
        while (parent := parents.get(label, label)) != label:
            parents[label] = parents.get(parent, parent)
            label = parent
        return label

    for one, other in labels[pairs].tolist():
        low, high = sorted((root(one), root(other)))
        parents[high] = low
    joined = labels.copy()
    if parents:
        changed = np.isin(labels, list(parents))
        joined[changed] = [root(label) for label in labels[changed].tolist()]
    return joined


def first_of_each(values: np.ndarray) -> np.ndarray:
    """For each value, the number of the first that equals it: groups of equal ones."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    return first[which]
