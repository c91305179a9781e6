"""Other trainers' names for the base model, the adapter, and how weights are held."""

from glmtune.config.foreign.fates import (
    DEFAULT,
    EVERYWHERE,
    TRAIN_AND_ANSWER,
    WITH_BASE,
    Foreign,
    becomes,
    idle,
    moot_rows,
    off_rows,
    only_rows,
    refused,
    rows,
    unless,
)

_BASE = becomes("base", word="folder or hub id of the base")
_ADAPTER = (becomes("adapter", word="run folder or adapter"),)
_TOKENIZER = refused("the tokenizer is the base's, from --base; leave this out", WITH_BASE)
_NOT_QUANTISED = idle("false", word="nothing is quantised", verbs=EVERYWHERE)
_IN_8_BITS = (
    becomes("quantization_bit", word="LLM.int8", values={"true": "8", "false": DEFAULT}),
    _NOT_QUANTISED,
)
_IN_4_BITS = (
    becomes("quantization_bit", word="NF4", values={"true": "4", "false": DEFAULT}),
    _NOT_QUANTISED,
)
_NUMBER_FORMAT = (
    becomes("bf16", values=dict.fromkeys(("bfloat16", "bf16", "torch.bfloat16"), "true")),
    becomes("fp16", values=dict.fromkeys(("float16", "fp16", "half", "torch.float16"), "true")),
    becomes("bf16", values=dict.fromkeys(("float32", "fp32", "float", "torch.float32"), "false")),
    idle("auto", word="the device's best is chosen", verbs=EVERYWHERE),
)
_DEVICE = (
    becomes("use_cpu", values={"cpu": "true"}),
    *unless(
        *("auto", "cuda", "cuda:0", "gpu", "balanced", "sequential"),
        word="a process has one card, the first that it sees",
        way="a process has one card, which CUDA_VISIBLE_DEVICES=1 before the command chooses",
        verbs=EVERYWHERE,
    ),
)

