"""`--to peft-old`: an adapter whose settings PEFT 0.10, and any version since, reads.

A version of PEFT refuses an adapter_config.json with a name that it does not know, whatever the
value; only names whose values differ from the defaults are written.
"""

from pathlib import Path

import peft

from glmtune.adapters.formats import write_adapter
from glmtune.adapters.naming import check_plain
from glmtune.data.files import read_json_object
from glmtune.errors import UserError
from glmtune.export.adapter_names import USE_HF, in_names_of_base
from glmtune.export.job import Job
from glmtune.export.reopening import OURS, Reopened, reopen_adapter
from glmtune.models.resolve import base_name
from glmtune.run_files import ADAPTER_CONFIG_FILE

OLDEST = "0.10.0"
KNOWN = frozenset((
    "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
    "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config",
    "use_dora", "layer_replication",
))  # fmt: skip
"""Names in an adapter_config.json that PEFT 0.10.0 knows. Source: its LoraConfig and PeftConfig."""


def write(job: Job, folder: Path) -> Reopened:
    """Write the adapter with settings that old versions know, and open it with today's PEFT."""
    check_plain(job.adapter, "--to peft-old", USE_HF)
    adapter = in_names_of_base(job)
    write_adapter(adapter.config, adapter.weights, folder, base_name(job.source.base))
    settings = read_json_object(folder / ADAPTER_CONFIG_FILE)
    if unknown := settings.keys() - KNOWN:
        raise UserError(
            f"--to peft-old: PEFT {OLDEST} does not know {', '.join(sorted(unknown))}, which this "
            "adapter needs; use --to hf"
        )
    found = reopen_adapter(job.source.base, str(job.source.adapter), str(folder))
    by = f"{OURS} with PEFT {peft.__version__}"
    return Reopened(
        by, False, f"{found}; every name in its settings is one that PEFT {OLDEST} knows"
    )
