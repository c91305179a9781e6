"""Sentencepiece files as several families have them: reading one, its ids, its text."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from glmtune.data.files import check_inside
from glmtune.errors import UserError
from glmtune.models.folders import is_lfs_pointer

# Starting the native threads costs more than encoding a handful of texts.
MIN_TEXTS_PER_THREAD = 32


def read_vocabulary(file: Path) -> bytes:
    """The bytes of a vocabulary file of any kind.

    Raises:
        UserError: a Git-LFS pointer, or a link that leads out of the folder.
    """
    if is_lfs_pointer(file):
        raise UserError(
            f"{file}: is a Git-LFS pointer, not the vocabulary; run `git lfs pull` in that "
            "folder or download the file itself"
        )
    check_inside(file)
    return file.read_bytes()


def write_vocabulary(data: bytes, folder: str, name: str, prefix: str | None) -> tuple[str]:
    """Write a vocabulary file as it was read, byte for byte; what `save_vocabulary` returns."""
    path = Path(folder, f"{prefix}-{name}" if prefix else name)
    path.write_bytes(data)
    return (str(path),)


def open_pieces(file: Path, data: bytes) -> SentencePieceProcessor:
    """The processor of a sentencepiece file's bytes.

    Raises:
        UserError: they are no sentencepiece model.
    """
    try:
        return SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise UserError(
            f"{file}: is no sentencepiece model ({len(data)} bytes); download it again"
        ) from error


def encode_pieces(
    sp: SentencePieceProcessor, texts: list[str], num_threads: int | None = None
) -> list[list[int]]:
    """The ids of texts, encoded in sentencepiece's own threads where there are many."""
    if len(texts) == 1:  # a list would start a thread even so
        return [sp.encode(texts[0])]
    threads = num_threads or (-1 if len(texts) >= MIN_TEXTS_PER_THREAD else 1)
    return sp.encode(texts, num_threads=threads)


def join_runs(items: list, names: list[str | None], decode: Callable[[list], str]) -> str:
    """The text of ids or pieces: runs of those without a name are decoded, between the names."""
    parts = []
    for is_text, run in groupby(zip(items, names, strict=True), lambda pair: pair[1] is None):
        if is_text:
            parts.append(decode([item for item, _ in run]))
        else:
            parts += [name for _, name in run if name]
    return "".join(parts)
