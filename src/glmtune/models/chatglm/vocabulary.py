"""The vocabulary file of ChatGLM-6B, both published revisions, and its pieces for white space."""

import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from glmtune.errors import UserError
from glmtune.models.chatglm.settings import (
    NUM_IMAGE_TOKENS,
    VOCAB_SIZE_V1_0,
    VOCAB_SIZE_V1_1,
)
from glmtune.models.pieces import open_pieces, read_vocabulary

VOCAB_FILE = "ice_text.model"
MAX_BLANKS = 80
SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
NUM_PIECES_V1_0 = 130_000
NUM_PIECES_V1_1 = 130_344

_BLANKS = re.compile(f" {{2,{MAX_BLANKS}}}")
_STANDINS = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>")
UNFINISHED = r"<(\|(t(a(b\|?)?)?|b(l(a(n(k(_(\d{1,2}\|?)?)?)?)?)?)?)?|n)?$"
"""An incomplete name of such a piece at the end of a text, which more pieces may complete."""


def replace_blanks(text: str) -> str:
    """Write newlines, tabs and runs of blanks as the names of their pieces."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return _BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", text)


def restore_blanks(text: str) -> str:
    """Undo `replace_blanks`."""

    def restore(name: re.Match) -> str:
        if name[1]:
            return " " * int(name[1])
        return "\n" if name[0] == "<n>" else "\t"

    return _STANDINS.sub(restore, text)


def read_vocab(vocab_file: str | Path | None) -> tuple[bytes, SentencePieceProcessor]:
    """Read a sentencepiece file: its bytes, and the processor they make.

    Raises:
        UserError: no such file, a Git-LFS pointer, or no sentencepiece model.
    """
    if vocab_file is None or not Path(vocab_file).is_file():
        raise UserError(
            f"tokenizer: no {VOCAB_FILE} in the folder (value: {vocab_file}); take it from the "
            "published ChatGLM-6B folder, beside the weights"
        )
    data = read_vocabulary(Path(vocab_file))
    return data, open_pieces(Path(vocab_file), data)


def image_tokens_v1_0(model_vocab_size: int | None, given: int | None) -> int:
    """Number of ids before the text ids in the first revision: 20,000, unless they were removed.

    ChatGLM-6B-Slim (March 2023) has the first revision's vocabulary file beside 130,528 rows, so
    that its ids are those of the later revision. A tokenizer saved by itself states the number.
    """
    if model_vocab_size == VOCAB_SIZE_V1_1:
        return 0
    if model_vocab_size == VOCAB_SIZE_V1_0 or given is None:
        return NUM_IMAGE_TOKENS
    return given


def check_revision(vocab_file: Path, model_vocab_size: int) -> int:
    """Refuse a vocabulary file of one published revision beside a model of the other.

    Returns:
        The number of pieces in the file.

    Raises:
        UserError: they are of different revisions.
    """
    num_pieces = read_vocab(vocab_file)[1].get_piece_size()
    compare_revisions(vocab_file, num_pieces, model_vocab_size)
    return num_pieces


def compare_revisions(
    vocab_file: str | Path | None, num_pieces: int, model_vocab_size: int | None
) -> None:
    """Refuse a number of pieces that belongs to the other published revision than the model.

    Raises:
        UserError: they are of different revisions.
    """
    of_model = {VOCAB_SIZE_V1_0: "v1.0", VOCAB_SIZE_V1_1: "v1.1"}.get(model_vocab_size or 0)
    of_file = {NUM_PIECES_V1_0: "v1.0", NUM_PIECES_V1_1: "v1.1"}.get(num_pieces)
    was_cut = (num_pieces, model_vocab_size) == (NUM_PIECES_V1_0, VOCAB_SIZE_V1_1)
    if of_model and of_file and of_model != of_file and not was_cut:
        raise UserError(
            f"{vocab_file}: the tokenizer ({num_pieces} pieces, revision {of_file}) and the model "
            f"(vocab_size {model_vocab_size}, revision {of_model}) are of different revisions of "
            "ChatGLM-6B; take both from the same download"
        )


def extend_v1_0(model_bytes: bytes) -> bytes:
    """Append to the first revision's vocabulary the pieces that its code added when loading.

    The result has the pieces of the later revision's file, in the same order: the 8 specials, the
    tab, the runs of 2 to 80 blanks and the 256 bytes. A repeated protobuf field may be continued by
    appending to the message, so no protobuf library is needed.
    Source: sentencepiece_model.proto (ModelProto.pieces = 1, trainer_spec = 2; SentencePiece.piece
    = 1, score = 2, type = 3; TrainerSpec.byte_fallback = 35).
    """
    control, user_defined, byte = 3, 4, 6
    pieces = [(name, control) for name in SPECIALS]
    pieces += [("<|tab|>", user_defined)]
    pieces += [(f"<|blank_{n}|>", user_defined) for n in range(2, MAX_BLANKS + 1)]
    pieces += [(f"<0x{value:02X}>", byte) for value in range(256)]

    def field(tag: int, payload: bytes) -> bytes:
        assert len(payload) < 128  # a longer length would take more than one byte
        return bytes([tag, len(payload)]) + payload

    score = bytes([0x15, 0, 0, 0, 0])
    appended = [
        field(0x0A, field(0x0A, name.encode()) + score + bytes([0x18, kind]))
        for name, kind in pieces
    ]
    byte_fallback = field(0x12, bytes([0x98, 0x02, 0x01]))
    return model_bytes + b"".join(appended) + byte_fallback
