"""What changes while a model trains, and must be restored for a resumed run to be the same."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from glmtune.training.best import Best, Evaluations
from glmtune.training.gradients import GradientSums
from glmtune.training.watch import RandomState, Watch


@dataclass
class TrainingState:
    """Weights, optimiser, schedule, and how far the run has come."""

    model: PeftModel
    """The model with its adapter."""
    optimizer: Optimizer
    scheduler: LambdaLR
    loss_sum: Tensor
    """This process's share of the losses since the last record, summed over steps."""
    watch: Watch
    """Checks each step before it is applied."""
    gradients: GradientSums
    """Sums the gradients of all processes."""
    scaler: Any = None
    """The gradient scaler of float16, or None."""
    global_step: int = 0
    num_loss_steps: int = 0
    """Steps in `loss_sum`."""
    num_tokens: int = 0
    """Real tokens seen by all processes, padding not counted."""
    evaluations: Evaluations = field(default_factory=Evaluations)
    """The scores of each held-out row and general question so far."""
    best: Best | None = None
    """The best checkpoint; known to the first process."""
    last_good: Path | None = None
    """The newest checkpoint that this run has written, or was resumed from."""

    @property
    def weights(self) -> list[nn.Parameter]:
        """What trains: the adapter's weights."""
        return self.optimizer.param_groups[0]["params"]


def own_state(state: TrainingState) -> dict[str, Any]:
    """What each process has of its own: random numbers and its share of the running loss.

    Dropout draws from torch's generators; nothing that trains uses those of Python or numpy.
    Nothing here waits for the device.
    """
    return {
        **RandomState.of(state.loss_sum.device)._asdict(),
        "loss_sum": state.loss_sum.clone(),
        "num_loss_steps": state.num_loss_steps,
    }


def restore_own_state(own: Mapping[str, Any], state: TrainingState) -> None:
    """Restore what `own_state` returned."""
    RandomState(own["cpu"], own["cuda"]).restore(state.loss_sum.device)
    state.loss_sum.copy_(own["loss_sum"])
    state.num_loss_steps = own["num_loss_steps"]
