"""Encode text with a published `ice_text.model`, without transformers: all that rows need.

`tokenization.ChatGLMTokenizer` is the same for every other use, and encodes with this.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from glmtune.data import templates
from glmtune.data.conversations import EncodedExample, Example, encode_rounds
from glmtune.data.files import read_json_object
from glmtune.data.flaws import Flaw
from glmtune.data.row_rule import RowRule
from glmtune.errors import UserError
from glmtune.models.chatglm.rows import row_rule
from glmtune.models.chatglm.vocabulary import (
    NUM_PIECES_V1_0,
    SPECIALS,
    VOCAB_FILE,
    compare_revisions,
    extend_v1_0,
    image_tokens_v1_0,
    read_vocab,
    replace_blanks,
    restore_blanks,
)
from glmtune.models.pieces import encode_pieces
from glmtune.models.special_names import encode_around

# The tokens that fill these places, whatever `tokenizer_config.json` names for them.
NAMED_TOKENS = {
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "mask_token": "[MASK]",
}


class Encoder:
    """A vocabulary and the ids that its special tokens have.

    Args:
        vocab_file: path of the sentencepiece file.
        num_image_tokens: ids before the first text token; read off the file when None.

    Raises:
        UserError: no such file, or not a sentencepiece model of this family.
    """

    bos_token_id: Any
    allow_special = False
    opens_thoughts = False

    def __init__(self, vocab_file: str | None, num_image_tokens: int | None = None):
        self.open_vocabulary(vocab_file, num_image_tokens)

    def open_vocabulary(self, vocab_file: str | None, num_image_tokens: int | None) -> None:
        """Read the file; see the class."""
        self.model_bytes, self.sp = read_vocab(vocab_file)
        num_pieces = self.sp.get_piece_size()
        config_file = Path(str(vocab_file)).with_name("config.json")
        of_model = None
        if config_file.is_file():
            of_model = read_json_object(config_file).get("vocab_size")
            compare_revisions(vocab_file, num_pieces, of_model)
        self.is_v1_0 = num_pieces == NUM_PIECES_V1_0
        if self.is_v1_0:
            self.sp = SentencePieceProcessor(model_proto=extend_v1_0(self.model_bytes))
            num_image_tokens = image_tokens_v1_0(of_model, num_image_tokens)
        self.num_image_tokens = num_image_tokens or 0
        if missing := [name for name in SPECIALS if not self.sp.is_control(self.sp[name])]:
            raise UserError(
                f"{vocab_file}: has no special piece {missing[0]}, so it is not a ChatGLM-6B "
                f"vocabulary; take {VOCAB_FILE} from the folder of the model's weights"
            )

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
    def row_rule(self) -> RowRule:
        """How rows are laid out with these ids."""
        return row_rule(self)

    @cached_property
    def special_names(self) -> dict[str, list[int]]:
        """Names that a text may spell; see `data.dataset.RowTokenizer`.

        Those that end a prompt stand once in a row and nowhere else, so they stay text.
        """
        in_every_row = {special.text for special in self.row_rule.after_prompt}
        return {name: [] if name in in_every_row else [self.id_of(name)] for name in SPECIALS}

    @property
    def gmask_token_id(self) -> int:
        """The id of `[gMASK]`."""
        return self.id_of("[gMASK]")

    def id_of(self, piece: str) -> int:
        """The id of a piece of the vocabulary."""
        return self.sp.piece_to_id(piece) + self.num_image_tokens

    def is_new(self, token: Any) -> bool:
        """Whether the vocabulary lacks a name, so that a token of that name has to be added."""
        return self.sp[str(token)] == self.sp.unk_id() and str(token) != "<unk>"

    def encode_batch(
        self,
        texts: list[str],
        *,
        add_special_tokens: bool = False,
        max_length: int | None = None,
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """Encode many texts at once in sentencepiece's own threads.

        Args:
            texts: any number of texts.
            add_special_tokens: append ``[gMASK] <sop>`` to each.
            max_length: most ids of each, the two special ids included and kept.
            num_threads: all cores by default.
        """
        specials = [self.gmask_token_id, self.bos_token_id] if add_special_tokens else []
        room = None if max_length is None else max(0, max_length - len(specials))
        return [[*islice(ids, room), *specials] for ids in self._ids_of(texts, num_threads)]

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of ids; special ids and those of images have none."""
        first, end = self.num_image_tokens, self.vocab_size
        texts = self.sp.decode([[i - first for i in row if first <= i < end] for row in rows])
        return [restore_blanks(text) for text in texts]

    def encode_contexts(
        self, contexts: list[str], *, num_threads: int | None = None
    ) -> list[list[int]]:
        """Encode contexts as the texts that they are; see `data.dataset.RowTokenizer`."""
        return self.encode_batch(contexts, num_threads=num_threads)

    def encode_examples(
        self, examples: Sequence[Example], *, num_threads: int | None = None
    ) -> list[EncodedExample | Flaw]:
        """Encode conversations as the rounds of the published chat; see `data.dataset`.

        Earlier answers are part of the prompt, whose tokens see each other in both directions, so
        only the last one can be supervised.
        """
        return encode_rounds(self, examples, templates.after_rounds, num_threads)

    def _ids_of(self, texts: list[str], num_threads: int | None) -> Iterable[Iterable[int]]:
        """The ids of each text."""
        offset = self.num_image_tokens

        def encode(texts: list[str]) -> list[list[int]]:
            encoded = encode_pieces(self.sp, [replace_blanks(text) for text in texts], num_threads)
            return [[i + offset for i in ids] for ids in encoded] if offset else encoded

        return (
            encode_around(texts, self.special_names, encode)
            if self.allow_special
            else encode(texts)
        )


class RowEncoder(Encoder):
    """An encoder by itself, whose special ids are those of the vocabulary."""

    def __getattr__(self, name: str) -> int:
        """``bos_token_id`` and the like."""
        if (token := NAMED_TOKENS.get(name.removesuffix("_id"))) and name.endswith("_id"):
            return self.id_of(token)
        raise AttributeError(name)

    @classmethod
    def of_folder(cls, folder: Path) -> "RowEncoder | None":
        """The encoder of a model's folder; None where the folder's settings add tokens.

        Raises:
            UserError: as the class.
        """
        if (folder / "special_tokens_map.json").exists() or (folder / "added_tokens.json").exists():
            return None
        file = folder / "tokenizer_config.json"
        settings = read_json_object(file) if file.is_file() else {}
        num_image_tokens = settings.get("num_image_tokens")
        if not isinstance(num_image_tokens, int | None):
            return None
        vocab_file = folder / VOCAB_FILE
        encoder = cls(str(vocab_file) if vocab_file.is_file() else None, num_image_tokens)
        return None if any(map(encoder.is_new, _names(settings))) else encoder


def _names(settings: dict[str, Any]) -> list[Any]:
    """The tokens that a tokenizer_config.json names."""
    named = [settings.get(key) for key in NAMED_TOKENS]
    for key in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"):
        tokens = settings.get(key) or []
        named += tokens.values() if isinstance(tokens, dict) else tokens
    contents = [name.get("content") if isinstance(name, dict) else name for name in named]
    return [content for content in contents if content]
