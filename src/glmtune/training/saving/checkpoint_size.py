"""The size of checkpoints on disk, computed before the first of them is written."""

from glmtune.config.settings import TrainSettings
from glmtune.training.planning.memory import Setup

# A weight and AdamW's two moments, all of them float32.
_BYTES_PER_WEIGHT = 3 * 4
_BYTES_PER_TENSOR = 3 * 700  # names and headers, in each of the three places
_BYTES_PER_PROCESS = 8_000  # its random state
_BYTES_PER_RECORD = 400  # a record of trainer_state.json with all its fields
_BYTES_BESIDE = 20_000


def checkpoint_bytes(
    num_weights: int, num_tensors: int, num_processes: int, num_records: int
) -> int:
    """The size of a checkpoint at most: adapter, optimiser, random states, records.

    Args:
        num_weights: trainable numbers.
        num_tensors: tensors that hold them.
        num_processes: number of random states.
        num_records: records that `trainer_state.json` holds.
    """
    return (
        _BYTES_PER_WEIGHT * num_weights
        + _BYTES_PER_TENSOR * num_tensors
        + _BYTES_PER_PROCESS * num_processes
        + _BYTES_PER_RECORD * num_records
        + _BYTES_BESIDE
    )


def last_checkpoint_bytes(
    settings: TrainSettings, setup: Setup, max_steps: int, num_processes: int = 1
) -> int:
    """The size at most of a run's last checkpoint, which has all of its records.

    Args:
        settings: the run's settings.
        setup: the training setup, which says what trains.
        max_steps: steps of the whole run.
        num_processes: processes that share a step.
    """
    num_records = max_steps // settings.logging_steps + 2
    if settings.eval_ratio or settings.eval_dataset_path:
        # After each epoch there are fewer than after each step.
        every = 1 if settings.save_strategy == "epoch" else settings.save_steps
        num_records += max_steps // (settings.eval_steps or every) + 1
    num_tensors = 2 * len(setup.targets) * setup.shape.num_layers
    return checkpoint_bytes(setup.parameters(), num_tensors, num_processes, num_records)


def most_new_checkpoints(num_saves: int, num_there: int, limit: int | None) -> int:
    """How many more checkpoints than now can exist at the same time.

    With a limit there is briefly one more, since the oldest is deleted when the newest is whole.

    Args:
        num_saves: saves to come.
        num_there: checkpoints in the folder already.
        limit: how many are kept; None for all.
    """
    if limit is None or not num_saves:
        return num_saves
    return max(1, min(num_saves, limit + 1 - num_there))