MODELS: tuple[Foreign, ...] = (
    # --- base and adapter ---
    *rows("LLaMA-Factory, MedicalGPT, ptuning, qlora", "model_name_or_path", _BASE),
    *rows("alpaca-lora, axolotl, MedicalGPT", "base_model", _BASE),
    *rows("PEFT", "base_model_name_or_path", _BASE),
    *rows("unsloth, PEFT's examples", "model_name", _BASE),
    *rows("transformers", "pretrained_model_name_or_path", _BASE),
    *rows("ms-swift", "model", _BASE),
    *rows("finetune_demo", "model_dir", _BASE),
    *rows("LLM-Tuning", "model_checkpoint", _BASE),
    *rows("LLaMA-Factory", "adapter_name_or_path", *_ADAPTER),
    *rows("ChatGLM-Efficient-Tuning, qlora", "checkpoint_dir", *_ADAPTER),
    *rows("MedicalGPT", "peft_path lora_model", *_ADAPTER),
    *rows("alpaca-lora", "lora_weights", *_ADAPTER),
    *rows("axolotl", "lora_model_dir", *_ADAPTER),
    *rows("scripts of 2023", "lora_path lora_dir lora_checkpoint lora_ckpt_path", *_ADAPTER),
    *rows("PEFT's examples", "peft_model_id peft_model peft_model_path", *_ADAPTER),
    *rows("mlx-lm, scripts of 2023", "adapter_path adapter_dir", *_ADAPTER),
    *rows("ms-swift", "adapters", *_ADAPTER),
    *rows("ptuning, qlora", "tokenizer_name config_name", _TOKENIZER),
    *rows("MedicalGPT", "tokenizer_name_or_path tokenizer_path", _TOKENIZER),
    *rows("axolotl", "tokenizer_config base_model_config", _TOKENIZER),
    *moot_rows(
        "LLaMA-Factory, MedicalGPT, ptuning, axolotl",
        "use_fast_tokenizer tokenizer_use_fast tokenizer_type",
        "the tokenizer is glmtune's own",
    ),
    *moot_rows(
        "LLaMA-Factory, MedicalGPT, qlora, axolotl",
        "trust_remote_code",
        "the model is glmtune's own: no code of a folder is run",
    ),
    # --- the hub ---
    *rows(
        "LLaMA-Factory, MedicalGPT, ptuning, qlora",
        "cache_dir",
        refused("set the hub's cache with HF_HOME=FOLDER before the command", EVERYWHERE),
    ),
    *only_rows(
        "LLaMA-Factory, MedicalGPT, ptuning",
        "model_revision revision",
        "main",
        "fetch it with `hf download zai-org/chatglm-6b --revision NAME --local-dir chatglm-6b`, "
        "then --base chatglm-6b",
        WITH_BASE,
    ),
    *off_rows(
        "LLaMA-Factory, MedicalGPT, ptuning, qlora, axolotl",
        "use_auth_token hf_hub_token hf_use_auth_token",
        "pass a token as HF_TOKEN=... before the command, or with `hf auth login`",
    ),
    # --- bits and number formats ---
    *rows("MedicalGPT, alpaca-lora, axolotl", "load_in_8bit", *_IN_8_BITS),
    *rows("MedicalGPT, axolotl, unsloth", "load_in_4bit", *_IN_4_BITS),
    *rows("alpaca-lora", "load_8bit", *_IN_8_BITS),
    *rows("scripts of 2023", "load_4bit", *_IN_4_BITS),
    *rows("MedicalGPT", "qlora", *_IN_4_BITS),
    *rows(
        "qlora, ms-swift",
        "bits quant_bits",
        becomes("quantization_bit", values={"4": "4", "8": "8", "16": DEFAULT, "32": DEFAULT}),
        idle("16", "32", word="nothing is quantised", verbs=EVERYWHERE),
    ),
    *only_rows(
        "LLaMA-Factory, qlora, transformers",
        "quantization_type quant_type bnb_4bit_quant_type",
        "nf4",
        "four bits are NF4: --quantization_bit 4",
        TRAIN_AND_ANSWER,
    ),
    *only_rows(
        "LLaMA-Factory, qlora, transformers",
        "double_quantization double_quant bnb_4bit_use_double_quant",
        "true",
        "four bits have double quantisation: --quantization_bit 4",
        TRAIN_AND_ANSWER,
    ),
    *only_rows(
        "LLaMA-Factory",
        "quantization_method quant_method",
        "bnb bitsandbytes",
        "the base is quantised by bitsandbytes: --quantization_bit 4",
        TRAIN_AND_ANSWER,
    ),
    *rows("MedicalGPT, ms-swift", "torch_dtype", *_NUMBER_FORMAT),
    *rows("unsloth, transformers", "dtype", *_NUMBER_FORMAT),
    *rows("ChatGLM-6B-QLoRA, LLaMA-Factory", "compute_dtype infer_dtype", *_NUMBER_FORMAT),
    *rows("transformers", "bnb_4bit_compute_dtype", *_NUMBER_FORMAT),
    *rows("LLaMA-Factory, axolotl", "pure_bf16 bfloat16", becomes("bf16")),
    *rows("axolotl", "float16", becomes("fp16")),
    *rows(
        "axolotl",
        "float32",
        becomes("bf16", values={"true": "false"}),
        idle("false", word="the device's best is chosen", verbs=EVERYWHERE),
    ),
    *rows(
        "LLaMA-Factory, axolotl",
        "fp8",
        becomes("base_dtype", values={"true": "fp8", "false": "auto"}),
        idle("false", word="it is off", verbs=EVERYWHERE),
    ),
    # --- devices and kernels ---
    *rows("MedicalGPT, LLaMA-Factory, axolotl", "device_map", *_DEVICE),
    *rows("scripts of 2023", "device", *_DEVICE),
    *rows(
        "scripts of 2023",
        "gpu gpus gpu_id gpu_ids",
        refused("a process has one card: CUDA_VISIBLE_DEVICES=0 before the command", EVERYWHERE),
    ),
    *moot_rows(
        "LLaMA-Factory, MedicalGPT, axolotl, transformers",
        "flash_attn flash_attention use_flash_attn attn_implementation sdp_attention "
        "xformers_attention eager_attention attn_impl",
        "attention has kernels of its own, and the same results",
    ),
    *moot_rows(
        "LLaMA-Factory",
        "use_unsloth use_unsloth_gc enable_liger_kernel use_reentrant_gc",
        "training has kernels of its own, and the same results",
    ),
    *moot_rows("LLaMA-Factory, axolotl", "low_cpu_mem_usage", "weights are loaded one by one"),
    *moot_rows("LLaMA-Factory, qlora", "use_kv_cache", "answers always keep a cache"),
    *off_rows(
        "LLaMA-Factory, MedicalGPT, ptuning",
        "shift_attn rope_scaling resize_position_embeddings",
        "positions stay as published; leave this out",
    ),
    *off_rows(
        "LLaMA-Factory, MedicalGPT, axolotl",
        "resize_vocab resize_emb add_tokens add_special_tokens special_tokens",
        "the vocabulary stays as published; leave this out",
    ),
)
