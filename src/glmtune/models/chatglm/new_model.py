"""`glmtune new-model`: a model with random weights in the published layout, after some checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmtune.config.settings import NewModelSettings
from glmtune.data.files import new_folder
from glmtune.disk import check_room
from glmtune.errors import UserError, reason_of
from glmtune.hardware import GIB, machine_memory_gib
from glmtune.models.chatglm.family import check_pair
from glmtune.models.chatglm.settings import VOCAB_SIZE_V1_1
from glmtune.models.chatglm.vocabulary import VOCAB_FILE
from glmtune.models.resolve import GLM_TINY

if TYPE_CHECKING:
    from glmtune.models.chatglm.configuration import ChatGLMConfig

BYTES_PER_WEIGHT = 2  # float16
SIZES = (
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "vocab_size",
    "max_sequence_length",
)
# In the published vocabulary <sop> stands this far from the end, in both revisions.
SOP_FROM_END = VOCAB_SIZE_V1_1 - 130_004


@dataclass(frozen=True)
class NewModel:
    """What was written."""

    folder: Path
    num_parameters: int
    has_vocabulary: bool

    def __str__(self) -> str:
        if self.has_vocabulary:
            use = f"use it with --base {self.folder}"
        else:
            use = f"it has no tokenizer: put a {VOCAB_FILE} into it, or pass --vocab_file"
        return f"written: {self.folder}, {self.num_parameters:,} random parameters; {use}"


def new_model(settings: NewModelSettings) -> NewModel:
    """Write a randomly initialised checkpoint; its size is printed before it is written.

    Prints what it returns.

    Raises:
        UserError: the folder holds something or cannot be written, sizes or vocabulary do not fit
            together, or disk or memory is too small.
    """
    folder = Path(settings.folder)
    _check_empty(folder)
    vocab_file = _vocabulary(settings)
    from glmtune.models.chatglm import random_init

    config = shape(settings, vocab_file)
    num_parameters = count_parameters(config)
    num_bytes = num_parameters * BYTES_PER_WEIGHT
    num_shards = settings.num_shards or (
        random_init.PUBLISHED_SHARDS if settings.like == "chatglm-6b" else 1
    )
    print(
        f"{settings.folder}: {num_parameters:,} parameters in float16, {num_bytes / 1e9:,.2f} GB "
        f"in {num_shards} file(s)",
        flush=True,
    )
    _check_room(folder, num_bytes)
    try:
        with new_folder(settings.folder) as draft:
            random_init.write_random_model(
                draft, config, vocab_file, seed=settings.seed, num_shards=num_shards
            )
    except RuntimeError as error:  # raised by torch.save when the disk is full
        raise UserError(
            f"{folder}: the weights cannot be written ({reason_of(error)}); check the free space"
        ) from error
    result = NewModel(folder, num_parameters, vocab_file is not None)
    print(result)
    return result


def shape(settings: NewModelSettings, vocab_file: Path | None) -> "ChatGLMConfig":
    """The sizes and special ids that the settings ask for.

    The special ids are those of the vocabulary; without one they are as far from the end as in the
    published one.

    Raises:
        UserError: sizes that do not fit each other, or the vocabulary.
    """
    from glmtune.models.chatglm.configuration import ChatGLMConfig
    from glmtune.models.chatglm.tokenization import ChatGLMTokenizer

    like = ChatGLMConfig.from_pretrained(GLM_TINY) if settings.like == "glm-tiny" else None
    sizes = {name: getattr(like or ChatGLMConfig(), name) for name in SIZES}
    sizes |= {name: getattr(settings, name) for name in SIZES if getattr(settings, name)}
    if settings.hidden_size and not settings.inner_hidden_size:
        sizes["inner_hidden_size"] = 4 * settings.hidden_size
    if vocab_file is None:
        bos = sizes["vocab_size"] - SOP_FROM_END
        return ChatGLMConfig(**sizes, bos_token_id=bos, eos_token_id=bos + 1)
    tokenizer = ChatGLMTokenizer(str(vocab_file))
    if settings.vocab_size is None:
        sizes["vocab_size"] = max(sizes["vocab_size"], tokenizer.vocab_size)
    names = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
    config = ChatGLMConfig(**sizes, **{name: getattr(tokenizer, name) for name in names})
    check_pair(config, tokenizer)
    return config


def count_parameters(config: "ChatGLMConfig") -> int:
    """Parameters of a model of this shape, a tied head counted once; no memory is allocated."""
    import torch

    from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration

    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration._from_config(config, dtype=torch.float16)
    return sum(weight.numel() for weight in model.parameters())


def _vocabulary(settings: NewModelSettings) -> Path | None:
    if settings.vocab_file is not None:
        path = Path(settings.vocab_file)
        if not path.is_file():
            raise UserError(
                f"--vocab_file: {path} is no file; pass the {VOCAB_FILE} of a ChatGLM-6B folder"
            )
        return path
    return Path(GLM_TINY, VOCAB_FILE) if settings.like == "glm-tiny" else None


def _check_empty(folder: Path) -> None:
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: exists and is not an empty folder; name a new one")
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); name a new one") from error


def _check_room(folder: Path, num_bytes: int) -> None:
    fix = "name a folder on another disk, or smaller sizes"
    check_room(folder, num_bytes, "the weights take", fix)
    memory = machine_memory_gib()
    if memory and num_bytes / GIB > memory:
        raise UserError(
            f"{folder}: the weights take {num_bytes / GIB:,.1f} GiB of memory, this machine has "
            f"{memory:,.1f} GiB; choose smaller sizes"
        )
