"""The memory of a pass, summed up from what it must hold, before anything is loaded.

Memory peaks at one of three moments: at the logits, in the backward pass of the last layer, or in
the backward pass of a recomputed layer. Until then each layer keeps what its backward pass needs.
docs/memory.md derives the terms and compares them with measurements.

Sizes of activations are counted in values a token: one is `hidden_size` numbers of the compute
type. Shapes: B rows, S tokens of a padded row, T tokens of a pass, L supervised tokens, V
vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

from glmtune.hardware import NumberFormat
from glmtune.models.shape import LinearShape, Shape
from glmtune.ops import CHUNK, MOST_RANK

Layout = Literal["padded", "exact", "packed"]
"""The layout of a pass: rows padded to the longest, end to end, or in packs of one length."""

# cuBLAS workspaces, for each stream and each of two threads: one of forward, one of backward.
_WORKSPACE, _HOPPER_WORKSPACE, _THREADS = 8320 << 10, 32 << 20, 2


@dataclass(frozen=True)
class Setup:
    """What is trained, in which numbers, and how a pass is computed."""

    shape: Shape
    dtype: NumberFormat
    layout: Layout
    compiled: bool = False
    """Whether rows end to end go through the compiled block and the kernels."""
    on_gpu: bool = True
    is_hopper: bool = False
    bits: int | None = None
    """8 or 4 if the frozen linears are quantised."""
    quantize_head: bool = False
    is_fp8: bool = False
    rank: int = 8
    targets: tuple[str, ...] = ()
    """The linears that have an adapter."""
    has_dropout: bool = True
    captures_packs: bool = False
    """Whether short packs are captured, too, see `captured`."""
    num_shares: int = 1
    """Processes that share the base; layers are then gathered, and passes are not captured."""

    @property
    def captured(self) -> bool:
        """Whether each length of a pass is captured as a CUDA graph, as pays off for a few rows."""
        if self.num_shares > 1:
            return False
        return self.compiled and (self.layout == "exact" or self.captures_packs)

    @property
    def mlp(self) -> float:
        """What the MLP keeps for the backward pass between its linears, in values."""
        return self.shape.kept_by_mlp / self.shape.hidden_size

    @property
    def value_bytes(self) -> int:
        """Bytes of a value: one token's."""
        return self.shape.hidden_size * self.dtype.itemsize

    def parameters(self) -> int:
        """Number of the adapter's parameters."""
        return self.shape.adapter_parameters(self.rank, self.targets)


@dataclass(frozen=True)
class Batch:
    """The size of a pass."""

    num_tokens: int
    """Tokens of the pass, filler and padding included."""
    num_supervised: int


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of training, part by part."""

    weights: float
    """The base's weights, or a process's share of them."""
    adapter: float
    """Its weights and gradients, in float32."""
    optimiser: float
    """Two moments of each of the adapter's weights."""
    activations: float
    """What the layers keep for the backward pass."""
    logits: float
    """The logits, and the gradient of the last hidden states, which the head computes at once."""
    way_back: float
    """How much higher memory peaks inside a layer than at the logits."""
    buffers: float
    """The libraries' workspaces, a quantised weight as floats, one at a time, and layers that are
    gathered."""
    outside: float
    """Not counted by the allocator: CUDA itself, what is reserved and not in use."""

    @property
    def allocated(self) -> float:
        """The peak as counted by `torch.cuda.max_memory_allocated`."""
        fixed = self.weights + self.adapter + self.optimiser + self.buffers
        return fixed + self.of_the_pass

    @property
    def of_the_pass(self) -> float:
        """What exists only while a pass is computed."""
        return self.activations + self.logits + self.way_back

    @property
    def needed(self) -> float:
        """What the device must have."""
        return self.allocated + self.outside


