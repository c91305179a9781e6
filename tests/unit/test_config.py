"""Settings: what recipes and flags may say, and the one line that a mistake gets."""

import ast
import importlib.util
import math
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from glmtune.cli import main
from glmtune.config.flags import fields_by_group, split_arguments, verb_help
from glmtune.config.foreign import FOREIGN
from glmtune.config.names import did_you_mean
from glmtune.config.reading import (
    read_config,
    recipe_verbs,
    shared_setting,
    write_recipe,
    write_sections,
)
from glmtune.config.settings import (
    SETTINGS,
    CompareSettings,
    ConvertSettings,
    InferSettings,
    TokenizeSettings,
    TrainSettings,
)
from glmtune.errors import UserError
from glmtune.models.families import DEFAULT, FAMILIES

TRAIN = {"dataset_path": "data/tokens", "output_dir": "output"}
NONES = ("none", "null")
REQUIRED = {
    "validate": {"files": "a.json"},
    "convert": {"data_path": "a.json", "save_path": "a.jsonl"},
    "tokenize": {"jsonl_path": "a.jsonl", "save_path": "tokens"},
    "inspect": {"jsonl_path": "a.jsonl"},
    "train": TRAIN,
    "plan": {},
    "infer": {"data_path": "a.json"},
    "compare": {"data_path": "a.json", "adapter": "output"},
    "replay-rows": {"save_path": "a.jsonl"},
    "evaluate": {"data_path": "a.json"},
    "merge": {"adapter": "output", "save_path": "merged"},
    "adapters convert": {"old": "old", "new": "new"},
    "doctor": {},
    "demo": {},
    "new-model": {"folder": "new", "like": "glm-tiny"},
    "bench train": {},
    "bench decode": {},
    "bench serve": {},
    "bench memory": {},
    "bench startup": {},
    "reproduce": {},
    "chat": {},
    "serve": {},
    "replay": {"bundle": "crash-1"},
    "check": {"adapter": "output"},
    "ledger": {"adapter": "output"},
    "export": {"adapter": "output", "to": "hf"},
    "adapters dial": {"adapter": "output"},
    "adapters distil": {"adapter": "prefix", "data_path": "a.json", "output_dir": "new"},
    "push": {"folder": "output", "repo_id": "me/mine"},
    "tune": {"data_path": "a.json", "out": "tuned"},
}


def train(recipe: str | None = None, **flags: str) -> TrainSettings:
    return read_config(TrainSettings, recipe, TRAIN | flags)


def refusal(verb: str, recipe: str | None = None, **flags: str) -> str:
    """The error line of settings that must be refused."""
    with pytest.raises(UserError) as caught:
        read_config(SETTINGS[verb], recipe, REQUIRED[verb] | flags)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Write a recipe into an otherwise empty working folder, and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "r.yaml").write_bytes(data)
        return "r.yaml"

    return write


# --- values ---


def test_a_verb_may_take_several_files():
    recipe, flags = split_arguments("validate", ["a.json", "--held_out", "c", "b.yaml"])
    assert (recipe, flags) == (None, {"files": ["a.json", "b.yaml"], "held_out": "c"})
    config = read_config(SETTINGS["validate"], None, flags)
    assert (config.files, config.held_out) == (("a.json", "b.yaml"), "c")
    assert "usage: glmtune validate FILES ... [--name" in verb_help("validate", "")


def test_a_recipe_may_stand_before_the_words_of_any_verb_that_has_some():
    assert split_arguments("check", ["r.yaml"]) == ("r.yaml", {})
    assert split_arguments("validate", ["r.yaml", "a"]) == ("r.yaml", {"files": "a"})
    assert split_arguments("tune", ["r.yml", "a"]) == ("r.yml", {"data_path": "a"})
    assert split_arguments("doctor", ["r.yaml"]) == (None, {"recipe_path": "r.yaml"})
    with pytest.raises(UserError, match="unexpected"):
        split_arguments("demo", ["r.yaml"])


