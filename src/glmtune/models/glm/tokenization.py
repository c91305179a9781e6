"""The tokenizers that transformers' clients meet, for folders as published; their code is not run.

`GLMTokenizer.from_pretrained` gives the class that a folder's vocabulary needs. What rows need is
in `piece_encoder` and `byte_pair_encoder`, which both classes encode with.
"""

from itertools import compress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from glmtune.errors import UserError, reason_of
from glmtune.models import folders
from glmtune.models.glm.byte_pair_encoder import BytePairEncoder
from glmtune.models.glm.conversation_tokenizer import ConversationTokenizer
from glmtune.models.glm.encoder import TOKENIZER_FILE, VOCAB_FILE, find_vocabulary, is_byte_pairs
from glmtune.models.glm.piece_encoder import PieceEncoder
from glmtune.models.pieces import join_runs, write_vocabulary
from glmtune.models.special_names import MARK, pattern_of

_FILES = ("*.json", "*.model", "*.jinja")


class GLMTokenizer:
    """Gives the tokenizer of a folder: a `PieceTokenizer` or a `BytePairTokenizer`."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing: what is registered so leaves a copy of its source in each saved folder."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *inputs: Any, **kwargs: Any) -> Any:
        """The tokenizer of a folder, or of a name on a hub; arguments as transformers' method.

        Raises:
            UserError: there is no vocabulary, or it is damaged or not of the model beside it.
        """
        hub_arguments = {key: kwargs[key] for key in folders.HUB_ARGUMENTS if key in kwargs}
        folder = folders.fetch(str(name_or_path), _FILES, **hub_arguments)
        vocab_file = find_vocabulary(folder)
        of_folder: Any = BytePairTokenizer if is_byte_pairs(vocab_file) else PieceTokenizer
        try:
            return of_folder.from_pretrained(folder, *inputs, **kwargs)
        except UserError:
            raise
        except ValueError as error:  # transformers reads a tokenizer.json before its class does
            raise UserError(
                f"{vocab_file}: is damaged, or a settings file beside it is "
                f"({reason_of(error)[:200]}); download them again"
            ) from error


class PieceTokenizer(ConversationTokenizer, PieceEncoder, PreTrainedTokenizer):  # type: ignore[misc]
    """Encode and decode with ``tokenizer.model`` of ChatGLM2-6B or ChatGLM3-6B.

    A text is ``[gMASK] sop`` and its ids, as published; special names in it are ordinary text
    unless a chat template wrote them. Tokens added by name stand behind the last id, and the
    model's embedding must have rows for them.

    Args:
        vocab_file: path of the sentencepiece file.
        variant: the name of the layout, for a folder without config.json.

    Raises:
        UserError: no such file, no sentencepiece model, or not of the model beside it.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    keeps_marks = True

    def __init__(self, vocab_file: str | None = None, variant: str | None = None, **kwargs):
        if vocab_file is None:
            raise UserError(
                f"tokenizer: no {VOCAB_FILE} in the folder; take it from the published folder, "
                "beside the weights"
            )
        self.open_vocabulary(Path(vocab_file), variant)
        kwargs = self._complete(kwargs)
        kwargs["eos_token"], kwargs["pad_token"] = self.layout.stops[0], self.layout.pad
        kwargs["unk_token"] = "<unk>"
        kwargs.pop("additional_special_tokens", None)
        kwargs["extra_special_tokens"] = list(self.names.values())
        kwargs["added_tokens_decoder"] = {
            id_: token
            for id_, token in kwargs.get("added_tokens_decoder", {}).items()
            if self._is_new(str(token))
        }
        PreTrainedTokenizer.__init__(self, **kwargs)

    def _is_new(self, name: str) -> bool:
        """Whether neither the vocabulary nor the layout has a name."""
        return name not in self.ids and self.sp[name] == self.sp.unk_id()

    @property
    def _new_names(self) -> dict[str, int]:
        """The tokens that were added by name."""
        return {n: i for n, i in self._added_tokens_encoder.items() if i >= self.vocab_size}

    def get_vocab(self) -> dict[str, int]:
        """Every piece and its id, added tokens included."""
        pieces = {self._convert_id_to_token(i): i for i in range(self.vocab_size)}
        return pieces | self._added_tokens_encoder

    def tokenize(self, text: str, *args, split_special_tokens: bool | None = None, **kwargs):
        """The pieces of a text. Special names are ordinary text, unless a template wrote them."""
        if split_special_tokens or not (self._new_names or MARK in text):
            return self.sp.encode(text.replace(MARK, ""), out_type=str)
        if MARK in text:
            return [self._convert_id_to_token(i) for i in self.written_ids(text)]
        pieces: list[str] = []
        at = 0
        for found in pattern_of(self._new_names).finditer(text):
            pieces += [*self.sp.encode(text[at : found.start()], out_type=str), found[0]]
            at = found.end()
        return pieces + self.sp.encode(text[at:], out_type=str)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``[gMASK] sop text``, and with a second text ``[gMASK] sop text answer </s>``.

        A text that has its ``[gMASK] sop`` from a chat template gets no second one.
        """
        prefix = [self.ids[name] for name in self.layout.prefix]
        prefix = [] if token_ids_0[: len(prefix)] == prefix else prefix
        end = [] if token_ids_1 is None else [*token_ids_1, self.ids[self.layout.end]]
        return [*prefix, *token_ids_0, *end]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special id, 0 for the others, of the row that one or two texts make."""
        row = token_ids_0
        if not already_has_special_tokens:
            row = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(self._name_of(id_) is not None) for id_ in row]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of some pieces, with the names of special ones among it."""
        return self._decode([self._id_of(token) for token in tokens])

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Write the sentencepiece file as it was read, byte for byte."""
        return write_vocabulary(self.model_bytes, save_directory, VOCAB_FILE, filename_prefix)

    def _id_of(self, token: str) -> int:
        return self._added_tokens_encoder.get(token, self._convert_token_to_id(token))

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.sp.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return self.piece_of(index)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        # Rows that pad the embedding beyond the last id have no text.
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        ids = [i for i in ids if 0 <= i < self.vocab_size or i in self._added_tokens_decoder]
        names = [self._name_of(id_) for id_ in ids]
        if skip_special_tokens:
            shown = [name is None or self._is_new(name) for name in names]
            ids, names = list(compress(ids, shown)), list(compress(names, shown))
        text = join_runs(ids, names, self.sp.decode)
        clean = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if clean is None else clean:
            text = self.clean_up_tokenization(text)
        return text

    def _name_of(self, id_: int) -> str | None:
        """The name of a special or an added token; None for the pieces of ordinary text."""
        if id_ >= self.sp.get_piece_size():
            token = self._added_tokens_decoder.get(id_)
            return self.names.get(id_) or (token.content if token else None)
        return self.sp.id_to_piece(id_) if self.sp.is_control(id_) else None


