"""Other trainers' names for the settings of answering and merging, and our verbs' own variants."""

from glmtune.config.foreign.data import FEWER, LENGTH, NO_ROWS, NOT_CONVERTED
from glmtune.config.foreign.fates import (
    ANSWERING,
    EVERYWHERE,
    TRAINING,
    Foreign,
    becomes,
    idle,
    moot_rows,
    off_rows,
    only_rows,
    refused,
    rows,
)

_OURS = "glmtune"
_WITHOUT_QUESTION = becomes("max_new_tokens", word="max_length counted the question, this does not")
_ONE_FILE = refused("answers go to a file: --output_path output/answers.jsonl", ("infer",))
_AS_IT_WAS = "`glmtune merge --adapter output --save_path merged` writes the base's own type"
_NO_SERVER = refused("chat is in the terminal; leave this out", EVERYWHERE)

ANSWERS: tuple[Foreign, ...] = (
    *rows(
        "LLaMA-Factory, TRL",
        "max_length",
        _WITHOUT_QUESTION,
        *LENGTH,
    ),
    *rows("ptuning", "val_max_target_length", becomes("max_new_tokens"), *LENGTH),
    *rows("transformers", "generation_max_length", _WITHOUT_QUESTION),
    *rows(
        "axolotl, OpenAI's API", "generation_max_new_tokens max_tokens", becomes("max_new_tokens")
    ),
    *rows("LLaMA-Factory, ptuning", "eval_num_beams generation_num_beams", becomes("num_beams")),
    *rows("MedicalGPT, ms-swift", "stop_str stop_words", becomes("stop_strings")),
    *rows("scripts of 2023", "stop", becomes("stop_strings")),
    *only_rows("LLaMA-Factory, qlora", "length_penalty typical_p", "1", "leave this out"),
    *off_rows(
        "qlora",
        "no_repeat_ngram_size min_new_tokens penalty_alpha",
        "see --repetition_penalty 1.1",
        ("infer", "compare", "chat"),
    ),
    *only_rows("LLaMA-Factory", "skip_special_tokens", "true", "answers are text; leave this out"),
    *only_rows(
        "LLaMA-Factory",
        "infer_backend",
        "huggingface hf pt transformers",
        "answers have one decoder, which --decode_bits 8 makes faster",
        ANSWERING,
    ),
    *rows(
        "MedicalGPT",
        "interactive",
        idle("true", word="a chat is interactive", verbs=("chat",)),
        refused("`glmtune chat` talks; leave this out", EVERYWHERE),
    ),
    *moot_rows("scripts of 2023", "stream", "a chat's answers come as they are made", ("chat",)),
    *rows("alpaca-lora, MedicalGPT", "server_name share_gradio share port", _NO_SERVER),
    *rows("MedicalGPT, ms-swift", "output_file result_path", becomes("output_path", "save_path")),
    *rows("LLaMA-Factory", "export_dir", becomes("save_path", verbs=("merge",))),
    *rows("scripts of 2023", "merged_path save_dir", becomes("save_path", "output_dir")),
    *off_rows("LLaMA-Factory", "export_quantization_bit export_legacy_format", _AS_IT_WAS),
    # --- our own names, given to a verb that has another name for it ---
    *rows(
        f"{_OURS}, axolotl",
        "adapter",
        becomes("quantization_bit", word="NF4 under LoRA", values={"qlora": "4"}, verbs=TRAINING),
        idle("lora", word="LoRA is what is trained"),
        refused("the base is --base FOLDER", ("convert", "tokenize", "doctor", "replay")),
    ),
    *rows(
        _OURS,
        "output_dir",
        _ONE_FILE,
        becomes("save_path", verbs=("tokenize", "merge")),
        becomes("out", "folder", "new"),
        refused("lines go to a file: --save_path rows.jsonl", ("convert",)),
    ),
    *rows(_OURS, "output_path", becomes("output_dir", "save_path", "out", "folder", "new")),
    *rows(_OURS, "save_path", becomes("output_dir", "output_path", "out", "folder", "new")),
    *rows(_OURS, "out output", becomes("output_dir", "output_path", "save_path", "folder", "new")),
    *rows(_OURS, "data_path", NO_ROWS, NOT_CONVERTED, becomes("files")),
    *rows(
        _OURS,
        "jsonl_path",
        NO_ROWS,
        becomes("files"),
        refused(
            "records as alpaca has them are read: --data_path FILE.json",
            ("convert", "infer", "compare", "check"),
        ),
    ),
    *rows(
        _OURS,
        "dataset_path",
        refused("token rows are what is written: --save_path rows", ("tokenize",)),
        refused(
            "token rows are for training; records are read here: --data_path FILE.json",
            ("convert", "infer", "compare", "check"),
        ),
        refused("`glmtune validate FILE.json` reads records", ("validate",)),
    ),
    *rows(_OURS, "limit", *FEWER),
    *rows(
        _OURS,
        "per_device_train_batch_size",
        becomes("per_device_eval_batch_size", word="records answered at a time"),
    ),
    *rows(_OURS, "decode_bits", refused("the base is held in few bits by --quantization_bit 8")),
    *rows(
        _OURS,
        "max_new_tokens",
        refused(
            "answers are as long as `glmtune tokenize --jsonl_path rows.jsonl --save_path rows "
            "--max_seq_length 200` cut them to; leave this out here"
        ),
    ),
)
