"""The tokenizer of a folder for rows alone, without torch and transformers.

A folder has one of three vocabularies: ``tokenizer.model`` of sentencepiece (ChatGLM2-6B and
ChatGLM3-6B), ``tokenizer.model`` of tiktoken's form (GLM-4-9B as first published), or
``tokenizer.json`` of the tokenizers library (the -hf folders, GLM-4-0414, GLM-Edge).
`tokenization` has the classes for every other use, which encode with these.
"""

from pathlib import Path

from glmtune.data.files import read_json_object
from glmtune.errors import UserError
from glmtune.models.glm.byte_pair_encoder import BytePairEncoder, is_tiktoken
from glmtune.models.glm.conversations import CONFIG_FILE, ConversationEncoder
from glmtune.models.glm.piece_encoder import PieceEncoder
from glmtune.models.glm.settings import CHATGLM2, CHATGLM3, variant_of
from glmtune.models.pieces import read_vocabulary

VOCAB_FILE, TOKENIZER_FILE = "tokenizer.model", "tokenizer.json"


def find_vocabulary(folder: Path) -> Path:
    """The vocabulary file of a folder: ``tokenizer.model`` before ``tokenizer.json``.

    Raises:
        UserError: there is neither.
    """
    for name in (VOCAB_FILE, TOKENIZER_FILE):
        if (folder / name).is_file():
            return folder / name
    file = folder / CONFIG_FILE
    variant = variant_of(read_json_object(file)) if file.is_file() else None
    wanted = VOCAB_FILE if variant in (CHATGLM2, CHATGLM3) else f"{VOCAB_FILE} or {TOKENIZER_FILE}"
    raise UserError(
        f"{folder}: has no {wanted}; take it from the published folder, beside the weights"
    )


def is_byte_pairs(vocab_file: Path) -> bool:
    """Whether a vocabulary file is one of byte pairs, else one of sentencepiece.

    Raises:
        UserError: a Git-LFS pointer, or a link that leads out of the folder.
    """
    data = read_vocabulary(vocab_file)
    return vocab_file.name == TOKENIZER_FILE or is_tiktoken(data)


def check_kind(folder: Path) -> None:
    """Make sure that a folder's vocabulary, if it has one, is of the kind of its config.json.

    Raises:
        UserError: it is of another model.
    """
    if any((folder / name).is_file() for name in (VOCAB_FILE, TOKENIZER_FILE)):
        vocab_file = find_vocabulary(folder)
        kind = BytePairEncoder if is_byte_pairs(vocab_file) else PieceEncoder
        kind.layout_of(vocab_file)


def of_folder(folder: Path) -> ConversationEncoder:
    """The encoder of a model's folder.

    Raises:
        UserError: there is no vocabulary, or it is damaged or not of the model beside it.
    """
    vocab_file = find_vocabulary(folder)
    return (BytePairEncoder if is_byte_pairs(vocab_file) else PieceEncoder)(vocab_file)
