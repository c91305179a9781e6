"""Names of other trainers: each becomes a setting, is accepted where harmless, or is refused."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping

import pytest

from glmtune.config.flags import split_arguments, verb_help
from glmtune.config.foreign import FOREIGN, TABLE
from glmtune.config.foreign.fates import OWN_RANK, Becomes, Fate, Idle
from glmtune.config.foreign.page import names_page
from glmtune.config.names import check_name
from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS
from glmtune.errors import UserError

from .test_config import REQUIRED

# A valid value for each kind of setting, for names that are aliases.
TEXTS = ("12", "0.25", "true", "linear", "tensorboard", "4", "dense", "some/path")
# Inputs of the conversions, and their results.
CONVERTED = {
    "eval_ratio": [("0.1", 0.1), ("0", 0.0)],
    "warmup_steps": [("0.03", 0.03)],
    "lora_target": [
        ("dense", ("dense",)),
        ("query_key_value,dense", ("query_key_value", "dense")),
        ("[query_key_value,dense]", ("query_key_value", "dense")),
        ("['query_key_value', \"dense\"]", ("query_key_value", "dense")),
        ('["dense"]', ("dense",)),
        ("all-linear", ("all",)),
    ],
}


def fates(verb: str, name: str) -> list[Fate]:
    """The possible outcomes for a name that is given to a verb."""
    fields = SETTINGS[verb].model_fields
    return [
        fate
        for fate in FOREIGN[name].fates
        if verb in (fate.verbs or SETTINGS)
        and (not isinstance(fate, Becomes) or any(target in fields for target in fate.settings))
    ]


def cases() -> list[tuple[str, str]]:
    """Every name with every verb that has a use for it."""
    return [
        (verb, name)
        for name in FOREIGN
        for verb in SETTINGS
        if name not in SETTINGS[verb].model_fields and fates(verb, name)
    ]


def read(verb: str, **flags: str):
    """A verb's settings, with required ones filled in unless the flags give them."""
    given = {}
    for name in flags:
        for fate in fates(verb, name) if name in FOREIGN else ():
            given |= dict.fromkeys(getattr(fate, "settings", ()))
    required = {name: text for name, text in REQUIRED[verb].items() if name not in given}
    return read_config(SETTINGS[verb], None, required | flags)


def complaint(call: Callable, *arguments) -> str:
    """The error line of a call, "" where there is none."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


def follow(verb: str, line: str) -> None:
    """Do what an error says: its commands and its flags must be ones that are understood."""
    for command in re.findall(r"`([^`]*glmtune [^`]*)`", line):
        words = shlex.split(command.partition("glmtune ")[2])
        told = " ".join(words[:2]) if " ".join(words[:2]) in SETTINGS else words[0]
        assert told in SETTINGS, command
        recipe, flags = split_arguments(told, words[len(told.split()) :])
        assert recipe in (None, "RECIPE.yaml")
        assert set(flags) <= set(SETTINGS[told].model_fields), command
        read_config(SETTINGS[told], None, REQUIRED[told] | flags)
    line = re.sub(r"`[^`]*`", "", line.partition(": ")[2])
    for name, value in re.findall(r"--(\w+) ([^\s,;]+)", line):
        assert name in SETTINGS[verb].model_fields, f"{verb}: {line}"
        read_config(SETTINGS[verb], None, REQUIRED[verb] | {name: value})


def test_the_table_has_each_name_once_with_its_source():
    assert len(TABLE) >= 400
    assert [name for name, count in Counter(row.name for row in TABLE).items() if count > 1] == []
    assert all(row.source and row.fates and re.fullmatch(r"\w+", row.name) for row in TABLE)
    sources = " ".join(row.source for row in TABLE)
    for project in (
        *("LLaMA-Factory", "alpaca-lora", "MedicalGPT", "ptuning", "finetune_demo", "axolotl"),
        *("unsloth", "PEFT", "transformers", "ChatGLM-Tuning", "qlora", "ChatGLM-Finetuning"),
    ):
        assert project in sources


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_is_of_use_somewhere(name):
    assert any((verb, name) in ALL_CASES for verb in SETTINGS)
    for verb in SETTINGS:
        assert "did you mean" not in complaint(check_name, verb, name, f"--{name}")


ALL_CASES = set(cases())


@pytest.mark.parametrize("name", FOREIGN)
def test_each_fate_of_a_name(name, capsys, monkeypatch):
    """A setting gets the value; a name without effect changes nothing; a refusal names a fix."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for verb in SETTINGS:
        if (verb, name) in ALL_CASES:
            try_each_fate(verb, name, capsys)


