"""The memory of a run, computed before anything is loaded, and what that decides.

The length of packs and the number of recomputed layers are chosen here, from the recipe,
config.json, the lengths of the rows and the card.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glmtune.config.settings import TrainSettings
from glmtune.data.packing import full_length
from glmtune.data.split import split_rows
from glmtune.hardware import GIB, Card, NumberFormat, can_compile
from glmtune.models.families import family_of
from glmtune.models.shape import bits_of
from glmtune.training.plan import (
    CAPTURED_LENGTHS,
    Lengths,
    captured_supervised,
    count_steps,
    make_plan,
)
from glmtune.training.planning.memory import Batch, Estimate, Layout, Setup, estimate

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedConfig

# Lengths of packs to choose from, and their relative speed on an H200 without recomputed layers
# (2,048 is interpolated). Packs longer than the first would not be faster.
PACK_SPEEDS = {8192: 1.0, 4096: 0.98, 2048: 0.93, 1024: 0.87}
PACK_LENGTH_ON_CPU = 2048
# Packs up to this length are captured as a CUDA graph if the base is in 8 or 4 bits and memory
# allows it. Of a model of 9B in 4 bits, kernels take 157 ms a step of 2,048 tokens on an H200, and
# launching them took 360.
CAPTURED_PACK = 2048
# Recomputing every layer adds one forward pass to a forward and a backward pass.
_RECOMPUTE_COST = 0.5
# Usable share of a card's memory: a desktop or another program may hold the rest.
_USABLE = 0.95
# Relative error of an estimate.
ERROR = 0.1


class EqualRows(NamedTuple):
    """Rows that do not exist yet: all of one length, with every token supervised."""

    lengths_R: np.ndarray

    @classmethod
    def of(cls, settings: TrainSettings, length: int) -> "EqualRows":
        """Make enough rows for two steps, all of one length."""
        num_rows = 2 * settings.per_device_train_batch_size * settings.passes_of_all(1)
        return cls(np.full(num_rows, length))

    @property
    def num_labels_R(self) -> np.ndarray:
        """See `Lengths`."""
        return self.lengths_R

    def split(self, eval_ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Lengths`."""
        return split_rows(len(self.lengths_R), eval_ratio, seed)


@dataclass(frozen=True)
class Forecast:
    """A run's passes, as the card allows them, and the memory they need."""

    card: Card
    setup: Setup
    batch: Batch
    """The heaviest pass."""
    recompute: int
    """How many layers, from the first, are recomputed in the backward pass."""
    estimate: Estimate
    frugal: "Forecast | None" = None
    """The same run with no memory spent on speed, if the card leaves a choice."""

    @property
    def layout(self) -> Layout:
        """The layout of the rows in a pass."""
        return self.setup.layout

    @property
    def pack_length(self) -> int | None:
        """Tokens of a pack; None where a pass takes rows by their number."""
        return self.batch.num_tokens if self.layout == "packed" else None

    @property
    def least(self) -> "Forecast":
        """The least memory that these settings need: short packs, recomputed layers."""
        return self.frugal or self

    @property
    def needed_gib(self) -> float:
        """GiB that the card must have."""
        return self.estimate.needed / GIB

    @property
    def room_gib(self) -> float:
        """GiB of the card that are available to the run, after other programs."""
        return min(_USABLE * self.card.gib, self.card.free_gib)

    @property
    def fits(self) -> bool:
        """Whether it should fit."""
        return not self.card.gib or self.needed_gib <= self.room_gib

    @property
    def cannot_fit(self) -> bool:
        """Whether the run cannot fit even if the estimate is too high by its error.

        Memory of a CPU can be swapped: slow, but possible.
        """
        least = (self.estimate.needed - ERROR * self.estimate.allocated) / GIB
        return self.card.on_gpu and least > min(self.card.gib, self.card.free_gib)

    def as_record(self) -> dict[str, Any]:
        """All of it as plain numbers, sizes in GiB."""
        parts = {f"{name}_gib": size / GIB for name, size in asdict(self.estimate).items()}
        return {
            "card": self.card.name,
            "card_gib": self.card.gib,
            "layout": self.layout,
            "dtype": str(self.setup.dtype).removeprefix("torch."),
            "quantization_bit": self.setup.bits,
            "quantize_head": self.setup.quantize_head,
            "tokens_per_pass": self.batch.num_tokens,
            "layers_recomputed": self.recompute,
            "num_layers": self.setup.shape.num_layers,
            **parts,
            "allocated_gib": self.estimate.allocated / GIB,
            "needed_gib": self.needed_gib,
            "least_gib": self.least.needed_gib,
            "fits": self.fits,
            "cannot_fit": self.cannot_fit,
        }


