"""GGUF files of every family that llama.cpp has, opened by llama.cpp itself."""

import json
from pathlib import Path

import glm_folders
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from glm_folders import write_model, write_run
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from glmtune import cli
from glmtune.adapters import load_adapter, read_adapter
from glmtune.adapters.merge import merge_in_memory
from glmtune.errors import UserError
from glmtune.export import gguf_file, gguf_target, llama_cpp
from glmtune.models.families import FAMILIES, family_of
from glmtune.models.glm.gguf import _name_of
from glmtune.models.loading import load_base_model, load_tokenizer

ROPE_RATIO, EPS, POSITIONS = 50, 1e-3, 8192
# Name of the entry, its vocabulary, whether it is in the publisher's layout, and llama.cpp's names.
KINDS = {
    "chatglm3": ("ChatGLM3-6B", "glm3_tokenizer.model", True, "chatglm", "llama", "default"),
    "chatglm2": ("ChatGLM2-6B", "glm3_tokenizer.model", True, "chatglm", "llama", "default"),
    "glm4": ("GLM-4-9B", "glm/glm4_tokenizer.model", True, "chatglm", "gpt2", "chatglm-bpe"),
    "glm4-0414": ("GLM-4-0414", "glm/glm4_tokenizer.model", False, "glm4", "gpt2", "glm4"),
    "glm-edge": ("GLM-Edge", None, False, "chatglm", "gpt2", "chatglm-bpe"),
}
SLOW = pytest.mark.slow  # its layers and its vocabulary are those of ChatGLM3-6B
TEXTS = [
    "people, gasoline, eop and [gMASK]", "中文，标点。１２３ ４５６", "a  b   c    d", "\n\n\n",
    "\t\tif x:\r\n",
    "I'll we've THEY'RE don't", "1234567890 0.001", "🤗🇨🇳 naïve café Ωμέγα Привет",
    " leading and trailing ",
    "https://example.com/a?b=c&d=e#f", "{\"json\": [1, 2.5, null]}", "\u3000\u3000段落\u00a0x",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_of(shared, tmp_path_factory):
    """By kind: the folders of a base and of a run with an adapter on all linears."""
    made = {}

    def make(kind):
        if kind not in made:
            name, vocabulary, is_published, *_ = KINDS[kind]
            family = next(family for family in FAMILIES if family.name == name)
            place = tmp_path_factory.mktemp(kind)
            file = shared / "golden" / vocabulary if vocabulary else None
            base = write_model(place / "base", family, file, published=is_published)
            config = json.loads((base / "config.json").read_text())
            if is_published:
                config |= {
                    "rope_ratio": ROPE_RATIO, "layernorm_epsilon": EPS, "seq_length": POSITIONS
                }  # fmt: skip
            else:
                config |= {"rms_norm_eps": EPS, "max_position_embeddings": POSITIONS}
                config["rope_parameters"]["rope_theta"] = 10_000 * ROPE_RATIO
            (base / "config.json").write_text(json.dumps(config))
            made[kind] = base, write_run(base, place / "run")
        return made[kind]

    return make


@pytest.fixture(scope="module")
def gguf_of(run_of, tmp_path_factory):
    """By kind: the folder of a GGUF file in float32, and its record."""
    made = {}

    def make(kind):
        if kind not in made:
            out = tmp_path_factory.mktemp("gguf") / kind
            made[kind] = out, export(*run_of(kind), out, "--quant", "f32")
        return made[kind]

    return make


def export(base, run, out, *more):
    words = ["export", run, "--base", base, "--to", "gguf", "--out", out, *more]
    assert cli.main([*map(str, words)]) == 0
    return json.loads((out / "export.json").read_text())


def fields_of(path):
    fields = gguf_file.Reader(str(path)).fields
    return {name: field.contents() for name, field in fields.items()}


@pytest.mark.parametrize(
    "kind",
    [*(kind for kind in KINDS if kind != "chatglm2"), pytest.param("chatglm2", marks=SLOW)],
)
def test_llama_cpp_answers_as_we_do(run_of, gguf_of, kind):
    folder, record = gguf_of(kind)
    assert record["opened_by"].startswith("llama.cpp (xllamacpp ")
    assert record["by_the_targets_own_reader"]
    assert (
        "64 greedy tokens of 2 answers are the same; the ids of 7 texts and of a"
        in (record["found"])
    )
    assert "conversation by the chat template are the same" in record["found"]
    (path,) = folder.glob("*.gguf")
    found = fields_of(path)
    *_, arch, vocabulary, pre = KINDS[kind]
    family = family_of(load_base_model(str(run_of(kind)[0])).config)
    tokenizer = load_tokenizer(str(run_of(kind)[0]))
    stops = [tokenizer.ids[name] for name in tokenizer.layout.stops]
    is_edge = kind == "glm-edge"
    wanted = {
        "general.architecture": arch,
        f"{arch}.rope.freq_base": 10_000 * ROPE_RATIO,
        f"{arch}.rope.dimension_count": 8 if is_edge else 4,
        f"{arch}.context_length": POSITIONS,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": 8,
        f"{arch}.attention.layer_norm_rms_epsilon": pytest.approx(EPS),
        "tokenizer.ggml.model": vocabulary,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.add_bos_token": False,
    }
    wanted |= {
        f"tokenizer.ggml.{name}_token_id": id_
        for name, id_ in zip(("eos", "eot", "eom"), stops, strict=False)
    }
    assert {name: found[name] for name in wanted} == wanted
    assert "generation %}" not in found["tokenizer.chat_template"]
    modelfile = (folder / "Modelfile").read_text()
    assert f"FROM ./{path.name}\n" in modelfile
    assert modelfile.count("PARAMETER stop ") == len(stops)
    assert family.exports.gguf


def test_a_file_as_an_array_holds_what_the_packages_reader_finds(gguf_of):
    (path,) = gguf_of("glm-edge")[0].glob("*.gguf")
    ours, theirs = (reader(str(path)) for reader in (gguf_file.Reader, GGUFReader))
    assert type(ours.data) is np.ndarray
    assert [*ours.fields] == [*theirs.fields]
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents()
    assert len(ours.tensors) == len(theirs.tensors) > 0
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.name, one.tensor_type) == (other.name, other.tensor_type)
        np.testing.assert_array_equal(one.data, other.data)


