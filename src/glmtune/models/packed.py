"""A model over packed rows, as plain functions of tensors: the fast path of training.

It computes what the family's model does with PEFT's LoRA, its reference, but on rows without
padding, and applies the head only where a token is supervised. The family gives one layer as a
function (`family.PackedBlock`); it is compiled once, for one shape, and serves every layer, since
its weights are arguments.

Shapes: T tokens of a pack, L supervised tokens, H hidden, X position streams.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from glmtune.data.packing import Pack
from glmtune.models.family import PackedBlock, layers_of
from glmtune.models.low_rank import has_lora, split_lora
from glmtune.models.quantised import frozen_of
from glmtune.models.sharded import Gathered, comes_and_goes, gathered
from glmtune.ops.attention import PaddedRows
from glmtune.ops.linear import Dense, Fp8, Fp8Linear, Frozen, joined, lay_together
from glmtune.ops.lora import Dropout, LowRank, lora_linear
from glmtune.ops.loss import IGNORED, SoftmaxLoss, head_log_probs, head_loss
from glmtune.ops.quantised import Quantised

if TYPE_CHECKING:
    from peft import PeftModel

_KEEP_LESS = (
    "ban_recompute_used_far_apart",
    "ban_recompute_long_fusible_chains",
    "ban_recompute_materialized_backward",
)
SUPERVISED_MULTIPLE = 64


class Linear(NamedTuple):
    """A frozen linear and, where it has one, its adapter."""

    frozen: Frozen
    adapter: LowRank | None

    def __call__(self, x_TK: Tensor, dropout: Dropout | None) -> Tensor:
        """``(T, K)`` to ``(T, N)``."""
        return lora_linear(x_TK, self.frozen, self.adapter, dropout)


Attention = Any  # PaddedRows, or the kernels' RowSpans, importable only with Triton


class PackTensors(NamedTuple):
    """A pack on its device."""

    input_ids_T: Tensor
    position_ids_XT: Tensor
    attention: Attention
    supervised_at_L: Tensor
    targets_L: Tensor


class LayerDropout(NamedTuple):
    """The dropouts of one layer's adapters."""

    seeds: Tensor
    """One seed for each linear of the layer."""
    below: Tensor
    scale: Tensor

    def each(self, together: int = 0) -> Iterator[Dropout]:
        """One dropout for each linear, in the order of `Shape.linears`.

        Args:
            together: how many linears, from the first, read one input; see `Dropout.factor`.
        """
        for i in range(self.seeds.shape[0]):
            seed, factor = self.seeds[i], None
            if i < together:
                seed, factor = self.seeds[0], seed
            yield Dropout(seed, self.below, self.scale, factor)


class Dropouts(NamedTuple):
    """The dropouts of all layers in one pass."""

    seeds: Tensor
    """int32, one for each layer and linear."""
    below: Tensor
    scale: Tensor

    def of(self, layer: int) -> LayerDropout:
        """The dropouts of one layer."""
        return LayerDropout(self.seeds[layer], self.below, self.scale)