def test_sections_say_what_was_set_and_nothing_else(tmp_path):
    path = str(tmp_path / "r.yaml")
    strange = "a\u2028b\x85c 数据"
    written = [
        read_config(SETTINGS["validate"], None, {"files": ["a.json", strange]}),
        train(lora_target="all", warmup_steps="0.5", dataset_path=strange),
        read_config(SETTINGS["plan"], None, {}),
    ]
    write_sections(written, path)
    for settings in written[:2]:
        read = read_config(type(settings), path, {})
        assert read == settings
        assert read.model_fields_set == settings.model_fields_set
    assert read_config(SETTINGS["plan"], path, {}).lora_target == ("all",)


def test_a_report_replaces_none_of_the_files_it_is_about():
    assert "would overwrite" in refusal("validate", json_path="./a.json")
    assert "would overwrite" in refusal("validate", held_out="b", json_path="b")


def test_original_defaults():
    config = train()
    assert (config.lora_alpha, config.lora_dropout) == (32, 0.1)
    assert config.lora_target is config.lora_rank is None, "the model family's own"
    assert (DEFAULT.lora_target, DEFAULT.lora_rank) == (("query_key_value",), 8)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (6, 1)
    assert (config.learning_rate, config.save_steps, config.logging_steps) == (1e-4, 1000, 50)
    assert (config.fp16, config.bf16, config.gradient_checkpointing) == (False, None, "auto")
    rows = read_config(TokenizeSettings, None, REQUIRED["tokenize"])
    assert (rows.max_seq_length, rows.skip_overlength) == (200, False)
    assert read_config(InferSettings, None, REQUIRED["infer"]).max_new_tokens == 150
    assert read_config(CompareSettings, None, REQUIRED["compare"]).limit == 200


def test_flags_are_typed():
    config = train(learning_rate="2e-4", fp16="false", bf16="true", max_steps="52000")
    assert (config.learning_rate, config.fp16, config.bf16, config.max_steps) == (
        2e-4,
        False,
        True,
        52000,
    )
    assert train(gradient_checkpointing="true").gradient_checkpointing is True
    assert train(gradient_checkpointing="auto").gradient_checkpointing == "auto"
    assert train(warmup_steps="0.03").warmup_steps == 0.03


@pytest.mark.parametrize(
    "text, resume",
    [("true", "true"), ("True", "true"), ("false", None), ("none", None), ("a", "a")],
)
def test_resume_from_checkpoint_is_true_or_a_path(text, resume):
    assert train(resume_from_checkpoint=text).resume_from_checkpoint == resume


@pytest.mark.parametrize(
    "text, targets",
    [
        ("query_key_value", ("query_key_value",)),
        ("query_key_value, dense", ("query_key_value", "dense")),
        ("all", ("all",)),
        ("all-linear", ("all",)),
    ],
)
def test_lora_target(text, targets):
    assert train(lora_target=text).lora_target == targets


@pytest.mark.parametrize("text", ['["dense", "dense_h_to_4h"]', "[dense, 'dense_h_to_4h', dense]"])
def test_lora_target_as_a_list_in_a_flag(text):
    assert train(lora_target=text).lora_target == ("dense", "dense_h_to_4h")


@pytest.mark.parametrize("verb", ["train", "plan", "doctor"])
@pytest.mark.parametrize("names", ["q_proj,v_proj", "[q_proj, v_proj]", '["q_proj", "v_proj"]'])
@pytest.mark.parametrize("in_recipe", [False, True])
def test_a_lora_target_that_no_model_has(recipe, capsys, verb, names, in_recipe):
    """Reported before anything else: none of the named files exists."""
    path = recipe(f"train:\n  dataset_path: rows\n  output_dir: out\n  lora_target: {names}")
    flags = ["--lora_target", names, "--dataset_path", "rows", "--output_dir", "out"]
    words = [path] if in_recipe or verb == "doctor" else flags
    code = main([verb, *words])
    told = "".join(capsys.readouterr())
    assert "Traceback" not in told
    line = next(line for line in told.splitlines() if "ChatGLM-6B has no linear 'q_proj'" in line)
    assert code == (1 if verb == "doctor" else 2)
    advised = line.partition("choose from ")[2].partition(",")[0]
    assert DEFAULT.targets((advised,), DEFAULT.shape(DEFAULT.read_settings({}))) == (advised,)


