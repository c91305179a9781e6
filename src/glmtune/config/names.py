"""What settings are called: today's names, yesterday's, and those that glmtune does not have.

Scripts of 2023 pass names that transformers 5 took out of TrainingArguments. Those are read as
today's, with a note; the rest of TrainingArguments is refused by name, so that nobody believes a
setting works that does not; anything else gets a "did you mean".
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from glmtune.config.settings import SETTINGS
from glmtune.errors import UserError, note


class Given(NamedTuple):
    """A setting as the user gave it.

    Args:
        value: the text, several texts (a YAML list), or None (YAML's null).
        source: what to call it in an error: `--lora_rank`, or `recipe.yaml:7: lora_rank`.
    """

    value: str | list[str] | None
    source: str

    def __str__(self) -> str:
        """The setting with its value, for the start of an error line."""
        value = "null" if self.value is None else repr(self.value)
        return f"{self.source} {value if len(value) <= 200 else f'{value[:197]}...'}"


class OldName(NamedTuple):
    """Today's name of a setting (None: there is nothing to set any more), and a word about it."""

    today: str | None
    note: str


_OLD_TRAINING_NAMES = {
    "warmup_ratio": OldName("warmup_steps", "a number below 1 is a share of all steps"),
    "no_cuda": OldName("use_cpu", "it means the same"),
    "per_gpu_train_batch_size": OldName("per_device_train_batch_size", "it means the same"),
    "per_gpu_eval_batch_size": OldName("per_device_eval_batch_size", "it means the same"),
    "activation_checkpointing": OldName("gradient_checkpointing", "it means the same"),
    "target_modules": OldName("lora_target", "it means the same"),
    "logging_dir": OldName(None, "TensorBoard's events lie in output_dir's runs/"),
    "save_safetensors": OldName(None, "adapters are always written as safetensors"),
    "group_by_length": OldName(None, "rows come in the order of train_sampling_strategy"),
    "evaluation_strategy": OldName(None, "eval_ratio above 0 evaluates, every eval_steps"),
    "eval_strategy": OldName(None, "eval_ratio above 0 evaluates, every eval_steps"),
    "include_tokens_per_second": OldName(None, "tokens per second are always shown"),
    "use_mps_device": OldName(None, "the device is found; use_cpu stays on the CPU"),
}
_OLD_ANSWER_NAMES = {
    "max_length": OldName("max_new_tokens", "max_length counted the question, this does not"),
}
OLD_NAMES: dict[str, dict[str, OldName]] = {
    "train": _OLD_TRAINING_NAMES,
    "plan": _OLD_TRAINING_NAMES,
    "infer": _OLD_ANSWER_NAMES,
    "compare": _OLD_ANSWER_NAMES,
}
"""Verb -> name of former days -> today's."""

_NOT_OFFERED = """
accelerator_config activation_checkpointing_kwargs adafactor auto_find_batch_size
average_tokens_across_devices batch_eval_metrics bf16_full_eval dataloader_drop_last
dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor ddp_backend
ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
debug deepspeed dispatch_batches do_eval do_predict do_train enable_jit_checkpoint
eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_use_gather_object
fp16_backend fp16_full_eval fp16_opt_level fsdp fsdp_config fsdp_min_num_params
fsdp_transformer_layer_cls_to_wrap full_determinism gradient_checkpointing_kwargs greater_is_better
half_precision_backend hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
hub_token ignore_data_skip include_for_metrics include_inputs_for_metrics
include_num_input_tokens_seen jit_mode_eval label_names label_smoothing_factor length_column_name
liger_kernel_config load_best_model_at_end local_rank log_level log_level_replica log_on_each_node
logging_first_step logging_nan_inf_filter logging_strategy lr_scheduler_kwargs metric_for_best_model
mp_parameters neftune_noise_alpha optim optim_args optim_target_modules parallelism_config
past_index prediction_loss_only project push_to_hub push_to_hub_model_id push_to_hub_organization
push_to_hub_token ray_scope restore_callback_states_from_checkpoint run_name save_on_each_node
save_only_model save_strategy sharded_ddp skip_memory_metrics split_batches tf32 torch_compile
torch_compile_backend torch_compile_mode torch_empty_cache_steps torchdynamo tpu_metrics_debug
tpu_num_cores trackio_bucket_id trackio_space_id trackio_static_space_id use_cache use_ipex
use_legacy_prediction_loop use_liger_kernel xpu_backend
"""
NOT_OFFERED = frozenset(_NOT_OFFERED.split())
"""Names that TrainingArguments has or had and `glmtune train` has not; a test compares the two."""


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean X?" for the candidate most like `word`, or "" when none is."""
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def knows(verb: str, name: str) -> bool:
    """Whether `verb` has a setting of this name, today or in former days."""
    return name in SETTINGS[verb].model_fields or name in OLD_NAMES.get(verb, {})


def check_name(verb: str, name: str, source: str) -> None:
    """Raise UserError, with the likeliest fix, for a name that `verb` does not know."""
    if knows(verb, name):
        return
    if verb in ("train", "plan") and name in NOT_OFFERED:
        raise UserError(
            f"{source}: transformers' TrainingArguments know this setting, glmtune does not offer "
            "it; take it out"
        )
    # Benchmarks and plans borrow settings of what they measure; none is where a user looks for one.
    verbs = [other for other in SETTINGS if not other.startswith(("bench", "plan"))]
    if verbs := [other for other in verbs if name in SETTINGS[other].model_fields]:
        raise UserError(f"{source} is a setting of {', '.join(verbs)}, not of {verb}; take it out")
    dashes = "--" if source.startswith("--") else ""
    hint = did_you_mean(name, SETTINGS[verb].model_fields, prefix=dashes)
    hint = hint or f"; `glmtune {verb} --help` lists its settings"
    raise UserError(f"{source} is not a setting of {verb}{hint}")


def with_todays_names(verb: str, given: Mapping[str, Given]) -> dict[str, Given]:
    """Return the settings under today's names, with a note on stderr for each old one.

    Raises:
        UserError: a name that the verb does not have, or one setting given under both names.
    """
    today: dict[str, Given] = {}
    for name, setting in given.items():
        check_name(verb, name, setting.source)
        if old := OLD_NAMES.get(verb, {}).get(name):
            now = f"is {old.today} today" if old.today else "has no effect any more"
            note(f"{name} {now}: {old.note}")
            if old.today is None:
                continue
            if name == "warmup_ratio":
                _check_ratio(setting)
            name = old.today
        if name in today:
            raise UserError(f"{today[name].source} and {setting.source} are one setting; keep one")
        today[name] = setting
    return today


def _check_ratio(setting: Given) -> None:
    """As warmup_steps, a ratio of 1 would be one single step."""
    try:
        in_range = 0 <= float(str(setting.value)) < 1
    except ValueError:
        in_range = False
    if not in_range:
        raise UserError(f"{setting} should be a share of all steps, from 0 to below 1")
