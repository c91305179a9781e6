"""Other trainers' names for rows, their length, and held-out rows."""

from glmtune.config.foreign.fates import (
    ANSWERING,
    DEFAULT,
    EVERYWHERE,
    LAYOUT,
    MAKING_ROWS,
    TRAINING,
    Foreign,
    becomes,
    moot,
    moot_rows,
    off_rows,
    only_rows,
    percentage_of_rows,
    refused,
    rows,
    share_of_rows,
    unless,
)

CONVERT = "`glmtune convert --data_path FILE.json --save_path rows.jsonl`"
NO_ROWS = refused(
    f"training reads rows that two verbs make: {CONVERT}, `glmtune tokenize --jsonl_path "
    "rows.jsonl --save_path rows`; then --dataset_path rows"
)
NOT_CONVERTED = refused(
    f"records become lines first: {CONVERT}, then --jsonl_path rows.jsonl", ("tokenize",)
)
_ASK = "`glmtune compare --data_path FILE.json --adapter output`"

_RECORDS = (
    NO_ROWS,
    NOT_CONVERTED,
    becomes("data_path", "files", word="the records to read"),
)
_NAMED_RECORDS = (
    NO_ROWS,
    NOT_CONVERTED,
    refused("records are a file: --data_path FILE.json", ("convert", "infer", "compare", "check")),
    refused("records are files: `glmtune validate FILE.json`", ("validate",)),
)
_LIST = "a data set of a list is named with it: {}DIR/dataset_info.json#NAME"
_LISTED_RECORDS = (
    NO_ROWS,
    refused(_LIST.format("--jsonl_path "), ("tokenize", "inspect")),
    refused(_LIST.format("--data_path "), ("convert", "infer", "compare", "check", "tune")),
    refused(_LIST.format("`glmtune validate ") + "`", ("validate",)),
)
_HELD_OUT = (
    becomes("held_out", word="no question of it may stand in the files"),
    becomes("data_path", word="the records to answer", verbs=ANSWERING),
    refused(
        "rows are held out of the training rows: --eval_ratio 0.05; or a file of its own is "
        "tokenised and evaluated on: --eval_dataset_path FOLDER"
    ),
    refused(f"a file of its own is asked after training: {_ASK}", MAKING_ROWS),
)
_EVAL_RATIO = becomes("eval_ratio", word="the share held out", values=share_of_rows)
FEWER = (
    becomes("limit"),
    refused(
        "every row of dataset_path is used: give `glmtune convert` a shorter file, or stop early "
        "with --max_steps 1000"
    ),
    refused("for 500 of its rows, --jsonl_path rows.jsonl#500", ("tokenize",)),
    refused("all rows of a file are read: shorten the file", MAKING_ROWS),
)
LENGTH = (
    becomes("max_seq_length", word="it holds for question and answer, each by itself"),
    refused(
        "rows are as long as tokenize made them: `glmtune tokenize --jsonl_path rows.jsonl "
        "--save_path rows --max_seq_length 200`; leave this out here"
    ),
)
_WORKERS = (becomes("num_threads"), moot("rows are read in one process", EVERYWHERE))
_PROMPT = refused(
    "questions are put as the original puts them, and as the rows of dataset_path are made; leave "
    "this out",
    EVERYWHERE,
)

