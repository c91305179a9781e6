"""ChatGLM-6B over packed rows, as plain functions of tensors: the fast path of training.

It computes what `modeling` does with PEFT's LoRA, which is its reference, but on rows without
padding, and the head only where something is learned. One block is compiled once, for one shape,
and serves every layer, since its weights are arguments.

Shapes: T tokens of a pack, L learned tokens, H hidden, N heads, D head size.
"""

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch._functorch.config as functorch_config
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from glmtune.data.packing import Pack
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import (
    RESIDUAL_SCALE,
    ChatGLMBlock,
    ChatGLMForConditionalGeneration,
)
from glmtune.models.low_rank import split_lora
from glmtune.models.quantised import frozen_of
from glmtune.ops.attention import PaddedRows
from glmtune.ops.linear import Dense, Fp8Linear, Frozen, frozen_linear
from glmtune.ops.lora import Dropout, LowRank, lora_factors, lora_linear
from glmtune.ops.loss import IGNORED, SoftmaxLoss, head_loss
from glmtune.ops.norm import Norm
from glmtune.ops.quantised import Quantised
from glmtune.ops.rotary import rotary_angles

# Whole rows at a time in registers, where that is faster: the norms, and float8's largest values.
# Kernels of that kind cannot be read back from the compiler's cache (torch 2.11 raises a TypeError
# at the second run on a machine), so that what is compiled is not put there.
COMPILE_OPTIONS: dict[str, Any] = {"triton.multi_kernel": 1, "fx_graph_cache": False}
_KEEP_LESS = (
    "ban_recompute_used_far_apart",
    "ban_recompute_long_fusible_chains",
    "ban_recompute_materialized_backward",
)
LEARNED_MULTIPLE = 64
COMPILED_HEADS = 64, 128  # sizes of a head that models of this family have


class Linear(NamedTuple):
    """A frozen linear and, where it has one, its adapter."""

    frozen: Frozen
    adapter: LowRank | None

    def __call__(self, x_TK: Tensor, dropout: Dropout | None) -> Tensor:
        """``(T, K)`` to ``(T, N)``."""
        return lora_linear(x_TK, self.frozen, self.adapter, dropout)


class BlockWeights(NamedTuple):
    """The weights of one layer."""

    input_layernorm: Norm
    query_key_value: Linear
    dense: Linear
    post_attention_layernorm: Norm
    dense_h_to_4h: Linear
    dense_4h_to_h: Linear


Attention = Any  # PaddedRows, or the kernels' RowSpans, which cannot be imported without Triton


class PackTensors(NamedTuple):
    """A pack on its device."""

    input_ids_T: Tensor
    position_ids_2T: Tensor
    attention: Attention
    learned_at_L: Tensor
    targets_L: Tensor


class LayerDropout(NamedTuple):
    """The dropouts of one layer's adapters."""

    seeds_4: Tensor
    """One seed for each linear of a block."""
    below: Tensor
    scale: Tensor

    def each(self) -> Iterator[Dropout]:
        """One for each linear, in the order of `BlockWeights`."""
        return (Dropout(self.seeds_4[i], self.below, self.scale) for i in range(4))


class Dropouts(NamedTuple):
    """The dropouts of all layers in one pass."""

    seeds: Tensor
    """int32 ``(num_layers, 4)``."""
    below: Tensor
    scale: Tensor

    def of(self, layer: int) -> LayerDropout:
        """Those of one layer."""
        return LayerDropout(self.seeds[layer], self.below, self.scale)


