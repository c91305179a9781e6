"""The settings in config.json of the younger family, without transformers.

Two layouts exist. The publisher's own, with model_type "chatglm" and remote code, is that of
ChatGLM2-6B, ChatGLM3-6B and the first GLM-4-9B; transformers' is that of the -hf folders, of
GLM-4-0414, GLM-Z1 and GLM-Edge. The first maps onto the second without a rest.

Sources: config.json and modeling_chatglm.py of the published folders; transformers' `GlmConfig` and
`Glm4Config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from glmtune.errors import UserError
from glmtune.models.shape import check_quantisation

CHATGLM2, CHATGLM3, GLM4, GLM4_0414, EDGE = "chatglm2", "chatglm3", "glm4", "glm4-0414", "glm-edge"
VARIANTS = (CHATGLM2, CHATGLM3, GLM4, GLM4_0414, EDGE)

_PUBLISHED_TYPE = "chatglm"
# What the publisher's files call the model: by it, other programs tell ChatGLM2-6B from ChatGLM3-6B
# and find its vocabulary.
_NAMES_IN_FILES = {
    CHATGLM2: "THUDM/chatglm2-6b",
    CHATGLM3: "THUDM/chatglm3-6b",
    GLM4: "THUDM/glm-4-9b-chat",
}
_OF_2022 = "block_position_encoding"  # a key of GLM-10B and its kin, whose model_type is "glm", too
# Keys that the publisher's layout has since ChatGLM2-6B, and ChatGLM-6B has not.
_PUBLISHED_KEYS = ("padded_vocab_size", "multi_query_attention", "kv_channels")
ROPE_BASE = 10_000.0
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
}  # fmt: skip
"""How positions may be scaled, by transformers' names, and the numbers that each needs.

Their frequencies depend on the configuration alone, not on the length of a row.
"""
_HALF = 0.5  # of a head, the part that is rotated
_VOCAB_CHATGLM = 65_024  # rows of embedding and head of ChatGLM2-6B and ChatGLM3-6B
_CHATGLM2_POSITIONS = 32_768
_MAX_SIZE = 2**24
_BITS = (0, 8, 4)
_RENAMED = {
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
    "add_qkv_bias": "attention_bias",
}
# Switches of the publisher's code with the value that its models have; another is another model.
_FIXED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
}
# Keys of the publisher's layout that have their names in transformers' as well.
_KEPT = ("eos_token_id", "pad_token_id", "tie_word_embeddings", "torch_dtype", "dtype", "use_cache",
         "quantization_bit", "quantization_config")  # fmt: skip


def is_published(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the publisher's own layout."""
    return settings.get("model_type") == _PUBLISHED_TYPE and any(
        key in settings for key in _PUBLISHED_KEYS
    )


def variant_of(settings: Mapping[str, Any]) -> str | None:
    """Which model a config.json is of, one of `VARIANTS`; None where it is of another family.

    ChatGLM2-6B and ChatGLM3-6B have the same layout and sizes. What tells them apart is the name
    that the publisher left in the file, or else the number of positions.
    """
    kind, saved = settings.get("model_type"), settings.get("published_as")
    if _OF_2022 in settings:
        return None
    if kind in ("glm", "glm4") and saved in VARIANTS:
        return saved
    if kind == "glm4":
        return GLM4_0414
    if kind == "glm":
        if _rotary_factor(settings) == 1.0:
            return EDGE
        return CHATGLM3 if settings.get("vocab_size") == _VOCAB_CHATGLM else GLM4
    if not is_published(settings) or "vision_config" in settings:
        return None
    name = str(settings.get("_name_or_path", "")).lower()
    if "chatglm2" in name or "codegeex2" in name:
        return CHATGLM2
    if "chatglm3" in name:
        return CHATGLM3
    rows = settings.get("padded_vocab_size")
    if isinstance(rows, int) and rows > _VOCAB_CHATGLM:
        return GLM4
    is_long = settings.get("seq_length") == _CHATGLM2_POSITIONS
    return CHATGLM2 if is_long and settings.get("rope_ratio", 1) == 1 else CHATGLM3


