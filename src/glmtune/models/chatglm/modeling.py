"""ChatGLM-6B on transformers' own classes, numerically equal to the published code.

What sets the model apart from its contemporaries: a prefix that is seen in both directions, two
streams of rotary positions, and a residual that carries the normalised input scaled by alpha.

Shapes: B rows of a batch, S query tokens, K key tokens, H hidden, N heads, D head size,
V vocabulary.
"""

import math
import warnings
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
from transformers.utils.output_capturing import capture_outputs

from glmtune.hardware import pick_device, pick_dtype
from glmtune.models import weights
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.folder import (
    EMBEDDING,
    HEAD,
    HEAD_SCALE,
    ROTARY_BUFFER,
    check_folder,
)
from glmtune.models.chatglm.layout import read_layout
from glmtune.models.integer_weights import (
    SCALE,
    Packed,
    PackedEmbedding,
    PackedLinear,
    dequantise_modules,
    pack_modules,
    quantise_tables,
)
from glmtune.models.quantised import bits_of, check_quantising, quantise, settle
from glmtune.ops.attention import prefix_lm_mask
from glmtune.ops.loss import next_token_loss
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
    scores_BNSK = (query @ key.transpose(-1, -2)).float() * scaling
    weights_BNSK = scores_BNSK.masked_fill(~mask, -torch.inf).softmax(-1).to(query.dtype)
    return (weights_BNSK @ value).transpose(1, 2), weights_BNSK


