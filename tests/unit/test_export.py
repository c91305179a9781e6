"""A tuned model for other programs: what is written, by whom it is opened, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from glm_folders import bases_and_runs
from peft import PeftModel
from safetensors.torch import load_file

from glmtune import cli
from glmtune.adapters import load_adapter, merge, read_adapter
from glmtune.adapters.merge import copy_tokenizer
from glmtune.config.settings import ExportSettings
from glmtune.export import hf, peft_old, plain_reader, published
from glmtune.export.job import Job
from glmtune.export.source import find_source
from glmtune.models.families import FAMILIES
from glmtune.models.folders import weight_files
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY
from glmtune.models.weights import load_mapped

# Name of the entry, its vocabulary, and whether its folder is in the publisher's layout.
KINDS = {
    "chatglm3": ("ChatGLM3-6B", "glm3_tokenizer.model", True),
    "glm4-0414": ("GLM-4-0414", "glm/glm4_tokenizer.model", False),
}
STOPS = {"chatglm3": [2, 64795, 64797], "glm4-0414": [151329, 151336, 151338]}


@pytest.fixture(scope="module")
def run_of(shared, tmp_path_factory):
    """By kind: the folders of a base and of a run with an adapter on all linears."""
    return bases_and_runs(shared, tmp_path_factory, KINDS)


@pytest.fixture(scope="module")
def hf_of(run_of, tmp_path_factory):
    """By kind: what `--to hf` wrote of it, and its record; opening it takes a process."""
    made = {}

    def make(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp("hf") / kind
            made[kind] = export(*run_of(kind), "hf", "--out", out)
        return made[kind]

    return make


def export(base, run, to, *more):
    """Run the command; returns the folder that it wrote and its record."""
    out = Path(f"{run}-{to}")
    words = ["export", str(run), "--base", str(base), "--to", to, *map(str, more)]
    if "--out" in words:
        out = Path(words[words.index("--out") + 1])
    assert cli.main(words) == 0
    return out, json.loads((out / "export.json").read_text())


def tuned_logits(base, run):
    return merge.probe(load_adapter(load_base_model(str(base), dtype=torch.float32), run))


def refused(capsys, *words):
    """The one line that a command ends with."""
    assert cli.main(["export", *map(str, words)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# --- hf ---


@pytest.mark.parametrize("kind", KINDS)
def test_hf_is_opened_by_transformers_alone(run_of, hf_of, kind):
    base, run = run_of(kind)
    folder, record = hf_of(kind)
    assert record["by_the_targets_own_reader"]
    assert record["opened_by"] == f"transformers {transformers.__version__} without glmtune"
    assert (
        "the ids of 7 texts and a conversation by the chat template are the same"
        in (record["found"])
    )
    classes = {"chatglm3": transformers.GlmForCausalLM, "glm4-0414": transformers.Glm4ForCausalLM}
    plain = classes[kind].from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[vocab * i // 20 for i in range(20)] for vocab in [plain.vocab_size]])
    with torch.inference_mode():
        found = plain.eval()(ids).logits
    assert (found - tuned_logits(base, run)).abs().max() < 1e-4
    assert sorted(plain.generation_config.eos_token_id) == STOPS[kind]
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert (folder / "chat_template.jinja").is_file()
    assert not list(folder.glob("*.py"))
    assert not any("auto_map" in file.read_text() for file in folder.glob("*config.json"))
    again = load_tokenizer(str(folder))  # ours
    assert again.encode_plain(["people"]) == load_tokenizer(str(base)).encode_plain(["people"])


def test_a_word_with_a_special_name_in_it_stays_a_word(run_of):
    """The vocabulary of ChatGLM3-6B has a token "eop", which is in "people"."""
    tokenizer = load_tokenizer(str(run_of("chatglm3")[0]))
    (make,) = {f.exports.plain_tokenizer for f in FAMILIES if f.name == "ChatGLM3-6B"}
    plain = make(tokenizer)
    text = "people hope, gasopen"
    assert plain.encode(text, add_special_tokens=False).ids == tokenizer.encode_plain([text])[0]
    written = plain.encode("[gMASK]sop<|user|>\n hello", add_special_tokens=False).ids
    ids = tokenizer.ids
    assert written[:3] == [ids["[gMASK]"], ids["sop"], ids["<|user|>"]]


def test_files_that_transformers_opens_stay_as_they_are(run_of, hf_of, tmp_path):
    """As those of GLM-4-0414 are: a tokenizer.json, and settings that name a class of its."""
    settled = shutil.copytree(hf_of("glm4-0414")[0], tmp_path / "base")
    (settled / "tokenizer.model").unlink()
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    (settled / names[1]).write_bytes((settled / names[1]).read_bytes() + b"\n\n")
    settings = ExportSettings(adapter=str(run_of("glm4-0414")[1]), base=str(settled), to="hf")
    (tmp_path / "new").mkdir()
    copy_tokenizer(settled, tmp_path / "new")
    hf.write_plain_tokenizer(Job(find_source(settings)), tmp_path / "new")
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (settled / name).read_bytes()


def test_an_export_with_other_logits_is_not_kept(run_of, tmp_path, monkeypatch, capsys):
    base, run = run_of("chatglm3")

    def damage(model, dtype):
        model.model.layers[0].mlp.down_proj.weight.data.zero_()

    monkeypatch.setattr(published, "downcast_lossless", damage)
    out = tmp_path / "new"
    line = refused(capsys, run, "--base", base, "--to", "chatglm", "--out", out)
    assert "gives other logits, opened by glmtune" in line
    assert list(tmp_path.iterdir()) == []


def test_the_plain_reader_cannot_import_this_package(strange_adapter, tmp_path):
    """ChatGLM-6B has no class in transformers: a process without glmtune does not open it."""
    folder, record = export(GLM_TINY, strange_adapter, "hf", "--out", tmp_path / "new")
    assert not record["by_the_targets_own_reader"]
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    named = json.loads((folder / "config.json").read_text())["auto_map"]["AutoConfig"]
    assert (folder / f"{named.partition('.')[0]}.py").is_file()
    (tmp_path / "asked.json").write_text(json.dumps({"ids": [1], "texts": [], "chat": []}))
    command = [sys.executable, plain_reader.__file__, folder, tmp_path / "asked.json", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0


# --- chatglm ---


def test_chatglm_has_the_published_keys_and_settings(shared, tmp_path):
    base = shared / "golden" / "chatglm3-6b-32k-tiny"
    run = shared / "golden/glm/adapters/chatglm3-6b-32k-tiny/peft_0_7_all"
    folder, record = export(base, run, "chatglm", "--out", tmp_path / "new")
    assert record["opened_by"] == "glmtune"
    found, wanted = (
        {name: list(t.shape) for path in weight_files(f) for name, t in load_mapped(path).items()}
        for f in (folder, base)
    )
    assert found == {name: shape for name, shape in wanted.items() if "inv_freq" not in name}
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (folder, base))
    names = ("rope_ratio", "seq_length", "padded_vocab_size", "layernorm_epsilon", "kv_channels",
             "ffn_hidden_size", "multi_query_group_num", "num_layers", "add_qkv_bias")  # fmt: skip
    assert {name: ours[name] for name in names} == {name: theirs.get(name) for name in names}
    assert ours["rope_ratio"] == 50
    assert ours["architectures"] == ["ChatGLMModel"]
    expected = load_file(run / "expected.safetensors")
    model = load_base_model(str(folder), dtype=torch.float32)
    valid = expected["attention_mask"].bool()
    with torch.inference_mode():
        logits = model(
            input_ids=expected["input_ids"], attention_mask=expected["attention_mask"]
        ).logits
    assert (logits - expected["logits_merged"])[valid].abs().max() < 1e-4


def test_chatglm_names_code_only_where_it_is_there(run_of, tmp_path):
    base, run = run_of("chatglm3")
    with_code = shutil.copytree(base, tmp_path / "code")
    settings = json.loads((with_code / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    (with_code / "config.json").write_text(json.dumps(settings))
    of_tokenizer = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    file = with_code / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": of_tokenizer}))
    found = {}
    for is_there in (False, True):
        if is_there:
            (with_code / "configuration_chatglm.py").write_text("raise SystemExit")
            (with_code / "tokenization_chatglm.py").write_text("raise SystemExit")
        folder, _ = export(with_code, run, "chatglm", "--out", tmp_path / f"new {is_there}")
        maps = {
            file.name: json.loads(file.read_text()).get("auto_map")
            for file in folder.glob("*config.json")
        }
        found[is_there] = maps, sorted(file.name for file in folder.glob("*.py"))
    nothing = dict.fromkeys(found[False][0])
    assert found[False] == (nothing, [])
    named = {"config.json": settings["auto_map"], "tokenizer_config.json": of_tokenizer}
    assert found[True] == (
        nothing | named, ["configuration_chatglm.py", "tokenization_chatglm.py"]
    )  # fmt: skip


def test_a_scaling_that_the_publisher_cannot_say_is_refused(hf_of, tmp_path, capsys):
    plain = shutil.copytree(hf_of("chatglm3")[0], tmp_path / "hf")
    settings = json.loads((plain / "config.json").read_text())
    settings["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (plain / "config.json").write_text(json.dumps(settings))
    line = refused(capsys, plain, "--to", "chatglm")
    assert "rope_type 'linear' cannot be said in the publisher's layout" in line
    assert not Path(f"{plain}-chatglm").exists()


# --- adapters ---


def split_halves(folder, layer=0):
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = f"base_model.model.model.layers.{layer}.mlp."
    return [
        {side: tensors.get(f"{stem}{half}_proj.lora_{side}.weight") for side in "AB"}
        for half in ("gate", "up", "gate_up")
    ]


def test_vllm_has_the_halves_of_glm4_apart(run_of, tmp_path):
    base, run = run_of("glm4-0414")
    folder, record = export(base, run, "vllm-adapter", "--out", tmp_path / "new")
    assert "differ by 0.0e+00" in record["found"]
    gate, up, whole = split_halves(folder)
    assert whole == {"A": None, "B": None}
    _, _, before = split_halves(run)
    assert gate["A"].equal(up["A"])
    assert gate["A"].equal(before["A"])
    assert torch.cat([gate["B"], up["B"]]).equal(before["B"])
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )


@pytest.mark.parametrize(("version", "apart"), [(None, False), ("0.32", False), ("0.31.0", True)])
def test_vllm_has_other_names_for_glm_before_a_version(shared, tmp_path, version, apart, capsys):
    """vLLM 0.32 serves Glm by transformers' class, earlier ones by their own."""
    models = shared / "golden/glm"
    flags = ["--vllm_version", version] if version else []
    folder, _ = export(
        models / "models/glm-tiny", models / "adapters/glm-tiny/lora-all", "vllm-adapter",
        "--out", tmp_path / "new", *flags,
    )  # fmt: skip
    gate, _, whole = split_halves(folder)
    assert (gate["A"] is not None) == apart
    assert (whole["A"] is None) == apart
    told = capsys.readouterr().err
    assert (
        "before 0.32" if apart else "vLLM 0.32 and later; for earlier ones: --vllm_version 0.31"
    ) in told


