"""transformers' TrainingArguments, current and deprecated: how those we lack are handled.

A test compares the names with the installed transformers, so that a new one is noticed.
"""

from glmtune.config.foreign.fates import (
    EVERYWHERE,
    OWN_RANK,
    TRAINING,
    Foreign,
    becomes,
    idle,
    moot_rows,
    off_rows,
    only_rows,
    refused,
    rows,
    share_of_steps,
    unless,
)

_SOURCE = "transformers"

# AdamW in any implementation. Paged and 8-bit forms save memory that LoRA does not need.
ADAMW = (
    *("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla"),
    *("adamw_apex_fused", "adamw_torch_npu_fused", "adamw_anyprecision"),
    *("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"),
    *("paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"),
)
OPTIMISER = unless(
    *ADAMW,
    word="the optimiser is AdamW, its states in float32, which take megabytes with LoRA",
    way="training has one optimiser, AdamW: leave this out, or say adamw_torch",
)
TORCHRUN = "`torchrun --nproc_per_node 2 -m glmtune train --dataset_path rows --output_dir output`"

_NO_NOISE = "no noise is added to embeddings; see --lora_dropout 0.1"
_LOADING = "rows are read once, as arrays: there is no loader to tune"
_PROCESSES = "processes share gradients in one way only"
_HUB = "nothing is pushed to a hub"
_LOG_LEVEL = "there are no levels of logging"
_EVALUATION = "eval_ratio above 0 holds rows out and evaluates, every eval_steps"
NO_SHARDS = (
    f"several GPUs by {TORCHRUN}, each with the whole base, or a share of it with --shard_base "
    "true; less memory by --quantization_bit 4 or --gradient_checkpointing true"
)


def _off(names: str, way: str) -> tuple[Foreign, ...]:
    return off_rows(_SOURCE, names, way, TRAINING)


def _only(names: str, values: str, way: str) -> tuple[Foreign, ...]:
    return only_rows(_SOURCE, names, values, way, TRAINING)


def _moot(names: str, word: str) -> tuple[Foreign, ...]:
    return moot_rows(_SOURCE, names, word, TRAINING)


