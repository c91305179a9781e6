"""What stays fixed while a run trains, and how its moving parts are built."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel, get_scheduler

from glmtune.adapters import attach_lora
from glmtune.config import TrainConfig
from glmtune.data.packing import check_lengths, plan_packs
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.hardware import GIB, device_name, pick_device, pick_dtype, total_memory_gib
from glmtune.models.chatglm.packed import PackedModel, base_of, can_compile, to_fp8
from glmtune.training.checkpoints import TrainingState
from glmtune.training.memory import PACK_LENGTH_ON_CPU, Room
from glmtune.training.passes import CapturedPass, PackedPass, PaddedPass, Pass
from glmtune.training.plan import PackPlan, Plan, RowPlan, split_rows
from glmtune.training.watch import Watch

# Below this a card is short of memory for activations at the original's batch size.
RECOMPUTE_BELOW_GIB = 40

# How the rows of a pass lie: padded to the longest, end to end, or so in packs of one length.
Layout = Literal["padded", "exact", "packed"]

# Settings that change a run's numbers as they stand; `Run.identity` adds those that depend on more.
_NUMERIC_SETTINGS = (
    "seed", "eval_ratio", "train_sampling_strategy", "lora_rank", "lora_alpha", "lora_dropout",
    "lora_target", "base_dtype", "learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run's settings and data, and the numbers that follow from them."""

    config: TrainConfig
    accelerator: Accelerator
    rows: TokenRows
    plan: Plan
    eval_rows: np.ndarray
    """Row numbers held out for evaluation."""
    max_steps: int
    warmup_steps: int
    dtype: torch.dtype
    """Compute type of the base model."""
    base_name: str
    layout: Layout

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        accelerator: Accelerator,
        rows: TokenRows,
        model: PeftModel,
        base_name: str,
    ) -> "Run":
        """Work out the numbers of a run: its split, its global batch, its steps."""
        train_rows, eval_rows = split_rows(len(rows), config.eval_ratio, config.seed)
        layout = choose_layout(config, accelerator.device)
        seed = config.seed if config.data_seed is None else config.data_seed
        shuffle = config.train_sampling_strategy == "random"
        passes = accelerator.num_processes * config.gradient_accumulation_steps
        plan: Plan
        if layout == "packed":
            length = pack_length(config, model, accelerator.device, rows)
            check_lengths(rows, np.arange(len(rows)), length, config.dataset_path)
            plan = PackPlan(train_rows, seed, shuffle, rows.lengths_R, length, passes)
        else:
            batch_size = config.per_device_train_batch_size
            plan = RowPlan(train_rows, seed, shuffle, batch_size * passes, batch_size)
        max_steps = config.max_steps
        if max_steps <= 0:
            max_steps = plan.num_steps(config.num_train_epochs)
        warmup = config.warmup_steps
        return cls(
            config,
            accelerator,
            rows,
            plan,
            eval_rows,
            max_steps,
            warmup_steps=int(warmup) if warmup >= 1 else math.ceil(warmup * max_steps),
            dtype=model.get_input_embeddings().weight.dtype,
            base_name=base_name,
            layout=layout,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Every setting and fact that changes the run's numbers: a resumed run must have the same.

        How a global batch is dealt out to passes and processes is not among them, nor is the number
        of steps where the schedule does not depend on it: such a run may be made longer.
        """
        has_end = self.config.lr_scheduler_type in ("linear", "cosine")
        return {
            "base model": self.base_name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data sha256": self.rows.digest()[:16],
            "data_seed": self.plan.seed,
            "layout": self.layout,
            f"{self.plan.unit} per step": self.plan.step_size,
            "steps of the schedule": self.max_steps if has_end else "any",
            "warmup_steps": self.warmup_steps,
            **{name: getattr(self.config, name) for name in _NUMERIC_SETTINGS},
        }

    def recompute(self, model: PeftModel) -> bool:
        """Whether activations are computed again on the way back."""
        wish, device = self.config.gradient_checkpointing, self.accelerator.device
        if wish != "auto" or self.layout == "padded" or device.type != "cuda":
            return wants_recompute(self.config, device)
        if isinstance(self.plan, PackPlan):
            num_tokens = self.plan.pack_length
        else:
            longest = int(self.rows.lengths_R[self.plan.row_ids].max())
            num_tokens = self.config.per_device_train_batch_size * longest
        return not room_for(self.config, model, device).holds(num_tokens, recompute=False)

    def eval_parts(self) -> list[np.ndarray]:
        """Row numbers of each evaluation pass."""
        if isinstance(self.plan, PackPlan):
            return plan_packs(self.rows.lengths_R, self.eval_rows, self.plan.pack_length)
        # Rows of like length together, so that little is padded.
        by_length = self.eval_rows[np.argsort(self.rows.lengths_R[self.eval_rows], kind="stable")]
        size = self.config.per_device_eval_batch_size
        return [by_length[first : first + size] for first in range(0, len(by_length), size)]

    @property
    def eval_steps(self) -> int:
        """Steps between evaluations."""
        return self.config.eval_steps or self.config.save_steps


def start_accelerator(config: TrainConfig) -> tuple[Accelerator, torch.dtype]:
    """The device or devices that a run trains on, and the compute type of its base model.

    bfloat16 and float32 go without autocast: the base is in that type, the adapter in float32.
    float16 goes with Accelerate's autocast and gradient scaler, and with a word of caution.

    Raises:
        UserError: a number format or a way of distributing that is not to be had.
    """
    device = pick_device(config.use_cpu)
    dtype, caution = pick_dtype(device, config.bf16, config.fp16)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="fp16" if dtype == torch.float16 else "no"
    )
    # The loop counts its passes itself; a launcher's environment must not divide the loss again.
    accelerator.gradient_accumulation_steps = 1
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"accelerate launch: {kind.value} is not offered; each process holds the whole frozen "
            "base: launch with --multi_gpu, or without a launcher"
        )
    if caution and accelerator.is_main_process:
        print(f"note: {caution}")
    return accelerator, dtype


def enable_recompute(model: PreTrainedModel) -> None:
    """Compute activations again on the way back instead of keeping them."""
    # transformers 5.23 calls it after the activations, and warns of the name that 5.17 has alone.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def adapt(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Put the run's adapter on a base, and the base into the numbers that are asked for."""
    adapted = attach_lora(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_target,
    )
    if config.base_dtype == "fp8":
        to_fp8(adapted)
    return adapted


def choose_layout(config: TrainConfig, device: torch.device) -> Layout:
    """How the rows of a pass lie; on a GPU, where nothing else is said, in packs.

    Who gives both the rows of a pass and the number of steps, as the original's command does, has
    chosen them for each other: packs would go through the data twenty times as often.
    """
    on_gpu = device.type == "cuda"
    packing = config.packing
    if packing is None:
        chosen = {"per_device_train_batch_size", "max_steps"} <= config.model_fields_set
        packing = on_gpu and not config.exact_batch and (not chosen or bool(config.tokens_per_step))
    if packing:
        return "packed"
    exact = on_gpu if config.exact_batch is None else config.exact_batch
    return "exact" if exact else "padded"


def wants_recompute(config: TrainConfig, device: torch.device) -> bool:
    """Whether to recompute activations; "auto" does so on small GPUs only, as it costs a third."""
    if config.gradient_checkpointing == "auto":
        return device.type == "cuda" and total_memory_gib(device) < RECOMPUTE_BELOW_GIB
    return config.gradient_checkpointing


def room_for(config: TrainConfig, model: PeftModel, device: torch.device) -> Room:
    """What the device's memory leaves to passes of this model."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / GIB
    base = base_of(model)
    more_adapters = config.lora_target != ("query_key_value",)
    return Room(base.config, total_memory_gib(device) - weights, base.dtype, more_adapters)


def pack_length(
    config: TrainConfig, model: PeftModel, device: torch.device, rows: TokenRows
) -> int:
    """Tokens of a pack: what is asked for, or what memory holds, and then at least one row."""
    if config.tokens_per_step:
        return config.tokens_per_step
    wish = None if config.gradient_checkpointing == "auto" else config.gradient_checkpointing
    length = PACK_LENGTH_ON_CPU
    if device.type == "cuda":
        length = room_for(config, model, device).longest_pack(wish)
    return max(length, 64 * -(-int(rows.lengths_R.max()) // 64))


def layout_as_run(
    config: TrainConfig, model: PeftModel, device: torch.device, rows: TokenRows
) -> dict[str, Any]:
    """The settings of the layout as they came out: a run goes on with them on any other card."""
    layout = choose_layout(config, device)
    length = pack_length(config, model, device, rows) if layout == "packed" else None
    return {
        "packing": layout == "packed",
        "exact_batch": layout == "exact",
        "tokens_per_step": length,
    }


def check_fp8(device: torch.device) -> None:
    """Raise UserError where a device has no matrix units for float8."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError(
            f"base_dtype fp8: {device_name(device)} has no float8 matrix units (Hopper and newer "
            "GPUs have); leave base_dtype out"
        )