def estimate(setup: Setup, batch: Batch, recompute: int = 0) -> Estimate:
    """The memory that a run of such passes takes.

    Args:
        setup: what is trained, and how.
        batch: its largest pass.
        recompute: how many layers, from the first, keep only their input; at most all but the last.
    """
    num_layers, token_bytes = setup.shape.num_layers, setup.value_bytes * batch.num_tokens
    layer, last = kept_by_layer(setup), kept_by_layer(setup, supervised_share(setup, batch))
    kept = recompute + (num_layers - 1 - recompute) * layer + last + kept_once(setup)
    logits = logit_bytes(setup, batch)
    moments = [logits, way_back(setup, supervised_share(setup, batch)) * token_bytes]
    if recompute:
        again = recompute - 1 + layer + kept_once(setup) + way_back(setup)
        moments.append((again - kept) * token_bytes)
    activations = kept * token_bytes
    of_the_pass = activations + max(moments)
    parameters = setup.parameters()
    # A captured pass writes its gradients beside those that it adds them to.
    copies = 3 if setup.captured else 2
    return Estimate(
        weights=share_bytes(setup),
        adapter=4 * copies * parameters,
        optimiser=8 * parameters,
        activations=activations,
        logits=logits,
        way_back=of_the_pass - activations - logits,
        buffers=buffer_bytes(setup),
        outside=outside_bytes(setup, of_the_pass),
    )


def supervised_share(setup: Setup, batch: Batch) -> float:
    """Share of the tokens that leave the last layer: in packed passes, only the supervised ones."""
    return 1.0 if setup.layout == "padded" else batch.num_supervised / batch.num_tokens


def kept_by_layer(setup: Setup, share: float = 1.0) -> float:
    """What a layer keeps for the backward pass, in values a token.

    The inputs of its norms, queries, keys and values, the attention's output with a float32 a head
    for its softmax, and the input of the MLP's activation. Everything else is recomputed from these
    by compiled code, or not needed, since the weights are frozen.

    Args:
        setup: what is trained, and how.
        share: share of the tokens that continue after the attention.
    """
    shape, itemsize = setup.shape, setup.dtype.itemsize
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    softmax = 4 * shape.num_heads / setup.value_bytes
    before = 1 + (shape.qkv_values + queries) / hidden + softmax
    # The MLP's norm reads a sum; where attention's output has a norm, the sum is computed again.
    after = max(1, shape.output_norms) + setup.mlp
    if setup.layout == "padded":
        before += (queries + keys) / hidden  # rotated, beside the projections' outputs
    if not setup.compiled and itemsize < 4:
        before += 2 * shape.head_dim / hidden  # cosines and sines in the compute type
    for linear in shape.linears:
        if linear.makes_qkv:
            before += kept_by_adapter(setup, linear)
        else:
            after += kept_by_adapter(setup, linear)
    return before + share * after


def kept_by_adapter(setup: Setup, linear: LinearShape) -> float:
    """What one linear's adapter keeps for its backward pass, in values a token: its input.

    Kernels of compiled layers that drop out inputs keep neither those nor masks: the inputs are
    computed again from what the layer keeps anyway. Where a norm reads the linear's output, the
    update is kept beside the output, not their sum (measured).
    """
    if linear.name not in setup.targets:
        return 0.0
    width, itemsize = linear.inputs / setup.shape.hidden_size, setup.dtype.itemsize
    mask = width / itemsize if setup.has_dropout else 0.0  # a byte a number
    if setup.layout == "padded":
        in_float32 = 4 / itemsize * width
        if setup.has_dropout and not setup.on_gpu:
            mask = in_float32  # the CPU's dropout keeps factors
        return in_float32 + mask + 4 * setup.rank / setup.value_bytes
    if not setup.compiled:
        return width + mask
    if setup.has_dropout and setup.rank <= MOST_RANK:
        is_read_by_norm = setup.shape.output_norms and linear.outputs == setup.shape.hidden_size
        return 1.0 if is_read_by_norm and not linear.makes_qkv else 0.0
    only_qkv = all(other.makes_qkv for other in setup.shape.linears if other.name in setup.targets)
    return mask if only_qkv else width


