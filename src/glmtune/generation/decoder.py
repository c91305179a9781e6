"""The decoder: a batch of prompts in, tokens out as they come.

A prompt is read once (`prefill`), and then each step reads one token a row (`decode`), chooses the
next and notes which rows have ended, all on the device and in buffers of fixed size and place. On a
GPU the step is captured once and replayed, so that it costs one launch, and the host looks only
every few tokens, so that neither waits for the other.

Shapes: B rows of a batch, S columns of the longest prompt, K columns of the buffers, D head size,
V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmtune.config.groups import GenerationSettings
from glmtune.errors import UserError
from glmtune.generation.prompts import EncodedPrompt
from glmtune.generation.reference import NOT_FINITE, left_padded
from glmtune.generation.sampling import choose, largest, random_numbers
from glmtune.generation.weights import can_be_captured, most_rows_for_kernels, read_weights
from glmtune.hardware import capture_graph, check_decoding
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.decoding import (
    Angles,
    KeyValueCache,
    Projection,
    decode,
    prefill,
    run_block,
    run_block_in_few_kernels,
    run_head,
    run_head_in_few_kernels,
)
from glmtune.models.chatglm.layout import read_layout
from glmtune.ops.attention import prefix_lm_mask
from glmtune.ops.rotary import rotary_angles

TOKENS_PER_LOOK = 8
"""Steps that a GPU is given before the host looks at what came out."""
COLUMNS_PER_GROWTH = 128
"""Buffers have a multiple of so many columns: few sizes, so that few steps are captured."""
WARM_UP_STEPS = 3
"""Before a capture, so that what libraries set up at first use is not captured."""


@dataclass
class Buffers:
    """All that a step reads and writes. Column k belongs to the k-th token of a row."""

    settings: GenerationSettings
    """What is built into the step: penalty and filters."""
    cache: KeyValueCache
    tokens_BK: Tensor
    mask_BK: Tensor
    """True for the columns that hold a real token by now."""
    angles_2BK2Q: Tensor
    """Cosines and sines of all positions, Q = D / 4."""
    column_1: Tensor
    """Of the newest token, which is not in the cache yet."""
    finished_B: Tensor
    fault_B: Tensor
    """0, or NaN once a score was not finite."""
    seen_BV: Tensor | None
    numbers_BK: Tensor | None
    replay: Callable[[], None] | None = None
    """The captured step."""

    @classmethod
    def new(
        cls,
        config: ChatGLMConfig,
        settings: GenerationSettings,
        num_rows: int,
        num_columns: int,
        like: Tensor,
    ) -> "Buffers":
        """Buffers for so many rows and columns, on the device and of the type of a tensor."""

        def new(value: int, *shape: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=like.device)

        shape = (num_rows, num_columns)
        with_penalty = settings.repetition_penalty is not None
        return cls(
            settings=settings,
            cache=KeyValueCache.zeros(config, *shape, like),
            tokens_BK=new(0, *shape, dtype=torch.long),
            mask_BK=new(1, *shape, dtype=torch.bool),
            angles_2BK2Q=new(0, 2, *shape, 2, config.head_dim // 4, dtype=like.dtype),
            column_1=new(0, 1, dtype=torch.long),
            finished_B=new(0, num_rows, dtype=torch.bool),
            fault_B=new(0, num_rows, dtype=torch.float32),
            seen_BV=new(0, num_rows, config.vocab_size, dtype=torch.bool) if with_penalty else None,
            numbers_BK=new(0, *shape, dtype=torch.float64) if settings.draws else None,
        )

    def fits(self, settings: GenerationSettings, num_rows: int, num_columns: int) -> bool:
        """Whether they serve for such a batch."""
        rows, columns = self.tokens_BK.shape
        return self.settings == settings and rows == num_rows and columns >= num_columns


def find_stop_ids(model: Any) -> list[int]:
    """The ids at which an answer ends, as the model's generation_config or config names them."""
    for config in (model.generation_config, model.config):
        stop = config.eos_token_id
        if stop is not None:
            return [stop] if isinstance(stop, int) else list(stop)
    raise AssertionError("the model names no eos_token_id")


