"""Encode with the byte-pair vocabularies of GLM-4 and GLM-Edge, by the tokenizers library.

GLM-4-9B was first published with a file in tiktoken's form: a line for each token, its bytes in
base64 and its rank. Every way to halve a token into two others is a merge of the tokenizers
library's; that takes 0.8 s (one core of a server) the first time in a process, where reading a
whole ``tokenizer.json`` of 8.6 MB takes 0.5 s.
"""

import base64
import codecs
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from glmtune.errors import UserError, reason_of
from glmtune.models.glm.conversations import ConversationEncoder
from glmtune.models.glm.layouts import Layout
from glmtune.models.glm.settings import EDGE, GLM4, GLM4_0414
from glmtune.models.pieces import read_vocabulary

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# What a text is split into before bytes are joined. Source: the published tokenizer's pattern.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_tiktoken(data: bytes) -> bool:
    """Whether a vocabulary file's bytes are in tiktoken's form."""
    return _TIKTOKEN_LINE.match(data) is not None


def _byte_names() -> str:
    """The character that stands for each byte in the tokenizers library's byte-level pieces.

    Visible characters stand for themselves, the others for those from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in visible else next(others)) for byte in range(256))


def tokenizer_of_tiktoken(data: bytes, file: Path, layout: Layout) -> Tokenizer:
    """The tokenizers library's tokenizer of a file in tiktoken's form, special tokens behind it.

    Raises:
        UserError: the file is damaged.
    """
    try:
        model = _model_of_tiktoken(data)
    except ValueError as error:
        raise UserError(
            f"{file}: is damaged ({reason_of(error)}, {len(data)} bytes); download it again"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in layout.specials]
    )
    prefix = [(name, tokenizer.token_to_id(name)) for name in layout.prefix]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*layout.prefix, "$A"], pair=[*layout.prefix, "$A", "$B:1"], special_tokens=prefix
    )
    return tokenizer


@lru_cache(maxsize=1)
def _model_of_tiktoken(data: bytes) -> BPE:
    """The byte pairs of a file's content; tokenizers share them, as a process opens one file often.

    Raises:
        ValueError: the content is damaged.
    """
    fields = data.split()
    tokens = [base64.b64decode(token, validate=True) for token in fields[::2]]
    ranks = list(map(int, fields[1::2]))
    if sorted(ranks) != list(range(len(tokens))) or not all(tokens):
        raise ValueError("ranks do not count up from 0")
    table = _byte_names()
    names = [codecs.charmap_decode(token, "strict", table)[0] for token in tokens]
    vocab = dict(zip(names, ranks, strict=True))
    names.sort(key=vocab.__getitem__)
    return BPE(vocab, list(_merges(names, vocab)), ignore_merges=True)


def _merges(names: list[str], vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every way to halve a token into two others, in the order of the tokens' ranks."""
    for name in names:
        for place in range(1, len(name)):
            if (end := name[place:]) in vocab and (start := name[:place]) in vocab:
                yield start, end


def tokenizer_of_json(data: bytes, file: Path) -> Tokenizer:
    """The tokenizer of a ``tokenizer.json``, neither cutting nor padding.

    Raises:
        UserError: the file is damaged.
    """
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise UserError(
            f"{file}: is damaged ({reason_of(error)[:200]}, {len(data)} bytes); download it again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class BytePairEncoder(ConversationEncoder):
    """A byte-pair vocabulary, of either form.

    Args:
        vocab_file: ``tokenizer.model`` in tiktoken's form or ``tokenizer.json``, in the folder of a
            model.
        layout: the name of the layout, for a folder without config.json.

    Raises:
        UserError: the file is damaged, lacks the layout's tokens, or is not of the model beside it.
    """

    layout_names = (GLM4_0414, GLM4, EDGE)

    def __init__(self, vocab_file: Path, layout: str | None = None):
        self.open_vocabulary(vocab_file, layout)

    def open_vocabulary(self, vocab_file: Path, layout: str | None) -> None:
        """Read the file; see the class."""
        self.model_bytes = read_vocabulary(vocab_file)
        self.open_folder(vocab_file, layout)
        self.joins_newline = not is_tiktoken(self.model_bytes)
        if self.joins_newline:
            self.byte_pairs = tokenizer_of_json(self.model_bytes, vocab_file)
        else:
            self.byte_pairs = tokenizer_of_tiktoken(self.model_bytes, vocab_file, self.layout)
        ids = {name: self.byte_pairs.token_to_id(name) for name in self.layout.specials}
        self.ids = {name: id_ for name, id_ in ids.items() if id_ is not None}
        if missing := self.layout.missing(self.ids):
            raise UserError(
                f"{vocab_file}: has no token {missing[0]}, so it is not a vocabulary of "
                f"{self.layout.name}; take it from the folder of the model's weights"
            )
        self._num_read = self.vocab_size
        self.check_size(vocab_file)

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        return self.byte_pairs.get_vocab_size(with_added_tokens=True)

    def encode_plain(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]:
        """The ids of texts, in which special names are ordinary text."""
        tokenizer = self.byte_pairs
        tokenizer.no_truncation()  # transformers leaves there what a call of it asked for
        tokenizer.no_padding()
        before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
        try:
            if num_threads == 1 or len(texts) == 1:
                return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encoded]
        finally:
            tokenizer.encode_special_tokens = before

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of ids; special ids have none."""
        return self.byte_pairs.decode_batch([list(row) for row in rows], skip_special_tokens=True)

    def piece_of(self, id_: int) -> str:
        """How messages show an id."""
        return self.byte_pairs.decode([id_], skip_special_tokens=False)