DATA: tuple[Foreign, ...] = (
    # --- files ---
    *rows("LLaMA-Factory, qlora, unsloth", "dataset", *_LISTED_RECORDS),
    *rows("axolotl", "datasets", NO_ROWS, becomes("datasets"), *_NAMED_RECORDS[2:]),
    *rows("TRL, MedicalGPT", "dataset_name", *_NAMED_RECORDS),
    *rows("LLaMA-Factory", "dataset_dir", *_LISTED_RECORDS),
    *rows(
        "LLaMA-Factory, ms-swift",
        "mix_strategy interleave_probs interleave_prob",
        *unless(
            "concat",
            word="files follow each other, and training shuffles their rows",
            way="how often the rows of a file are used is said beside it, in a recipe of tokenize: "
            "datasets: [{path: a.jsonl, weight: 2}, {path: b.jsonl}]",
            verbs=EVERYWHERE,
        ),
    ),
    *rows("MedicalGPT, ptuning", "dataset_config_name", *_NAMED_RECORDS),
    *rows("axolotl", "dataset_prepared_path", *_NAMED_RECORDS),
    *rows("ptuning, finetune_demo", "train_file", *_RECORDS),
    *rows("MedicalGPT", "train_file_dir data_file", *_RECORDS),
    *rows("ChatGLM-6B-QLoRA", "train_data_path", *_RECORDS),
    *rows("ChatGLM-Finetuning, VisualGLM-6B", "train_path train_data", *_RECORDS),
    *rows("LLM-Tuning", "input_file", *_RECORDS),
    *rows("ptuning, transformers' examples", "validation_file", *_HELD_OUT),
    *rows("ptuning, finetune_demo", "test_file val_file", *_HELD_OUT),
    *rows("MedicalGPT", "validation_file_dir", *_HELD_OUT),
    *rows("LLaMA-Factory", "eval_dataset", *_HELD_OUT),
    *rows("ChatGLM-6B-QLoRA", "eval_data_path", *_HELD_OUT),
    *rows("axolotl, ms-swift, VisualGLM-6B", "test_datasets val_dataset valid_data", *_HELD_OUT),
    *rows(
        "LLaMA-Factory, LLM-Tuning",
        "tokenized_path tokenized_dataset",
        becomes("dataset_path", "save_path", word="token rows", verbs=(*TRAINING, "tokenize")),
    ),
    *rows("LLM-Tuning", "save_name", becomes("save_path", word="token rows", verbs=("tokenize",))),
    *only_rows("ChatGLM-Efficient-Tuning", "split", "train", "all rows of a file are read"),
    # --- how much of them ---
    *rows("LLaMA-Factory", "val_size", _EVAL_RATIO),
    *rows("alpaca-lora, axolotl", "val_set_size", _EVAL_RATIO),
    *rows("ChatGLM-Efficient-Tuning", "dev_ratio", _EVAL_RATIO),
    *rows("qlora", "eval_dataset_size", _EVAL_RATIO),
    *rows("ms-swift, datasets", "split_dataset_ratio test_size", _EVAL_RATIO),
    *rows(
        "MedicalGPT",
        "validation_split_percentage",
        becomes("eval_ratio", word="a share, not per cent", values=percentage_of_rows),
    ),
    *rows("LLaMA-Factory, ChatGLM-Efficient-Tuning", "max_samples", *FEWER),
    *rows("MedicalGPT, ptuning, qlora", "max_train_samples", *FEWER),
    *rows("MedicalGPT, ptuning, qlora", "max_eval_samples max_predict_samples", *FEWER),
    # --- their length ---
    *rows("LLaMA-Factory, alpaca-lora", "cutoff_len", *LENGTH),
    *rows("axolotl", "sequence_len", *LENGTH),
    *rows("MedicalGPT, transformers", "model_max_length", *LENGTH),
    *rows("ptuning", "max_source_length max_target_length", *LENGTH),
    *rows("qlora", "source_max_len target_max_len", *LENGTH),
    *rows("finetune_demo, ChatGLM-6B-QLoRA", "max_input_length max_output_length", *LENGTH),
    *rows("transformers' examples, TRL", "block_size max_seq_len", *LENGTH),
    *rows("ChatGLM-Finetuning", "max_len max_src_len", *LENGTH),
    *rows("glmtune, unsloth", "max_seq_length", *LENGTH),
    *rows("ChatGLM-Finetuning", "is_skip", becomes("skip_overlength")),
    *rows(
        "axolotl, ms-swift",
        "excess_length_strategy truncation_strategy",
        becomes(
            "skip_overlength",
            values={"drop": "true", "delete": "true", "truncate": "false", "right": "false"},
        ),
        LENGTH[1],
    ),
    # --- how they are read ---
    *rows("LLaMA-Factory, MedicalGPT, ptuning", "preprocessing_num_workers", *_WORKERS),
    *rows("finetune_demo, TRL, axolotl", "num_proc dataset_num_proc dataset_processes", *_WORKERS),
    *moot_rows(
        "LLaMA-Factory, MedicalGPT, ptuning",
        "overwrite_cache preprocessing_batch_size",
        "no cache of rows is kept",
    ),
    *off_rows("LLaMA-Factory, axolotl", "streaming", "rows are read as a whole; leave this out"),
    *rows("LLaMA-Factory", "template", _PROMPT),
    *rows("alpaca-lora", "prompt_template_name prompt_template", _PROMPT),
    *rows("MedicalGPT", "template_name", _PROMPT),
    *rows("axolotl, TRL", "chat_template chat_template_jinja", _PROMPT),
    *rows("LLaMA-Factory, MedicalGPT, ms-swift", "default_system system_prompt system", _PROMPT),
    *rows("ptuning, ChatGLM-6B-QLoRA", "source_prefix prompt_text", _PROMPT),
    *only_rows(
        "ptuning, LLM-Tuning",
        "prompt_column prompt_key",
        "instruction context",
        f"the field is called instruction, for {CONVERT}",
    ),
    *only_rows(
        "ptuning, LLM-Tuning",
        "response_column target_key",
        "output target",
        f"the field is called output, for {CONVERT}",
    ),
    *only_rows("qlora", "dataset_format", "alpaca", f"rows are alpaca's, for {CONVERT}"),
    *rows("ptuning", "history_column", refused(f"{CONVERT} finds the fields itself", EVERYWHERE)),
    # --- what is supervised ---
    *only_rows(
        "LLaMA-Factory, MedicalGPT, ptuning",
        "ignore_pad_token_for_loss",
        "true",
        "filler is never supervised; leave this out",
    ),
    *off_rows(
        "LLaMA-Factory, alpaca-lora, qlora, axolotl",
        "train_on_prompt train_on_inputs train_on_source mask_history",
        "answers are supervised and questions are not; leave this out",
    ),
    *only_rows(
        "alpaca-lora",
        "add_eos_token",
        "true",
        "an answer ends in the end token, unless it was cut; leave this out",
    ),
    *moot_rows(
        "ptuning, axolotl",
        "pad_to_max_length pad_to_sequence_len pad_to_multiple_of",
        "filler is neither seen nor supervised",
    ),
    *rows(
        "axolotl",
        "sample_packing",
        becomes("layout", word=LAYOUT, values={"true": "packed", "false": "exact"}),
    ),
    *rows(
        "LLaMA-Factory",
        "neat_packing",
        becomes("layout", word=LAYOUT, values={"true": "packed", "false": DEFAULT}),
    ),
    *moot_rows("axolotl", "eval_sample_packing", "the loss of a row is the same in a pack"),
    *rows(
        "LLaMA-Factory",
        "disable_shuffling",
        becomes("train_sampling_strategy", values={"true": "sequential", "false": "random"}),
    ),
    *rows(
        "ms-swift",
        "dataset_shuffle shuffle",
        becomes("train_sampling_strategy", values={"true": "random", "false": "sequential"}),
    ),
    *only_rows(
        "ChatGLM-Tuning",
        "version",
        "v1",
        "v1 is ChatGLM-6B; v2 and v3 are ChatGLM2 and ChatGLM3, which are not here yet",
    ),
    *only_rows(
        "ms-swift, ChatGLM-Finetuning",
        "model_type mode",
        "chatglm chatglm-6b chatglm_6b chatglm-6b-v1 glm",
        "ChatGLM-6B is what is here; ChatGLM2, ChatGLM3 and GLM-4 are not yet",
    ),
    *moot_rows("ptuning", "lang", "rows of both languages are read alike"),
)
