"""What stays fixed while a run trains, and how its moving parts are built."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel, get_scheduler

from glmtune.adapters import attach_lora, continue_adapter
from glmtune.adapters.formats import Adapter
from glmtune.config.settings import TrainSettings
from glmtune.data.packing import check_lengths
from glmtune.data.split import GROUPS
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.general.scores import GeneralRows
from glmtune.hardware import device_name
from glmtune.models.families import family_of
from glmtune.models.packed import PackedModel, base_of, to_fp8
from glmtune.models.shape import bits_of
from glmtune.training.gradients import GradientSums
from glmtune.training.launch import shards_base
from glmtune.training.passes import CapturedPass, PackedPass, PaddedPass, Pass
from glmtune.training.peers import Peers
from glmtune.training.plan import PackPlan, Plan, count_steps, is_saved, make_plan
from glmtune.training.planning.forecast import Forecast, Forecaster, make_forecaster
from glmtune.training.planning.memory import Layout
from glmtune.training.state import TrainingState
from glmtune.training.watch import Watch

if TYPE_CHECKING:
    from glmtune.training.samples import Samples

MANY_EPOCHS = 50
SAVE_STEPS = TrainSettings.model_fields["save_steps"].default
NUM_EPOCHS = TrainSettings.model_fields["num_train_epochs"].default

# Settings that change a run's numbers by themselves; `Run.identity` adds the derived ones.
_NUMERIC_SETTINGS = (
    "seed", "eval_ratio", "train_sampling_strategy", "lora_alpha", "lora_dropout",
    "base_dtype", "quantization_bit", "quantize_head", "learning_rate",
    "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run's settings and data, and the numbers that follow from them."""

    settings: TrainSettings
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
    forecast: Forecast
    forecaster: Forecaster
    """Forecasts for other settings."""
    sources: Mapping[str, Any]
    """Fingerprints of the rows and the base, by which a resumed run recognises them."""
    general: GeneralRows | None = None
    """The general set that is scored at every evaluation."""
    peers: Peers = field(default_factory=lambda: Peers(0, 1))
    """The other processes."""
    samples: "Samples | None" = None
    """Held-out questions that are answered at every evaluation, before the first step too."""

    @classmethod
    def of(
        cls,
        settings: TrainSettings,
        accelerator: Accelerator,
        rows: TokenRows,
        model: PeftModel,
        base_name: str,
        sources: Mapping[str, Any] | None = None,
        forecaster: Forecaster | None = None,
    ) -> "Run":
        """Work out the numbers of a run: its split, its global batch, its steps.

        Free memory of the card must be read before the weights are on it; a `forecaster` made
        before that is then passed in.
        """
        base = base_of(model)
        forecaster = forecaster or make_forecaster(accelerator, base.config, base.dtype, rows)
        forecast = forecaster(settings)
        _, eval_rows = rows.split(settings.eval_ratio, settings.seed)
        if length := forecast.pack_length:
            check_lengths(rows, np.arange(rows.num_own), length, settings.dataset_path)
            for name, row_ids in rows.eval_sets.items():
                check_lengths(rows, row_ids, length, f"eval_dataset_path {name}")
        plan = make_plan(settings, rows, forecast.pack_length, accelerator.num_processes)
        max_steps = count_steps(settings, plan)
        warmup = settings.warmup_steps
        return cls(
            settings,
            accelerator,
            rows,
            plan,
            eval_rows,
            max_steps,
            warmup_steps=int(warmup) if warmup >= 1 else math.ceil(warmup * max_steps),
            dtype=base.dtype,
            base_name=base_name,
            forecast=forecast,
            forecaster=forecaster,
            sources=sources or {},
        )

    def cautions(self) -> list[str]:
        """Warnings about a number of steps that may be a mistake, a line each."""
        num_epochs, num_rows = self.plan.epoch(self.max_steps), len(self.plan.row_ids)
        told = []
        if num_epochs > MANY_EPOCHS:
            told.append(
                f"{self.max_steps:,} steps are {num_epochs:,.0f} epochs of {num_rows:,} rows, "
                "and the adapter then mostly memorises them; --max_steps -1 "
                "--num_train_epochs 3 goes through them three times"
            )
        if self.warmup_steps >= self.max_steps and self.settings.lr_scheduler_type != "constant":
            told.append(
                f"warmup_steps {self.settings.warmup_steps:g}: the learning rate rises in all "
                f"{self.max_steps:,} steps and never comes to {self.settings.learning_rate:g}; "
                "--warmup_steps 0.03 takes 3 % of them"
            )
        if self.settings.save_strategy == "epoch" and self.settings.save_steps != SAVE_STEPS:
            told.append(
                f"save_steps {self.settings.save_steps} has no effect: checkpoints come after each "
                "epoch (--save_strategy steps: every save_steps)"
            )
        if self.settings.max_steps > 0 and self.settings.num_train_epochs != NUM_EPOCHS:
            told.append(
                f"num_train_epochs {self.settings.num_train_epochs:g} has no effect: the run has "
                f"max_steps {self.settings.max_steps} (--max_steps -1: as many as the epochs take)"
            )
        if self.settings.eval_steps and not len(self.eval_rows) and self.general is None:
            told.append(
                f"eval_steps {self.settings.eval_steps} has no effect: no rows are held out, and "
                "no general questions asked (--eval_ratio 0.05, --general_set true)"
            )
        return told

    @property
    def layout(self) -> Layout:
        """The layout of the rows in a pass."""
        return self.forecast.layout

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the base, so that all compute in step."""
        return shards_base(self.settings, self.accelerator)

    def heaviest_part(self) -> np.ndarray:
        """Row numbers of the pass that needs most memory."""
        return self.plan.heaviest(
            self.max_steps, self.accelerator.num_processes, self.layout == "padded"
        )

    @property
    def has_end(self) -> bool:
        """Whether the learning rate comes down to 0 at the last step."""
        return self.settings.lr_scheduler_type in ("linear", "cosine")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Every setting and fact that changes the run's numbers: a resumed run must have the same.

        How a global batch is divided into passes and among processes is not among them, nor is the
        number of steps if the schedule does not depend on it: such a run may be extended.
        """
        return {
            "base model": self.base_name,
            **self.sources,
            "dtype": str(self.dtype).removeprefix("torch."),
            "data sha256": self.rows.digest()[:16],
            **({} if self.rows.groups_R is None else {GROUPS: _digest(self.rows.groups_R)}),
            "data_seed": self.plan.seed,
            "layout": self.layout,
            f"{self.plan.unit} per step": self.plan.step_size,
            "pack length": self.plan.pack_length if isinstance(self.plan, PackPlan) else "any",
            "steps of the schedule": self.max_steps if self.has_end else "any",
            "warmup_steps": self.warmup_steps,
            "lora_target": self.forecast.setup.targets,
            "lora_rank": self.forecast.setup.rank,
            **{name: getattr(self.settings, name) for name in _NUMERIC_SETTINGS},
        }

    def shared_facts(self) -> dict[str, Any]:
        """What all processes must have alike: settings, rows and base; paths may differ."""
        own = {"base", "dataset_path", "eval_dataset_path", "output_dir", "adapter", "general_set"}
        own |= {"resume_from_checkpoint", "report_to", "disable_tqdm"}
        settings = self.settings.model_dump(mode="json", exclude=own)
        return settings | {"device": self.accelerator.device.type} | self.identity

    def is_saved(self, step: int) -> bool:
        """Whether there is a checkpoint of a step that has been taken."""
        return step > 0 and (is_saved(self.settings, self.plan, step) or step == self.max_steps)

    def is_evaluated(self, step: int) -> bool:
        """Whether there is an evaluation of a step that has been taken."""
        if every := self.settings.eval_steps:
            return step > 0 and (step % every == 0 or step == self.max_steps)
        return self.is_saved(step)

    @property
    def eval_steps(self) -> int:
        """Steps between evaluations; of the first epoch, where there is one after each."""
        return self.settings.eval_steps or self.save_steps

    @property
    def save_steps(self) -> int:
        """Steps between checkpoints; of the first epoch, where there is one after each."""
        by_epoch = self.settings.save_strategy == "epoch"
        return self.plan.steps_in(0) if by_epoch else self.settings.save_steps