def test_lora_target_as_a_list(recipe):
    assert train(recipe("lora_target: [dense, dense_h_to_4h]")).lora_target == (
        "dense",
        "dense_h_to_4h",
    )
    assert TrainSettings(**TRAIN, lora_target=["dense"]).lora_target == ("dense",)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        train().max_steps = 5


@pytest.mark.parametrize(
    "verb, name, value, words",
    [
        ("train", "lora_rank", "abc", "a whole number, at least 1"),
        ("train", "lora_rank", "6.5", "a whole number"),
        ("train", "per_device_train_batch_size", "0", "at least 1"),
        ("train", "per_device_eval_batch_size", "-1", "at least 1"),
        ("train", "learning_rate", "nan", "a number, above 0"),
        ("train", "learning_rate", "1-e4", "a number, above 0"),
        ("train", "eval_ratio", "0.6", "at least 0, at most 0.5"),
        ("train", "lora_dropout", "1", "below 1"),
        ("train", "fp16", "flase", "true or false"),
        ("train", "gradient_checkpointing", "often", "auto, true or false"),
        ("train", "report_to", "wandb", "tensorboard, none or all"),
        ("train", "lora_target", ",", "names with commas between"),
        ("train", "output_dir", "", "a path"),
        ("train", "output_dir", "a\0b", "a path"),
        ("tokenize", "max_seq_length", "3", "a whole number, at least 4"),
        ("convert", "on_bad_row", "drop", "fail or skip"),
        ("infer", "top_p", "1.1", "a number, above 0, at most 1"),
    ],
)
def test_wrong_value(verb, name, value, words):
    line = refusal(verb, **{name: value})
    assert line.startswith(f"--{name} {value!r} should be ")
    assert words in line


@pytest.mark.parametrize(
    "verb, flags, words",
    [
        ("train", {"fp16": "true", "bf16": "true"}, "fp16 and bf16 are both true"),
        ("train", {"warmup_steps": "1.5"}, "give whole steps, or a share below 1"),
        (
            "train",
            {"layout": "padded", "tokens_per_step": "4096"},
            "tokens_per_step is the length of packs, but layout is padded",
        ),
        ("train", {"packing": "true", "layout": "padded"}, "are one setting; keep one"),
        ("train", {"packing": "true", "exact_batch": "true"}, "are one setting; keep one"),
        ("plan", {"exact_batch": "true", "layout": "packed"}, "are one setting; keep one"),
        ("infer", {"temperature": "0.7"}, "set do_sample true"),
        ("compare", {"top_k": "5", "do_sample": "false"}, "set do_sample true"),
        ("convert", {"save_path": "./a.json"}, "save_path would overwrite data_path"),
        ("adapters convert", {"new": "old/"}, "new would overwrite old"),
    ],
)
def test_settings_that_contradict(verb, flags, words):
    line = refusal(verb, **flags)
    assert words in line
    assert all(f"--{name}" in line for name in flags)


@pytest.mark.parametrize("flags", [{}, {"do_sample": "true"}, {"do_sample": "false"}])
@pytest.mark.parametrize("verb", ["infer", "compare", "chat"])
def test_a_temperature_of_nothing_is_taken_everywhere(verb, flags):
    paths = {} if verb == "chat" else {"data_path": "a.json", "adapter": "run"}
    config = read_config(SETTINGS[verb], None, {"temperature": "0", **paths, **flags})
    assert config.temperature == 0


def test_a_contradiction_names_every_place(recipe):
    line = refusal("train", recipe("max_steps: 5\nbf16: true"), fp16="true")
    assert line.endswith("(given: --fp16, r.yaml:2: bf16)")


def test_all_that_is_missing_in_one_line():
    with pytest.raises(UserError, match="missing: --data_path --save_path"):
        read_config(ConvertSettings, None, {})


