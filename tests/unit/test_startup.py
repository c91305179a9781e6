"""The imports of each verb, mistakes reported before heavy imports, and `bench startup`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

import glmtune
from glmtune import cli, imports
from glmtune.bench import startup
from glmtune.config.settings import InferSettings, TrainSettings
from glmtune.data.arrow_files import file_name, read_dataset, write_file, write_lists
from glmtune.early import check_answering, check_training
from glmtune.models.base_files import load_row_tokenizer, read_settings
from glmtune.models.chatglm.encoder import RowEncoder
from glmtune.models.loading import load_config, load_tokenizer
from glmtune.models.resolve import GLM_TINY

HEAVY = {
    "torch", "transformers", "peft", "datasets", "bitsandbytes", "matplotlib", "accelerate",
    "tensorboard", "pandas", "scipy", "sklearn",
}  # fmt: skip
TINY, ROWS = "--base glm-tiny", "--data_path rows.json"
MODULES = """
import gc, sys
from glmtune.cli import main
code = main()
present = {name.partition(".")[0] for name, module in sys.modules.items() if module}
print("\\nEND", code, gc.get_stats()[2]["collections"], *sorted(present))
"""
MOST_FULL_COLLECTIONS = 1

MISTAKES = {
    "a verb": "trainn",
    "a flag": "train --lerning_rate 1",
    "a recipe that is not there": "train no.yaml",
    "a recipe that is none": "train bad.yaml",
    "validate": "validate no.json",
    "convert": "convert --data_path no.json --save_path new.jsonl",
    "tokenize rows": f"tokenize --jsonl_path no.jsonl --save_path new {TINY}",
    "inspect rows": f"inspect no.jsonl {TINY}",
    "inspect base": "inspect rows.jsonl --base ./no",
    "tokenize base": "tokenize --jsonl_path rows.jsonl --save_path new --base ./no",
    "train rows": f"train --dataset_path no --output_dir new {TINY}",
    "train base": "train --dataset_path tokens --output_dir new --base ./no",
    "train target": f"train --dataset_path tokens --output_dir new --lora_target q {TINY}",
    "plan base": "plan --base ./no",
    "plan card": "plan --card no",
    "infer records": f"infer --data_path no.json {TINY}",
    "infer adapter": f"infer --data_path rows.json --adapter ./no {TINY}",
    "infer empty adapter": f"infer --data_path rows.json --adapter tokens {TINY}",
    "infer base": "infer --data_path rows.json --base ./no",
    "compare": f"compare --data_path rows.json --adapter ./no {TINY}",
    "replay-rows": "replay-rows new.jsonl --base ./no",
    "evaluate": f"evaluate --data_path rows.json --adapter adapter,./no {TINY}",
    "chat": "chat --base ./no",
    "chat of no model": "chat --base tokens",
    "serve": "serve --base ./no",
    "serve run": "serve --run no",
    "serve adapter": f"serve --adapter mine=./no {TINY}",
    "serve two of one name": f"serve --adapter a=adapter --adapter a=adapter {TINY}",
    "check": f"check ./no {TINY}",
    "ledger": f"ledger ./no {TINY}",
    "adapters dial": f"adapters dial ./no {TINY}",
    "adapters dial of no run": f"adapters dial adapter {TINY}",
    "adapters distil": f"adapters distil ./no {ROWS} --output_dir new {TINY}",
    "adapters distil of LoRA": f"adapters distil adapter {ROWS} --output_dir new {TINY}",
    "adapters dial onto something": f"adapters dial adapter {ROWS} --write tokens {TINY}",
    "push": "push ./no --repo_id me/mine",
    "merge": f"merge --adapter ./no --save_path new {TINY}",
    "merge onto something": f"merge --adapter ./no --save_path tokens {TINY}",
    "adapters convert": "adapters convert ./no new",
    "export": f"export ./no --to hf {TINY}",
    "export for no such engine": f"export adapter --to chatglm {TINY}",
    "export onto something": f"export adapter --to hf --out tokens {TINY}",
    "replay": "replay ./no",
    "doctor": "doctor --explain nothing_that_is_known",
    "demo": "demo --out tokens",
    "tune": f"tune no.json --out new {TINY}",
    "tune base": "tune rows.json --out new --base ./no",
    "new-model": "new-model tokens --like glm-tiny",
    "bench train": "bench train --dataset_path no",
    "bench decode": "bench decode --json_path no/such/file",
    "bench serve": "bench serve --json_path no/such/file",
    "bench memory": "bench memory --json_path no/such/file",
    "bench startup": "bench startup --json_path no/such/file",
    "reproduce": "reproduce no-such-work",
}
# Packages that each working verb must not import.
ANSWERING = HEAVY - {"torch", "transformers", "accelerate"}
INFER = "infer --data_path rows.json --output_path answers.jsonl --limit 1 --max_new_tokens 1"
TOKENIZE = "tokenize --jsonl_path rows.jsonl --save_path new"
VERBS = {
    "validate": ("validate rows.json", HEAVY),
    "convert": ("convert --data_path rows.json --save_path new.jsonl", HEAVY),
    "tokenize": (f"{TOKENIZE} {TINY}", HEAVY - {"matplotlib"}),
    "plan": (f"plan --use_cpu true {TINY}", HEAVY),
    "plan of the published model": ("plan --card H200", HEAVY),
    "plan of rows": (f"plan --use_cpu true {TINY} --dataset_path tokens", HEAVY),
    "infer": (f"{INFER} {TINY}", ANSWERING),
    "chat": (f"chat --max_new_tokens 1 {TINY}", ANSWERING),
    "infer with an adapter": (
        f"{INFER} --overwrite_output true --adapter adapter {TINY}",
        ANSWERING - {"peft"},
    ),
    "compare": (
        f"compare --data_path rows.json --adapter adapter --limit 1 --max_new_tokens 1 {TINY}",
        (ANSWERING | {"jieba", "nltk"}) - {"peft"},
    ),
    "train": (
        f"train --dataset_path tokens --output_dir new --max_steps 1 --use_cpu true {TINY}",
        {"datasets", "bitsandbytes", "pandas", "scipy", "sklearn"},
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, strange_adapter):
    """A folder with records, rows, token rows, an adapter and a broken recipe."""
    place = tmp_path_factory.mktemp("startup")
    records = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(9)]
    (place / "rows.json").write_text(json.dumps(records), encoding="utf-8")
    (place / "bad.yaml").write_text("max_steps: [", encoding="utf-8")
    for line in (
        "convert --data_path rows.json --save_path rows.jsonl",
        f"tokenize --jsonl_path rows.jsonl --save_path tokens {TINY}",
    ):
        assert run(line, place)[0] == 0
    (place / "adapter").symlink_to(strange_adapter)
    return place


def run(line, place):
    """Exit code of a command, what it wrote on stderr, and the packages in its memory.

    None may have had all its objects searched for garbage while they became more.
    """
    sources = str(Path(glmtune.__file__).parent.parent)
    environment = {k: v for k, v in os.environ.items() if k not in ("GLMTUNE_MODEL", "HF_ENDPOINT")}
    done = subprocess.run(
        [sys.executable, "-c", MODULES, *line.split()],
        cwd=place,
        env=environment | {"PYTHONPATH": sources, "HF_HUB_OFFLINE": "1"},
        input="",
        capture_output=True,
        text=True,
        timeout=300,
    )
    _, end, told = done.stdout.rpartition("\nEND ")
    assert end, done.stderr
    code, num_collections, *packages = told.split()
    assert int(num_collections) <= MOST_FULL_COLLECTIONS
    return int(code), done.stderr, set(packages)


@pytest.mark.parametrize("line", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(line, place):
    code, err, packages = run(line, place)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    assert packages & HEAVY == set()


@pytest.mark.parametrize(("line", "absent"), VERBS.values(), ids=VERBS)
def test_a_verb_imports_what_it_needs_and_no_more(line, absent, place):
    code, err, packages = run(line, place)
    assert code == 0, err
    assert packages & absent == set()


@pytest.mark.parametrize(
    ("is_command", "bits", "quantised", "left_out"),
    [
        (True, None, False, True),
        (False, None, False, False),  # a program's own process is not ours to change
        (True, "8", False, False),
        (True, None, True, False),
    ],
)
def test_bitsandbytes_is_left_out_where_nothing_is_quantised(
    is_command, bits, quantised, left_out, place, tmp_path, monkeypatch
):
    monkeypatch.setattr(glmtune, "is_command", is_command)
    monkeypatch.setattr(imports, "_left_out", set())
    config = json.loads(Path(GLM_TINY, "config.json").read_text(encoding="utf-8"))
    if quantised:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    flags = {"base": str(tmp_path), "data_path": str(place / "rows.json")}
    answering = InferSettings(**flags, output_path="new", quantization_bit=bits)
    training = TrainSettings(
        base=str(tmp_path), dataset_path=str(place), output_dir="new", quantization_bit=bits
    )
    for check, settings in ((check_answering, answering), (check_training, training)):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "bitsandbytes", raising=False)
            check(settings)
            assert (find_spec("bitsandbytes") is None) == left_out
            if left_out:  # a package that a check did import must stay: its submodules do
                del sys.modules["bitsandbytes"]


def test_a_package_that_was_imported_after_all_stays_whole(monkeypatch):
    """Its submodules stay in memory, and Python would not bind them to a new one."""
    monkeypatch.setattr(glmtune, "is_command", True)
    monkeypatch.setattr(imports, "_left_out", set())
    monkeypatch.delitem(sys.modules, "left_out_1", raising=False)
    imports.leave_out("left_out_1", "left_out_2")
    monkeypatch.setitem(sys.modules, "left_out_1", imports)
    imports.leave_out_nothing()
    assert sys.modules["left_out_1"] is imports
    assert "left_out_2" not in sys.modules


def test_every_verb_has_a_mistake():
    lines = [*MISTAKES.values()]
    assert all(any(line.startswith(f"{verb} ") for line in lines) for verb in cli.VERBS)


def test_models_are_registered_where_another_program_imports_them():
    code = (
        "import glmtune.models; from transformers import AutoConfig; from glmtune.models.resolve "
        "import GLM_TINY; print(type(AutoConfig.from_pretrained(GLM_TINY)).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "ChatGLMConfig"


# --- what is light beside what it stands for ---


@pytest.mark.parametrize("num_rows", [1, 2500])
def test_token_rows_are_written_as_datasets_writes_them(num_rows, tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 9, n, dtype=np.int32) for n in rng.integers(1, 9, num_rows)]
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    ids = pa.ListArray.from_arrays(ends, pa.array(np.concatenate(rows)))
    table = pa.table({"input_ids": ids, "seq_len": pa.array(np.ones(num_rows, dtype=np.int32))})
    (tmp_path / "ours").mkdir()
    name = file_name(0, 1)
    digest = write_file(table, tmp_path / "ours" / name)
    write_lists(table.schema, tmp_path / "ours", [name], [digest])
    datasets.Dataset(table).save_to_disk(str(tmp_path / "theirs"))
    contents = []
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        state = json.loads(files.pop("state.json"))
        assert len(state.pop("_fingerprint")) == 16
        contents.append((files, state))
    assert contents[0] == contents[1]
    assert datasets.load_from_disk(str(tmp_path / "ours"))[:] == table.to_pydict()


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("has_state", [True, False])
def test_token_rows_are_read_as_datasets_reads_them(num_files, has_state, tmp_path):
    rows = {"input_ids": [[i, *range(i % 3)] for i in range(9)], "seq_len": [1] * 9}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path), num_shards=num_files)
    state = json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))
    assert len(state["_data_files"]) == num_files
    table = read_dataset(tmp_path, state if has_state else {})
    assert table.equals(datasets.load_from_disk(str(tmp_path)).with_format("arrow")[:])
    assert table.to_pydict() == rows


def test_a_row_encoder_is_the_tokenizer_for_rows():
    light, whole = load_row_tokenizer(GLM_TINY), load_tokenizer(GLM_TINY)
    assert isinstance(light, RowEncoder)
    for name in ("row_rule", "vocab_hash", "revision", "vocab_size"):
        assert getattr(light, name) == getattr(whole, name)
    texts = ["", "a  b\tc\nd", "你好，世界 [gMASK] <sop>", "x" * 200]
    for specials in (False, True):
        one, other = (
            t.encode_batch(texts, add_special_tokens=specials, max_length=50)
            for t in (light, whole)
        )
        assert one == other


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<new>"}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<sop>", "<tool>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9000": {"content": "<tool>"}}}),
        ("added_tokens.json", {"<tool>": 9000}),
        ("special_tokens_map.json", {}),
    ],
)
def test_a_folder_that_adds_tokens_gets_the_whole_tokenizer(name, content, tmp_path):
    vocabulary = Path(GLM_TINY, "ice_text.model").read_bytes()
    (tmp_path / "ice_text.model").write_bytes(vocabulary)
    assert RowEncoder.of_folder(tmp_path) is not None
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert RowEncoder.of_folder(tmp_path) is None


@pytest.mark.parametrize("base", [GLM_TINY, "zai-org/chatglm-6b"])
def test_settings_are_those_of_the_configuration(base, offline):
    light, whole = read_settings(base), load_config(base)
    differing = {
        name for name, value in light.to_dict().items() if getattr(whole, name, value) != value
    }
    assert differing == set()
    for name in ("head_dim", "num_image_tokens", "revision", "model_type"):
        assert getattr(light, name) == getattr(whole, name)


# --- bench startup ---


def test_bench_startup_tells_time_multiple_and_target(tmp_path, monkeypatch, capsys):
    cases = [case for case in startup.CASES if case.name in ("mistake: flag", "convert")]
    monkeypatch.setattr(startup, "CASES", cases)
    path = tmp_path / "startup.jsonl"
    assert cli.main(["bench", "startup", "--repeats", "1", "--json_path", str(path)]) == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["torch_cpu_seconds"] > 0
    for case in cases:
        found = record["startup"][case.name]
        assert found["target"] == case.target
        assert found["multiple"] == found["cpu_seconds"] / record["torch_cpu_seconds"]
    out = capsys.readouterr().out
    assert "mistake: flag" in out
    assert "(target 0.5 x: " in out


@pytest.mark.slow
def test_bench_startup_says_which_command_does_not_work(monkeypatch, capsys):
    broken = startup.Case("broken", 1.0, "validate rows.json", until="never said")
    monkeypatch.setattr(startup, "CASES", [broken])
    assert cli.main(["bench", "startup", "--repeats", "1"]) == 2
    assert "validate rows.json: does not reach its work" in capsys.readouterr().err