class PackedModel:
    """A model with an adapter, to be trained on packs; it shares every weight with the original."""

    def __init__(
        self,
        model: "PeftModel | PreTrainedModel",
        family_block: PackedBlock,
        *,
        compiled: bool,
        any_length: bool = False,
        recompute: int = 0,
    ):
        """Take a model from `attach_lora`, or to compute losses one without an adapter.

        Args:
            model: its weights are shared, not copied.
            family_block: the layer function of its family.
            compiled: compile the layer and use the kernels, which needs a GPU.
            any_length: compile once for packs of any length, instead of once for each length.
            recompute: the first N layers keep only their input and are recomputed in the backward
                pass; at most all but the last, whose backward pass begins at once.
        """
        base = base_of(model)
        self.config, self.dtype, self.device = base.config, base.dtype, base.device
        self.family_block = family_block
        self.embedding = base.get_input_embeddings()
        self.output = base.get_output_embeddings()
        with gathered(self.output):
            head = frozen_of(self.output)
        assert isinstance(head, Dense | Quantised)
        self.head = head.weight_NK if isinstance(head, Dense) else head
        self.layers, self.blocks = Gathered(layers_of(base)), []
        for layer in layers_of(base):
            with gathered(layer):
                self.blocks.append(family_block.weights_of(layer))
        self.final_norm = family_block.final_norm(base)
        assert 0 <= recompute < len(self.blocks)
        self.recompute = recompute
        self.block: Callable = family_block.block
        self.last_block: Callable = family_block.block
        self.softmax_loss: SoftmaxLoss | None = None
        self.attention: Any = PaddedRows
        self.compiled, self.any_length = compiled, compiled and any_length
        if compiled:
            self._compile()

    def _compile(self) -> None:
        # Imported before the compiler meets them inside a layer.
        from glmtune.ops import dropped_kernels, gate_kernels  # noqa: F401
        from glmtune.ops.loss_kernels import softmax_loss_
        from glmtune.ops.packed_attention import RowSpans

        # By default the compiler keeps the output of dropout, although it can be recomputed from
        # what is kept anyway: 1.7 GiB for a pack of 8,192 tokens.
        for name in _KEEP_LESS:
            if hasattr(functorch_config, name):
                setattr(functorch_config, name, False)
        # Without `triton.multi_kernel`, whose kernels gave other gradients from run to run, see
        # docs/log.md, 2026-11-30.
        self.block = self.last_block = torch.compile(self.family_block.block, fullgraph=True)
        self.attention, self.softmax_loss = RowSpans, softmax_loss_

    def to_tensors(self, pack: Pack, num_supervised: int | None = None) -> PackTensors:
        """A pack's tensors on the model's device, without waiting for it.

        Args:
            pack: see `data.packing.lay_out`.
            num_supervised: L, at least the pack's number of supervised tokens; the rest is filled
                with places that are ignored. By default see `num_supervised`.
        """
        padding = (num_supervised or self.num_supervised(pack)) - len(pack.targets_L)
        spans = map(torch.from_numpy, (pack.start_T, pack.prefix_end_T, pack.end_T))
        tensors = PackTensors(
            torch.from_numpy(pack.input_ids_T),
            torch.from_numpy(pack.position_ids_XT),
            self.attention.of(*spans),
            torch.from_numpy(np.pad(pack.supervised_at_L, (0, padding))),
            torch.from_numpy(np.pad(pack.targets_L, (0, padding), constant_values=IGNORED)),
        )
        return move(tensors, self.device)

    def num_supervised(self, pack: Pack) -> int:
        """The number of supervised tokens that a pack's tensors hold by default."""
        # Keeps torch.compile from specialising on sizes 0 and 1.
        multiple = SUPERVISED_MULTIPLE if self.compiled else 1
        return max(1, -(-len(pack.targets_L) // multiple)) * multiple

    def dropouts(self, rate: float, seed: int) -> Dropouts:
        """Dropout of the adapters' inputs for one pass.

        Args:
            rate: share that is dropped.
            seed: seed of this pass.
        """
        shape = len(self.blocks), self.family_block.num_linears
        seeds = np.random.default_rng(seed).integers(-(2**31), 2**31, shape)
        below = torch.tensor(round(rate * 2**32) - 2**31, dtype=torch.int32)
        return move(
            Dropouts(torch.from_numpy(seeds).int(), below, torch.tensor(1 / (1 - rate))),
            self.device,
        )

    def loss(self, pack: PackTensors, dropouts: Dropouts | None = None) -> Tensor:
        """Summed cross entropy over a pack's supervised tokens, a float32 scalar.

        Args:
            pack: see `to_tensors`.
            dropouts: None for none. At rate 0 they have no effect, and need no new compilation.
        """
        hidden_LH = self._hidden(pack, dropouts)
        with gathered(self.output):  # the loss's gradient is computed along with it
            return head_loss(hidden_LH, self.head, pack.targets_L, self.softmax_loss)

    @torch.no_grad()
    def log_probs(self, pack: PackTensors, dropouts: Dropouts | None = None) -> Tensor:
        """Log-probability of each of a pack's supervised tokens, ``(L,)`` float32; filler has 0."""
        hidden_LH = self._hidden(pack, dropouts)
        with gathered(self.output):
            return head_log_probs(hidden_LH, self.head, pack.targets_L)

    def _hidden(self, pack: PackTensors, dropouts: Dropouts | None = None) -> Tensor:
        """The final norm's outputs where the next token is supervised, ``(L, H)``."""
        with gathered(self.embedding):  # by `forward` alone, FSDP2's hooks have no part in it
            hidden_TH = self.embedding.forward(pack.input_ids_T).to(self.dtype)
        cos, sin = self.family_block.angles(pack.position_ids_XT, self.config)
        if self.compiled:
            torch._dynamo.mark_dynamic(pack.supervised_at_L, 0)
        *first, last = range(len(self.blocks))
        for layer in first:
            if self.any_length:
                _let_vary(hidden_TH, cos, sin, *pack.attention)
            drop = dropouts.of(layer) if dropouts else None
            hidden_TH = self.layers.enter(layer, hidden_TH)
            arguments = hidden_TH, self.blocks[layer], pack.attention, cos, sin, drop
            if layer < self.recompute and torch.is_grad_enabled():
                # Dropout is a function of its seed: there is no random state to save, nor to read
                # while a graph is captured.
                hidden_TH = checkpoint(
                    self.block, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_TH = self.block(*arguments)
            hidden_TH = self.layers.leave(layer, hidden_TH)
        if self.any_length:
            _let_vary(hidden_TH, cos, sin, *pack.attention)
        drop = dropouts.of(last) if dropouts else None
        hidden_TH = self.layers.enter(last, hidden_TH)
        arguments = hidden_TH, self.blocks[last], pack.attention, cos, sin, drop
        hidden_LH = self.last_block(*arguments, pack.supervised_at_L)
        return self.final_norm(self.layers.leave(last, hidden_LH))


def _let_vary(*tensors_T: Tensor) -> None:
    """Mark the number of tokens as dynamic for the compiler."""
    for tensor_T in tensors_T:
        torch._dynamo.mark_dynamic(tensor_T, 0)


def move(value: Any, device: torch.device) -> Any:
    """Copy tensors, also inside tuples, to a device, from pinned memory, without waiting."""
    if isinstance(value, Tensor):
        pinned = value.pin_memory() if device.type == "cuda" else value
        return pinned.to(device, non_blocking=True)
    parts = [move(part, device) for part in value]
    return tuple(parts) if type(value) is tuple else type(value)(*parts)


def base_of(model: "PeftModel | PreTrainedModel") -> PreTrainedModel:
    """The base that an adapter is attached to; a model without one is its own."""
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def linear_of(module: nn.Module) -> Linear:
    """A linear's weights and those of the adapter on it, not copied."""
    base, updates = split_lora(module)
    (adapter,) = updates or (None,)
    return Linear(frozen_of(base), adapter)


def frozen_together(modules: Sequence[nn.Module]) -> tuple[Frozen, ...]:
    """The frozen parts of linears of one input: as one where that takes no memory, else each."""
    linears = [split_lora(module)[0] for module in modules]
    frozen = tuple(map(frozen_of, linears))
    if any(map(comes_and_goes, linears)):
        return frozen
    plain = [linear for linear in linears if type(linear) is nn.Linear]
    if len(plain) == len(linears):
        biased = {linear.bias is not None for linear in plain}
        return (lay_together(plain),) if len(biased) == 1 else frozen
    eights = [one for one in frozen if isinstance(one, Fp8)]
    if len(eights) < len(frozen):
        return frozen
    rows, row_scales, columns, _, biases = zip(*eights, strict=True)
    row, row_scale, column = joined(rows, 0), joined(row_scales, 0), joined(columns, 1)
    biased = {bias is not None for bias in biases}
    if row is None or row_scale is None or column is None or len(biased) > 1:
        return frozen
    bias = torch.cat(biases) if True in biased else None
    return (Fp8(row, row_scale, column, eights[0].column_scale_K, bias),)


def to_fp8(model: "PeftModel", together: Sequence[Sequence[str]] = ()) -> None:
    """Convert the frozen linears of the layers to float8, in place, one by one.

    Args:
        model: a model from `attach_lora`.
        together: names of a layer's linears that read one input, see `PackedBlock.together`; they
            are quantised as one.
    """
    for layer in layers_of(base_of(model)):
        for names in together:
            _to_fp8_together(layer, names)
        adapters = [module for module in layer.modules() if has_lora(module)]
        within = {part for adapter in adapters for part in adapter.modules()} - {*adapters}
        for parent in [module for module in layer.modules() if module not in within]:
            if has_lora(parent):
                if isinstance(parent.base_layer, nn.Linear):
                    parent.base_layer = Fp8Linear(parent.base_layer)
                continue
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, Fp8Linear(linear))


def _to_fp8_together(layer: nn.Module, names: Sequence[str]) -> None:
    modules = [layer.get_submodule(name) for name in names]
    linears = [cast(nn.Linear, split_lora(module)[0]) for module in modules]
    for name, module, eight in zip(names, modules, Fp8Linear.together(linears), strict=True):
        if has_lora(module):
            module.base_layer = eight
        else:
            layer.set_submodule(name, eight)