TRAINING_ARGUMENTS: tuple[Foreign, ...] = (
    # --- the same under another name ---
    *rows(
        _SOURCE,
        "warmup_ratio",
        becomes(
            "warmup_steps", word="a number below 1 is a share of all steps", values=share_of_steps
        ),
    ),
    *rows(_SOURCE, "no_cuda", becomes("use_cpu")),
    *rows(_SOURCE, "per_gpu_train_batch_size", becomes("per_device_train_batch_size")),
    *rows(_SOURCE, "per_gpu_eval_batch_size", becomes("per_device_eval_batch_size")),
    *rows(_SOURCE, "activation_checkpointing", becomes("gradient_checkpointing")),
    # --- optimiser and loss ---
    *rows(_SOURCE, "optim", *OPTIMISER),
    *_off("adafactor", "training has one optimiser, AdamW; leave this out"),
    *_off(
        "optim_args optim_target_modules",
        "AdamW is set by --weight_decay 0.01 and --adam_beta1 0.9",
    ),
    *_off(
        "lr_scheduler_kwargs", "a course is set by --lr_scheduler_type cosine --warmup_steps 100"
    ),
    *_off("label_smoothing_factor", "labels are not smoothed here; leave this out"),
    *off_rows("MedicalGPT", "neft_alpha", _NO_NOISE, TRAINING),
    *_off("neftune_noise_alpha", _NO_NOISE),
    *rows(
        _SOURCE,
        "average_tokens_across_devices",
        *unless(
            "true",
            word="the loss is the mean over all processes' tokens",
            way="the loss is always the mean over all processes' tokens; leave this out",
        ),
    ),
    # --- evaluation ---
    *rows(
        _SOURCE,
        "eval_strategy evaluation_strategy",
        becomes("eval_ratio", word="no rows are held out", values={"no": "0"}),
        idle("steps", word=_EVALUATION),
        refused(
            "evaluations come with the checkpoints: --eval_ratio 0.1 --save_strategy epoch; or "
            "every N steps: --eval_ratio 0.1 --eval_steps 500"
        ),
    ),
    *_moot("do_eval", _EVALUATION),
    *_moot(
        "prediction_loss_only eval_accumulation_steps eval_do_concat_batches label_names "
        "eval_use_gather_object batch_eval_metrics",
        "what is evaluated is the loss on the rows held out",
    ),
    *_off("eval_delay", "the first evaluation comes after --eval_steps 500"),
    *_off("eval_on_start", "`glmtune compare --data_path FILE --adapter output` shows the base"),
    *_off(
        "include_for_metrics include_inputs_for_metrics",
        "what is evaluated is the loss; leave this out",
    ),
    *_off(
        "load_best_model_at_end",
        "the last checkpoint is the result, and output/best leads to the best: `glmtune merge "
        "--adapter output/best --save_path merged`, like any verb, takes either",
    ),
    *_moot(
        "metric_for_best_model greater_is_better", "the best checkpoint is chosen by held-out rows"
    ),
    # --- saving and resuming ---
    *rows(
        _SOURCE,
        "save_safetensors",
        *unless(
            "true",
            word="adapters are always written as safetensors",
            way="adapters are always written as safetensors, which PEFT reads; leave this out",
        ),
    ),
    *_off("save_only_model", "a checkpoint always holds what resuming needs; leave this out"),
    *_off("save_on_each_node", "the first process saves for all; leave this out"),
    *_off("ignore_data_skip", "a resumed run continues at its row; leave this out"),
    *_off(
        "enable_jit_checkpoint",
        "a signal makes a run save and stop in any case, and --max_hours 8 does",
    ),
    *_moot("restore_callback_states_from_checkpoint", "there are no callbacks"),
    # --- logging ---
    *_moot("logging_dir", "TensorBoard's events lie in output_dir's runs/"),
    *rows(
        _SOURCE,
        "logging_strategy",
        *unless(
            "steps",
            word="lines come every logging_steps",
            way="lines are logged every N steps: --logging_steps 50",
        ),
    ),
    *_moot("logging_first_step", "the first step is always logged"),
    *_moot("logging_nan_inf_filter", "a loss that is not finite stops the run"),
    *_moot("log_level log_level_replica log_on_each_node", _LOG_LEVEL),
    *_moot(
        "include_tokens_per_second include_num_input_tokens_seen",
        "tokens are logged as tokens_per_second",
    ),
    *_moot("skip_memory_metrics", "the peak of memory is always logged"),
    *_moot("run_name project", "a run is called what its output_dir is called"),
    *_moot(
        "trackio_bucket_id trackio_space_id trackio_static_space_id",
        "metrics go to TensorBoard and metrics.jsonl",
    ),
    # --- rows ---
    *_moot("remove_unused_columns", "rows on disk have no column that training does not read"),
    *_moot("group_by_length", "rows come in the order of train_sampling_strategy"),
    *_moot("length_column_name", "lengths are read off the rows"),
    *_moot(
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "accelerator_config dispatch_batches split_batches",
        _LOADING,
    ),
    *_off("dataloader_drop_last", "no row is dropped at the end of an epoch; leave this out"),
    *_off(
        "auto_find_batch_size", "`glmtune plan --memory_gib 16` prints what fits; leave this out"
    ),
    # --- devices ---
    *rows(
        _SOURCE,
        "local_rank",
        idle("-1", "0", OWN_RANK, word="the launcher's environment gives the rank"),
        refused(f"the launcher gives each process its rank: {TORCHRUN}"),
    ),
    *_moot(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
        _PROCESSES,
    ),
    *_moot("ddp_timeout", "processes wait as long as torch lets them"),
    *rows(
        _SOURCE,
        "ddp_backend",
        *unless(
            *("nccl", "gloo"),
            word="nccl on GPUs and gloo on CPUs are chosen without it",
            way="nccl on GPUs and gloo on CPUs are chosen without it; leave this out",
        ),
    ),
    *_off(
        "deepspeed fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap "
        "sharded_ddp parallelism_config",
        NO_SHARDS,
    ),
    *_moot("use_mps_device", "the device is found; use_cpu stays on the CPU"),
    *_moot("tpu_metrics_debug tpu_num_cores mp_parameters ray_scope", "no device here needs it"),
    *_off("use_ipex xpu_backend", "a CPU computes with torch alone: --use_cpu true"),
    # --- speed and precision ---
    *_moot("tf32", "float32 products stay exact, and other types do not ask"),
    *_moot("use_cache", "a training pass keeps no cache"),
    *_moot("gradient_checkpointing_kwargs activation_checkpointing_kwargs", "results are the same"),
    *_moot(
        "torch_compile torch_compile_backend torch_compile_mode torchdynamo use_liger_kernel "
        "liger_kernel_config torch_empty_cache_steps",
        "training has kernels of its own, which are compiled where that helps",
    ),
    *_off("fp16_full_eval bf16_full_eval", "evaluation computes as training does: --bf16 true"),
    *rows(
        _SOURCE,
        "half_precision_backend fp16_backend",
        *unless("auto", "amp", "cpu_amp", word="torch rounds", way="there is none but torch's"),
    ),
    *_off("fp16_opt_level", "--fp16 true or --bf16 true is all there is to choose"),
    *_off("jit_mode_eval use_legacy_prediction_loop", "answers have a decoder of their own"),
    *_off("full_determinism", "a run on a CPU repeats bit for bit: --use_cpu true --seed 42"),
    *_off("debug", "`glmtune replay` computes a step that failed again, and finds the module"),
    *rows(_SOURCE, "past_index", *unless("-1", word="there is no past", way="leave this out")),
    # --- verbs of their own ---
    *rows(
        _SOURCE,
        "do_train",
        *unless(
            "true",
            word="train trains",
            way="`glmtune plan` forecasts a run without it, `glmtune infer` answers",
        ),
        refused("`glmtune train --dataset_path rows --output_dir output` trains", EVERYWHERE),
    ),
    *rows(
        _SOURCE,
        "do_predict",
        idle("true", word="this verb answers", verbs=("infer", "compare")),
        *unless(
            "false",
            word="training answers nothing",
            way="`glmtune infer --data_path FILE --adapter output` answers",
            verbs=EVERYWHERE,
        ),
    ),
    # --- the hub ---
    *_off(
        "push_to_hub hub_always_push",
        f"{_HUB}; `glmtune push RUN --repo_id ME/NAME` uploads it later; leave this out",
    ),
    *_moot(
        "hub_model_id hub_private_repo hub_revision hub_strategy hub_token "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token",
        _HUB,
    ),
)