class ChatGLMAttention(nn.Module):
    """Multi-head attention with a fused projection that is interleaved head by head."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # the mask says it all
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
    """What the bare model and the language model share."""

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

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, Packed):  # random integers mean nothing
            super()._init_weights(module)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, blocks and the last LayerNorm."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
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
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch of rows, or of the next tokens of cached rows.

        Args:
            input_ids: ``(B, S)``; whole rows unless `past_key_values` holds their beginning.
            attention_mask: ``(B, K)``, 1 for real tokens, or a ready boolean ``(B, 1, S, K)``;
                by default every id but ``<pad>`` is real.
            position_ids: both streams, ``(B, 2, S)``; by default read off the ids of whole rows.
            past_key_values: one of transformers' caches; `cache` will do as well.
            inputs_embeds: ``(B, S, H)`` in the place of ids; needs a ready mask and positions.
            use_cache: make a cache where none was given.

        Raises:
            ValueError: positions or mask cannot be derived, because a row lacks its special ids
                or because `input_ids` continue a cache.
        """
        if past_key_values is None:
            past_key_values = kwargs.pop("cache", None)
        if inputs_embeds is None:
            # A packed embedding cannot know the compute type.
            inputs_embeds = self.word_embeddings(input_ids).to(self.final_layernorm.weight.dtype)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        has_mask = attention_mask is not None and attention_mask.ndim == 4
        if not has_mask or position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            if input_ids is None or past_length:
                raise ValueError(
                    "mask and positions are read off the ids of whole rows; to continue a cache or "
                    "to start from embeddings, pass position_ids (B, 2, S) and a boolean "
                    "attention_mask (B, 1, S, K)"
                )
            layout = read_layout(input_ids, self.config, attention_mask if not has_mask else None)
            position_ids = layout.position_ids_B2S if position_ids is None else position_ids
            if not has_mask:
                attention_mask = prefix_lm_mask(layout.prefix_end_B, layout.valid_BS)
        cos, sin = rotary_angles(position_ids, self.config.head_dim)

        hidden_BSH = inputs_embeds
        for layer in self.layers:
            hidden_BSH = layer(
                hidden_BSH, attention_mask, cos, sin, past_key_values=past_key_values
            )
        kept: dict[str, Any] = {CACHE_FIELD: past_key_values}
        return BaseModelOutputWithPast(self.final_layernorm(hidden_BSH), **kept)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """The language model; its name and its tensors' names are those of the published class."""

    _tied_weights_keys = {HEAD: EMBEDDING}  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [HEAD_SCALE]  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.quantization_bit:
            part = self if config.quantization_embeddings else self.transformer.layers
            pack_modules(part, config.quantization_bit)
        elif config.quantization_embeddings:
            self.transformer.word_embeddings = PackedEmbedding(self.transformer.word_embeddings, 8)
            self.lm_head = PackedLinear(self.lm_head, 8)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load a published folder, its own `save_pretrained`, or a hub id; no code of it is run.

        As transformers', but strict (every tensor is there, none is extra, all have their shapes)
        and in the compute type of the machine: bfloat16 on a GPU that has it, float32 on a CPU.
        `dtype="auto"` keeps the type of the files. The weights of a published int8 or int4 folder
        stay packed, see `dequantize`. With transformers' `quantization_config` for bitsandbytes a
        float folder is quantised while it loads; one that was saved after that loads as it is.

        Raises:
            UserError: one line that names what does not fit.
        """
        hub = {key: kwargs[key] for key in weights.HUB_ARGUMENTS if key in kwargs}
        folder = weights.fetch(pretrained_model_name_or_path, **hub)
        if not isinstance(config, ChatGLMConfig):
            config = ChatGLMConfig.from_pretrained(folder)
        if bits := bits_of(config):
            check_quantising(f"{folder}: its quantization_config", bits, None)
        check_folder(folder, config, cls)
        if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
            kwargs["dtype"], caution = pick_dtype(pick_device(), bf16=None, fp16=False)
            if caution:
                warnings.warn(caution, stacklevel=2)
        with weights.indexed(folder) as place:
            loaded = super().from_pretrained(place, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model.lm_head, Packed) and config.tie_word_embeddings:
            # Of a packed head transformers ties the integers, a parameter, but no buffer.
            setattr(model.lm_head, SCALE, getattr(model.transformer.word_embeddings, SCALE))
        if bits_of(model.config):
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            settle(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded

    def tie_weights(self, missing_keys: set[str] | None = None, *args, **kwargs) -> None:
        """As transformers', which compares a loaded head with the embedding: `check_folder` did."""
        if missing_keys is not None and self.config.tie_word_embeddings:
            missing_keys.add(HEAD)
        super().tie_weights(missing_keys, *args, **kwargs)

    def quantize_head(self) -> None:
        """Round embedding and head to 8 bits, in place; a tensor that served both does so still."""
        body = self.transformer
        body.word_embeddings, self.lm_head = quantise_tables(body.word_embeddings, self.lm_head)
        self.config.quantization_embeddings = True

    def quantize(self, bits: int) -> None:
        """Quantise the layers' linears with bitsandbytes, in place, to 8 or 4 bits.

        Of a published int8 or int4 folder they are requantised; its packed embedding and head, if
        it has such, become floats.
        """
        quantise(self, self.transformer.layers, bits)
        self._unpack(self.dtype)

    def _unpack(self, dtype: torch.dtype) -> None:
        dequantise_modules(self, dtype)
        self.config.quantization_bit, self.config.quantization_embeddings = 0, False
        self.tie_weights()

    def dequantize(self, dtype: torch.dtype | None = None) -> "ChatGLMForConditionalGeneration":
        """Turn packed and bitsandbytes' weights into floats, in place; floats stay as they are.

        Args:
            dtype: of the whole model from here on; by default the compute type it has.
        """
        dtype = dtype or self.dtype
        if bits_of(self.config):
            super().dequantize(dtype)
            self._weight_conversions = None  # what loading remembers for saving in few bits again
        self._unpack(dtype)
        return nn.Module.to(self, dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, S, V)`` and, with `labels`, the float32 loss.

        Args:
            input_ids: see `ChatGLMModel.forward`, as the further arguments up to `inputs_embeds`.
            attention_mask: likewise.
            position_ids: likewise.
            past_key_values: likewise.
            inputs_embeds: likewise.
            labels: ``(B, S)``, not shifted, -100 where nothing is to be learned.
            use_cache: by default a cache is made while generating, none with labels.
            logits_to_keep: logits of the last so many tokens only; 0 for all.
            num_items_in_batch: what the summed loss is divided by (labels of the whole step).
            kwargs: `output_hidden_states` and `output_attentions`.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None if labels is None else next_token_loss(logits_BSV, labels, num_items_in_batch)
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
        **kwargs,
    ) -> dict:
        """One step's inputs: the new ids, and their mask and positions read off the whole rows."""
        if past_key_values is None:
            past_key_values = kwargs.get("cache")
        layout = read_layout(input_ids, self.config, attention_mask)
        num_new = next_sequence_length or input_ids.shape[1]
        mask_B1SK = prefix_lm_mask(layout.prefix_end_B, layout.valid_BS, num_new)
        if past_key_values is not None:
            num_keys, _ = past_key_values.get_mask_sizes(num_new, 0)
            # A static cache has more places than tokens: what lies beyond is not there yet.
            mask_B1SK = F.pad(mask_B1SK, (0, num_keys - mask_B1SK.shape[-1]), value=False)
        return {
            "input_ids": input_ids[:, -num_new:].contiguous(),
            "attention_mask": mask_B1SK,
            "position_ids": layout.position_ids_B2S[:, :, -num_new:].contiguous(),
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep") or 0,
        }
