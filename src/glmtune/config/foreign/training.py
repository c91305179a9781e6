"""Other trainers' names for LoRA's settings, a run's schedule and its outputs."""

from glmtune.config.foreign.fates import (
    DEFAULT,
    EVERYWHERE,
    LAYOUT,
    TRAINING,
    Foreign,
    becomes,
    idle,
    moot_rows,
    names_of_linears,
    off_rows,
    only_rows,
    refused,
    rows,
    share_of_steps,
    unless,
)
from glmtune.config.foreign.training_arguments import NO_SHARDS, OPTIMISER, TORCHRUN

_LORA_ONLY = (
    "LoRA on linears is all that is trained: `glmtune train --dataset_path rows --output_dir "
    "output --lora_rank 8 --lora_target query_key_value`; leave this out"
)
_ON_TOP = (
    "to train a new adapter on top of another, `glmtune merge --adapter ADAPTER --save_path "
    "merged`, then --base merged; leave this out"
)
_PLAIN = "the update is LoRA's of 2023, scaled by lora_alpha / lora_rank; leave this out"
_NO_PREFIX = refused(
    "P-Tuning v2 is not trained here, LoRA is: `glmtune train --dataset_path rows --output_dir "
    "output --lora_rank 8`; infer, compare and chat run a prefix that is trained already; leave "
    "this out",
    EVERYWHERE,
)
_TARGETS = becomes("lora_target", values=names_of_linears)
_ANSWER_BATCH = becomes(
    "per_device_eval_batch_size", word="records answered at a time", verbs=("infer", "compare")
)
_CHECKPOINTING = becomes(
    "gradient_checkpointing", values={"true": "true", "unsloth": "true", "false": "false"}
)
_LAUNCHER = refused(f"how many processes there are is said to the launcher: {TORCHRUN}")
_RECIPE = refused("all settings of a run are flags or one recipe: `glmtune train RECIPE.yaml`")
_METRICS = "metrics go to metrics.jsonl and TensorBoard: --report_to tensorboard; leave this out"


def _off(source: str, names: str, way: str) -> tuple[Foreign, ...]:
    return off_rows(source, names, way, TRAINING)