def _digest(groups_R: np.ndarray) -> str:
    return hashlib.sha256(groups_R.astype("<i8").tobytes()).hexdigest()[:16]


def adapt(
    model: PreTrainedModel, settings: TrainSettings, beginning: Adapter | None = None
) -> PeftModel:
    """Put the run's adapter on a base, and convert the base to the requested number format.

    Args:
        model: the base model.
        settings: the run's settings.
        beginning: the adapter that the run continues; else it starts a new one.

    Raises:
        UserError: the adapter does not fit the base, or float8 the base's number format.
    """
    if beginning is not None:
        adapted = continue_adapter(model, beginning, settings.lora_dropout)
    else:
        adapted = attach_lora(
            model,
            rank=settings.lora_rank or family_of(model.config).lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_target,
        )
    if settings.base_dtype == "fp8":
        if bits := bits_of(model.config):
            raise UserError(
                f"base_dtype fp8: the base is in {bits} bits already; leave base_dtype out"
            )
        to_fp8(adapted, family_of(model.config).native().packed.together)
    return adapted


def layout_as_run(forecast: Forecast) -> dict[str, Any]:
    """The layout settings as resolved on this card: the run can be resumed with them on another."""
    return {"layout": forecast.layout, "tokens_per_step": forecast.pack_length}


def check_fp8(device: torch.device) -> None:
    """Raise UserError where a device has no matrix units for float8."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError(
            f"base_dtype fp8: {device_name(device)} has no float8 matrix units (Hopper and newer "
            "GPUs have); leave base_dtype out"
        )


def build_pass(run: Run, model: PeftModel, weights: list[nn.Parameter]) -> Pass:
    """Build the pass that the run's forecast chose."""
    setup, recompute = run.forecast.setup, run.forecast.recompute
    if setup.layout == "padded":
        return PaddedPass(run.accelerator, model, run.rows, recompute)
    packed = PackedModel(
        model,
        family_of(base_of(model).config).native().packed,
        compiled=setup.compiled,
        any_length=setup.layout == "exact",
        recompute=recompute,
    )
    common = run.accelerator, packed, run.rows, run.settings.lora_dropout
    # Without compilation, filler would only cost time.
    length = run.forecast.pack_length if setup.compiled else None
    if setup.captured:
        return CapturedPass(*common, length, weights)
    return PackedPass(*common, length)


def build_state(run: Run, model: PeftModel) -> TrainingState:
    """Build optimiser and schedule for the adapter's weights, and prepare them with Accelerate."""
    settings, accelerator = run.settings, run.accelerator
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = AdamW(
        weights,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    scheduler = get_scheduler(
        settings.lr_scheduler_type,
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
        gradients=GradientSums(weights, accelerator),
    )