@pytest.mark.parametrize("kind", ["chatglm3", "glm4-0414", "glm-edge"])
def test_llama_cpp_puts_the_adapter_alone_on_the_base(run_of, kind, tmp_path):
    base, run = run_of(kind)
    record = export(base, run, tmp_path / "new", "--adapter_alone", "true")
    assert "on a file of the base, 64 greedy tokens of 2 answers are the same" in record["found"]
    assert record["by_the_targets_own_reader"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "README.md", "adapter.gguf", "export.json"
    ]  # fmt: skip


def test_an_adapter_of_several_ranks_has_its_scales_in_b(shared, tmp_path):
    """llama.cpp divides one alpha by each rank."""
    golden = shared / "golden/glm"
    base = load_base_model(str(golden / "models/glm-tiny"), dtype=torch.float32)
    folder = golden / "adapters/glm-tiny/lora-patterns"
    model = load_adapter(base, folder)
    scales = {
        name.removeprefix("base_model.model."): (module.scaling["default"], module.r["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert len({*scales.values()}) > 1
    form = gguf_target.GgufForm("chatglm", _name_of, *[None] * 8)
    path = tmp_path / "adapter.gguf"
    gguf_file.write_adapter_file(path, "x", form, read_adapter(folder))
    alpha = fields_of(path)["adapter.lora.alpha"]
    tensors = {name: torch.from_numpy(t.copy()) for name, t in gguf_file.read_tensors(path)}
    weights = load_file(folder / "adapter_model.safetensors")
    for name, (scale, rank) in scales.items():
        a, b = (tensors[f"{_name_of(name)}.weight.lora_{side}"] for side in "ab")
        before_b = weights[f"base_model.model.{name}.lora_B.weight"]
        before_a = weights[f"base_model.model.{name}.lora_A.weight"]
        torch.testing.assert_close(b @ a * (alpha / rank), before_b @ before_a * scale)


@pytest.mark.parametrize("kind", ["chatglm3", "glm4-0414"])
def test_texts_have_our_ids(run_of, gguf_of, kind):
    (path,) = gguf_of(kind)[0].glob("*.gguf")
    tokenizer = load_tokenizer(str(run_of(kind)[0]))
    told = llama_cpp.ask(path, [], texts=TEXTS)
    assert told.texts == tokenizer.encode_plain(TEXTS)


def test_beyond_4096_tokens_the_rope_base_shows(run_of, gguf_of, tmp_path):
    base, run = run_of("chatglm3")
    (path,) = gguf_of("chatglm3")[0].glob("*.gguf")
    model = merge_in_memory(str(base), run).model
    tokenizer = load_tokenizer(str(base))
    row = torch.randint(300, 60_000, (4200,), generator=torch.Generator().manual_seed(0)).tolist()
    stops = [*tokenizer.stop_ids]
    ours = llama_cpp.greedy(model, row, stops, 32)
    assert llama_cpp.ask(path, [row]).answers == [ours]
    form = family_of(model.config).exports.gguf(model.config, tokenizer)
    assert form.rope_base == 10_000 * ROPE_RATIO
    wrong = tmp_path / "wrong.gguf"
    gguf_file.write_model(
        wrong, "x", form._replace(rope_base=10_000), model.config, model.state_dict(), "f32"
    )
    assert llama_cpp.ask(wrong, [row]).answers != [ours]


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_positions_are_scaled_as_here(run_of, kind, tmp_path):
    base, _ = run_of("glm-edge")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] |= {
        "rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 128
    }  # fmt: skip
    config["max_position_embeddings"] = 512
    scaled = tmp_path / "base"
    scaled.mkdir()
    for file in base.iterdir():
        (scaled / file.name).write_bytes(file.read_bytes())
    (scaled / "config.json").write_text(json.dumps(config))
    model, tokenizer = (
        load_base_model(str(scaled), dtype=torch.float32),
        load_tokenizer(str(scaled)),
    )
    form = family_of(model.config).exports.gguf(model.config, tokenizer)
    row = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    answers = []
    for place, one in enumerate((form, form._replace(rope_scaling={}))):
        path = tmp_path / f"{place}.gguf"
        tensors = gguf_target._tensors(model)
        gguf_file.write_model(path, "x", one, model.config, tensors, "f32")
        answers += llama_cpp.ask(path, [row]).answers
    assert answers[0] == llama_cpp.greedy(model, row, [*tokenizer.stop_ids], 32)
    assert answers[1] != answers[0]


# --- number types, and what goes wrong ---


@pytest.mark.parametrize(("quant", "bits"), [("f16", 16), ("q8_0", 8.5)])
def test_files_in_fewer_bits(shared, tmp_path, monkeypatch, quant, bits):
    for sizes in (glm_folders.SIZES, glm_folders.PUBLISHED_SIZES):
        for name in ("intermediate_size", "ffn_hidden_size"):
            if name in sizes:
                monkeypatch.setitem(sizes, name, 64)
    family = next(family for family in FAMILIES if family.name == "GLM-Edge")
    base = write_model(tmp_path / "base", family, None)
    assert cli.main(["export", str(base), "--to", "gguf", "--quant", quant]) == 0
    folder = Path(f"{base}-gguf-{quant}")
    record = json.loads((folder / "export.json").read_text())
    assert record["by_the_targets_own_reader"]
    assert f"as {quant} the weights move a logit by" in record["found"]
    (path,) = folder.glob("*.gguf")
    matrices = [t for t in GGUFReader(str(path)).tensors if len(t.shape) == 2]
    numbers = sum(int(t.n_elements) for t in matrices)
    assert sum(int(t.n_bytes) for t in matrices) * 8 / numbers == bits
    assert all(
        t.tensor_type.name == "F32" for t in GGUFReader(str(path)).tensors if len(t.shape) == 1
    )


def test_rows_that_do_not_divide_are_refused(run_of, tmp_path, capsys):
    base, run = run_of("glm-edge")
    words = [
        "export",
        run,
        "--base",
        base,
        "--to",
        "gguf",
        "--quant",
        "q8_0",
        "--out",
        tmp_path / "x",
    ]
    assert cli.main([*map(str, words)]) == 2
    assert "rows of 48 numbers, which do not divide by 32; use --quant f16" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_llama_cpp_reads_otherwise_is_not_kept(run_of, tmp_path, capsys, monkeypatch):
    base, run = run_of("glm-edge")
    make = gguf_target._form
    monkeypatch.setattr(gguf_target, "_form", lambda job: make(job)._replace(rope_base=2.0))
    words = [
        "export",
        run,
        "--base",
        base,
        "--to",
        "gguf",
        "--quant",
        "f32",
        "--out",
        tmp_path / "x",
    ]
    assert cli.main([*map(str, words)]) == 2
    assert "answers otherwise than these weights here, from token" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_llama_cpp_does_not_open_is_told_in_one_line(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"^--to gguf: llama\.cpp does not open what was written"):
        llama_cpp.ask(tmp_path / "no.gguf", [[1]])


def test_without_llama_cpp_the_file_is_read_by_us(run_of, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    base, run = run_of("glm-edge")
    record = export(base, run, tmp_path / "new", "--quant", "f32")
    assert record["opened_by"] == "glmtune with the gguf package"
    assert not record["by_the_targets_own_reader"]
    assert "pip install xllamacpp" in capsys.readouterr().err
    assert "our own reader" in (tmp_path / "new" / "README.md").read_text()


def test_a_base_without_a_tokenizer_is_refused(shared, tmp_path, capsys):
    golden = shared / "golden/glm"
    words = ["export", golden / "adapters/glm-tiny/lora-all", "--base", golden / "models/glm-tiny",
             "--to", "gguf", "--out", tmp_path / "x"]  # fmt: skip
    assert cli.main([*map(str, words)]) == 2
    assert "has no tokenizer, which a GGUF file holds" in capsys.readouterr().err


def test_the_modelfile_writes_the_layout(gguf_of):
    role = '<|{{ if eq .Role "tool" }}observation{{ else }}{{ .Role }}{{ end }}|>'
    begin, end = "{{ range .Messages }}", "{{ .Content }}{{ end }}<|assistant|>"
    wanted = {
        "chatglm3": f"[gMASK]<sop>{begin}{role}\n {end}",
        "glm-edge": f"{begin}{role}\n{end}",
    }
    for kind, template in wanted.items():
        assert f'TEMPLATE """{template}"""' in (gguf_of(kind)[0] / "Modelfile").read_text()
