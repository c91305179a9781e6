"""A frozen base of which each process holds a share, by torch's FSDP2.

The weights of a layer are gathered when it is computed, and freed afterwards; so are those of the
embedding and the head. What trains stays whole in every process: gradients, optimiser and
checkpoints are those of a base that every process holds. transformers' own forward gathers by
FSDP2's hooks; passes over packed rows, which take the weights and not the modules, by `Gathered`.

All processes must gather the same layers in the same order: each runs as many passes as the others.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.errors import UserError
from glmtune.models.families import family_of
from glmtune.models.family import layers_of

_MARK, _SUM = "_glmtune_comes_and_goes", "_glmtune_sum_of_bytes"


def shard_base(model: nn.Module, base: PreTrainedModel, device: torch.device) -> None:
    """Share out the frozen weights of a base among the processes, in place.

    Called by all processes, with the same weights; none waits for another. `begin_gathering` comes
    next.

    Args:
        model: the base in PEFT's wrapping, in the CPU's memory or on the device; what is to be
            trained is moved to the device whole.
        base: the base in it.
        device: of this process; a layer at a time is whole there.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    tables = dict.fromkeys((base.get_input_embeddings(), base.get_output_embeddings()))
    is_tied = len({getattr(table, "weight", table) for table in tables}) < len(tables)
    # A table that embedding and head have in common is gathered for both at once.
    units: list[Any] = [*layers_of(base), *([list(tables)] if is_tied else tables)]
    whole = _kept_whole(model, units)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for unit in units:
        for module in _modules(unit):
            _make_ready(module, device)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


def begin_gathering(model: nn.Module, base: PreTrainedModel, device: torch.device) -> None:
    """Compute once, all processes together: the first forward has to be that of the whole.

    It tells FSDP2 what belongs together. Then weights whose bytes are called floats are compared
    with what they were.

    Raises:
        UserError: they are others.
    """
    ids = family_of(base.config).probe_row(base.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    for layer in layers_of(base):
        with gathered(layer):
            for name, linear in layer.named_modules():
                if hasattr(linear, _SUM) and _sum_of_bytes(linear) != getattr(linear, _SUM):
                    raise UserError(
                        f"shard_base: gathering changes the 4-bit weight of {name}, by torch "
                        f"{torch.__version__}; leave shard_base or quantization_bit out"
                    )


def _sum_of_bytes(linear: Any) -> int:
    """A sum that nearly every change of a weight's bytes changes."""
    return int(linear.weight.data.view(torch.uint8).sum(dtype=torch.int64))


def _kept_whole(model: nn.Module, units: Sequence[Any]) -> set[nn.Parameter]:
    """What trains, and what is in no unit.

    Nothing else may be kept: a parameter that is shared out would stay whole on the device as long
    as somebody refers to it.
    """
    within = {p for unit in units for module in _modules(unit) for p in module.parameters()}
    return {p for p in model.parameters() if p.requires_grad or p not in within}


def _modules(unit: nn.Module | Sequence[nn.Module]) -> Sequence[nn.Module]:
    return unit if isinstance(unit, list) else [cast(nn.Module, unit)]


def comes_and_goes(linear: nn.Module) -> bool:
    """Whether a linear's weight has memory only while its layer is gathered."""
    return hasattr(linear, _MARK)


def _make_ready(module: nn.Module, device: torch.device) -> None:
    """Mark linears; make bitsandbytes' 4-bit weights plain tensors, whose scales stay whole.

    In its forward, bitsandbytes gives such a weight the scales of `quant_state` again, and takes
    its bytes in any type. FSDP2 before torch 2.13 shares out floats alone, and on a GPU copies
    those of 16 bits through float32, which makes all that are not numbers the same one. So the
    bytes are called float32.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            setattr(linear, _MARK, True)
        if bitsandbytes and isinstance(linear, bitsandbytes.nn.Linear4bit):
            state = linear.weight.quant_state
            state.to(device)
            linear.quant_state = state
            floats = linear.weight.data.flatten().view(torch.float32)[:, None]
            linear.weight = nn.Parameter(floats, requires_grad=False)
            setattr(linear, _SUM, _sum_of_bytes(linear))


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights are shared out, so that they have to be gathered."""
    # Importing FSDP2 takes a second, which a run that does not share its base need not pay.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """Inside the `with` block, a module's weights are whole, if they are shared out."""
    if not is_sharded(module):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


class Gathered:
    """Gathers the layers around functions of their weights, forward and backward.

    The weights that the functions take are those of the modules while these are gathered: tensors
    that stay the same, and whose memory comes and goes.

    Args:
        layers: a list of modules, in the order of the forward pass; nothing happens to those that
            are not shared out.
    """

    def __init__(self, layers: Any):
        self._layers = layers
        self._is_sharded = is_sharded(layers[0])

    def enter(self, number: int, hidden: Tensor) -> Tensor:
        """Gather a layer, before its forward; its backward pass frees it behind this input."""
        if not self._is_sharded:
            return hidden
        self.gather(number, number + 1)
        return _Then.apply(hidden, partial(self.free, number))

    def leave(self, number: int, hidden: Tensor) -> Tensor:
        """Free a layer, after its forward; its backward pass gathers it before this output."""
        if not self._is_sharded:
            return hidden
        self.free(number)
        return _Then.apply(hidden, partial(self._gather_again, number))

    def gather(self, number: int, following: int) -> None:
        """Wait for a layer's weights, and begin to gather those of the one that follows."""
        self._layers[number].unshard()
        if 0 <= following < len(self._layers):
            self._layers[following].unshard(async_op=True)

    def free(self, number: int) -> None:
        """Free a layer's weights."""
        self._layers[number].reshard()

    def _gather_again(self, number: int) -> None:
        """Gather a layer for its backward pass."""
        self.gather(number, number - 1)
        if number == 0:
            # Its input, the embedding, has no gradient with which it would be freed.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self.free, 0))


class _Then(torch.autograd.Function):
    """Gives its input, and calls a function when the gradient of it has come."""

    @staticmethod
    def forward(ctx, hidden, call):
        ctx.call = call
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        ctx.call()
        return grad, None