def test_vllm_has_the_publishers_names_for_a_published_base(run_of, tmp_path, capsys):
    base, run = run_of("chatglm3")
    folder, _ = export(
        base, run, "vllm-adapter", "--out", tmp_path / "new", "--vllm_version", "0.31"
    )
    linears = {name.rpartition(".")[2] for name in read_adapter(folder).modules}
    assert linears == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert "--vllm_version changes nothing here" in capsys.readouterr().err


def test_vllm_gets_one_rank_and_one_scale(shared, tmp_path):
    """Versions that ignore patterns would scale modules wrongly."""
    models = shared / "golden/glm"
    run = models / "adapters/glm-tiny/lora-patterns"
    folder, record = export(
        models / "models/glm-tiny", run, "vllm-adapter", "--out", tmp_path / "new"
    )
    before, after = (
        json.loads((place / "adapter_config.json").read_text()) for place in (run, folder)
    )
    assert before["rank_pattern"]
    assert {"rank_pattern", "alpha_pattern"} & after.keys() == set()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {after["r"]}
    difference = float(record["found"].partition("differ by ")[2].split()[0])
    assert difference < 1e-4


def test_peft_old_knows_each_name_of_its_settings(run_of, tmp_path):
    base, run = run_of("chatglm3")
    folder, record = export(base, run, "peft-old", "--out", tmp_path / "new")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings.keys() <= peft_old.KNOWN
    assert "exclude_modules" not in peft_old.KNOWN  # of PEFT 0.14
    assert record["opened_by"].startswith("glmtune with PEFT ")
    # The base's folder is the publisher's, whose code has these names.
    assert set(settings["target_modules"]) == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"
    }  # fmt: skip


