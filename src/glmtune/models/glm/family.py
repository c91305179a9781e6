"""The younger family as the rest of the project sees it: one entry for each published layout."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from glmtune.data.dataset import RowTokenizer
from glmtune.data.row_rule import RowRule, as_ids
from glmtune.errors import UserError
from glmtune.models.family import AdapterNames, Exports, Family, NamingRule, Native
from glmtune.models.glm import naming
from glmtune.models.glm.layouts import LAYOUTS, Layout
from glmtune.models.glm.mapping import to_published
from glmtune.models.glm.settings import (
    CHATGLM2,
    CHATGLM3,
    EDGE,
    GLM4,
    GLM4_0414,
    GlmSettings,
    as_published,
    is_published,
    variant_of,
)
from glmtune.models.shape import LinearShape, Shape

_QKV = ("q_proj", "k_proj", "v_proj")
# What the publisher's code calls linears that are others here.
_PUBLISHED_NAMES = {
    "query_key_value": _QKV,
    "dense": ("o_proj",),
    "dense_h_to_4h": ("gate_up_proj",),
    "dense_4h_to_h": ("down_proj",),
}
_CHATGLM = {
    "model_type": "glm", "vocab_size": 65_024, "num_hidden_layers": 28, "rms_norm_eps": 1e-5,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_STOPS = [151_329, 151_336, 151_338]
_PUBLISHED_SETTINGS: dict[str, dict[str, Any]] = {
    CHATGLM2: _CHATGLM | {"max_position_embeddings": 32_768, "published_as": CHATGLM2},
    CHATGLM3: _CHATGLM | {"max_position_embeddings": 8192, "published_as": CHATGLM3},
    GLM4: {
        "model_type": "glm", "rms_norm_eps": 1.5625e-7, "eos_token_id": _STOPS,
        "pad_token_id": _STOPS[0], "max_position_embeddings": 131_072,
    },
    GLM4_0414: {
        "model_type": "glm4", "rms_norm_eps": 1e-5, "eos_token_id": _STOPS,
        "pad_token_id": _STOPS[0], "max_position_embeddings": 32_768, "attention_bias": True,
    },
    EDGE: {
        "model_type": "glm", "vocab_size": 59_264, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "attention_bias": False,
        "tie_word_embeddings": True, "partial_rotary_factor": 1.0,
        "eos_token_id": [59_246, 59_253, 59_255], "pad_token_id": 59_246,
    },
}  # fmt: skip
"""config.json of the model that each entry is named for, as far as it is needed.

Sources: the published config.json; GLM-Edge-1.5B's as quoted in public tests.
"""


def shape(config: Any) -> Shape:
    """The sizes of a model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    of_queries = config.num_attention_heads * config.head_dim
    of_keys = config.num_key_value_heads * config.head_dim
    num_norms = 4 if config.model_type == "glm4" else 2
    has_bias = config.attention_bias
    return Shape(
        num_layers=config.num_hidden_layers,
        hidden_size=hidden,
        vocab_size=config.vocab_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_positions=config.max_position_embeddings,
        tied_head=config.tie_word_embeddings,
        linears=(
            LinearShape("q_proj", of_queries, hidden, has_bias=has_bias, makes_qkv=True),
            LinearShape("k_proj", of_keys, hidden, has_bias=has_bias, makes_qkv=True),
            LinearShape("v_proj", of_keys, hidden, has_bias=has_bias, makes_qkv=True),
            LinearShape("o_proj", hidden, of_queries, has_bias=False),
            LinearShape("gate_up_proj", 2 * inner, hidden, has_bias=False),
            LinearShape("down_proj", hidden, inner, has_bias=False),
        ),
        norm_values=num_norms * hidden,
        final_norm_values=hidden,
        kept_by_mlp=2 * inner,
        output_norms=num_norms - 2,
    )


def row_rule(layout: Layout, config: Any) -> RowRule:
    """How rows are laid out; a small model's special ids follow its end of text as published."""
    published = layout.stop_ids[0]
    ends = as_ids(config.eos_token_id)
    first = ends[0] if ends else published
    if first == published:
        return layout.row_rule()
    return layout.row_rule({name: i - published + first for name, i in layout.specials.items()})