Forecaster = Callable[[TrainSettings], Forecast]
"""The forecast of any settings on the same card, with the same base and rows."""


def forecast(
    settings: TrainSettings,
    config: "PreTrainedConfig | Any",
    dtype: NumberFormat,
    card: Card,
    rows: Lengths,
    num_processes: int = 1,
) -> Forecast:
    """Choose length of packs and layers to recompute, and estimate what the run then takes.

    Args:
        settings: the run's settings.
        config: configuration of the base model, or what `Family.read_settings` makes of it.
        dtype: the compute type.
        card: the device that each process trains on.
        rows: rows of the data set.
        num_processes: processes that share a step.
    """
    layout, family = choose_layout(settings, card.on_gpu), family_of(config)
    shape = family.shape(config)
    setup = Setup(
        shape,
        dtype,
        layout,
        compiled=layout != "padded" and can_compile(card, shape.head_dim, family.head_dims),
        on_gpu=card.on_gpu,
        is_hopper=card.is_hopper,
        bits=settings.bits or bits_of(config),
        quantize_head=settings.quantize_head,
        is_fp8=settings.base_dtype == "fp8",
        rank=settings.lora_rank or family.lora_rank,
        targets=family.targets(settings.lora_target, shape),
        has_dropout=settings.lora_dropout > 0,
        num_shares=num_processes if settings.shard_base else 1,
    )
    wish = settings.gradient_checkpointing
    if layout == "packed":
        choices = _packs(settings, card, rows)
        batch, recompute = _choose_pack(choices, wish, setup, card)
        chosen_setup, captured = setup, replace(setup, captures_packs=True)
        is_small = setup.bits is not None and batch.num_tokens <= CAPTURED_PACK
        if setup.compiled and is_small and holds(card, captured, batch, recompute):
            chosen_setup = captured
    else:
        choices = [_largest_batch(settings, setup, rows, num_processes)]
        (batch,) = choices
        recompute = choose_recompute(wish, setup, batch, card)
        chosen_setup = setup
    forecasts = []
    most = setup.shape.num_layers - 1 if wish == "auto" and card.on_gpu else recompute
    for how, size, again in ((chosen_setup, batch, recompute), (setup, choices[-1], most)):
        forecasts.append(Forecast(card, how, size, again, estimate(how, size, again)))
    chosen, frugal = forecasts
    return replace(chosen, frugal=frugal) if frugal.needed_gib < chosen.needed_gib else chosen


def make_forecaster(
    accelerator: "Accelerator", config: "PreTrainedConfig", dtype: NumberFormat, rows: Lengths
) -> Forecaster:
    """Make a forecaster for any settings on a run's device, with its base and rows."""
    card, num_processes = Card.of(accelerator.device), accelerator.num_processes
    return lambda settings: forecast(settings, config, dtype, card, rows, num_processes)


