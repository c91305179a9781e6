"""No foreign code is executed: each attempt must be refused in one line that names the file."""

import ast
import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import save_file

import glmtune
from glmtune import cli
from glmtune.adapters import convert_adapter, load_adapter
from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS
from glmtune.data.dataset import load_dataset
from glmtune.data.files import check_inside
from glmtune.errors import UserError
from glmtune.models.folders import weight_files
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import resolve_base
from glmtune.models.torch_files import read_torch_file
from glmtune.training.saving.manifest import write_manifest

SOURCES = sorted(Path(glmtune.__file__).parent.rglob("*.py"))
DEEP = '{"a":' * 100_000
RECIPE_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


class Trap:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path):
    path = tmp_path / "sprung"
    yield Trap(path)
    assert not path.exists(), "the code ran"


@pytest.fixture
def base_folder(tiny_folder, tmp_path):
    ignored = shutil.ignore_patterns("adapter_*", "*.safetensors", "expected.json")
    return shutil.copytree(tiny_folder, tmp_path / "base", ignore=ignored)


@pytest.fixture
def adapter_folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder / "adapter_peft_0_2_plain", tmp_path / "adapter")


@pytest.fixture(scope="module")
def base(tiny_folder):
    return load_base_model(str(tiny_folder), dtype=torch.float32)


def refused(words, function, *arguments):
    """Check that a call is refused in one short line with these words."""
    start = time.process_time()
    with pytest.raises(UserError, match=words) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 5


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the source itself ---


def calls():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.name, ast.unparse(node.func), node


def test_no_call_trusts_remote_code():
    given = [
        (p, n) for p, n, call in calls() for k in call.keywords if k.arg == "trust_remote_code"
    ]
    assert given == []
    # Nor through a dictionary of arguments; a table only tells what becomes of that flag.
    for path in (path for path in SOURCES if path.parent.name != "foreign"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and node.value == "trust_remote_code")


def test_every_pickle_is_read_by_weights_only():
    loads = [
        (path, {k.arg: ast.unparse(k.value) for k in call.keywords})
        for path, name, call in calls()
        if name == "torch.load"
    ]
    assert loads
    assert {path for path, _ in loads} == {"torch_files.py"}
    assert all(keywords["weights_only"] == "True" for _, keywords in loads)