def try_each_fate(verb, name, capsys):
    tried = 0
    for fate in fates(verb, name):
        if isinstance(fate, Becomes):
            fields = SETTINGS[verb].model_fields
            target = next(setting for setting in fate.settings if setting in fields)
            if fate.values is None:
                tried += passes_on(verb, name, target)
                break
            if isinstance(fate.values, Mapping):
                for text, value in fate.values.items():
                    config = read(verb, **{name: text}, **fate.beside)
                    expected = read(verb) if value is None else read(verb, **{target: value})
                    assert config == expected
                    tried += 1
            elif isinstance(fate.values, Callable):
                for text, value in CONVERTED[target]:
                    if name == "validation_split_percentage":
                        text = str(100 * float(text))
                    assert getattr(read(verb, **{name: text}), target) == value
                    tried += 1
        elif isinstance(fate, Idle):
            for text in fate.values or ("true", "false", "12", "words"):
                if text != OWN_RANK:
                    assert read(verb, **{name: text}) == read(verb)
                    tried += 1
        else:
            with pytest.raises(UserError) as caught:
                read(verb, **{name: "zzz"})
            line = str(caught.value)
            assert line == f"--{name} 'zzz': {fate.way}"
            assert "did you mean" not in line
            follow(verb, line)
            tried += 1
            break  # what comes after a refusal is for other verbs
        told = capsys.readouterr().err.splitlines()
        assert told
        names = [name, *getattr(fate, "beside", ())]
        assert all(any(line.startswith(f"note: {n} ") for n in names) for line in told)
    assert tried


def passes_on(verb: str, name: str, target: str) -> int:
    """Values that the setting accepts give the same result under the other name."""
    tried = 0
    for text in TEXTS:
        try:
            expected = read(verb, **{target: text})
        except UserError:
            with pytest.raises(UserError):
                read(verb, **{name: text})
            continue
        assert read(verb, **{name: text}) == expected
        tried += 1
    return tried


@pytest.mark.parametrize("name", sorted({name for verb, name in ALL_CASES if verb == "train"}))
def test_a_recipe_is_answered_as_flags_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("false", "0.5", "null", "[a, b]", "{a: 1}", ""):
        (tmp_path / "r.yaml").write_text(f"{name}: {text}\n")
        told = complaint(read_config, SETTINGS["train"], "r.yaml", REQUIRED["train"])
        assert told == "" or told.startswith(f"r.yaml:1: {name} ")
        assert "did you mean" not in told
        if text in ("null", ""):
            config = read_config(SETTINGS["train"], "r.yaml", REQUIRED["train"])
            assert config == read("train")