def as_glm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config.json under transformers' names; those of its layout stay.

    Raises:
        UserError: a switch of the publisher's code that none of its models has, P-Tuning's prefix,
            or a size that no model has.
    """
    if not is_published(settings):
        _check_rotary(settings)
        return dict(settings)
    if settings.get("pre_seq_len"):
        raise UserError(
            "config.json has pre_seq_len, so it is a P-Tuning v2 checkpoint, which is not loaded "
            "here; pass the base it was trained on"
        )
    for name, value in _FIXED.items():
        if bool(settings.get(name, value)) is not value:
            raise _no_value(name, settings[name])
    found = {ours: settings[name] for name, ours in _RENAMED.items() if name in settings}
    found |= {name: settings[name] for name in _KEPT if name in settings}
    found.setdefault("attention_bias", False)
    found["num_key_value_heads"] = (
        settings.get("multi_query_group_num", 1)
        if settings.get("multi_query_attention")
        else settings.get("num_attention_heads")
    )
    if settings.get("rope_scaling"):
        raise UserError(
            "config.json: rope_scaling has no effect in the layout of model_type "
            f"{_PUBLISHED_TYPE!r}, whose code reads rope_ratio alone; take it out, or pass the "
            "folder that transformers saves of the model, with rope_scaling in it"
        )
    ratio = settings.get("rope_ratio", 1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or ratio <= 0:
        raise _no_value("rope_ratio", ratio)
    found["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": ROPE_BASE * ratio,
        "partial_rotary_factor": _HALF,
    }
    found.setdefault("tie_word_embeddings", False)
    return found | {"model_type": "glm", "published_as": variant_of(settings)}


def as_published(config: Any) -> dict[str, Any]:
    """A config.json of the publisher's layout: the reverse of `as_glm`.

    Args:
        config: of ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B, under transformers' names.

    Raises:
        UserError: the layout has no words for what it says.
    """
    rope, variant = config.rope_parameters, variant_of(config.to_dict())
    fixes = {
        "rope_type": rope["rope_type"] == "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", _HALF) == _HALF,
    }
    if odd := [name for name, is_sayable in fixes.items() if not is_sayable]:
        raise UserError(
            f"config.json: {odd[0]} {rope[odd[0]]!r} cannot be said in the publisher's layout, "
            "whose code reads rope_ratio alone; use --to hf"
        )
    ratio = rope["rope_theta"] / ROPE_BASE
    found = {theirs: getattr(config, ours) for theirs, ours in _RENAMED.items()}
    kept = {"eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache"}
    return {
        "_name_or_path": _NAMES_IN_FILES[variant or GLM4],
        "model_type": _PUBLISHED_TYPE,
        "architectures": ["ChatGLMModel"],
        **found,
        **{name: getattr(config, name) for name in kept},
        **_FIXED,
        "vocab_size": config.vocab_size,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "rope_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
        "pre_seq_len": None,
        "prefix_projection": False,
    }


@dataclass(kw_only=True)
class GlmSettings:
    """Sizes and special ids of a checkpoint, checked, under transformers' names.

    Raises:
        UserError: a size that no model has.
    """

    model_type: str = "glm"
    published_as: str | None = None
    vocab_size: int = 151_552
    hidden_size: int = 4096
    intermediate_size: int = 13_696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 131_072
    attention_bias: bool = True
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    quantization_bit: int = 0
    quantization_config: Any = None

    def __post_init__(self) -> None:
        check_sizes(vars(self))

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self:
        """The settings of a config.json of either layout."""
        named = as_glm(settings)
        own = {field.name for field in fields(cls)}
        read = cls(**{name: value for name, value in named.items() if name in own})
        read.published_as = variant_of(settings)
        return read

    def to_dict(self) -> dict[str, Any]:
        """The settings under the names that config.json has."""
        return dict(vars(self))


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim",
          "max_position_embeddings")  # fmt: skip


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Make sure that sizes can be those of a model.

    Args:
        settings: under transformers' names.

    Raises:
        UserError: one cannot.
    """
    for name in _SIZES:
        size = settings.get(name)
        if type(size) is not int or not 0 < size <= _MAX_SIZE:
            raise _no_value(name, size)
    heads, groups = settings["num_attention_heads"], settings["num_key_value_heads"]
    if heads % groups:
        raise UserError(
            f"config.json: {heads} heads (num_attention_heads) cannot share {groups} heads of keys "
            "and values; take config.json from the published folder"
        )
    if settings["head_dim"] % 4:
        raise _no_value("head_dim", settings["head_dim"])
    if quantised := settings.get("quantization_config"):
        check_quantisation(
            quantised, "the model in float16 or bfloat16, with quantization_bit 8 or 4"
        )
    if settings.get("quantization_bit", 0) not in _BITS:
        raise UserError(
            f"config.json: quantization_bit {settings['quantization_bit']!r} is not known, only "
            "the 8 and 4 of the published folders; pass one of those, or the model in float16"
        )


def _rope(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """How positions are rotated, under either name of transformers' layout."""
    for name in ("rope_scaling", "rope_parameters"):
        if rope := settings.get(name):
            if not isinstance(rope, Mapping):
                raise _no_value(name, rope)
            return rope
    return {}


def _check_rotary(settings: Mapping[str, Any]) -> None:
    """Refuse settings of transformers' layout whose positions are not known here.

    Raises:
        UserError: a scaling of positions that is not, or that lacks a number; or a rope_ratio that
            the rope_theta is not of.
    """
    rope = _rope(settings)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(
            f"config.json: rope_type {kind!r:.99} is not known here; there are "
            f"{', '.join(SCALINGS)}: take the scaling of positions out, or choose one of these"
        )
    for name in SCALINGS[kind]:
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(
                f"config.json: rope_type {kind} needs {name}, and it is {value!r:.99}; set it as "
                "the model's page says, or take the scaling of positions out"
            )
    theta, ratio = settings.get("rope_theta", rope.get("rope_theta")), settings.get("rope_ratio")
    if isinstance(ratio, int | float) and theta is not None and theta != ROPE_BASE * ratio:
        raise UserError(
            f"config.json: rope_ratio {ratio:g} means rope_theta {ROPE_BASE * ratio:g}, but "
            f"rope_theta is {theta:g}; take config.json from the folder of the weights"
        )


def _rotary_factor(settings: Mapping[str, Any]) -> float:
    rope = settings.get("rope_parameters")
    inner = rope.get("partial_rotary_factor", _HALF) if isinstance(rope, Mapping) else _HALF
    return settings.get("partial_rotary_factor", inner)


def _no_value(name: str, value: object) -> UserError:
    return UserError(
        f"config.json: {name} is {value!r:.99}, which no model has; take config.json from the "
        "published folder"
    )