def test_nothing_evaluates_or_unpickles():
    """But what a command and its own workers of Ray send each other: Ray itself unpickles that."""
    banned = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "yaml.load", "os.system"}
    banned |= {"yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "np.load", "joblib.load"}
    found = {(path, name) for path, name, _ in calls() if name in banned}
    ours = {"spread.py", "ray_driver.py"}
    assert found == {(path, name) for path in ours for name in ("pickle.load", "pickle.loads")}
    imported = {
        name.name.partition(".")[0]
        for path in SOURCES
        if path.name not in ours
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imported & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"} == set()


# --- pickles ---


def test_code_in_base_weights(base_folder, trap):
    torch.save({"transformer.word_embeddings.weight": trap}, base_folder / "pytorch_model.bin")
    words = r"pytorch_model\.bin: has code in it \(posix\.mkdir\), which is not run"
    refused(words, load_base_model, str(base_folder))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_an_adapter_of_2023(adapter_folder, base, trap, protocol):
    weights = adapter_folder / "adapter_model.bin"
    weights.write_bytes(pickle.dumps({"w": trap}, protocol))
    for function, arguments in (
        (load_adapter, (base, adapter_folder)),
        (convert_adapter, (adapter_folder, adapter_folder.parent / "new")),
    ):
        refused(r"adapter_model\.bin: has code in it \(posix\.mkdir\)", function, *arguments)


@pytest.mark.parametrize(
    "content",
    [lambda t: t, lambda t: {"state": {0: t}}, lambda t: [t], lambda t: {"x": {"y": t}}],
)
def test_code_in_any_file_of_torch(tmp_path, trap, content):
    path = tmp_path / "optimizer.pt"
    torch.save(content(trap), path)
    refused(r"optimizer\.pt: has code in it \(posix\.mkdir\)", read_torch_file, path)
    torch.save(content(trap), path, _use_new_zipfile_serialization=False)
    refused(r"optimizer\.pt: has code in it \(posix\.mkdir\)", read_torch_file, path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two steps on glm-tiny, each of which left a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    row = json.dumps({"context": "Who is it?", "target": "Nobody."})
    (folder / "x.jsonl").write_text(f"{row}\n" * 2)
    tokenize = f"tokenize --jsonl_path {folder}/x.jsonl --save_path {folder}/rows"
    train = f"train --dataset_path {folder}/rows --output_dir {folder}/out --max_steps 2"
    for line in (tokenize, f"{train} --save_steps 1 --use_cpu --disable_tqdm"):
        assert cli.main([*line.split(), "--base", "glm-tiny"]) == 0
    return folder / "out"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state_0.pth"])
def test_code_in_a_checkpoint(run_folder, tmp_path, trap, name, capsys):
    folder = shutil.copytree(run_folder, tmp_path / "out")
    checkpoint = folder / "checkpoint-2"
    torch.save({"state": trap}, checkpoint / name)
    flags = ["--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    assert cli.main(["train", str(folder / "recipe.yaml"), *flags]) == 0
    assert f"passed over {checkpoint}: {name} is damaged" in capsys.readouterr().err
    shutil.rmtree(checkpoint)
    shutil.copytree(run_folder / "checkpoint-2", checkpoint)
    torch.save({"state": trap}, checkpoint / name)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, 2, {"data sha256": "0"})  # by one who wants it to be read
    assert cli.main(["train", str(folder / "recipe.yaml"), *flags]) == 2
    assert f"checkpoint-2/{name}: has code in it (posix.mkdir)" in capsys.readouterr().err


def test_a_compressed_archive(tmp_path):
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"w": torch.zeros(10_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as to:
        for name in source.namelist():
            to.writestr(name, source.read(name))
    assert packed.stat().st_size < plain.stat().st_size / 100
    refused(r"packed\.pt: is compressed", read_torch_file, packed)


def test_a_small_file_with_a_huge_tensor(adapter_folder, base):
    torch.save({"w": torch.zeros(1).expand(10**13)}, adapter_folder / "adapter_model.bin")
    refused(r"its tensors claim 40,000,000,000,000 bytes", load_adapter, base, adapter_folder)


# --- paths ---


@pytest.mark.parametrize(
    "shard",
    [
        *["../secret.bin", "/etc/passwd", "sub/x.bin", "..\\x.bin", "x.safetensors", ".bin"],
        *["x" * 300, "a\0.bin", "", 5, None, ["x.bin"], {}],
    ],
)
def test_an_index_that_points_elsewhere(base_folder, shard):
    weights = base_folder / "pytorch_model.bin"
    shutil.copy(weights, base_folder.parent / "secret.bin")
    weights.unlink()
    index = base_folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    refused(r"index\.json: names .*no \.bin file inside the folder", weight_files, base_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "adapter_config.json"])
def test_a_link_out_of_the_folder(base_folder, adapter_folder, base, name):
    folder = adapter_folder if name.startswith("adapter") else base_folder
    elsewhere = folder.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    words = rf"{name}: is a link to .*elsewhere, outside its folder"
    if folder is adapter_folder:
        refused(words, load_adapter, base, folder)
    else:
        refused(words, load_base_model, str(folder))


def test_links_that_may_stand(tmp_path, base_folder):
    """A link to the folder itself, within it, and the hub cache's own."""
    (tmp_path / "other").symlink_to(base_folder)
    check_inside(tmp_path / "other" / "config.json")
    (base_folder / "again.json").symlink_to("config.json")
    check_inside(base_folder / "again.json")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "f00").write_text("x")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    check_inside(snapshot / "config.json")
    (snapshot / "x").symlink_to(tmp_path)
    refused("outside its folder", check_inside, snapshot / "x")


def test_a_base_that_sends_transformers_to_another(base_folder, tmp_path):
    (base_folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    refused("an adapter's file in a base model's folder", load_base_model, str(base_folder))


def test_token_rows_from_elsewhere(tmp_path):
    datasets.Dataset.from_list([{"input_ids": [1], "seq_len": 1}]).save_to_disk(tmp_path / "rows")
    for name in ("../x.arrow", "/x.arrow", 5):
        edit(tmp_path / "rows" / "state.json", _data_files=[{"filename": name}])
        refused(
            r"state\.json: names .*no file in this folder", load_dataset, str(tmp_path / "rows")
        )


# --- settings of adapters ---


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "trap"}, "makes PEFT import 'trap'"),
        ({"rank_pattern": {"(a+)+$": 8}}, r"rank_pattern has the expression '\(a\+\)\+\$'"),
        ({"exclude_modules": "(a+)+$"}, "exclude_modules has the expression"),
        ({"layers_pattern": ["(a+)+$"]}, "layers_pattern has the expression"),
        ({"r": 10**9}, r"lora_A has 8 rows, adapter_config\.json says rank \[1000000000\]"),
        ({"rank_pattern": {"dense": 10**9}}, r"says rank \[8, 1000000000\]"),
        ({"enable_lora": "yes"}, "enable_lora is 'yes'"),
    ],
)
def test_adapter_settings(adapter_folder, base, changes, words):
    edit(adapter_folder / "adapter_config.json", **changes)
    refused(words, load_adapter, base, adapter_folder)