@pytest.mark.parametrize(
    "verb, flags, words",
    [
        ("train", {"load_in_8bit": "8"}, "should be true or false"),
        ("train", {"val_size": "500"}, "--eval_ratio 0.05"),
        ("train", {"val_set_size": "2000"}, "--eval_ratio 0.05"),
        ("train", {"val_size": "x"}, "should be a number"),
        ("train", {"validation_split_percentage": "90"}, "--eval_ratio 0.05"),
        ("train", {"optim": "sgd"}, "adamw_torch"),
        ("train", {"do_train": "false"}, "glmtune plan"),
        ("train", {"save_strategy": "no"}, "should be steps or epoch"),
        ("train", {"eval_strategy": "epoch"}, "--save_strategy epoch"),
        ("train", {"load_best_model_at_end": "true"}, "--adapter output/best"),
        ("train", {"save_safetensors": "false"}, "always written as safetensors"),
        ("train", {"deepspeed": "ds.json"}, "torchrun"),
        ("train", {"cutoff_len": "512"}, "glmtune tokenize"),
        ("train", {"max_seq_length": "512"}, "glmtune tokenize"),
        ("train", {"dataset": "alpaca_zh"}, "--dataset_path rows"),
        ("train", {"train_file": "a.json"}, "--dataset_path rows"),
        ("train", {"data_path": "a.json"}, "--dataset_path rows"),
        ("train", {"validation_file": "dev.json"}, "--eval_ratio"),
        ("train", {"create_new_adapter": "true"}, "glmtune merge"),
        ("train", {"resume_lora_training": "false"}, "glmtune merge"),
        ("tokenize", {"adapter": "a"}, "--base"),
        ("train", {"pre_seq_len": "128"}, "--lora_rank"),
        ("train", {"finetuning_type": "full"}, "LoRA"),
        ("train", {"stage": "dpo"}, "questions with answers"),
        ("train", {"adam_beta3": "0.9"}, "--adam_beta2"),
        ("train", {"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES=1"),
        ("train", {"local_rank": "1"}, "torchrun"),
        ("train", {"hub_token": "secret", "push_to_hub": "true"}, "glmtune push"),
        ("train", {"wandb_project": "glm"}, "--report_to tensorboard"),
        ("tokenize", {"version": "v2"}, "ChatGLM2"),
        ("tokenize", {"data_path": "a.json"}, "--jsonl_path"),
        ("infer", {"output_dir": "out"}, "--output_path"),
        ("infer", {"dataset_path": "rows"}, "--data_path FILE.json"),
        (
            "infer",
            {"lora_dim": "8"},
            "is lora_rank here, a setting of train, adapters distil, not of",
        ),
        ("infer", {"optim": "adamw_torch"}, "concerns train, plan, not infer"),
        ("merge", {"load_in_4bit": "true"}, "is quantization_bit here, a setting of train"),
        ("convert", {"output_dir": "out"}, "--save_path rows.jsonl"),
    ],
)
def test_the_right_way_is_told(verb, flags, words):
    with pytest.raises(UserError) as caught:
        read(verb, **flags)
    line = str(caught.value)
    assert words in line
    assert "\n" not in line
    assert "secret" not in line
    follow(verb, line)


@pytest.mark.parametrize(
    "verb, flags, today",
    [
        ("train", {"base_model": "m", "lora_r": "4"}, {"base": "m", "lora_rank": 4}),
        ("train", {"load_in_8bit": "true", "load_in_4bit": "false"}, {"quantization_bit": "8"}),
        ("train", {"adapter": "qlora", "load_in_4bit": "True"}, {"quantization_bit": "4"}),
        ("train", {"adapter": "a", "resume_lora_training": "true"}, {"adapter": "a"}),
        ("train", {"adapter_name_or_path": "a", "create_new_adapter": "no"}, {"adapter": "a"}),
        ("plan", {"lora_path": "a"}, {"adapter": "a"}),
        ("train", {"early_stopping_patience": "3"}, {"early_stopping": 3}),
        ("train", {"bits": "16"}, {"quantization_bit": None}),
        ("train", {"val_size": "0.1"}, {"eval_ratio": 0.1}),
        ("train", {"validation_split_percentage": "1"}, {"eval_ratio": 0.01}),
        ("train", {"torch_dtype": "float32"}, {"bf16": False, "fp16": False}),
        ("train", {"torch_dtype": "torch.bfloat16"}, {"bf16": True}),
        ("train", {"bf16": "auto"}, {"bf16": None}),
        ("train", {"device_map": "cpu"}, {"use_cpu": True}),
        ("train", {"use_gradient_checkpointing": "unsloth"}, {"gradient_checkpointing": True}),
        ("train", {"disable_gradient_checkpointing": "1"}, {"gradient_checkpointing": False}),
        ("train", {"disable_shuffling": "true"}, {"train_sampling_strategy": "sequential"}),
        ("train", {"evaluation_strategy": "no"}, {"eval_ratio": 0.0}),
        ("tokenize", {"cutoff_len": "256"}, {"max_seq_length": 256}),
        ("tokenize", {"preprocessing_num_workers": "3"}, {"num_threads": 3}),
        ("tokenize", {"model_name_or_path": "m"}, {"base": "m"}),
        ("tokenize", {"excess_length_strategy": "drop"}, {"skip_overlength": True}),
        ("infer", {"lora_path": "out"}, {"adapter": "out"}),
        ("infer", {"adapter": "out"}, {"adapter": "out"}),
        ("compare", {"peft_path": "out"}, {"adapter": "out"}),
        ("merge", {"adapter_name_or_path": "out", "export_dir": "m"}, {"save_path": "m"}),
        ("merge", {"adapter": "a"}, {"adapter": "a"}),
        ("chat", {"adapter": "out"}, {"adapter": "out"}),
        ("check", {"adapter": "out"}, {"adapter": "out"}),
        ("chat", {"checkpoint_dir": "out"}, {"adapter": "out"}),
        ("validate", {"validation_file": "b.json"}, {"held_out": "b.json"}),
        ("doctor", {"base_model": "m"}, {"base": "m"}),
        ("plan", {"model_name_or_path": "m", "load_in_4bit": "true"}, {"quantization_bit": "4"}),
        ("bench train", {"lora_r": "4"}, {"lora_rank": 4}),
    ],
)
def test_what_becomes_of_names(verb, flags, today):
    config = read(verb, **flags)
    assert {name: getattr(config, name) for name in today} == today


# Names that other projects have and the table has not: none of them is a slip of one of ours.
def test_off_undoes_a_recipe_and_never_another_name(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("quantization_bit: 4\n")
    given = REQUIRED["train"] | {"load_in_4bit": "false"}
    assert read_config(SETTINGS["train"], str(recipe), given).quantization_bit is None
    with pytest.raises(UserError, match="--load_in_8bit and --load_in_4bit are one setting"):
        read("train", load_in_8bit="true", load_in_4bit="true")
    with pytest.raises(UserError, match="are one setting"):
        read("train", eval_strategy="no", val_size="0.1")


def test_a_rank_is_the_launchers(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert read("train", local_rank="3") == read("train", local_rank="-1") == read("train")
    with pytest.raises(UserError, match="the launcher gives each process"):
        read("train", local_rank="2")


def test_a_flag_that_stands_for_a_path_lacks_its_value():
    with pytest.raises(UserError, match="--base_model lacks its value, which should be a path"):
        split_arguments("train", ["--base_model", "--do_train"])
    line = "--do_train --load_in_4bit --local-rank=0 --lora_r 8"
    flags = split_arguments("train", line.split())
    assert flags[1] == {
        "do_train": "true",
        "load_in_4bit": "true",
        "local_rank": "0",
        "lora_r": "8",
    }


def test_help_lists_the_names_that_are_read():
    assert "load_in_4bit" in verb_help("train", "")
    assert "peft_path" in verb_help("chat", "")
    assert "optim," not in verb_help("train", "")


def test_the_page_is_in_step(root):
    page = (root / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == names_page(), "run: python -m glmtune.config.foreign.page > docs/flags.md"
    assert all(f"`{row.name}`" in page for row in TABLE)