def test_peft_old_of_transformers_own_names_is_loaded_by_peft(shared, tmp_path):
    models = shared / "golden/glm"
    base, run = models / "models/glm4-tiny", models / "adapters/glm4-tiny/lora-all-split"
    folder, _ = export(base, run, "peft-old", "--out", tmp_path / "new")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = merge.probe(PeftModel.from_pretrained(plain, folder))
    assert (found - tuned_logits(base, run)).abs().max() < 1e-4


# --- the card ---


def test_the_card_has_scores_with_intervals_cost_and_licence(run_of, tmp_path):
    base, run = run_of("glm4-0414")
    base = shutil.copytree(base, tmp_path / "base")
    (base / "LICENSE").write_text("Do as you like.")
    (base / "README.md").write_text("---\nlicense: mit\nsecret: x\n---\n# Base\n")
    run = shutil.copytree(run, tmp_path / "run")
    metrics = {"base": 20.0, "tuned": 25.5, "difference": 5.5, "low": 4.25, "high": 6.75, "n": 40}
    (run / "compare").mkdir()
    (run / "compare/compare.json").write_text(
        json.dumps(
            {
                "sentence": {"zh": "变好", "en": "Better"},
                "date": "2026-11-30",
                "languages": {"all": {"metrics": {"chrf": metrics}}},
            }
        )
    )
    folder, record = export(base, run, "peft-old")
    card = (folder / "README.md").read_text()
    assert "| all rows | chrf | 20.000 | 25.500 | +5.500 (+4.250 to +6.750) | 40 |" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert (folder / "LICENSE").read_text() == "Do as you like."
    assert "its text is in LICENSE" in card
    assert record["found"] in card
    assert str(tmp_path) not in card + json.dumps(record)