def test_none_undoes_a_recipe(recipe):
    path = recipe("save_total_limit: 2\nchatglm_path: base")
    assert train(path).save_total_limit == 2
    assert train(path, save_total_limit="none", base="None").save_total_limit is None
    assert read_config(
        CompareSettings, None, REQUIRED["compare"] | {"limit": "none"}
    ).limit is None  # fmt: skip
    assert "should be a whole number" in refusal("train", save_steps="none")


# --- names ---


@pytest.mark.parametrize(
    "name, hint",
    [
        ("lora_rnk", "did you mean --lora_rank?"),
        ("lr_sheduler_type", "did you mean --lr_scheduler_type?"),
        ("no_such_flag", "`glmtune train --help`"),
        ("top_k", "a setting of infer, replay-rows, compare, evaluate, chat, not of train"),
        ("card", "a setting of plan, not of train"),
    ],
)
def test_unknown_name(name, hint):
    line = refusal("train", **{name: "1"})
    assert line.startswith(f"--{name} is ")
    assert hint in line


@pytest.mark.parametrize(
    "word, meant",
    [
        ("lora_rank_", "lora_rank"),
        ("lorarank", "lora_rank"),
        ("loar_rank", "lora_rank"),
        ("learning_rat", "learning_rate"),
        ("learnign_rate", "learning_rate"),
        ("eval_step", "eval_steps"),
        ("save_step", "save_steps"),
        ("datset_path", "dataset_path"),
        ("dataset_paht", "dataset_path"),
        ("gradient_accumulaton_steps", "gradient_accumulation_steps"),
        ("gradient_accumulation_step", "gradient_accumulation_steps"),
        ("quantisation_bit", "quantization_bit"),
        ("num_trian_epochs", "num_train_epochs"),
        ("outputdir", "output_dir"),
    ],
)
def test_a_slip_is_understood(word, meant):
    assert did_you_mean(word, TrainSettings.model_fields) == f"; did you mean {meant}?"


@pytest.mark.parametrize(
    "word",
    [
        *("base_model", "checkpoint_dir", "val_size", "lora_dim", "adapter_name_or_path"),
        *("adam_beta3", "fp32", "bf8", "save_path", "top_p", "test_steps", "data_sets", "rank"),
        *("num_steps", "max_tokens", "min_steps", "eval_dtype", "lora_beta", "x", ""),
    ],
)
def test_another_name_is_no_slip(word):
    assert did_you_mean(word, TrainSettings.model_fields) == ""


def test_unknown_name_in_a_recipe(recipe):
    line = refusal("train", recipe("seed: 1\nlora_rnk: 8"))
    assert line == "r.yaml:2: lora_rnk is not a setting of train; did you mean lora_rank?"


def test_every_training_argument_is_offered_mapped_or_refused():
    """Fails when a newer transformers adds names."""
    package = importlib.util.find_spec("transformers").submodule_search_locations[0]
    tree = ast.parse(Path(package, "training_args.py").read_text(encoding="utf-8"))
    arguments = next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"
    )
    names = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert len(names) > 50
    assert names - set(TrainSettings.model_fields) - set(FOREIGN) == set()


@pytest.mark.parametrize(
    "old, value, today, expected",
    [
        ("warmup_ratio", "0.1", "warmup_steps", 0.1),
        ("no_cuda", "true", "use_cpu", True),
        ("per_gpu_train_batch_size", "3", "per_device_train_batch_size", 3),
        ("per_gpu_eval_batch_size", "4", "per_device_eval_batch_size", 4),
        ("activation_checkpointing", "true", "gradient_checkpointing", True),
        ("target_modules", "dense", "lora_target", ("dense",)),
    ],
)
def test_old_names_are_read_as_todays(old, value, today, expected, capsys):
    assert getattr(train(**{old: value}), today) == expected
    notes = capsys.readouterr().err
    assert notes.startswith(f"note: {old} is {today} here")
    assert notes.count("\n") == 1