def kept_once(setup: Setup) -> float:
    """Cosines and sines in float32, in values a token."""
    return 4 * setup.shape.head_dim / setup.value_bytes


def logit_bytes(setup: Setup, batch: Batch) -> float:
    """The peak memory of the loss.

    The reference path holds logarithms of all probabilities, and two gradients of that size, in
    float32. The others take the supervised tokens in chunks, and compiled passes overwrite the
    logits with their gradient.
    """
    vocab_size, itemsize = setup.shape.vocab_size, setup.dtype.itemsize
    if setup.layout == "padded":
        return batch.num_tokens * (12 * vocab_size + setup.value_bytes)
    each = itemsize
    if not setup.compiled:
        each += 16 if itemsize < 4 else 12
    # Input and output of the last norm, and the gradient of its output.
    hidden = 3 * batch.num_supervised * setup.value_bytes
    return hidden + min(CHUNK, batch.num_supervised) * vocab_size * each


def way_back(setup: Setup, share: float = 1.0) -> float:
    """Gradients that exist at once inside a layer, in values a token.

    The gradients of the output and of the inner activation, which compiled code turns in place into
    that of GELU's input; other passes write a second one, and two more for the residual.
    """
    if setup.compiled:
        return share * (1 + setup.mlp)
    return share * (2 + 2 * setup.mlp)


def base_bytes(setup: Setup) -> int:
    """Weights of the base; float8 keeps each linear in two layouts, with a float32 a row."""
    shape = setup.shape
    size = shape.weight_bytes(setup.dtype, setup.bits, quantize_head=setup.quantize_head)
    if setup.is_fp8:
        for linear in shape.linears:
            values, lines = linear.outputs * linear.inputs, linear.outputs + linear.inputs
            size += shape.num_layers * ((2 - setup.dtype.itemsize) * values + 4 * lines)
    return size


def share_bytes(setup: Setup) -> float:
    """What a process holds of the base: all of it, or its share."""
    return base_bytes(setup) / setup.num_shares


def gathered_bytes(setup: Setup) -> float:
    """Weights of a base that is shared out, while they are whole: two layers, or the head.

    While a layer is computed, the next one comes; what comes is copied once from the message. The
    scales of 4-bit weights are always whole, and so are those weights while they are loaded.
    """
    if setup.num_shares == 1:
        return 0.0
    whole, table = base_bytes(setup), table_bytes(setup)
    layer = (whole - table * (1 if setup.shape.tied_head else 2)) / setup.shape.num_layers
    most = max(3 * layer, 2 * table)
    return max(most, whole - share_bytes(setup)) if setup.bits else most


def table_bytes(setup: Setup) -> float:
    """The embedding, or the head."""
    return setup.shape.vocab_size * setup.shape.hidden_size * setup.dtype.itemsize


def buffer_bytes(setup: Setup) -> float:
    """Workspaces of each stream, of which captured passes have two; and one weight as floats.

    Of a base that is shared out, also what is gathered of it.
    """
    size = gathered_bytes(setup)
    if setup.on_gpu:
        streams = 2 if setup.captured else 1
        workspace = _HOPPER_WORKSPACE if setup.is_hopper else _WORKSPACE
        size += streams * _THREADS * workspace
    if setup.bits:
        largest = max(linear.outputs * linear.inputs for linear in setup.shape.linears)
        # Integers are converted to floats, which are then scaled.
        size += largest * setup.dtype.itemsize * (2 if setup.bits == 8 else 1)
    return size


def outside_bytes(setup: Setup, of_the_pass: float) -> float:
    """CUDA with its kernels and the allocator's gaps; and what captured passes reserve.

    Captured passes have memory of their own, beside that in which a new length is warmed up.
    """
    if not setup.on_gpu:
        return 0.0
    return (0.75 * 2**30) + (of_the_pass if setup.captured else 0.0)