# --- where to, and what is refused ---


@pytest.fixture
def run_folder(shared, tmp_path):
    """A run with two checkpoints, of which the first is the best."""
    run = tmp_path / "out"
    source = shared / "golden/glm/adapters/glm4-tiny"
    for step, name in ((100, "lora-all"), (200, "lora-qkv")):
        shutil.copytree(source / name, run / f"checkpoint-{step}")
    for file in (source / "lora-qkv").iterdir():
        shutil.copyfile(file, run / file.name)
    (run / "best").symlink_to("checkpoint-100")
    return run


@pytest.mark.parametrize(
    ("words", "name", "adapter"),
    [
        ([], "out-peft-old", "lora-qkv"),
        (["--checkpoint", "100"], "out-checkpoint-100-peft-old", "lora-all"),
        (["--checkpoint", "best"], "out-best-peft-old", "lora-all"),
    ],
)
def test_a_checkpoint_is_chosen_and_named(shared, run_folder, words, name, adapter):
    base = shared / "golden/glm/models/glm4-tiny"
    assert cli.main(
        ["export", str(run_folder), *words, "--base", str(base), "--to", "peft-old"]
    ) == 0  # fmt: skip
    folder = run_folder.parent / name
    wanted = read_adapter(shared / "golden/glm/adapters/glm4-tiny" / adapter)
    assert read_adapter(folder).digest() == wanted.digest()