class Decoder:
    """Answers batches of prompts with a model as it stands when this is made.

    An adapter that is disabled then is not applied, also if it is enabled later.

    Args:
        model: a ChatGLM-6B in evaluation mode, plain or in PEFT's wrapping.
        stop_ids: tokens at which an answer ends.
        bits: 8 or 4 round the linears for speed; see `read_weights`.
        merge: merge the adapter into copies of the weights; likewise.
        compiled: compile the layers of the one-token step, which takes a minute and is faster for
            more rows than the kernels are for.
        device: where to answer; by default where the model is. A model that waits in CPU memory is
            brought to a GPU a linear at a time, so that there it takes its rounded size.
        beside: a decoder of the same model with the same settings; what both read alike is shared.

    Raises:
        UserError: the weights cannot be had in so few bits, or the device lacks something.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        *,
        bits: int = 16,
        merge: bool = False,
        compiled: bool = False,
        device: torch.device | None = None,
        beside: "Decoder | None" = None,
    ):
        self.config: ChatGLMConfig = model.config
        self.device: torch.device = device or model.device
        check_decoding(self.device, bits, compiled)
        self._linears: dict[tuple[nn.Module, int], Projection] = beside._linears if beside else {}
        with torch.inference_mode():
            self.weights = read_weights(
                model, bits=bits, merge=merge, device=self.device, known=self._linears
            )
        self.captures = self.device.type == "cuda" and can_be_captured(self.weights)
        self._most_rows_for_kernels = most_rows_for_kernels(self.weights, self.config)
        self._is_stop_V = torch.zeros(self.config.vocab_size, dtype=torch.bool, device=self.device)
        self._is_stop_V[list(stop_ids)] = True
        self._buffers: Buffers | None = None
        self._block: Callable[..., Tensor] = run_block
        self._head: Callable[..., Tensor] = run_head
        if compiled:
            # With it, products of one row become reductions that conversions are fused into.
            options: dict[str, Any] = {"coordinate_descent_tuning": True}
            self._block = torch.compile(run_block, options=options)
            self._head = torch.compile(run_head, options=options)

    @classmethod
    def of(
        cls,
        model: Any,
        settings: GenerationSettings,
        device: torch.device | None = None,
        beside: "Decoder | None" = None,
    ) -> "Decoder":
        """A decoder that ends answers where the model does, with the bits that are asked for."""
        return cls(
            model,
            find_stop_ids(model),
            bits=settings.decoder_bits,
            compiled=settings.decode_compile,
            device=device,
            beside=beside,
        )

    @torch.inference_mode()
    def stream(
        self, prompts: Sequence[EncodedPrompt], settings: GenerationSettings
    ) -> Iterator[list[list[int]]]:
        """The tokens of each prompt's answer, some more at a time, until all have ended.

        An answer that has ended goes on with padding while others do not; `finish` ends one.

        Args:
            prompts: one batch, which must fit into the model's positions with its answers.
            settings: without beams; stop strings are the caller's concern.

        Raises:
            UserError: the model's logits are not finite.
        """
        buffers, num_prompt_columns = self._read_prompts(prompts, settings)
        start, end = num_prompt_columns, num_prompt_columns + settings.max_new_tokens
        made = start + 1
        while True:
            rows = buffers.tokens_BK[:, start:made].tolist()
            if buffers.fault_B.isnan().any():
                self._buffers = None  # the cache is spoilt
                raise UserError(NOT_FINITE)
            yield rows
            if made == end or buffers.finished_B.all():
                return
            start, made = made, min(made + self._tokens_per_look, end)
            for num_columns in range(start, made):
                if buffers.replay is None:
                    self._step(buffers, num_columns)
                else:
                    buffers.replay()

    @torch.inference_mode()
    def finish(self, row: int) -> None:
        """Take a row of the batch that is streamed as ended, as for a stop string."""
        assert self._buffers is not None, "nothing is streamed"
        self._buffers.finished_B[row] = True

    @property
    def _tokens_per_look(self) -> int:
        return TOKENS_PER_LOOK if self.device.type == "cuda" else 1

    def _read_prompts(
        self, prompts: Sequence[EncodedPrompt], settings: GenerationSettings
    ) -> tuple[Buffers, int]:
        """Fill the buffers from prompts, as far as the first token of each answer."""
        pad_id = self.config.pad_token_id
        input_ids_BS, valid_BS = left_padded(prompts, pad_id, self.device)
        num_rows, num_columns = input_ids_BS.shape
        buffers = self._buffers_for(num_rows, num_columns + settings.max_new_tokens, settings)
        num_later = buffers.tokens_BK.shape[1] - num_columns
        buffers.tokens_BK.copy_(F.pad(input_ids_BS, (0, num_later), value=pad_id))
        buffers.mask_BK.copy_(F.pad(valid_BS, (0, num_later), value=False))
        buffers.column_1.fill_(num_columns - 1)
        buffers.finished_B.zero_()
        buffers.fault_B.zero_()
        if buffers.seen_BV is not None:
            # Padding was not said: an answer must not depend on it, so <sop> stands in its place.
            said_BS = torch.where(valid_BS, input_ids_BS, input_ids_BS[:, -1:])
            buffers.seen_BV.zero_().scatter_(1, said_BS, True)
        if buffers.numbers_BK is not None:
            later = buffers.numbers_BK[:, num_columns : num_columns + settings.max_new_tokens]
            later.copy_(random_numbers(settings, prompts, self.device))

        # Later columns hold answer tokens, whatever their ids: their positions are known now.
        later_valid_BK = F.pad(valid_BS, (0, num_later), value=True)
        layout = read_layout(buffers.tokens_BK, self.config, later_valid_BK)
        angles = rotary_angles(layout.position_ids_B2S, self.config.head_dim)
        for buffer, angle in zip(buffers.angles_2BK2Q, angles, strict=True):
            buffer.copy_(angle)
        logits_BV = prefill(
            self.weights,
            input_ids_BS,
            prefix_lm_mask(layout.prefix_end_B, valid_BS),
            Angles(*buffers.angles_2BK2Q[:, :, :num_columns]),
            buffers.cache,
        )
        self._choose(buffers, logits_BV)
        return buffers, num_columns

    def _buffers_for(
        self, num_rows: int, num_columns: int, settings: GenerationSettings
    ) -> Buffers:
        """Those of the last batch if they serve, or new ones, with a captured step on a GPU."""
        built_in = settings.model_copy(
            update={"max_new_tokens": 0, "seed": 0, "stop_strings": None}
        )
        if self._buffers is None or not self._buffers.fits(built_in, num_rows, num_columns):
            self._buffers = None  # free them first
            num_columns += -num_columns % COLUMNS_PER_GROWTH
            like = self.weights.final_norm.weight
            self._buffers = Buffers.new(self.config, built_in, num_rows, num_columns, like)
            if self.captures:
                self._buffers.replay = self._capture(self._buffers)
        return self._buffers

    def _capture(self, buffers: Buffers) -> Callable[[], None]:
        """The step over all columns as a CUDA graph. Buffers hold nonsense meanwhile."""
        step = partial(self._step, buffers)
        with torch.cuda.device(self.device):
            graph, _ = capture_graph(step, WARM_UP_STEPS, step)
        return graph.replay

    def _step(self, buffers: Buffers, num_columns: int | None = None) -> None:
        """Read the newest token of each row and choose the next; looks at the first columns only.

        Nothing here may depend on a tensor's value on the host.
        """
        column_1 = buffers.column_1
        functions = self._block, self._head
        if len(buffers.tokens_BK) <= self._most_rows_for_kernels:
            functions = run_block_in_few_kernels, run_head_in_few_kernels
        buffers.mask_BK.index_fill_(1, column_1, True)
        logits_BV = decode(
            self.weights,
            buffers.tokens_BK.index_select(1, column_1),
            column_1,
            buffers.mask_BK[:, None, None, :num_columns],
            Angles(*buffers.angles_2BK2Q.index_select(2, column_1)),
            buffers.cache,
            *functions,
        )
        self._choose(buffers, logits_BV)

    def _choose(self, buffers: Buffers, logits_BV: Tensor) -> None:
        """Choose the next token of each row, which becomes its newest."""
        top_B, token_B = largest(logits_BV)
        buffers.fault_B.add_(top_B, alpha=0)  # NaN where any score is; infinite ones give NaN
        buffers.column_1.add_(1)
        settings, numbers_BK = buffers.settings, buffers.numbers_BK
        if settings.draws or settings.repetition_penalty is not None:
            draw_B1 = None if numbers_BK is None else numbers_BK.index_select(1, buffers.column_1)
            token_B = choose(logits_BV.float(), settings, buffers.seen_BV, draw_B1)
        token_B1 = token_B.masked_fill(buffers.finished_B, self.config.pad_token_id)[:, None]
        buffers.tokens_BK.index_copy_(1, buffers.column_1, token_B1)
        buffers.finished_B.logical_or_(self._is_stop_V.index_select(0, token_B1[:, 0]))
        if buffers.seen_BV is not None:
            buffers.seen_BV.scatter_(1, token_B1, True)
