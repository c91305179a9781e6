"""The tokenizer of ChatGLM-6B, both published revisions, on sentencepiece alone.

Text rules of the published code: a newline becomes ``<n>``, a tab ``<|tab|>`` and a run of n blanks
``<|blank_n|>``, longest first; everything else, special names in the text included, is left to
sentencepiece, so no text can produce a special id. `encode` appends ``[gMASK] <sop>``.

Only a chat template writes special ids (chat_template.py), whether its output is tokenised at once
or stored as a string first. Text is also split at tokens that were added by name.
"""

import re
from collections.abc import Iterable
from itertools import compress
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.chat_template_utils import render_jinja_template

from glmtune.data.files import read_json_object
from glmtune.models import families
from glmtune.models.chatglm.chat_template import CHAT_TEMPLATE, NAMES, WRITTEN_NAMES, assistant_mask
from glmtune.models.chatglm.encoder import NAMED_TOKENS, Encoder
from glmtune.models.chatglm.vocabulary import (
    UNFINISHED,
    VOCAB_FILE,
    replace_blanks,
    restore_blanks,
)
from glmtune.models.folders import HUB_ARGUMENTS
from glmtune.models.pieces import join_runs, write_vocabulary
from glmtune.models.special_names import MARK, check_mask_can_be, guard_chat, mark

_WRITTEN = [(re.escape(MARK + name), name) for name in WRITTEN_NAMES]
_IMAGE = re.compile(r"<image_(\d+)>")


