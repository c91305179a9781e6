"""What stays fixed while a run trains, and how its moving parts are built."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from torch.optim import AdamW
from transformers import PreTrainedModel, get_scheduler

from glmtune.config import TrainConfig
from glmtune.errors import UserError
from glmtune.hardware import pick_device, pick_dtype, total_memory_gib
from glmtune.training.batches import DataPlan, TokenRows, split_rows
from glmtune.training.checkpoints import TrainingState

# Below this a card is short of memory for activations at the original's batch size.
RECOMPUTE_BELOW_GIB = 40

# Settings that change a run's numbers as they stand; `Run.identity` adds those that depend on more.
_NUMERIC_SETTINGS = (
    "seed", "eval_ratio", "train_sampling_strategy", "lora_rank", "lora_alpha", "lora_dropout",
    "lora_target", "learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run's settings and data, and the numbers that follow from them."""

    config: TrainConfig
    accelerator: Accelerator
    rows: TokenRows
    plan: DataPlan
    eval_rows: np.ndarray
    """Row numbers held out for evaluation."""
    max_steps: int
    warmup_steps: int
    pad_token_id: int
    dtype: torch.dtype
    """Compute type of the base model."""
    base_name: str

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
        rows_per_pass = config.per_device_train_batch_size * accelerator.num_processes
        plan = DataPlan(
            train_rows,
            global_batch_size=rows_per_pass * config.gradient_accumulation_steps,
            seed=config.seed if config.data_seed is None else config.data_seed,
            shuffle=config.train_sampling_strategy == "random",
        )
        max_steps = config.max_steps
        if max_steps <= 0:
            max_steps = math.ceil(config.num_train_epochs * plan.steps_per_epoch)
        warmup = config.warmup_steps
        return cls(
            config,
            accelerator,
            rows,
            plan,
            eval_rows,
            max_steps,
            warmup_steps=int(warmup) if warmup >= 1 else math.ceil(warmup * max_steps),
            pad_token_id=model.config.pad_token_id,
            dtype=model.get_input_embeddings().weight.dtype,
            base_name=base_name,
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
            "rows per step": self.plan.global_batch_size,
            "steps of the schedule": self.max_steps if has_end else "any",
            "warmup_steps": self.warmup_steps,
            **{name: getattr(self.config, name) for name in _NUMERIC_SETTINGS},
        }

    @property
    def eval_steps(self) -> int:
        """Steps between evaluations."""
        return self.config.eval_steps or self.config.save_steps

    def epoch(self, step: int) -> float:
        """How often the rows have been gone through after so many steps."""
        return step / self.plan.steps_per_epoch


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


def wants_recompute(config: TrainConfig, device: torch.device) -> bool:
    """Whether to recompute activations; "auto" does so on small GPUs only, as it costs a third."""
    if config.gradient_checkpointing == "auto":
        return device.type == "cuda" and total_memory_gib(device) < RECOMPUTE_BELOW_GIB
    return config.gradient_checkpointing


def build_state(run: Run, model: PeftModel) -> TrainingState:
    """Optimiser and schedule for the adapter's weights, all of it handed to Accelerate."""
    config, accelerator = run.config, run.accelerator
    optimizer = AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
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
    model, optimizer = accelerator.prepare(model, optimizer)
    return TrainingState(
        model,
        optimizer,
        scheduler,
        scaler=accelerator.scaler,
        loss_sum=torch.zeros((), device=accelerator.device),
    )
