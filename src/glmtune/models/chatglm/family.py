"""The `Family` entries of ChatGLM-6B: its two published revisions."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from glmtune.data import templates
from glmtune.errors import UserError
from glmtune.models.chatglm import conversation, naming
from glmtune.models.chatglm.encoder import RowEncoder
from glmtune.models.chatglm.published import known_sha256
from glmtune.models.chatglm.rows import row_rule
from glmtune.models.chatglm.settings import (
    VOCAB_SIZE_V1_0,
    ChatGLMSettings,
    has_later_keys,
)
from glmtune.models.chatglm.vocabulary import SPECIALS
from glmtune.models.family import AdapterNames, ChatFormat, Exports, Family, Native
from glmtune.models.shape import LinearShape, Shape

_IDS = ("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id")


def shape(config: ChatGLMSettings) -> Shape:
    """The sizes of a model."""
    hidden, inner = config.hidden_size, config.inner_hidden_size
    return Shape(
        num_layers=config.num_layers,
        hidden_size=hidden,
        vocab_size=config.vocab_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_positions=config.max_sequence_length,
        tied_head=config.tie_word_embeddings,
        linears=(
            LinearShape("query_key_value", 3 * hidden, hidden, has_bias=True, makes_qkv=True),
            LinearShape("dense", hidden, hidden, has_bias=True),
            LinearShape("dense_h_to_4h", inner, hidden, has_bias=True),
            LinearShape("dense_4h_to_h", hidden, inner, has_bias=True),
        ),
        norm_values=4 * hidden,  # two LayerNorms, of weight and bias
        final_norm_values=2 * hidden,
        kept_by_mlp=inner,
    )


def check_pair(config: ChatGLMSettings, tokenizer: Any) -> None:
    """Check that a config.json and a tokenizer have the same special ids.

    Raises:
        UserError: they are of different revisions, or disagree on a special id.
    """
    for name in _IDS:
        of_model, of_tokenizer = getattr(config, name), getattr(tokenizer, name)
        ids = of_model if isinstance(of_model, list) else [of_model]
        if of_model in (None, []) or any(id_ != of_tokenizer for id_ in ids):
            raise UserError(
                f"{name}: the model says {of_model}, the tokenizer {of_tokenizer}; they are of "
                "different revisions of ChatGLM-6B, take both from the same download"
            )
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"vocab_size: the tokenizer has {tokenizer.vocab_size} ids, the model only "
            f"{config.vocab_size} rows; take both from the same download"
        )


def probe_row(config: ChatGLMSettings) -> list[int]:
    """Twenty ids spread over the vocabulary, with the special ids in the middle."""
    import torch

    text = torch.linspace(config.pad_token_id + 1, config.mask_token_id - 1, 18).long().tolist()
    assert config.bos_token_id is not None
    return [*text[::2], config.gmask_token_id, config.bos_token_id, *text[1::2]]


def _to_own(updates: Mapping[str, Any], config: Any) -> dict[str, Any]:
    from glmtune.models.chatglm.adapters import to_own

    return to_own(updates, config)


def _new_model(settings: Any) -> Any:
    # Imported late: it imports models.resolve, which imports the list of families.
    from glmtune.models.chatglm.new_model import new_model

    return new_model(settings)


@cache
def _native() -> Native:
    from glmtune.models.chatglm.configuration import ChatGLMConfig
    from glmtune.models.chatglm.decoding import DECODING
    from glmtune.models.chatglm.folder import check_folder
    from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration, ChatGLMModel
    from glmtune.models.chatglm.packed import PACKED
    from glmtune.models.chatglm.random_init import write_random_model
    from glmtune.models.chatglm.tokenization import ChatGLMTokenizer

    return Native(
        config_class=ChatGLMConfig,
        model_class=ChatGLMForConditionalGeneration,
        bare_class=ChatGLMModel,
        in_transformers=False,
        tokenizer_class=ChatGLMTokenizer,
        check_folder=check_folder,
        packed=PACKED,
        decoding=DECODING,
        write_random=write_random_model,
        bench_peers={"6b": "chatglm3-6b", "wide": "glm-small", "small": "glm-small"},
        bench_configs={
            "6b": ChatGLMConfig(),
            "wide": ChatGLMConfig(
                hidden_size=1024, num_layers=2, num_attention_heads=8, inner_hidden_size=4096
            ),
            "small": ChatGLMConfig(
                vocab_size=4096, hidden_size=256, num_layers=4, num_attention_heads=4,
                inner_hidden_size=1024, bos_token_id=3572, eos_token_id=3573,
            ),
        },
    )  # fmt: skip


def _is_of(v1_0: bool, settings: Mapping[str, Any]) -> bool:
    if settings.get("model_type") != "chatglm" or has_later_keys(settings):
        return False
    return v1_0 == (settings.get("vocab_size") == VOCAB_SIZE_V1_0)


V1_1 = Family(
    name="ChatGLM-6B",
    owns=lambda settings: _is_of(False, settings),
    model_type=ChatGLMSettings.model_type,
    native=_native,
    read_settings=ChatGLMSettings.read,
    published=("zai-org/chatglm-6b", "THUDM/chatglm-6b", "ZhipuAI/ChatGLM-6B"),
    known_sha256=known_sha256,
    shape=shape,
    row_rule=row_rule,
    row_tokenizer=RowEncoder.of_folder,
    check_pair=check_pair,
    lora_target=("query_key_value",),
    lora_rank=8,
    adapter_names=AdapterNames(naming.is_own, naming.is_third, _to_own),
    chat=ChatFormat(
        describe="the model's own, [Round N], 问：, 答：; a question continues the conversation",
        write=templates.after_rounds,
        polish=conversation.polish,
        marks=(conversation.MARK,),
        unsettled="".join(conversation.FULL_WIDTH),
    ),
    probe_row=probe_row,
    head_dims=(64, 128),
    special_names=SPECIALS,
    exports=Exports(
        refused={
            "chatglm": "is what --to hf writes of this model: its own layout is the published one",
            "gguf": "is not run by llama.cpp and Ollama; chatglm.cpp "
            "(github.com/li-plus/chatglm.cpp) runs it in its own format, and --to hf writes a "
            "folder for transformers",
            "vllm-adapter": "is not served by vLLM; glmtune serve serves the adapter as it is",
        }
    ),
    new_model=_new_model,
)
V1_0 = V1_1._replace(name="ChatGLM-6B v1.0", owns=lambda settings: _is_of(True, settings))
