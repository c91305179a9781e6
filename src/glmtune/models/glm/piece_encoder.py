"""Encode with ``tokenizer.model`` of ChatGLM2-6B and ChatGLM3-6B, a sentencepiece file.

Behind its pieces come the special tokens, which the published code appends; no text makes one.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from glmtune.models.glm.conversations import ConversationEncoder
from glmtune.models.glm.settings import CHATGLM2, CHATGLM3
from glmtune.models.pieces import encode_pieces, open_pieces, read_vocabulary

BLANK = "\u2581"
"""How a piece writes a blank."""


class PieceEncoder(ConversationEncoder):
    """A sentencepiece vocabulary and the special tokens behind it.

    Args:
        vocab_file: the sentencepiece file, in the folder of a model.
        layout: the name of the layout, for a folder without config.json.

    Raises:
        UserError: no sentencepiece model, or not of the model beside it.
    """

    has_blank = True
    layout_names = (CHATGLM3, CHATGLM2)

    def __init__(self, vocab_file: Path, layout: str | None = None):
        self.open_vocabulary(vocab_file, layout)

    def open_vocabulary(self, vocab_file: Path, layout: str | None) -> None:
        """Read the file; see the class."""
        self.model_bytes = read_vocabulary(vocab_file)
        self.sp = open_pieces(vocab_file, self.model_bytes)
        self.open_folder(vocab_file, layout)
        num_pieces = self.sp.get_piece_size()
        self.ids = {"<unk>": self.sp.unk_id(), "</s>": self.sp.eos_id()}
        appended = [name for name in self.layout.specials if name not in self.ids]
        self.ids |= {name: num_pieces + place for place, name in enumerate(appended)}
        self.names = {id_: name for name, id_ in self.ids.items() if id_ >= num_pieces}
        self.check_size(vocab_file)

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        return self.sp.get_piece_size() + len(self.names)

    def encode_plain(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]:
        """The ids of texts, in which special names are ordinary text."""
        return encode_pieces(self.sp, texts, num_threads)

    @cached_property
    def _piece_sizes(self) -> np.ndarray:
        """The bytes of text that each piece stands for; special tokens stand for none."""
        sp = self.sp
        pieces = (sp.id_to_piece(id_).replace(BLANK, " ") for id_ in range(sp.get_piece_size()))
        sizes = [1 if sp.is_byte(id_) else len(p.encode()) for id_, p in enumerate(pieces)]
        return np.array(sizes + [0] * len(self.names))

    def ends_in_text(self, ids: Sequence[int]) -> np.ndarray:
        """Where each token of an encoded text ends in it, in bytes.

        The blank that the vocabulary puts before each text does not count.
        """
        return np.cumsum(self._piece_sizes[list(ids)]) - 1

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of ids; special ids have none."""
        num_pieces = self.sp.get_piece_size()
        return self.sp.decode([[i for i in row if 0 <= i < num_pieces] for row in rows])

    def piece_of(self, id_: int) -> str:
        """How messages show an id."""
        return self.names.get(id_) or self.sp.id_to_piece(id_)
