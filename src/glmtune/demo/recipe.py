"""How the demonstration tunes glm-tiny: settings of `glmtune train`, found by measurement."""

from typing import Any

# Not yet measured over five seeds: see tools/measure_demo.py.
RECIPE: dict[str, Any] = {
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "per_device_train_batch_size": 16,
    "num_train_epochs": 1.8,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,
    "logging_steps": 10,
}