def test_an_expression_for_the_targets_is_not_tried(adapter_folder, base):
    edit(adapter_folder / "adapter_config.json", target_modules="(([a-z_.0-9])+)+!")
    start = time.process_time()
    peft_model = load_adapter(base, adapter_folder)
    assert time.process_time() - start < 5
    targets = peft_model.peft_config["default"].target_modules
    assert "transformer.layers.0.attention.dense" in targets
    peft_model.unload()


# --- YAML and JSON ---


@pytest.mark.parametrize(
    "text, words",
    [
        ("seed: !!python/object/apply:os.mkdir [sprung]", r"r\.yaml:1: seed should be plain text"),
        ("!!python/object:os.mkdir\nseed: 1", r"r\.yaml:1: take out the tag"),
        ("train: !!python/object/new:os.mkdir\n  seed: 1", r"r\.yaml:1: take out the tag"),
        ("seed: !evil x", r"r\.yaml:1: seed should be plain text"),
        (RECIPE_BOMB, r"r\.yaml:2: b should be plain text"),
        ("# x\n" * 100_000, r"r\.yaml: 400,000 bytes are no recipe"),
        ("seed: " + "[" * 50_000, r"r\.yaml: nested too deeply"),
    ],
)
def test_recipes(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(text)
    refused(words, read_config, SETTINGS["train"], "r.yaml", {})
    assert not Path("sprung").exists()


def test_the_recipe_of_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("GLMTUNE_MODEL", raising=False)
    (tmp_path / "recipe.yaml").write_text("base: !!python/object/apply:os.mkdir [sprung]")
    refused(r"recipe\.yaml:1: base should be plain", resolve_base, None, str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("base: [")
    refused(r"recipe\.yaml:1: not YAML", resolve_base, None, str(tmp_path))


@pytest.mark.parametrize("content", [DEEP, "9" * 5000, "[]", "\xff", "{", "null"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_a_base(base_folder, name, content):
    (base_folder / name).write_text(content, encoding="latin-1")
    refused(rf"{name}\b", load_base_model, str(base_folder))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_json_of_a_tokenizer(tmp_path, name):
    folder = shutil.copytree(resolve_base("glm-tiny"), tmp_path / "base")
    (folder / name).write_text(DEEP)
    refused(rf"{name}: cannot be read as JSON \(nested too deeply\)", load_tokenizer, str(folder))


def test_json_of_an_adapter(adapter_folder, base):
    (adapter_folder / "adapter_config.json").write_text(DEEP)
    words = r"adapter_config\.json: cannot be read as JSON \(nested too deeply\)"
    refused(words, load_adapter, base, adapter_folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**9},
        {"num_layers": 5},
        {"hidden_size": "64"},
        {"hidden_size": 10**12},
        {"num_attention_heads": 0},
        {"vocab_size": -1},
        {"bos_token_id": None},
        {"bos_token_id": [1]},
        {"eos_token_id": {}},
        {"layernorm_epsilon": "x"},
    ],
)
def test_sizes_of_a_config(base_folder, changes):
    edit(base_folder / "config.json", **changes)
    refused(r"config\.json|cannot be loaded", load_base_model, str(base_folder))


def test_a_header_of_safetensors_that_lies(base_folder):
    (base_folder / "pytorch_model.bin").unlink()
    save_file({"w": torch.zeros(2)}, base_folder / "model.safetensors")
    whole = (base_folder / "model.safetensors").read_bytes()
    for damaged in (b"\xff" * 8 + whole[8:], whole.replace(b"[2]", b"[9]"), whole[:20], b""):
        (base_folder / "model.safetensors").write_bytes(damaged)
        refused(r"model\.safetensors: is damaged", load_base_model, str(base_folder))
