"""ChatGLM-6B on transformers' own classes, numerically equal to the published code.

Differences from other decoders: a prefix that is seen in both directions, two
streams of rotary positions, and a residual that carries the normalised input scaled by alpha.

Shapes: B rows of a batch, S query tokens, K key tokens, H hidden, N heads, D head size,
V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.folder import (
    EMBEDDING,
    HEAD,
    HEAD_SCALE,
    ROTARY_BUFFER,
    check_folder,
)
from glmtune.models.chatglm.layout import check_answers, check_labels, known_mask, lay_out
from glmtune.models.integer_weights import (
    IntegerEmbedding,
    IntegerLinear,
    IntegerModule,
    use_integer_modules,
)
from glmtune.models.precision import dequantise
from glmtune.models.strict_loading import read_strictly
from glmtune.ops.attention import right_kernels
from glmtune.ops.loss import IGNORED, next_token_loss, shifted_loss
from glmtune.ops.rotary import rotary_angles, rotate

# The published code scales every residual as if the model had 28 layers, whatever config.json says.
RESIDUAL_SCALE = math.sqrt(2 * 28)
# transformers 5.24 calls "cache" what was "past_key_values" before; both are understood here.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_FIELD = next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__annotations__)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_
) -> tuple[Tensor, Tensor]:
    """Attention in plain steps, the reference of the fused kernels: ``(B, S, N, D)``, weights."""
    # In bfloat16, scores of some hundreds would be rounded to whole numbers.
    scores_BNSK = query.float() @ key.float().transpose(-1, -2) * scaling
    weights_BNSK = scores_BNSK.masked_fill(~mask, -torch.inf).softmax(-1).to(query.dtype)
    return (weights_BNSK @ value).transpose(1, 2), weights_BNSK


class ChatGLMAttention(nn.Module):
    """Multi-head attention with a fused projection that is interleaved head by head."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # the mask decides
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_BSH: Tensor,
        mask_B1SK: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; returns ``(B, S, H)`` and, where the implementation has them, the weights."""
        heads = (self.config.num_attention_heads, 3 * self.config.head_dim)
        mixed_BNS3D = self.query_key_value(hidden_BSH).unflatten(-1, heads).transpose(1, 2)
        query, key, value = mixed_BNS3D.chunk(3, dim=-1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        with right_kernels():
            context_BSND, weights = attend(
                self, query, key, value, mask_B1SK, scaling=self.scaling, dropout=0.0
            )
        return self.dense(context_BSND.flatten(2)), weights


class ChatGLMMLP(nn.Module):
    """Two linears with a GELU (tanh form) between; no gate."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """``(B, S, H)`` to ``(B, S, H)``."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden_BSH), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer. The residual is the NORMALISED input, scaled: ``LN(x) * alpha + f(LN(x))``."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mlp = ChatGLMMLP(config)

    def forward(
        self,
        hidden_BSH: Tensor,
        mask_B1SK: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """``(B, S, H)`` to ``(B, S, H)``."""
        normed = self.input_layernorm(hidden_BSH)
        attended, _ = self.attention(normed, mask_B1SK, cos, sin, past_key_values)
        normed = self.post_attention_layernorm(normed * RESIDUAL_SCALE + attended)
        return normed * RESIDUAL_SCALE + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """The common base of the bare model and the language model."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ChatGLMBlock,
        "attentions": ChatGLMAttention,
    }
    _keys_to_ignore_on_load_unexpected = [ROTARY_BUFFER]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a published folder, its own `save_pretrained`, or a hub id: see `read_strictly`."""
        return read_strictly(cls, check_folder, pretrained_model_name_or_path, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, IntegerModule):  # its weights always come from a file
            super()._init_weights(module)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, blocks and the last LayerNorm."""

    _keys_to_ignore_on_load_unexpected = [ROTARY_BUFFER, HEAD, HEAD_SCALE]  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.is_below_head = False
        if config.quantization_bit:
            part = self if config.quantization_embeddings else self.layers
            use_integer_modules(part, config.quantization_bit)
        elif config.quantization_embeddings:
            self.word_embeddings = IntegerEmbedding(self.word_embeddings, 8)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch of rows, or of the next tokens of cached rows.

        Args:
            input_ids: ``(B, S)``; whole rows unless a cache holds their beginning.
            attention_mask: 1 for real tokens, 0 for padding, ``(B, S)``; beside a cache of P
                columns ``(B, P + S)``; or a ready boolean ``(B, 1, S, K)``. By default every id but
                ``<pad>`` is real.
            position_ids: ``(B, 2, S)``, both streams; by default derived from the ids.
            past_key_values: one of transformers' caches, which holds the beginning of the rows, or
                a virtual prompt that every token sees, as in prefix tuning.
            inputs_embeds: ``(B, S, H)`` of the same tokens, used in place of the ids; if no ids
                are given, the special ids are found in the embeddings.
            use_cache: make a cache where none was given.
            cache: another name of `past_key_values`, that of transformers 5.24.
            labels: ``(B, S)``, not shifted; only checked here, see `check_labels`.
            kwargs: `output_hidden_states` and `output_attentions`.

        Raises:
            ValueError: a row lacks its special ids, a cache comes without a mask, an argument has
                another shape, or a row has a label outside its answer.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("input_ids: pass ids (B, S), or inputs_embeds (B, S, H)")
        past_key_values = cache if past_key_values is None else past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        given = attention_mask, position_ids, past_key_values
        mask_B1SK, position_ids_B2S = lay_out(
            input_ids, inputs_embeds, self.word_embeddings, self.config, *given
        )
        is_training = self.is_below_head and self.training and torch.is_grad_enabled()
        valid_BS = None if input_ids is None else input_ids.ne(self.config.pad_token_id)
        if labels is not None:
            check_labels(labels, position_ids_B2S, valid_BS)
        elif is_training and valid_BS is not None:
            check_answers(valid_BS, position_ids_B2S)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        cos, sin = rotary_angles(position_ids_B2S, self.config.head_dim)

        # An integer embedding does not know the compute type.
        hidden_BSH = inputs_embeds.to(self.final_layernorm.weight.dtype)
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH, mask_B1SK, cos, sin, past_key_values=past_key_values)
        kept: dict[str, Any] = {CACHE_FIELD: past_key_values}
        return BaseModelOutputWithPast(self.final_layernorm(hidden_BSH), **kept)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """The language model; its name and its tensors' names are those of the published class."""

    _tied_weights_keys = {HEAD: EMBEDDING}  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [HEAD_SCALE]  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.transformer.is_below_head = True
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.quantization_embeddings:
            self.lm_head = IntegerLinear(self.lm_head, config.quantization_bit or 8)
        self.post_init()

    def tie_weights(self, missing_keys: set[str] | None = None, *args, **kwargs) -> None:
        """Replace transformers' check of a loaded head by the one in `check_folder`."""
        if missing_keys is not None and self.config.tie_word_embeddings:
            missing_keys.add(HEAD)
        super().tie_weights(missing_keys, *args, **kwargs)

    def dequantize(self, dtype: torch.dtype | None = None) -> "ChatGLMForConditionalGeneration":
        """Turn all weights into floats, in place: see `precision.dequantise`."""
        return dequantise(self, dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, S, V)`` and, with labels, the float32 loss.

        Args:
            input_ids: see `ChatGLMModel.forward`, as the further arguments up to `inputs_embeds`.
            labels: ``(B, S)``, not shifted, -100 where a token is not supervised: in all of the
                prefix, see `check_labels`.
            use_cache: by default a cache is made while generating, none with labels.
            logits_to_keep: logits of the last N tokens only, 0 for all; or of these columns.
            num_items_in_batch: what the summed loss is divided by (labels of the whole step).
            cache: another name of `past_key_values`.
            kwargs: `output_hidden_states` and `output_attentions`; and `shift_labels` ``(B, S)``,
                already shifted labels, used in place of `labels`. (If it were a named argument,
                Trainer would require it in every batch.)

        Raises:
            ValueError: as in `ChatGLMModel`; or labels are given, but only some logits computed.
        """
        if (shift_labels := kwargs.pop("shift_labels", None)) is not None:
            labels = F.pad(shift_labels[:, :-1], (1, 0), value=IGNORED)  # for `check_labels`
        if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
            raise ValueError("logits_to_keep: a loss needs all logits; leave it out, or the labels")
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        kwargs["return_dict"] = True
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            labels=labels,
            **kwargs,
        )
        kept = (
            logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        )
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if shift_labels is not None:
            loss = shifted_loss(logits_BSV, shift_labels, num_items_in_batch)
        elif labels is not None:
            loss = next_token_loss(logits_BSV, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BSV,
            **{CACHE_FIELD: outputs.get(CACHE_FIELD)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> dict:
        """One step's inputs: the new ids or embeddings, and a mask over all columns.

        Raises:
            ValueError: `position_ids` of two streams, which generation would not advance.
        """
        position_ids = kwargs.pop("position_ids", None)  # transformers makes one stream: unused
        if position_ids is not None and position_ids.ndim == 3:
            raise ValueError(
                "position_ids: generation derives them from ids; leave it out, or call the model"
            )
        kwargs.pop("labels", None)
        cache = past_key_values if cache is None else cache
        starts_from_embeds = inputs_embeds is not None and is_first_iteration
        whole: Tensor = inputs_embeds if starts_from_embeds else input_ids  # type: ignore[assignment]
        new = whole if next_sequence_length is None else whole[:, -next_sequence_length:]
        attention_mask = known_mask(attention_mask, cache, input_ids, new.shape[1], self.config)
        # With embeddings there may be no ids, or only those generated so far.
        has_ids = not starts_from_embeds or input_ids.shape[1] >= whole.shape[1]
        inputs = kwargs | {
            "input_ids": input_ids[:, -new.shape[1] :].contiguous() if has_ids else None,
            "inputs_embeds": new.contiguous() if starts_from_embeds else None,
            "attention_mask": attention_mask,
            "past_key_values": cache,
        }
        if cache is not None and cache.is_compileable:
            # A compiled step needs inputs of the same shapes every time.
            rows = inputs["input_ids"], inputs["inputs_embeds"], self.transformer.word_embeddings
            layout = lay_out(*rows, self.config, attention_mask, None, cache)
            inputs["attention_mask"], inputs["position_ids"] = layout
        return inputs