class BytePairTokenizer(ConversationTokenizer, BytePairEncoder, PreTrainedTokenizerFast):  # type: ignore[misc]
    """Encode and decode with the byte-pair vocabulary of GLM-4 or GLM-Edge.

    Outside of conversations special names in a text become their ids, as published; rows are made
    by `encode_batch`, for which they are ordinary text.

    Args:
        vocab_file: path of a ``tokenizer.model`` in tiktoken's form.
        tokenizer_file: path of a ``tokenizer.json``, where there is no other.
        variant: the name of the layout, for a folder without config.json.

    Raises:
        UserError: no such file, a damaged one, or not of the model beside it.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE, "tokenizer_file": TOKENIZER_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        variant: str | None = None,
        **kwargs,
    ):
        found = vocab_file or tokenizer_file
        if found is None:
            raise UserError(
                f"tokenizer: no {VOCAB_FILE} or {TOKENIZER_FILE} in the folder; take it from the "
                "published folder, beside the weights"
            )
        self.open_vocabulary(Path(found), variant)
        self._tokenizer = self.byte_pairs
        PreTrainedTokenizerFast.__init__(self, **self._complete(kwargs))

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict[str, Any]:
        """Settings as they are: the vocabulary is read here, not by transformers."""
        return kwargs

    def _save_pretrained(
        self,
        save_directory: Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Write the vocabulary file as it was read, byte for byte, beside what was added to it.

        Beside tiktoken's form goes a ``tokenizer.json``, which other programs read.
        """
        start = f"{filename_prefix}-" if filename_prefix else ""
        as_json = Path(save_directory, start + TOKENIZER_FILE)
        if self.joins_newline and self.byte_pairs.get_vocab_size() == self._num_read:
            as_json.write_bytes(self.model_bytes)
        else:
            self.byte_pairs.save(str(as_json))
        if self.joins_newline:
            return (*file_names, str(as_json))
        as_read = Path(save_directory, start + VOCAB_FILE)
        as_read.write_bytes(self.model_bytes)
        return (*file_names, str(as_json), str(as_read))