class ChatGLMTokenizer(Encoder, PreTrainedTokenizer):
    """Encode and decode with a published `ice_text.model`.

    The special tokens are those of the vocabulary, whatever `tokenizer_config.json` says: files of
    the first revision name `</s>` as the end of text, which the model was never trained to write.
    Names that the vocabulary lacks are added after its last id; the model's embedding must have
    rows for them.

    Args:
        vocab_file: path of the sentencepiece file.
        num_image_tokens: ids before the first text token; by default from the file.

    Raises:
        UserError: no such file, or not a sentencepiece model of this family.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    unfinished = UNFINISHED
    """Pattern of a decoded text's end that further ids may still change."""

    def __init__(
        self, vocab_file: str | None = None, num_image_tokens: int | None = None, **kwargs
    ):
        self.open_vocabulary(vocab_file, num_image_tokens)
        self._names: dict[int, str | None] = {}
        """Names of ids of the vocabulary that were decoded: streams decode the same ones often."""
        for key, name in NAMED_TOKENS.items():
            if not self.is_new(kwargs.get(key) or name):
                kwargs[key] = name
        extra = kwargs.get("extra_special_tokens") or []
        extra = [*(extra.values() if isinstance(extra, dict) else extra)]
        extra += kwargs.pop("additional_special_tokens", None) or []
        kwargs["extra_special_tokens"] = ["[gMASK]", *filter(self.is_new, extra)]
        kwargs["added_tokens_decoder"] = {
            index: token
            for index, token in kwargs.get("added_tokens_decoder", {}).items()
            if self.is_new(token)
        }
        kwargs.pop("auto_map", None)  # names the publisher's code, which is not run
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        kwargs.setdefault("padding_side", "left")
        kwargs["chat_template"] = kwargs.get("chat_template") or CHAT_TEMPLATE
        PreTrainedTokenizer.__init__(self, num_image_tokens=self.num_image_tokens, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Do nothing: transformers would copy the source of the class into each saved folder."""

    @classmethod
    def from_pretrained(cls, name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The tokenizer of a folder or a hub id; arguments as transformers' method.

        The published folders of later models name a class of this name as well: they get their
        own family's, as those of `AutoTokenizer` do.
        """
        file = cached_file(
            name_or_path,
            CONFIG_NAME,
            **{key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs},
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        family = families.find_family(read_json_object(Path(file))) if file else None
        own = family.native().tokenizer_class if family and cls is ChatGLMTokenizer else cls
        if own is not cls:
            return own.from_pretrained(name_or_path, *inputs, **kwargs)
        return super().from_pretrained(name_or_path, *inputs, **kwargs)

    def get_vocab(self) -> dict[str, int]:
        """Every piece and its id, added tokens included."""
        pieces = {self._convert_id_to_token(i): i for i in range(self.vocab_size)}
        return pieces | self._added_tokens_encoder

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        tools: list | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = True,
        **variables: Any,
    ) -> Any:
        """Render messages like this model's training rows; arguments as in transformers.

        A single question is written as it is, several as rounds; ``[gMASK] <sop>`` follows the last
        question with or without `add_generation_prompt`, and ``<eop>`` the answer. The text of a
        leading system message comes before the first question, on a line of its own.

        Special names in a message stay text, whatever `sanitize_control_tokens` is. With `tokenize`
        false, the names that the template wrote carry a mark, which `encode` reads.
        `assistant_masks` is 1 for what a ``{% generation %}`` block wrote: the last answer and its
        ``<eop>``, since earlier answers belong to the question.

        Raises:
            jinja2.TemplateError: what the model cannot read: tools, pictures, other roles, two
                questions in a row.
            UserError: a mask is requested, but the template's block begins or ends within a text.
        """
        if return_assistant_tokens_mask:
            check_mask_can_be(tokenize, return_dict, continue_final_message)
        conversation, given = guard_chat(conversation, tools, documents, variables)
        given["add_generation_prompt"] = add_generation_prompt
        given["continue_final_message"] = continue_final_message
        rendered: Any = super().apply_chat_template(
            conversation, chat_template=chat_template, tokenize=False, **given
        )
        is_batch = isinstance(rendered, list)
        texts = [mark(text, NAMES) for text in (rendered if is_batch else [rendered])]
        if not tokenize:
            return texts if is_batch else texts[0]
        rows = self(
            texts if is_batch or return_tensors else texts[0],
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            **(tokenizer_kwargs or {}),
        )
        if return_assistant_tokens_mask:
            render: Any = render_jinja_template  # its annotation covers the text only
            rendered, spans = render(
                conversations=conversation if is_batch else [conversation],
                chat_template=self.get_chat_template(chat_template, tools),
                return_assistant_tokens_mask=True,
                **(self.special_tokens_map | given),
            )
            ids = rows["input_ids"] if is_batch or return_tensors else [rows["input_ids"]]
            masks = [
                self._fit(assistant_mask(text, of_text, self.tokenize), row)
                for text, of_text, row in zip(rendered, spans, ids, strict=True)
            ]
            rows["assistant_masks"] = masks if is_batch or return_tensors else masks[0]
        if return_tensors:
            rows = rows.convert_to_tensors(tensor_type=return_tensors)
        return rows if return_dict else rows["input_ids"]

    def _fit(self, mask: list[int], row: list[int]) -> list[int]:
        """A mask cut and padded as its row was."""
        num_kept = min(len(mask), len(row))
        mask = mask[len(mask) - num_kept :] if self.truncation_side == "left" else mask[:num_kept]
        padding = [0] * (len(row) - num_kept)
        return padding + mask if self.padding_side == "left" else mask + padding

    def _ids_of(self, texts: list[str], num_threads: int | None) -> Iterable[Iterable[int]]:
        if not self._new_tokens:
            return super()._ids_of(texts, num_threads)
        to_id = self._convert_token_to_id_with_added_voc
        return (map(to_id, self._pieces(text, self._new_tokens)) for text in texts)

    def tokenize(self, text: str, *args, split_special_tokens: bool | None = None, **kwargs):
        """The pieces of a text. Special names are ordinary text, unless a template wrote them.

        With `split_special_tokens` marked and added tokens are ordinary text as well.
        """
        if self.split_special_tokens if split_special_tokens is None else split_special_tokens:
            return self._pieces(text, [])
        return self._pieces(text, [*_WRITTEN, *self._new_tokens])

    def _pieces(self, text: str, names: list[tuple[str, str]]) -> list[str]:
        """The pieces of a text split at names, each a pattern and the piece it means."""
        pieces: list[str] = []
        at = 0
        if names:
            for found in re.finditer("|".join(f"({pattern})" for pattern, _ in names), text):
                assert found.lastindex
                pieces += self._encode_text(text[at : found.start()])
                pieces.append(names[found.lastindex - 1][1])
                at = found.end()
        return pieces + self._encode_text(text[at:])

    def _encode_text(self, text: str) -> list[str]:
        return self.sp.encode(replace_blanks(text), out_type=str)

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        num_added = super()._add_tokens(new_tokens, special_tokens=special_tokens)
        added = [token for token in self._added_tokens_decoder.values() if self.is_new(token)]
        added.sort(key=lambda token: -len(token.content))  # the longest match first
        self._new_tokens = [(_pattern(token), token.content) for token in added]
        return num_added

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """``text [gMASK] <sop>``, and with a second text ``text [gMASK] <sop> answer <eop>``.

        A text that has its ``<sop>`` from a chat template gets no second one.
        """
        ends = self.bos_token_id in token_ids_0
        prompt = [*token_ids_0, *([] if ends else [self.gmask_token_id, self.bos_token_id])]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special id, 0 for the others, of the row that one or two texts make.

        Args:
            token_ids_0: a text's ids, or a whole row's.
            token_ids_1: a second text's.
            already_has_special_tokens: `token_ids_0` is a row.
        """
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        special = {*self.all_special_ids, self.gmask_token_id} - {self.unk_token_id}
        row = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(i in special) for i in row]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of some pieces, with the names of special ones among it."""
        return join_runs(
            tokens,
            [self._name_of_piece(token) for token in tokens],
            lambda run: restore_blanks(self.sp.decode_pieces(run)),
        )

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Write the sentencepiece file as it was read, byte for byte."""
        return write_vocabulary(self.model_bytes, save_directory, VOCAB_FILE, filename_prefix)

    def _convert_token_to_id(self, token: str) -> int:
        if self.num_image_tokens and (image := _IMAGE.fullmatch(token)):
            return int(image[1])
        return self.id_of(token)

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        return self.sp.id_to_piece(index - self.num_image_tokens)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        # Rows that pad the embedding beyond the last piece have no text, neither have image ids.
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        first, end = self.num_image_tokens, self.vocab_size
        ids = [i for i in ids if first <= i < end or i in self._added_tokens_decoder]
        names = [self._name_of(i) for i in ids]
        if skip_special_tokens:
            shown = [name is None or not self._is_special(name) for name in names]
            ids, names = list(compress(ids, shown)), list(compress(names, shown))
        text = join_runs(
            ids, names, lambda run: restore_blanks(self.sp.decode([i - first for i in run]))
        )
        clean = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if clean is None else clean:
            text = self.clean_up_tokenization(text)
        return text

    def _is_special(self, name: str) -> bool:
        """Whether a name is a control piece of the vocabulary, or was added as special."""
        token = self._added_tokens_decoder.get(self._added_tokens_encoder.get(name, -1))
        return not self.is_new(name) or token is None or token.special

    def _name_of(self, id_: int) -> str | None:
        """The name of a special or an added token; None for the pieces of ordinary text."""
        if (added := self._added_tokens_decoder.get(id_)) is not None:
            return self._name_of_piece(str(added))
        if id_ not in self._names:
            self._names[id_] = self._name_of_piece(self._convert_id_to_token(id_))
        return self._names[id_]

    def _name_of_piece(self, piece: str) -> str | None:
        is_named = self.is_new(piece) and piece in self._added_tokens_encoder
        return piece if is_named or self.sp.is_control(self.sp[piece]) else None


def _pattern(token: AddedToken) -> str:
    """The pattern that an added token matches in a text."""
    pattern = re.escape(token.content)
    if token.single_word:
        pattern = f"(?<![^ ]){pattern}(?![^ ])"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")
