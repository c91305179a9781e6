"""The settings in config.json of ChatGLM-6B, both published revisions, without transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from glmtune.errors import UserError
from glmtune.models.shape import check_quantisation

# March 2023 (v1.0): 20,000 image tokens precede the text vocabulary, so every id is 20,000
# higher than in the revision of mid-2023 (v1.1).
NUM_IMAGE_TOKENS = 20_000
VOCAB_SIZE_V1_0 = 150_528
VOCAB_SIZE_V1_1 = 130_528
# Bits of the published quantised folders.
PACKED_BITS = (8, 4)

_SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size",
    "max_sequence_length",
)  # fmt: skip
_MAX_SIZE = 2**24

# Keys that only ChatGLM2-6B and ChatGLM3-6B have, which share the model_type "chatglm".
_LATER_FAMILY_KEYS = ("padded_vocab_size", "multi_query_attention", "kv_channels")


def has_later_keys(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json of this model_type is of ChatGLM2-6B or a younger model."""
    return any(key in settings for key in _LATER_FAMILY_KEYS)


def _no_value(name: str, value: object) -> UserError:
    return UserError(
        f"config.json: {name} is {value!r:.99}, which is not possible; take config.json from the "
        "published folder"
    )


@dataclass(kw_only=True, repr=False)
class ChatGLMSettings:
    """Sizes and special ids of a checkpoint, checked; `ChatGLMConfig` adds what transformers needs.

    The special ids that the first revision leaves out of its file are filled in: `[MASK]`,
    `[gMASK]` and `<pad>` are at fixed distances from `<sop>` (`bos_token_id`).

    Raises:
        UserError: as `ChatGLMConfig`.
    """

    model_type: ClassVar[str] = "chatglm"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = VOCAB_SIZE_V1_1
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    sop_in_prefix: bool = False
    """Whether ``<sop>`` continues the prompt's positions, as in the code of March 2023: true for
    v1.0, and for copies of it whose image tokens were removed."""
    quantization_bit: int = 0  # 8 or 4: integer weights in the layers' linears
    quantization_embeddings: bool = False  # embedding and head too; without the former, in 8 bits
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    mask_token_id: int = None  # type: ignore[assignment]  # filled in from bos_token_id
    gmask_token_id: int = None  # type: ignore[assignment]
    pad_token_id: int = None  # type: ignore[assignment]

    def __post_init__(self, **others: Any):
        self.check_others(others)
        self.quantization_bit = self.quantization_bit or 0
        if self.quantization_bit not in (0, *PACKED_BITS):
            raise UserError(
                f"config.json: quantization_bit {self.quantization_bit!r} is not known, only the 8 "
                "and 4 of the published folders; pass one of those, or ChatGLM-6B in float16"
            )
        stops = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if not all(stop is None or type(stop) is int for stop in stops):
            raise _no_value("eos_token_id", self.eos_token_id)
        if not isinstance(self.layernorm_epsilon, float):
            raise _no_value("layernorm_epsilon", self.layernorm_epsilon)
        for name in _SIZES:
            size = getattr(self, name)
            if type(size) is not int or not 0 < size <= _MAX_SIZE:
                raise _no_value(name, size)
        if not self.position_encoding_2d:
            raise UserError(
                "config.json: position_encoding_2d false is GLM-10B's layout, not ChatGLM-6B's; "
                "pass a ChatGLM-6B folder"
            )
        if self.hidden_size % (4 * self.num_attention_heads):
            raise UserError(
                f"config.json: hidden_size {self.hidden_size} cannot be cut into "
                f"{self.num_attention_heads} heads (num_attention_heads) of a multiple of 4"
            )
        if type(self.bos_token_id) is not int:
            raise _no_value("bos_token_id", self.bos_token_id)
        if self.num_image_tokens:
            self.sop_in_prefix = True
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        if self.pad_token_id is None:
            self.pad_token_id = 3 + self.num_image_tokens
        for name in ("mask_token_id", "gmask_token_id", "pad_token_id"):
            if type(getattr(self, name)) is not int:
                raise _no_value(name, getattr(self, name))

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self:
        """The settings of a config.json; its other keys are checked, too."""
        named = {cls.attribute_map.get(name, name): value for name, value in settings.items()}
        own = {field.name for field in fields(cls)}
        others = {name: value for name, value in named.items() if name not in own}
        cls.check_others(others)
        read = cls(**{name: value for name, value in named.items() if name in own})
        vars(read)["quantization_config"] = others.get("quantization_config")
        return read

    @staticmethod
    def check_others(others: Mapping[str, Any]) -> None:
        """Refuse keys of other families, and unknown kinds of quantisation."""
        if has_later_keys(others):
            raise UserError(
                'config.json: model_type "chatglm" with these keys is ChatGLM2-6B, ChatGLM3-6B or '
                "GLM-4-9B, which have another class; read it with AutoConfig.from_pretrained or "
                "ChatGLMConfig.from_dict, which give that"
            )
        if settings := others.get("quantization_config"):
            check_quantisation(
                settings,
                "ChatGLM-6B in float16 with quantization_bit 8 or 4, or its published -int8, -int4 "
                "or -int4-qe folder",
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings under the names that config.json has."""
        return {"model_type": self.model_type} | vars(self)

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_image_tokens(self) -> int:
        """Ids before the first text token: 20,000 in the revision of March 2023, else 0."""
        return NUM_IMAGE_TOKENS if self.vocab_size == VOCAB_SIZE_V1_0 else 0

    @property
    def revision(self) -> str:
        """Which published revision the weights belong to: "v1.0" or "v1.1"."""
        return "v1.0" if self.sop_in_prefix else "v1.1"