def choose_layout(settings: TrainSettings, on_gpu: bool) -> Layout:
    """The layout of the rows in a pass; by default packed on a GPU.

    If both the rows of a pass and the number of steps are given, as in the original's command, they
    were chosen for each other: packs would go through the data twenty times as often.
    """
    if settings.layout != "auto":
        return settings.layout
    if not on_gpu:
        return "padded"
    chosen = {"per_device_train_batch_size", "max_steps"} <= settings.model_fields_set
    return "exact" if chosen and not settings.tokens_per_step else "packed"


def choose_recompute(wish: bool | str, setup: Setup, batch: Batch, card: Card) -> int:
    """How many layers to recompute, from the first: as few as fit, or all or none if so set.

    "All" leaves out the last, whose backward pass begins as soon as it is done.
    """
    most = setup.shape.num_layers - 1
    if wish != "auto":
        return most if wish else 0
    if not card.on_gpu:
        return 0
    fitting = (k for k in range(most) if holds(card, setup, batch, k))
    return next(fitting, most)


def holds(card: Card, setup: Setup, batch: Batch, recompute: int) -> bool:
    """Whether such passes fit into the usable share of a card, whatever else runs there now."""
    return estimate(setup, batch, recompute).needed <= _USABLE * card.gib * GIB


def _packs(settings: TrainSettings, card: Card, rows: Lengths) -> list[Batch]:
    """The packs that a run may take, the shortest last."""
    share = rows.num_labels_R.sum() / rows.lengths_R.sum()

    def pack(length: int) -> Batch:
        return Batch(length, max(1, round(share * length)))

    longest = full_length(rows.lengths_R)
    if settings.tokens_per_step or not card.on_gpu:
        return [pack(settings.tokens_per_step or max(PACK_LENGTH_ON_CPU, longest))]
    return [pack(max(length, longest)) for length in PACK_SPEEDS]


def _choose_pack(
    packs: list[Batch], wish: bool | str, setup: Setup, card: Card
) -> tuple[Batch, int]:
    """The pack length and recomputed layers of the highest speed; if none fits, the shortest."""
    choices = []
    for batch, speed in zip(packs, PACK_SPEEDS.values(), strict=False):
        recompute = choose_recompute(wish, setup, batch, card)
        seconds = (1 + _RECOMPUTE_COST * recompute / setup.shape.num_layers) / speed
        choices.append((not holds(card, setup, batch, recompute), seconds, batch, recompute))
    misfits, _, batch, recompute = min(choices, key=lambda choice: choice[:2])
    return choices[-1][2:] if misfits else (batch, recompute)


def _largest_batch(
    settings: TrainSettings, setup: Setup, rows: Lengths, num_processes: int
) -> Batch:
    plan = make_plan(settings, rows, None, num_processes)
    padded = setup.layout == "padded"
    part = plan.heaviest(count_steps(settings, plan), num_processes, padded)
    lengths_B = rows.lengths_R[part]
    num_supervised = int(rows.num_labels_R[part].sum())
    if padded:
        return Batch(len(part) * int(lengths_B.max()), num_supervised)
    num_tokens = int(lengths_B.sum())
    if setup.captured:
        # Graphs exist for lengths that are multiples, and for each quarter of supervised tokens.
        num_tokens = CAPTURED_LENGTHS * -(-num_tokens // CAPTURED_LENGTHS)
        num_supervised = captured_supervised(num_tokens, num_supervised)
    return Batch(num_tokens, num_supervised)


def rows_of_reference(forecast: Forecast, longest: int, most: int = 6) -> int:
    """How many rows the reference may compute at once with no more memory than the run's passes.

    Args:
        forecast: forecast of the run.
        longest: tokens of the longest of those rows.
        most: upper limit of rows.
    """
    plain = replace(forecast.setup, layout="padded", compiled=False)
    limit = forecast.estimate.of_the_pass

    def fits(num_rows: int) -> bool:
        batch = Batch(num_rows * longest, num_rows * longest)
        return estimate(plain, batch, forecast.recompute).of_the_pass <= limit

    return next((num_rows for num_rows in range(most, 1, -1) if fits(num_rows)), 1)