def test_only_an_export_is_replaced_and_only_if_asked(shared, run_folder, capsys, tmp_path):
    base = shared / "golden/glm/models/glm4-tiny"
    words = [run_folder, "--base", base, "--to", "peft-old", "--out", tmp_path / "new"]
    assert cli.main(["export", *map(str, words)]) == 0
    (tmp_path / "new" / "old file").write_text("")
    assert "replace it with --overwrite_output true" in refused(capsys, *words)
    assert cli.main(["export", *map(str, words), "--overwrite_output", "true"]) == 0
    assert not (tmp_path / "new" / "old file").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("")
    words[-1] = tmp_path / "mine"
    assert "is no export of ours" in refused(capsys, *words, "--overwrite_output", "true")
    words[-1] = tmp_path
    assert "one above it" in refused(capsys, *words, "--overwrite_output", "true")


REFUSALS = {
    "no such checkpoint": ("{run} --checkpoint 7 --to hf", "it has 100, 200, best"),
    "chatglm of 0414": ("{run} --to chatglm", "GLM-4-0414 was published in transformers' layout"),
    "an adapter of a model": ("{base} --to vllm-adapter", "holds no adapter"),
    "a base of a model": ("{base} --base {base} --to hf", "which has no base"),
    "a number type for hf": ("{run} --to hf --quant f16", "with --to gguf alone"),
    "an adapter alone for hf": ("{run} --to hf --adapter_alone true", "with --to gguf alone"),
    "a version for hf": ("{run} --to hf --vllm_version 0.31", "with --to vllm-adapter alone"),
    "a version that is none": (
        "{run} --to vllm-adapter --vllm_version new", "a version such as 0.31",
    ),
    "an unknown target": ("{run} --to onnx", "hf, chatglm, gguf, vllm-adapter"),
    "v1 for gguf": ("{tiny} --base glm-tiny --to gguf", "chatglm.cpp (github.com/li-plus"),
    "v1 for vLLM": ("{tiny} --base glm-tiny --to vllm-adapter", "is not served by vLLM"),
    "the run itself": ("{run} --to hf --out {run}", "would overwrite"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "told"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    shared, run_folder, strange_adapter, capsys, monkeypatch, words, told
):
    monkeypatch.setattr("glmtune.adapters.merge.load_base_model", None)
    monkeypatch.setenv("GLMTUNE_MODEL", "")
    base = shared / "golden/glm/models/glm4-tiny"
    words = words.format(run=run_folder, base=base, tiny=strange_adapter).split()
    if "--base" not in words and words[0] != str(base):
        words += ["--base", str(base)]
    assert told in refused(capsys, *words)


def test_rounded_weights_are_refused_with_a_way_that_works(run_of, tmp_path, capsys):
    base, run = run_of("chatglm3")
    packed = shutil.copytree(base, tmp_path / "int8")
    settings = json.loads((packed / "config.json").read_text()) | {"quantization_bit": 8}
    (packed / "config.json").write_text(json.dumps(settings))
    line = refused(capsys, run, "--base", packed, "--to", "hf")
    assert "is in 8 bits, rounded already" in line
    assert f"glmtune merge --adapter {run} --base {packed} --save_path MERGED" in line


def test_a_full_disk_is_told_of_first(run_of, tmp_path, capsys, monkeypatch):
    base, run = run_of("chatglm3")
    monkeypatch.setattr("glmtune.disk.free_bytes", lambda folder: 1000)
    line = refused(capsys, run, "--base", base, "--to", "hf", "--out", tmp_path / "new")
    assert "0 MB are free, but --to hf writes about" in line
    assert not (tmp_path / "new").exists()


def test_a_run_in_few_bits_is_told_to_have_whole_weights(run_of, tmp_path, capsys):
    base, run = run_of("chatglm3")
    run = shutil.copytree(run, tmp_path / "run")
    recipe = {"dataset_path": "rows", "output_dir": "out", "quantization_bit": "4"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    export(base, run, "chatglm")
    assert "trained on the base in 4 bits; the export has the base's whole weights" in (
        capsys.readouterr().err
    )