TRAINING_NAMES: tuple[Foreign, ...] = (
    # --- LoRA ---
    *rows("alpaca-lora, qlora, axolotl", "lora_r", becomes("lora_rank")),
    *rows("PEFT, unsloth, finetune_demo", "r", becomes("lora_rank")),
    *rows("DeepSpeed-Chat, ChatGLM-Finetuning", "lora_dim", becomes("lora_rank")),
    *rows("scripts of 2023", "rank", becomes("lora_rank")),
    *rows("ChatGLM-Finetuning", "lora_module_name", _TARGETS),
    *rows("PEFT, MedicalGPT", "target_modules", _TARGETS),
    *rows("alpaca-lora, axolotl", "lora_target_modules", _TARGETS),
    *rows(
        "axolotl",
        "lora_target_linear",
        becomes("lora_target", values={"true": "all"}),
        idle("false", word="lora_target names the linears"),
    ),
    *only_rows("LLaMA-Factory", "finetuning_type", "lora", _LORA_ONLY),
    *only_rows("ChatGLM-Finetuning, ms-swift", "train_type tuner_type", "lora", _LORA_ONLY),
    *only_rows("LLaMA-Factory", "stage", "sft", "rows are questions with answers; leave this out"),
    *only_rows("PEFT", "peft_type", "lora", _LORA_ONLY),
    *only_rows("PEFT", "task_type", "causal_lm", "ChatGLM-6B is a causal LM; leave this out"),
    *only_rows("MedicalGPT", "use_peft", "true", _LORA_ONLY),
    *only_rows("VisualGLM-6B", "use_lora", "true", _LORA_ONLY),
    *off_rows("qlora", "full_finetune", _LORA_ONLY),
    *only_rows("PEFT, unsloth", "bias lora_bias", "none false", _LORA_ONLY, TRAINING),
    *off_rows("LLaMA-Factory, PEFT, unsloth", "use_rslora use_dora pissa_init", _PLAIN),
    *off_rows("axolotl", "peft_use_rslora peft_use_dora relora", _PLAIN),
    *only_rows("PEFT", "init_lora_weights", "true", _PLAIN),
    *off_rows("PEFT, unsloth", "loftq_config rank_pattern alpha_pattern", _PLAIN),
    *off_rows("PEFT, axolotl", "fan_in_fan_out lora_fan_in_fan_out inference_mode", _PLAIN),
    *off_rows("LLaMA-Factory, axolotl", "loraplus_lr_ratio", "see --learning_rate 1e-4", TRAINING),
    *off_rows("PEFT, MedicalGPT", "modules_to_save layers_to_transform", _LORA_ONLY),
    *off_rows("LLaMA-Factory, axolotl", "additional_target lora_modules_to_save", _LORA_ONLY),
    *off_rows("LLaMA-Factory", "upcast_layernorm train_from_scratch compute_accuracy", _LORA_ONLY),
    *off_rows("axolotl, LLaMA-Factory", "rl reward_model use_muon use_apollo", _LORA_ONLY),
    *moot_rows(
        "axolotl",
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel",
        "training has kernels of its own, and the same results",
        TRAINING,
    ),
    *off_rows("LLaMA-Factory", "use_galore use_badam use_llama_pro use_adam_mini", _LORA_ONLY),
    *rows(
        "ptuning, ChatGLM-Efficient-Tuning",
        "pre_seq_len",
        idle("0", word="there is no prefix", verbs=EVERYWHERE),
        _NO_PREFIX,
    ),
    *rows(
        "ptuning, ChatGLM-Efficient-Tuning",
        "prefix_projection",
        idle("false", word="there is no prefix", verbs=EVERYWHERE),
        _NO_PREFIX,
    ),
    *rows("ptuning", "ptuning_checkpoint", _NO_PREFIX),
    # --- rows of a step ---
    *rows(
        "glmtune",
        "packing",
        becomes("layout", word=LAYOUT, values={"false": "padded"}, beside={"exact_batch": "false"}),
        becomes("layout", word=LAYOUT, values={"true": "packed", "false": "exact"}),
    ),
    *rows(
        "glmtune",
        "exact_batch",
        becomes("layout", word=LAYOUT, values={"true": "exact", "false": DEFAULT}),
    ),
    *rows("alpaca-lora, axolotl", "micro_batch_size", becomes("per_device_train_batch_size")),
    *rows("scripts of 2023", "train_batch_size", becomes("per_device_train_batch_size")),
    *rows("DeepSpeed", "train_micro_batch_size_per_gpu", becomes("per_device_train_batch_size")),
    *rows("axolotl, MedicalGPT", "eval_batch_size", becomes("per_device_eval_batch_size")),
    *rows(
        "alpaca-lora, axolotl",
        "batch_size",
        _ANSWER_BATCH,
        refused(
            "a step has --per_device_train_batch_size 4 rows, times --gradient_accumulation_steps "
            "32 passes, times the processes"
        ),
    ),
    *rows("scripts of 2023", "accumulation_steps", becomes("gradient_accumulation_steps")),
    # --- schedule ---
    *rows("alpaca-lora, axolotl", "num_epochs", becomes("num_train_epochs")),
    *rows("scripts of 2023", "epochs epoch max_epochs", becomes("num_train_epochs")),
    *rows("VisualGLM-6B", "train_iters", becomes("max_steps")),
    *rows("VisualGLM-6B", "lr", becomes("learning_rate")),
    *rows("VisualGLM-6B", "lr_decay_style", becomes("lr_scheduler_type")),
    *rows("VisualGLM-6B", "warmup", becomes("warmup_steps", values=share_of_steps)),
    *rows("axolotl", "lr_scheduler", becomes("lr_scheduler_type")),
    *rows("transformers' examples", "num_warmup_steps", becomes("warmup_steps")),
    *rows("DeepSpeed", "gradient_clipping", becomes("max_grad_norm")),
    *rows("axolotl", "optimizer", *OPTIMISER),
    *_off("qlora", "adam8bit", "AdamW keeps its states in float32; leave this out"),
    *_off("axolotl", "adam_beta3 adam_epsilon2", "AdamW has --adam_beta2 0.999, no more"),
    *rows("unsloth", "random_state", becomes("seed")),
    *rows("unsloth", "use_gradient_checkpointing", _CHECKPOINTING),
    *rows("VisualGLM-6B", "checkpoint_activations", becomes("gradient_checkpointing")),
    *rows(
        "LLaMA-Factory",
        "disable_gradient_checkpointing",
        becomes("gradient_checkpointing", values={"true": "false", "false": "auto"}),
    ),
    *rows(
        "LLaMA-Factory, axolotl",
        "early_stopping_steps early_stopping_patience",
        becomes("early_stopping", word="evaluations that may follow the best one"),
    ),
    *_off(
        "axolotl",
        "evals_per_epoch saves_per_epoch",
        "both come every N steps, or after each epoch: --eval_steps 500 --save_steps 500",
    ),
    *moot_rows(
        "ptuning, finetune_demo",
        "predict_with_generate",
        "training is evaluated by the loss, and the answering verbs answer",
    ),
    *rows(
        "finetune_demo",
        "data_config training_args peft_config generation_config",
        refused(
            "sections have the names of verbs, such as train: put what it sets there", EVERYWHERE
        ),
    ),
    # --- devices ---
    *_off("ChatGLM-Finetuning, DeepSpeed", "ds_file deepspeed_config zero_stage", NO_SHARDS),
    *rows(
        "DeepSpeed, torchrun",
        "num_gpus nproc_per_node world_size master_port master_addr",
        _LAUNCHER,
    ),
    # --- what a run writes and resumes from ---
    *rows("ChatGLM-Finetuning", "save_model_step", becomes("save_steps")),
    *rows("ChatGLM-Finetuning", "show_loss_step", becomes("logging_steps")),
    *rows("VisualGLM-6B", "save_interval", becomes("save_steps")),
    *rows("VisualGLM-6B", "log_interval", becomes("logging_steps")),
    *rows("VisualGLM-6B", "eval_interval", becomes("eval_steps")),
    *rows(
        "axolotl",
        "auto_resume_from_checkpoints",
        becomes("resume_from_checkpoint", values={"true": "true", "false": DEFAULT}),
    ),
    *rows("scripts of 2023", "resume resume_from", becomes("resume_from_checkpoint")),
    *rows(
        "ChatGLM-Efficient-Tuning",
        "resume_lora_training",
        *unless("true", word="a run with --adapter continues its training", way=_ON_TOP),
    ),
    *_off("LLaMA-Factory", "create_new_adapter", _ON_TOP),
    *moot_rows("LLaMA-Factory", "plot_loss", "the curve of the loss is always drawn", TRAINING),
    *_off("alpaca-lora, axolotl", "wandb_project wandb_run_name wandb_watch", _METRICS),
    *_off("alpaca-lora, axolotl", "wandb_log_model use_wandb wandb_entity wandb_name", _METRICS),
    *_off("LLaMA-Factory", "use_swanlab", _METRICS),
    *rows(
        "axolotl",
        "use_tensorboard",
        becomes("report_to", values={"true": "tensorboard"}),
        idle("false", word="report_to says where metrics go"),
    ),
    *moot_rows("axolotl", "strict", "a name that is not known is always refused", TRAINING),
    *rows("ChatGLM-6B-QLoRA", "train_args_json", _RECIPE),
    *_off("axolotl", "save_first_step", "see --save_steps 1000"),
    *_off("unsloth", "push_model push_gguf save_gguf", "an adapter is written; leave this out"),
)