def test_old_length_of_an_answer(capsys):
    config = read_config(InferSettings, None, {"data_path": "a", "max_length": "99"})
    assert config.max_new_tokens == 99
    assert "note: max_length is max_new_tokens here" in capsys.readouterr().err


@pytest.mark.parametrize("ratio", ["1", "-0.1", "x"])
def test_a_warm_up_ratio_is_a_share(ratio):
    assert refusal("train", warmup_ratio=ratio).startswith(f"--warmup_ratio '{ratio}' should be")


def test_one_setting_under_two_names(recipe):
    assert "--no_cuda and --use_cpu are one" in refusal("train", no_cuda="true", use_cpu="true")
    path = recipe("warmup_steps: 100")
    assert train(path, warmup_ratio="0.1").warmup_steps == 0.1  # a flag overrides, by either name


# --- recipes ---


def test_flat_recipe_and_flags(recipe):
    path = recipe("# comment\nlora_rank: 4\nlearning_rate: 1e-4\nfp16: no\nseed: 7 # here\n")
    config = train(path, seed="8")
    assert (config.lora_rank, config.learning_rate, config.fp16, config.seed) == (4, 1e-4, False, 8)


def test_sections_and_what_they_share(recipe):
    path = recipe(
        "base: base\nmax_seq_length: 100\nseed: 1\n"
        "tokenize:\n  jsonl_path: rows\n  save_path: tokens\n"
        "train:\n  dataset_path: tokens\n  output_dir: out\n  seed: 2\ninfer:\n"
    )
    rows = read_config(TokenizeSettings, path, {})
    assert (rows.base, rows.max_seq_length, rows.save_path) == ("base", 100, "tokens")
    config = read_config(TrainSettings, path, {})
    assert (config.base, config.seed) == ("base", 2)
    assert read_config(InferSettings, path, {"data_path": "a"}).seed == 1


def test_scalars_are_taken_as_written(recipe):
    """YAML 1.1 would make these a boolean, an octal number, a date and a base-60 number."""
    for text in ("no", "0123", "2023-05-01", "12:30"):
        assert train(recipe(f"base: {text}")).base == text
    assert train(recipe("base:")).base is None
    assert train(recipe("\ufeffchatglm_path: 模型/基座")).base == "模型/基座"
    assert "should be a whole number" in refusal("train", recipe("lora_rank: true"))


@pytest.mark.parametrize(
    "text, line",
    [
        (
            "seed: 1\nlora_rank: abc",
            "r.yaml:2: lora_rank 'abc' should be a whole number, at least 1",
        ),
        ("lora_alpha:", "r.yaml:1: lora_alpha null should be a number, above 0"),
        ("seed: 1\n\nseed: 2", "r.yaml:3: seed stands twice; keep one"),
        ("train:\n  seed: 1\n  seed: 1", "r.yaml:3: seed stands twice; keep one"),
        ("train:\n  seed: 1\ntrain:\n", "r.yaml:3: train stands twice; keep one"),
        ("", "r.yaml: a recipe is lines of `name: value`, this is not"),
        ("- seed\n- 1", "r.yaml: a recipe is lines of `name: value`, this is not"),
        ("just words", "r.yaml: a recipe is lines of `name: value`, this is not"),
        ("trian:\n  seed: 1", "r.yaml:1: trian is no section; did you mean train?"),
        ("seed:\n  a: 1", "r.yaml:1: seed is no section"),
        ("train:\n  seed:\n    a: 1", "r.yaml:2: seed should be plain text"),
        ("? [a]\n: 1", "r.yaml:1: the name of a setting is one word"),
        ("<<: {seed: 1}", "r.yaml:1: << is no section"),
        ("seed: " + "7a" * 9999, "r.yaml:1: seed '" + 98 * "7a" + "... should be a whole number"),
        ("seed: [1, 2]", "r.yaml:1: seed ['1', '2'] should be a whole number"),
        ("seed: 1\n\tlora_rank: 8", "r.yaml:2: not YAML: "),
        ("seed: [1", "r.yaml:1: not YAML: "),
        ("---\nseed: 1\n---\nseed: 2", "r.yaml:3: not YAML: "),
        ("seed: *a", "r.yaml:1: not YAML: "),
        ("seed: &a [*a]", "r.yaml:1: seed should be plain text"),
        ("infer:\n  max_new_tokns: 5", "r.yaml:2: max_new_tokns is not a setting of infer; did"),
        ("lora_rnk: 5\ninfer:\n", "r.yaml:1: lora_rnk is not a setting of train; did you mean"),
        ("infer:\n  lora_rank: 8", "r.yaml:2: lora_rank is a setting of train, adapters distil"),
        ("seed: " + "[" * 1500, "r.yaml: nested too deeply"),
        ("seed: \0", "r.yaml: not YAML: "),
        (b"seed: \xff", "r.yaml: not UTF-8 at byte 6"),
    ],
)
def test_bad_recipe(recipe, text, line):
    assert refusal("train", recipe(text)).startswith(line)


