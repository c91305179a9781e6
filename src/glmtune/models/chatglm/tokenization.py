"""The tokenizer of ChatGLM-6B, both published revisions, on sentencepiece alone.

Text rules of the published code: a newline becomes ``<n>``, a tab ``<|tab|>`` and a run of n blanks
``<|blank_n|>``, longest first; everything else, special names in the text included, is left to
sentencepiece, so no text can produce a special id. `encode` appends ``[gMASK] <sop>``.
"""

import hashlib
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import PreTrainedTokenizer

from glmtune.data.files import check_inside, read_json_object
from glmtune.errors import UserError
from glmtune.models.chatglm.configuration import (
    NUM_IMAGE_TOKENS,
    VOCAB_SIZE_V1_0,
    VOCAB_SIZE_V1_1,
)
from glmtune.models.weights import is_lfs_pointer

VOCAB_FILE = "ice_text.model"
MAX_BLANKS = 80
SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
NUM_PIECES_V1_0 = 130_000
NUM_PIECES_V1_1 = 130_344
# Starting the native threads costs more than encoding a handful of texts.
MIN_TEXTS_PER_THREAD = 32

_BLANKS = re.compile(f" {{2,{MAX_BLANKS}}}")
_STANDINS = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>")


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


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Encode and decode with a published `ice_text.model`.

    The special tokens are fixed, whatever `tokenizer_config.json` says: files of the first
    revision name `</s>` as the end of text, which the model never learned to write.

    Args:
        vocab_file: path of the sentencepiece file.
        num_image_tokens: ids before the first text token; read off the file when None.

    Raises:
        UserError: no such file, or not a sentencepiece model of this family.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str | None = None, num_image_tokens: int | None = None, **kwargs
    ):
        self.model_bytes, self.sp = _read_vocab(vocab_file)
        num_pieces = self.sp.get_piece_size()
        config_file = Path(str(vocab_file)).with_name("config.json")
        of_model = None
        if config_file.is_file():
            of_model = read_json_object(config_file).get("vocab_size")
            _compare_revisions(vocab_file, num_pieces, of_model)
        self.is_v1_0 = num_pieces == NUM_PIECES_V1_0
        if self.is_v1_0:
            self.sp = SentencePieceProcessor(model_proto=extend_v1_0(self.model_bytes))
            num_image_tokens = _image_tokens_v1_0(of_model, num_image_tokens)
        self.num_image_tokens = num_image_tokens or 0
        if missing := [name for name in SPECIALS if not self.sp.is_control(self.sp[name])]:
            raise UserError(
                f"{vocab_file}: has no special piece {missing[0]}, so it is not a ChatGLM-6B "
                f"vocabulary; take {VOCAB_FILE} from the folder of the model's weights"
            )
        kwargs.update(
            unk_token="<unk>",
            pad_token="<pad>",
            bos_token="<sop>",
            eos_token="<eop>",
            mask_token="[MASK]",
            extra_special_tokens=["[gMASK]"],
        )
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        kwargs.setdefault("padding_side", "left")
        for stale in ("additional_special_tokens", "added_tokens_decoder", "auto_map"):
            kwargs.pop(stale, None)
        super().__init__(num_image_tokens=self.num_image_tokens, **kwargs)

    @property
    def vocab_hash(self) -> str:
        """The sha256 of the sentencepiece file, in hex."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The number of ids, image tokens included."""
        return self.sp.get_piece_size() + self.num_image_tokens

    @property
    def revision(self) -> str:
        """Which published revision the ids belong to: "v1.0" or "v1.1"."""
        return "v1.0" if self.is_v1_0 else "v1.1"

    @property
    def gmask_token_id(self) -> int:
        """The id of `[gMASK]`."""
        return self._convert_token_to_id("[gMASK]")

    def get_vocab(self) -> dict[str, int]:
        """Every piece and its id."""
        return {
            self._convert_id_to_token(i): i for i in range(self.num_image_tokens, self.vocab_size)
        }

    def encode_batch(
        self,
        texts: list[str],
        *,
        add_special_tokens: bool = False,
        max_length: int | None = None,
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """Encode many texts at once in sentencepiece's own threads; equal to `encode` one by one.

        Args:
            texts: any number of texts.
            add_special_tokens: append ``[gMASK] <sop>`` to each.
            max_length: cut each to so many ids, the two special ids included and kept.
            num_threads: all cores by default.
        """
        specials = [self.gmask_token_id, self.bos_token_id] if add_special_tokens else []
        room = None if max_length is None else max(0, max_length - len(specials))
        threads = num_threads or (-1 if len(texts) >= MIN_TEXTS_PER_THREAD else 1)
        offset = self.num_image_tokens
        encoded = self.sp.encode([replace_blanks(text) for text in texts], num_threads=threads)
        return [[i + offset for i in ids[:room]] + specials for ids in encoded]

    def tokenize(self, text: str, *args, **kwargs) -> list[str]:
        """The pieces of a text. Special names in it are ordinary text."""
        return self.sp.encode(replace_blanks(text), out_type=str)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``text [gMASK] <sop>``, and with a second text ``text [gMASK] <sop> answer <eop>``."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of some pieces; special pieces have none."""
        return restore_blanks(self.sp.decode_pieces(tokens))

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Write the sentencepiece file as it was read, byte for byte."""
        name = f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE
        path = Path(save_directory, name)
        path.write_bytes(self.model_bytes)
        return (str(path),)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp.piece_to_id(token) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp.id_to_piece(index - self.num_image_tokens)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        # Special ids have no text in the published decoder, asked for or not; neither have the rows
        # that pad the embedding beyond the last piece, nor image ids.
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        offset = self.num_image_tokens
        pieces = [i - offset for i in ids if offset <= i < self.vocab_size]
        text = restore_blanks(self.sp.decode(pieces))
        clean = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if clean is None else clean:
            text = self.clean_up_tokenization(text)
        return text


def _read_vocab(vocab_file: str | Path | None) -> tuple[bytes, SentencePieceProcessor]:
    if vocab_file is None or not Path(vocab_file).is_file():
        raise UserError(
            f"tokenizer: no {VOCAB_FILE} in the folder (value: {vocab_file}); take it from the "
            "published ChatGLM-6B folder, beside the weights (ChatGLM2 and 3 are not loaded yet)"
        )
    if is_lfs_pointer(Path(vocab_file)):
        raise UserError(
            f"{vocab_file}: is a Git-LFS pointer, not the vocabulary; run `git lfs pull` in that "
            "folder or download the file itself"
        )
    check_inside(Path(vocab_file))
    data = Path(vocab_file).read_bytes()
    try:
        return data, SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise UserError(
            f"{vocab_file}: is no sentencepiece model ({len(data)} bytes); download it again"
        ) from error


def _image_tokens_v1_0(model_vocab_size: int | None, given: int | None) -> int:
    """How many ids stand before the text in the first revision: 20,000, unless they were cut away.

    ChatGLM-6B-Slim (March 2023) has the first revision's vocabulary file beside 130,528 rows, so
    that its ids are those of the later revision. A vocabulary saved by itself says how many.
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
    num_pieces = _read_vocab(vocab_file)[1].get_piece_size()
    _compare_revisions(vocab_file, num_pieces, model_vocab_size)
    return num_pieces


def _compare_revisions(
    vocab_file: str | Path | None, num_pieces: int, model_vocab_size: int | None
) -> None:
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