def check_pair(layout: Layout, config: Any, tokenizer: Any) -> None:
    """Make sure that a config.json and a tokenizer are of one model.

    Raises:
        UserError: the tokenizer has more ids than the model, or ends answers at an id that the
            model does not stop at.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"vocab_size: the tokenizer has {tokenizer.vocab_size} ids, the model only "
            f"{config.vocab_size} rows; take both from the same download"
        )
    ends = config.eos_token_id
    (end,) = tokenizer.row_rule.end
    if (named := as_ids(ends)) and end.id not in (*named, *layout.stop_ids):
        raise UserError(
            f"eos_token_id: the model stops at {ends}, the tokenizer's rows end with {end.id} "
            f"({end.text}); take both from the same download"
        )


def _open_encoder(folder: Path) -> RowTokenizer | None:
    from glmtune.models.glm.encoder import of_folder

    return of_folder(folder)


def _check_tokenizer(tokenizer: Any) -> list[str]:
    from glmtune.models.glm.template import check_template

    return check_template(tokenizer)


def _to_own(updates: Mapping[str, Any], config: Any) -> dict[str, Any]:
    from glmtune.models.glm.adapters import to_own

    return to_own(updates, config)


def _to_published(updates: Mapping[str, Any], config: Any) -> dict[str, Any]:
    from glmtune.models.glm.adapters import to_published

    return to_published(updates, config)


def _to_apart(updates: Mapping[str, Any], config: Any) -> dict[str, Any]:
    from glmtune.models.glm.adapters import to_apart

    return to_apart(updates, config)


_ADAPTERS = AdapterNames(naming.is_own, naming.is_foreign, _to_own, _to_published, _to_apart)
# The publisher's code of these is transformers'.
_ADAPTERS_OF_ONE_LAYOUT = AdapterNames(naming.is_own, naming.is_half, _to_own, to_apart=_to_apart)


def _as_published(
    tensors: Mapping[str, Any], config: Any
) -> tuple[dict[str, Any], Iterator[tuple[str, Any]]]:
    return as_published(config), to_published(tensors)


def _plain_tokenizer(tokenizer: Any) -> Any:
    from glmtune.models.glm.plain_tokenizer import plain_tokenizer

    return plain_tokenizer(tokenizer)


def _gguf(config: Any, tokenizer: Any) -> Any:
    from glmtune.models.glm.gguf import gguf_form

    return gguf_form(config, tokenizer)


_EXPORTS = Exports(
    as_published=_as_published,
    is_published=is_published,
    plain_tokenizer=_plain_tokenizer,
    vllm_has_own_names_since=(0, 32),  # its models/glm.py is in 0.31.0, and not in 0.32.0
    gguf=_gguf,
)
_OF_ONE_LAYOUT = _EXPORTS._replace(
    as_published=None,
    refused={
        "chatglm": "was published in transformers' layout alone, which other tools read; use "
        "--to hf"
    },
)
_EXPORTS_OF = {
    CHATGLM2: _EXPORTS,
    CHATGLM3: _EXPORTS,
    GLM4: _EXPORTS,
    GLM4_0414: _OF_ONE_LAYOUT._replace(vllm_has_own_names_since=None),
    EDGE: _OF_ONE_LAYOUT,
}


# Sources: the licences' sections on naming, as the cards of derived models quote them.
_NAMING_RULES = {
    GLM4: NamingRule(
        "glm-4 licence", "glm-4", "Built with glm-4", r"glm-4v?-9b(?!-0414)|codegeex4"
    ),
    EDGE: NamingRule("GLM-Edge licence", "GLM-Edge", "Built with GLM-Edge", r"glm-edge"),
}


def probe_row(config: Any) -> list[int]:
    """Twenty ids from all over the vocabulary."""
    return [config.vocab_size * i // 20 for i in range(20)]


@cache
def _native(variant: str) -> Native:
    from glmtune.models.glm.configuration import MappedGlm4Config, MappedGlmConfig
    from glmtune.models.glm.decoding import DECODING
    from glmtune.models.glm.modeling import (
        Glm4ForCausalLM,
        Glm4Model,
        GlmForCausalLM,
        GlmModel,
        check_folder,
        read_tensors,
    )
    from glmtune.models.glm.packed import PACKED
    from glmtune.models.glm.random_init import write_random_model
    from glmtune.models.glm.tokenization import (
        BytePairTokenizer,
        GLMTokenizer,
        PieceTokenizer,
    )

    is_glm4 = variant == GLM4_0414
    config_class: Any = MappedGlm4Config if is_glm4 else MappedGlmConfig
    model_class: Any = Glm4ForCausalLM if is_glm4 else GlmForCausalLM
    # The publisher's name for it since GLM-4, and those in folders that transformers saves.
    saved_names = {
        "ChatGLM4Tokenizer": GLMTokenizer,
        **{of_kind.__name__: of_kind for of_kind in (PieceTokenizer, BytePairTokenizer)},
    }
    bench: dict[str, dict[str, dict[str, Any]]] = {
        CHATGLM3: {"chatglm3-6b": {}},
        GLM4: {"glm-4-9b": {}},
        GLM4_0414: {
            "glm-4-9b-0414": {},
            "glm-small": {
                "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768,
                "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 64, "eos_token_id": [4001, 4008, 4010], "pad_token_id": 4001,
            },
        },
        EDGE: {"glm-edge-1.5b": {}},
    }  # fmt: skip
    return Native(
        config_class=config_class,
        model_class=model_class,
        bare_class=Glm4Model if is_glm4 else GlmModel,
        tokenizer_class=GLMTokenizer,
        tokenizer_names=saved_names,
        check_folder=check_folder,
        read_tensors=read_tensors,
        packed=PACKED,
        decoding=DECODING,
        write_random=partial(write_random_model, model_class),
        bench_configs={
            name: config_class.from_dict(_PUBLISHED_SETTINGS[variant] | changes)
            for name, changes in bench.get(variant, {}).items()
        },
    )


def _entry(variant: str, name: str, published: tuple[str, ...]) -> Family:
    layout = LAYOUTS[variant]

    def owns(settings: Mapping[str, Any]) -> bool:
        return variant_of(settings) == variant

    native: Callable[[], Native] = partial(_native, variant)
    return Family(
        name=name,
        owns=owns,
        model_type=_PUBLISHED_SETTINGS[variant]["model_type"],
        native=native,
        read_settings=GlmSettings.read,
        published=published,
        published_settings=_PUBLISHED_SETTINGS[variant],
        shape=shape,
        row_rule=partial(row_rule, layout),
        row_tokenizer=_open_encoder,
        check_pair=partial(check_pair, layout),
        check_tokenizer=_check_tokenizer,
        lora_target=_QKV,
        lora_rank=8,  # of the published fine-tuning code
        other_names=_PUBLISHED_NAMES,
        adapter_names=(_ADAPTERS_OF_ONE_LAYOUT if variant in (GLM4_0414, EDGE) else _ADAPTERS),
        chat=layout.chat,
        probe_row=probe_row,
        head_dims=(64, 128),
        exports=_EXPORTS_OF[variant],
        special_names=layout.special_names,
        naming_rule=_NAMING_RULES.get(variant),
    )


ENTRIES = [
    _entry(CHATGLM3, "ChatGLM3-6B",
           ("zai-org/chatglm3-6b", "THUDM/chatglm3-6b", "ZhipuAI/chatglm3-6b")),
    _entry(CHATGLM2, "ChatGLM2-6B",
           ("zai-org/chatglm2-6b", "THUDM/chatglm2-6b", "ZhipuAI/chatglm2-6b")),
    _entry(GLM4_0414, "GLM-4-0414",
           ("zai-org/GLM-4-9B-0414", "THUDM/GLM-4-9B-0414", "ZhipuAI/GLM-4-9B-0414",
            "zai-org/GLM-Z1-9B-0414", "THUDM/GLM-Z1-9B-0414", "ZhipuAI/GLM-Z1-9B-0414")),
    _entry(GLM4, "GLM-4-9B",
           ("zai-org/glm-4-9b-chat-hf", "THUDM/glm-4-9b-chat-hf", "ZhipuAI/glm-4-9b-chat-hf")),
    _entry(EDGE, "GLM-Edge",
           ("zai-org/glm-edge-1.5b-chat", "THUDM/glm-edge-1.5b-chat",
            "ZhipuAI/glm-edge-1.5b-chat")),
]  # fmt: skip