def test_a_tag_builds_nothing(recipe, tmp_path):
    for text in (
        "seed: !!python/object/apply:os.mkdir [made]",
        "seed: !!python/object/new:str x",
        "seed: !local x",
        "!!python/object:object\nseed: 1",
    ):
        assert refusal("train", recipe(text)).startswith("r.yaml:1: ")
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    "text, verbs",
    [
        ("convert:\n  data_path: a\nchatglm_path: b\ntrain:", ["convert", "train"]),
        ("lora_rank: 8\nchatglm_path: b", ["train"]),
        ("jsonl_path: a\nchatglm_path: b", ["tokenize"]),
    ],
)
def test_whom_a_recipe_is_for(recipe, text, verbs):
    assert recipe_verbs(recipe(text)) == verbs


def test_one_setting_of_a_recipe(recipe):
    path = recipe("base: base\nseed: null\ntrain:\n  lora_rank: 8")
    assert shared_setting(path, "base") == "base"
    assert shared_setting(path, "seed") is shared_setting(path, "lora_rank") is None


def test_unreadable_recipe(tmp_path):
    assert "No such file" in refusal("train", str(tmp_path / "none.yaml"))
    assert "Is a directory" in refusal("train", str(tmp_path))


# --- writing ---


@pytest.mark.parametrize("verb", SETTINGS)
def test_a_written_recipe_reads_back(verb, tmp_path):
    config = read_config(SETTINGS[verb], None, REQUIRED[verb])
    path = tmp_path / "recipe.yaml"
    write_recipe(config, str(path))
    assert read_config(SETTINGS[verb], str(path), {}) == config
    assert path.read_text(encoding="utf-8").startswith("# As run by glmtune")
    assert f"glmtune {verb} recipe.yaml" in path.read_text(encoding="utf-8")
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(SETTINGS[verb].model_fields)
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_unwritable_recipe(tmp_path):
    with pytest.raises(UserError, match="cannot write the recipe"):
        write_recipe(train(), str(tmp_path / "none" / "recipe.yaml"))