def block(
    hidden_TH: Tensor,
    weights: BlockWeights,
    attention: Attention,
    cos: Tensor,
    sin: Tensor,
    dropout: LayerDropout | None,
    wanted_L: Tensor | None = None,
) -> Tensor:
    """One layer, ``(T, H)`` to ``(T, H)``: what `ChatGLMBlock` computes.

    Args:
        hidden_TH: what the layer before gives.
        weights: of this layer.
        attention: of all layers, as the next two.
        cos: ``(T, 2, D / 4)``, see `ops.rotary`.
        sin: likewise.
        dropout: of this layer; None for none.
        wanted_L: places of the tokens whose output is wanted, which makes it ``(L, H)``: of the
            last layer only what is learned. Their keys and values are those of all tokens.
    """
    drop_1, drop_2, drop_3, drop_4 = dropout.each() if dropout else (None,) * 4
    normed_TH = weights.input_layernorm(hidden_TH)
    num_heads = normed_TH.shape[1] // (4 * cos.shape[-1])
    frozen, adapter = weights.query_key_value
    y_TN3D = frozen_linear(normed_TH, frozen).unflatten(-1, (num_heads, -1))
    update = lora_factors(normed_TH, adapter, drop_1) if adapter else None
    context_TH = attention.attend(y_TN3D, update, cos, sin).flatten(1)
    if wanted_L is not None:
        normed_TH, context_TH = normed_TH[wanted_L], context_TH[wanted_L]
    attended_TH = weights.dense(context_TH, drop_2)
    normed_TH = weights.post_attention_layernorm(normed_TH * RESIDUAL_SCALE + attended_TH)
    inner = gelu(weights.dense_h_to_4h(normed_TH, drop_3))
    return normed_TH * RESIDUAL_SCALE + weights.dense_4h_to_h(inner, drop_4)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, as a sigmoid where a compiler fuses it: that takes one exponential."""
    if not x.is_cuda:
        return F.gelu(x, approximate="tanh")
    y = x.float()
    return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)


class PackedModel:
    """A model with an adapter, to be trained on packs; it shares every weight with the original."""

    def __init__(
        self,
        model: PeftModel,
        *,
        compiled: bool,
        any_length: bool = False,
        recompute: int = 0,
    ):
        """Look at a model that `attach_lora` returned.

        Args:
            model: its weights are shared, not copied.
            compiled: compile the block and use the kernels, which takes a GPU; see `can_compile`.
            any_length: compile once for packs of any length, instead of once for each length.
            recompute: of so many blocks, the first ones, keep the input alone, and compute the rest
                again on the way back; at most of all but the last, whose way back begins at once.
        """
        chatglm = base_of(model)
        self.config = chatglm.config
        self.embedding = chatglm.transformer.word_embeddings
        head = frozen_of(chatglm.lm_head)
        assert isinstance(head, Dense | Quantised)
        self.head = head.weight_NK if isinstance(head, Dense) else head
        self.dtype = chatglm.dtype
        self.blocks = [
            _weights_of(cast(ChatGLMBlock, layer)) for layer in chatglm.transformer.layers
        ]
        self.final_layernorm = Norm.of(chatglm.transformer.final_layernorm)
        self.device = chatglm.device
        assert 0 <= recompute < len(self.blocks)
        self.recompute = recompute
        self.block: Callable = block
        self.last_block: Callable = block
        self.softmax_loss: SoftmaxLoss | None = None
        self.attention: Any = PaddedRows
        self.compiled, self.any_length = compiled, compiled and any_length
        if compiled:
            self._compile()

    def _compile(self) -> None:
        from glmtune.ops.attention_kernels import RowSpans
        from glmtune.ops.loss_kernels import softmax_loss_

        # Left to itself the compiler keeps what dropout gives, although it can be computed again
        # from what is kept anyway: 1.7 GiB of a pack of 8,192 tokens.
        for name in _KEEP_LESS:
            if hasattr(functorch_config, name):
                setattr(functorch_config, name, False)
        options = {} if self.any_length else COMPILE_OPTIONS
        self.block = self.last_block = torch.compile(block, fullgraph=True, options=options)
        self.attention, self.softmax_loss = RowSpans, softmax_loss_

    def to_tensors(self, pack: Pack, num_learned: int | None = None) -> PackTensors:
        """A pack's tensors on the model's device, without waiting for it.

        Args:
            pack: see `data.packing.lay_out`.
            num_learned: L, filled up with places that teach nothing; at least as many as the pack
                has. By default as many as there are, or a few more where that is better.
        """
        padding = (num_learned or self.num_learned(pack)) - len(pack.targets_L)
        spans = map(torch.from_numpy, (pack.start_T, pack.prefix_end_T, pack.end_T))
        tensors = PackTensors(
            torch.from_numpy(pack.input_ids_T),
            torch.from_numpy(pack.position_ids_2T),
            self.attention.of(*spans),
            torch.from_numpy(np.pad(pack.learned_at_L, (0, padding))),
            torch.from_numpy(np.pad(pack.targets_L, (0, padding), constant_values=IGNORED)),
        )
        return move(tensors, self.device)

    def num_learned(self, pack: Pack) -> int:
        """How many learned tokens a pack's tensors hold by default."""
        # No shape is then so small that the compiler makes a case of its own of it.
        multiple = LEARNED_MULTIPLE if self.compiled else 1
        return max(1, -(-len(pack.targets_L) // multiple)) * multiple

    def dropouts(self, rate: float, seed: int) -> Dropouts:
        """Dropout of the adapters' inputs for one pass.

        Args:
            rate: share that is dropped.
            seed: of this pass alone.
        """
        seeds = np.random.default_rng(seed).integers(-(2**31), 2**31, (len(self.blocks), 4))
        below = torch.tensor(round(rate * 2**32) - 2**31, dtype=torch.int32)
        return move(
            Dropouts(torch.from_numpy(seeds).int(), below, torch.tensor(1 / (1 - rate))),
            self.device,
        )

    def loss(self, pack: PackTensors, dropouts: Dropouts | None = None) -> Tensor:
        """Summed cross entropy over a pack's learned tokens, a float32 scalar.

        Args:
            pack: see `to_tensors`.
            dropouts: None for none. At rate 0 they change nothing, and need not be compiled anew.
        """
        hidden_TH = self.embedding(pack.input_ids_T).to(self.dtype)
        angles = rotary_angles(pack.position_ids_2T[None], self.config.head_dim)
        cos, sin = (part[0].contiguous() for part in angles)
        if self.compiled:
            torch._dynamo.mark_dynamic(pack.learned_at_L, 0)
        *first, last = range(len(self.blocks))
        for layer in first:
            if self.any_length:
                _let_vary(hidden_TH, cos, sin, *pack.attention)
            drop = dropouts.of(layer) if dropouts else None
            arguments = hidden_TH, self.blocks[layer], pack.attention, cos, sin, drop
            if layer < self.recompute and torch.is_grad_enabled():
                # Dropout is a function of its seed: there is no random state to keep, and none to
                # ask for while a graph is captured.
                hidden_TH = checkpoint(
                    self.block, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_TH = self.block(*arguments)
        if self.any_length:
            _let_vary(hidden_TH, cos, sin, *pack.attention)
        drop = dropouts.of(last) if dropouts else None
        arguments = hidden_TH, self.blocks[last], pack.attention, cos, sin, drop
        hidden_LH = self.last_block(*arguments, pack.learned_at_L)
        return head_loss(
            self.final_layernorm(hidden_LH), self.head, pack.targets_L, self.softmax_loss
        )


def _let_vary(*tensors_T: Tensor) -> None:
    """Tell the compiler that the number of tokens is another in every pack."""
    for tensor_T in tensors_T:
        torch._dynamo.mark_dynamic(tensor_T, 0)


def can_compile(device: torch.device, config: ChatGLMConfig) -> bool:
    """Whether the kernels run here: a GPU of the Ampere generation or newer, with Triton."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return find_spec("triton") is not None and config.head_dim in COMPILED_HEADS


def move(value: Any, device: torch.device) -> Any:
    """Tensors, also within tuples, on a device; from pinned memory, beside other work."""
    if isinstance(value, Tensor):
        pinned = value.pin_memory() if device.type == "cuda" else value
        return pinned.to(device, non_blocking=True)
    parts = [move(part, device) for part in value]
    return tuple(parts) if type(value) is tuple else type(value)(*parts)


def base_of(model: PeftModel) -> ChatGLMForConditionalGeneration:
    """The base that an adapter is attached to."""
    base = model.get_base_model()
    assert isinstance(base, ChatGLMForConditionalGeneration)
    return base


def _weights_of(layer: ChatGLMBlock) -> BlockWeights:
    attention, mlp = layer.attention, layer.mlp
    return BlockWeights(
        Norm.of(layer.input_layernorm),
        _linear_of(attention.query_key_value),
        _linear_of(attention.dense),
        Norm.of(layer.post_attention_layernorm),
        _linear_of(mlp.dense_h_to_4h),
        _linear_of(mlp.dense_4h_to_h),
    )


def _linear_of(module: nn.Module) -> Linear:
    base, updates = split_lora(module)
    (adapter,) = updates or (None,)
    return Linear(frozen_of(base), adapter)


def to_fp8(model: PeftModel) -> None:
    """Put the frozen linears of the blocks into float8, in place, layer by layer."""
    for module in base_of(model).transformer.layers:
        layer = cast(ChatGLMBlock, module)
        for parent in (layer.attention, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, LoraLayer):
                    linear.base_layer = Fp8Linear(cast(nn.Linear, linear.base_layer))
                elif isinstance(linear, nn.Linear):
                    setattr(parent, name, Fp8Linear(linear))