def build_pass(run: Run, model: PeftModel, weights: list[nn.Parameter]) -> Pass:
    """The pass of this run's layout."""
    config, device = run.config, run.accelerator.device
    if run.layout == "padded":
        if wants_recompute(config, device):
            enable_recompute(base_of(model))
        return PaddedPass(run.accelerator, model, run.rows)
    compiled = can_compile(device, base_of(model).config)
    recompute = run.recompute(model)
    packed = PackedModel(
        model, compiled=compiled, any_length=run.layout == "exact", recompute=recompute
    )
    common = run.accelerator, packed, run.rows, config.lora_dropout
    if isinstance(run.plan, PackPlan):
        # Where nothing is compiled, filler would only cost time.
        return PackedPass(*common, run.plan.pack_length if compiled else None)
    if compiled:
        return CapturedPass(*common, None, weights)
    return PackedPass(*common, None)


def build_state(run: Run, model: PeftModel) -> TrainingState:
    """Optimiser and schedule for the adapter's weights, all of it handed to Accelerate."""
    config, accelerator = run.config, run.accelerator
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamW(
        weights,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=run.warmup_steps,
        num_training_steps=run.max_steps,
    )
    scaler, device = accelerator.scaler, accelerator.device
    return TrainingState(
        model,
        accelerator.prepare(optimizer),
        scheduler,
        scaler=scaler,
        loss_sum=torch.zeros((), device=device),
        watch=Watch(weights, optimizer, scaler, device, accelerator.num_processes),
    )