@example(path="\x85", rate=1.0, targets=["_"], resume="true")
@given(
    path=st.text(min_size=1).filter(lambda text: "\0" not in text and text.lower() not in NONES),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    targets=st.lists(st.text(string.ascii_lowercase + "_", min_size=1), min_size=1),
    resume=st.sampled_from(["true", None, "a: b", "#x", "'"]),
)
def test_any_value_survives_the_recipe(path, rate, targets, resume, tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "r.yaml"
    config = TrainSettings(
        dataset_path=path,
        output_dir=path + "x",
        base=path,
        learning_rate=rate,
        lora_target=targets,
        resume_from_checkpoint=resume,
    )
    write_recipe(config, str(file))
    assert read_config(TrainSettings, str(file), {}) == config


def test_published_recipes(root):
    recipes = sorted((root / "recipes").glob("*.yaml"))
    assert {path.name for path in recipes} >= {
        "chatglm-6b-alpaca-en.yaml",
        "chatglm-6b-alpaca-zh.yaml",
    }
    for path in (path for path in recipes if path.name.startswith("chatglm-6b")):
        head = path.read_text(encoding="utf-8").partition("\n\n")[0]
        configs = {}
        for verb in ("convert", "tokenize", "train", "infer", "compare"):
            assert f"glmtune {verb} recipes/{path.name}".split() in [
                line.lstrip("# ").split() for line in head.splitlines()
            ]
            configs[verb] = read_config(SETTINGS[verb], str(path), {})
        assert configs["convert"].save_path == configs["tokenize"].jsonl_path
        assert configs["tokenize"].save_path == configs["train"].dataset_path
        assert configs["train"].output_dir == configs["infer"].adapter
        assert configs["train"].max_steps == 52000
        assert math.isclose(configs["train"].learning_rate, 1e-4)
        assert (configs["tokenize"].max_seq_length, configs["infer"].max_new_tokens) == (200, 150)
        assert configs["tokenize"].skip_overlength


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize(
    "model", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b", "glm-4-9b-0414", "glm-edge-1.5b"]
)
def test_recipes_of_the_younger_models(root, model, language):
    path = root / "recipes" / f"{model}-alpaca-{language}.yaml"
    words = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    for verb in ("tune", "chat"):
        assert ["#", "glmtune", verb, f"recipes/{path.name}"] in words
    tuning = read_config(SETTINGS["tune"], str(path), {})
    asked = read_config(SETTINGS["chat"], str(path), {})
    planned = read_config(SETTINGS["plan"], str(path), {})
    assert tuning.base == asked.base == planned.base
    family = next(family for family in FAMILIES if tuning.base in family.published)
    shape = family.shape(family.read_settings(family.published_settings))
    assert family.targets(tuning.lora_target, shape) == family.lora_target
    assert (planned.lora_rank, planned.lora_target) == (tuning.lora_rank, tuning.lora_target)
    assert asked.adapter == f"{tuning.out}/run"
    assert tuning.data_path == f"data/alpaca_data_{language}.json"


# --- flags and help ---


def test_splitting_flags():
    line = "r.yaml --lora-rank 4 --seed=5 --fp16 --max_steps -1 --lora_target=a=b --bf16 false"
    assert split_arguments("train", line.split()) == (
        "r.yaml",
        {
            "lora_rank": "4",
            "seed": "5",
            "fp16": "true",
            "max_steps": "-1",
            "lora_target": "a=b",
            "bf16": "false",
        },
    )


def test_a_switch_leaves_the_recipe_alone():
    for switch in ("--use_cpu", "--resume_from_checkpoint", "--gradient_checkpointing"):
        recipe, flags = split_arguments("train", [switch, "r.yaml"])
        assert (recipe, list(flags.values())) == ("r.yaml", ["true"])
    assert split_arguments("train", ["--no-cuda", "--seed", "1"])[1] == {
        "no_cuda": "true",
        "seed": "1",
    }


def test_the_last_of_two_flags_counts_and_a_note_says_so(capsys):
    line = ["--seed", "1", "--seed", "2", "--lora_rank", "8", "--lora_rank=8"]
    assert split_arguments("train", line) == (None, {"seed": "2", "lora_rank": "8"})
    told = "note: --seed is given as 1 and as 2: the last counts, 2\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    "verb, name",
    [
        ("evaluate", "adapter"),
        ("serve", "adapter"),
        ("evaluate", "metric"),
        ("train", "eval_dataset_path"),
        ("train", "lora_target"),
        ("tokenize", "datasets"),
        ("infer", "stop_strings"),
    ],
)
def test_a_list_given_twice_grows(verb, name, capsys):
    flags = split_arguments(verb, [f"--{name}", "a", f"--{name}", "b,c"])[1]
    assert flags == {name: "a,b,c"}
    assert not capsys.readouterr().err


def test_a_setting_in_its_place_and_as_a_flag_is_refused():
    with pytest.raises(UserError, match="a and --adapter b say the same setting; give one"):
        split_arguments("check", ["a", "--adapter", "b"])


@pytest.mark.parametrize(
    "verb, line, words",
    [
        ("train", "--lora_rank", "--lora_rank lacks its value, which should be a whole number"),
        ("train", "--lora_rank --seed 1", "--lora_rank lacks its value"),
        ("train", "--lora_rnk", "did you mean --lora_rank?"),
        ("train", "data.json", "unexpected 'data.json'; a recipe ends in .yaml"),
        ("train", "a.yaml b.yaml", "unexpected 'b.yaml'"),
        ("train", "-lora_rank 8", "unexpected '8'"),
        ("adapters convert", "old new more", "unexpected 'more'"),
    ],
)
def test_bad_command_line(verb, line, words):
    with pytest.raises(UserError) as caught:
        split_arguments(verb, line.split())
    assert words in str(caught.value)


@pytest.mark.parametrize("verb", SETTINGS)
def test_help_lists_every_setting(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = verb_help(verb, "What it does.")
    entries = [line.split() for line in text.splitlines() if line.startswith("  --")]
    assert sorted(flag[2:] for flag, _ in entries) == sorted(SETTINGS[verb].model_fields)
    assert all(field.description for field in SETTINGS[verb].model_fields.values())
    assert all(heading for heading in fields_by_group(SETTINGS[verb]))
    assert max(map(len, text.splitlines())) <= 80


def test_help_shows_type_choices_default_and_group(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = verb_help("train", "What it does.")
    assert (
        "LoRA:\n  --lora_rank INT\n      rank of the update (default: the model family's own"
        in text
    )
    assert (
        "--lora_alpha NUMBER\n      the update is scaled by lora_alpha / lora_rank (default: 32)\n"
        in text
    )
    assert "--lr_scheduler_type linear|cosine|constant|constant_with_warmup\n" in text
    assert "the model family's own" in text
    assert "--fp16 true|false\n" in text
    assert "(default: false)" in text
    assert "(required)" in text
    assert "warmup_ratio" in text


@pytest.mark.parametrize(
    "verb, line",
    [
        ("plan", "--card NAME"),
        ("doctor", "--explain TEXT"),
        ("infer", "--encoding NAME"),
        ("train", "--output_dir PATH"),
        ("train", "--resume_from_checkpoint true|auto|PATH"),
        ("validate", "--files PATH"),
    ],
)
def test_help_says_path_of_paths_alone(verb, line):
    assert f"  {line}\n" in verb_help(verb, "")


def test_help_of_plan_tells_what_no_path_means():
    text = " ".join(verb_help("plan", "").split())
    assert "read (default: num_rows rows of row_length tokens) --output_dir" in text
    assert "--output_dir PATH accepted as a recipe has it; nothing is written there data:" in text


@pytest.mark.parametrize(
    "text, expected",
    [
        ("问:", ("问:",)),
        ("a,b c", ("a", "b c")),
        (r"\n\n,User:", ("\n\n", "User:")),
        ("none", None),
    ],
)
def test_stop_strings_of_a_flag(text, expected):
    flags = {"data_path": "a.json", "stop_strings": text}
    assert read_config(InferSettings, None, flags).stop_strings == expected


def test_stop_strings_of_a_recipe_may_hold_commas(recipe):
    path = recipe('stop_strings: ["a, b", "c\\n"]')
    config = read_config(InferSettings, path, {"data_path": "a.json"})
    assert config.stop_strings == ("a, b", "c\n")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"do_sample": "true"}, "num_beams 2 .*do_sample"),
        ({"decode_bits": "8"}, "num_beams 2 .*decode_bits 8"),
    ],
)
def test_a_beam_search_that_draws_or_rounds_is_refused(flags, expected):
    flags = {"data_path": "a.json", "num_beams": "2"} | flags
    with pytest.raises(UserError, match=expected):
        read_config(InferSettings, None, flags)


def test_a_beam_search_at_temperature_zero_draws_nothing():
    flags = {"data_path": "a.json", "num_beams": "2", "do_sample": "true", "temperature": "0"}
    assert not read_config(InferSettings, None, flags).draws
