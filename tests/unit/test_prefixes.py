"""P-Tuning v2 prefixes: read, run as past keys, refused elsewhere, and distilled into LoRA."""

import json
from pathlib import Path

import peft
import pytest
import torch
from adapter_files import fails
from plain_prefix import chatglm2_logits, chatglm_logits, greedy
from safetensors.torch import load_file, save_file

from glmtune import cli
from glmtune.adapters import load_prefix, read_adapter, read_prefix
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.models.likelihood import Probe, packed_layers, score_references
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY

NUM_PLACES = 5


def draw_encoder(columns, hidden=None, seed=0, scale=0.5):
    """The tensors of a published `PrefixEncoder`; with a projection where `hidden` is given.

    ChatGLM-6B projects from the hidden size, the others from as many columns as the prefix has.
    """
    torch.manual_seed(seed)
    if hidden is None:
        return {"embedding.weight": torch.randn(NUM_PLACES, columns) * scale}
    width, inner = hidden
    return {
        "embedding.weight": torch.randn(NUM_PLACES, width),
        "trans.0.weight": torch.randn(inner, width) / width**0.5,
        "trans.0.bias": torch.randn(inner) / 4,
        "trans.2.weight": torch.randn(columns, inner) / inner**0.5,
        "trans.2.bias": torch.randn(columns) / 4,
    }


def save_prefix(folder, encoder, name="pytorch_model.bin", more=()):
    """A checkpoint of the published scripts, which hold only what was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"transformer.prefix_encoder.{key}": t for key, t in encoder.items()} | dict(more)
    torch.save(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", "pre_seq_len": 5}))
    return folder


@pytest.fixture(scope="module")
def published(tiny_folder, request):
    """Published tensors, config.json, plain forward and prefix columns of two small models."""

    def find(name):
        if name == "chatglm":
            folder, logits, columns = tiny_folder, chatglm_logits, 4 * 2 * 64
        else:
            shared = request.getfixturevalue("shared")
            folder, logits, columns = (
                shared / "golden" / f"{name}-tiny",
                chatglm2_logits,
                3 * 2 * 2 * 16,
            )
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        config = json.loads((folder / "config.json").read_text())
        return folder, lambda ids, encoder=None: logits(tensors, config, ids, encoder), columns

    return find


ROWS = {
    "chatglm": [[7, 19, 300, 1001, 1004], [5, 6, 7, 8, 9, 10, 11, 1001, 1004], [42, 1001, 1004]],
    "chatglm2-6b": [[7, 19, 300], [5, 6, 7, 8, 9, 10, 11], [42]],
    "chatglm3-6b-32k": [[7, 19, 300], [5, 6, 7, 8, 9, 10, 11], [42]],
}


@pytest.mark.parametrize("name", ROWS)
def test_the_plain_forward_is_the_published_one(published, name):
    """Without a prefix, against the recorded logits of the published code."""
    folder, logits, _ = published(name)
    golden = load_file(folder / "forward.safetensors")
    for row in (0, 1):
        ids = golden["input_ids"][row]
        if "valid" in golden:
            ids = ids[golden["valid"][row]]
        found = logits(ids.tolist())
        wanted = golden["logits"][row]
        wanted = wanted[golden["valid"][row]] if "valid" in golden else wanted
        if name != "chatglm":  # padding is at an end there
            keep = min(len(found), len(wanted))
            found, wanted = found[:keep], wanted[:keep]
        assert (found - wanted).abs().max() < 2e-3


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_a_prefix_is_past_keys_before_positions_from_0(published, tmp_path, name, projected):
    """The model's forward and the decoder against the plain forward of the published layout."""
    folder, logits, columns = published(name)
    widths = ((64 if name == "chatglm" else columns), 64) if projected else None
    encoder = draw_encoder(columns, widths)
    model = load_prefix(
        load_base_model(str(folder), dtype=torch.float32), save_prefix(tmp_path / "p", encoder)
    )
    answer = [10, 20, 30]
    for ids in ROWS[name]:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0]
        wanted = logits(ids + answer, encoder)
        assert (found - wanted).abs().max() < 1e-3
        assert (wanted - logits(ids + answer)).abs().max() > 0.05  # the prefix has an effect

    settings = GenerationSettings(max_new_tokens=6)
    prompts = [EncodedPrompt(ids, number) for number, ids in enumerate(ROWS[name])]
    stop_ids = [-1]
    for size in (1, 3):  # a batch of one has other columns than one of several
        decoder = Decoder(model, stop_ids)
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            made = [[] for _ in batch]
            for more in decoder.stream(batch, settings):
                for row, new in zip(made, more, strict=True):
                    row += new
            for prompt, row in zip(batch, made, strict=True):
                assert row == greedy(lambda i: logits(i, encoder), prompt.ids, 6)
    with model.disable_adapter():
        bare = Decoder(model, stop_ids)
        assert bare.prefix is None
        (first,) = [row for (row,) in [next(bare.stream(prompts[:1], settings))]]
    assert first == greedy(logits, prompts[0].ids, 1)


def test_references_are_scored_with_the_prefix(published, tmp_path):
    folder, logits, columns = published("chatglm")
    encoder = draw_encoder(columns)
    model = load_prefix(
        load_base_model(str(folder), dtype=torch.float32), save_prefix(tmp_path / "p", encoder)
    )
    probe = Probe(ROWS["chatglm"][0], [10, 20, 1005])
    assert packed_layers(model) is None
    found = score_references(model, [probe], packed_layers(model))[0]
    log_probs = logits(probe.prompt_ids + probe.answer_ids, encoder).log_softmax(-1)
    wanted = sum(log_probs[4 + i, token] for i, token in enumerate(probe.answer_ids))
    assert found.log_prob == pytest.approx(float(wanted), abs=1e-3)
    with model.disable_adapter():
        assert packed_layers(model) is not None


# --- forms ---


@pytest.mark.parametrize("form", ["whole model", "checkpoint of a run", ".pt", "peft", "float16"])
def test_forms_of_a_prefix(published, tiny_folder, tmp_path, form):
    _, _, columns = published("chatglm")
    encoder = draw_encoder(columns)
    wanted, run = encoder["embedding.weight"], tmp_path / "run"
    if form == "peft":
        run.mkdir()
        save_file({"prompt_embeddings": wanted.clone()}, run / "adapter_model.safetensors")
        config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": NUM_PLACES}
        (run / "adapter_config.json").write_text(json.dumps(config))
    elif form == "whole model":
        base = torch.load(tiny_folder / "pytorch_model.bin", weights_only=True)
        save_prefix(run, encoder, more=base)
    elif form == "checkpoint of a run":
        save_prefix(run / "checkpoint-50", {"embedding.weight": torch.zeros_like(wanted)})
        save_prefix(run / "checkpoint-100", encoder)
        torch.save({"state": {}}, run / "checkpoint-100" / "optimizer.pt")
    elif form == ".pt":
        save_prefix(run, encoder, "prefix.pt")
    else:
        save_prefix(run, {key: t.half() for key, t in encoder.items()})
    torch.testing.assert_close(read_prefix(run).rows_PE, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda e: e.pop("embedding.weight"), "its prefix has no embedding.weight"),
        (lambda e: e.pop("trans.2.bias"), "its prefix has no trans.2.bias"),
        (lambda e: e.update({"trans.2.bias": torch.zeros(3)}), "do not follow each other"),
        (lambda e: e["trans.0.bias"].fill_(torch.nan), "trans.0.bias holds values that are not"),
        (lambda e: e.update({"lstm.weight": torch.zeros(3)}), "prefix_encoder.lstm.weight, which"),
    ],
)
def test_a_damaged_prefix_is_refused(tmp_path, change, fragment):
    encoder = draw_encoder(512, (64, 64))
    change(encoder)
    with fails(fragment):
        read_prefix(save_prefix(tmp_path / "p", encoder))


def test_a_prefix_of_another_base_is_refused(tiny_base, tmp_path):
    folder = save_prefix(tmp_path / "p", draw_encoder(510))
    with fails(r"has 510 numbers a place, but 512 are wanted by this base \(4 layers, 4 heads"):
        load_prefix(tiny_base, folder)
    with fails("holds LoRA"):
        read_prefix(tiny_lora(tmp_path))


def tiny_lora(tmp_path):
    stem = "base_model.model.transformer.layers.0.attention.query_key_value"
    (tmp_path / "lora").mkdir()
    torch.save(
        {f"{stem}.lora_A.weight": torch.ones(2, 64), f"{stem}.lora_B.weight": torch.ones(192, 2)},
        tmp_path / "lora" / "adapter_model.bin",
    )
    return tmp_path / "lora"


# --- verbs, on the model in the package ---


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A prefix of glm-tiny that changes its answers."""
    config = json.loads(Path(GLM_TINY, "config.json").read_text())
    columns = 2 * config["num_layers"] * config["hidden_size"]
    folder = tmp_path_factory.mktemp("prefix") / "checkpoint-9"
    return save_prefix(folder, draw_encoder(columns, seed=3, scale=8.0))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    questions = [f"Who has the number {i}?" for i in range(12)] + [
        f"{i} 号是谁？" for i in range(12)
    ]
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Mira."}]}
        for q in questions
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False))
    return str(path)


COMMON = ["--base", "glm-tiny", "--use_cpu", "true"]


def test_infer_answers_with_the_prefix(prefix, rows_file, tmp_path, capsys):
    def answers(*flags):
        path = tmp_path / f"{len(flags)}.jsonl"
        line = ["infer", "--data_path", rows_file, "--output_path", str(path), "--limit", "3"]
        assert cli.main([*line, "--max_new_tokens", "4", *COMMON, *flags]) == 0
        return [json.loads(line)["answer"] for line in path.read_text().splitlines()]

    with_prefix = answers("--adapter", str(prefix))
    assert "P-Tuning v2 prefix of 5 places" in capsys.readouterr().err
    assert with_prefix != answers()
    line = ["infer", "--data_path", rows_file, "--output_path", str(tmp_path / "b"), *COMMON]
    assert cli.main([*line, "--adapter", str(prefix), "--num_beams", "2"]) == 2
    assert "num_beams 2: a prefix is answered with without beams" in capsys.readouterr().err


def test_compare_and_chat_take_a_prefix(prefix, rows_file, tmp_path, capsys, monkeypatch):
    line = ["compare", "--adapter", str(prefix), "--data_path", rows_file, *COMMON, "--limit", "4"]
    line += ["--max_new_tokens", "3", "--general_set", "false", "--output_dir", str(tmp_path)]
    assert cli.main(line) == 0
    rows = [json.loads(row) for row in (tmp_path / "compare.jsonl").read_text().splitlines()]
    assert all(row["reference"]["base"] != row["reference"]["tuned"] for row in rows)
    assert any(row["base"]["text"] != row["tuned"]["text"] for row in rows)

    asked = iter(["/both", "Who has the number 3?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    flags = ["--do_sample", "false", "--temperature", "0", "--max_new_tokens", "3"]
    assert cli.main(["chat", "--adapter", str(prefix), *COMMON, *flags]) == 0
    out = capsys.readouterr().out
    assert "tuned is asked in the format chat, as the published scripts ask" in out


@pytest.mark.parametrize(
    "line",
    [
        "merge --adapter PREFIX --save_path new",
        "check PREFIX",
        "evaluate --adapter PREFIX --data_path ROWS",
        "adapters convert PREFIX new",
        "adapters dial PREFIX --data_path ROWS",
        "ledger PREFIX",
        "push PREFIX --repo_id me/mine",
        "serve --port 0 --adapter mine=PREFIX",
        "train --dataset_path TOKENS --adapter PREFIX --output_dir new",
    ],
)
def test_other_verbs_name_the_way_out(
    line, prefix, rows_file, toy_rows, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    paths = {"PREFIX": str(prefix), "ROWS": rows_file, "TOKENS": toy_rows}
    for name, path in paths.items():
        line = line.replace(name, path)
    words = line.split()
    base = [] if words[1] == "convert" else ["--base", "glm-tiny"]
    assert cli.main([*words, *base]) == 2
    err = capsys.readouterr().err.strip()
    assert "is a P-Tuning v2 prefix, not LoRA" in err.splitlines()[-1]
    assert f"adapters distil {prefix} --data_path FILE --output_dir NEW" in err
    assert not Path("new").exists()


def test_reading_it_as_lora_names_what_it_is(prefix):
    with fails("is a P-Tuning v2 prefix, not LoRA"):
        read_adapter(prefix)


def test_distil_makes_an_ordinary_adapter_that_answers_alike(prefix, rows_file, tmp_path, capsys):
    out = tmp_path / "distilled"
    line = ["adapters", "distil", str(prefix), "--data_path", rows_file, "--output_dir", str(out)]
    line += [*COMMON, "--max_new_tokens", "4", "--num_train_epochs", "30", "--eval_ratio", "0.25"]
    assert cli.main([*line, "--learning_rate", "5e-3", "--per_device_train_batch_size", "6"]) == 0
    report = json.loads((out / "distil.json").read_text())
    print(report)
    before, after = report["before"], report["after"]
    assert (report["num_trained"], report["num_held_out"]) == (18, 6)
    assert after["divergence"] < before["divergence"] / 4
    assert after["same_tokens"] > before["same_tokens"]
    assert after["same_answers"] > before["same_answers"]
    assert "with the adapter" in capsys.readouterr().out

    read_adapter(out).check_effect()
    model = peft.PeftModel.from_pretrained(load_base_model(GLM_TINY, dtype=torch.float32), str(out))
    assert {name for name in model.targeted_module_names if name.endswith("query_key_value")}
    assert cli.main([*line]) == 2  # the folder is not empty
    assert "is there already" in capsys.readouterr().err


def test_distil_refuses_what_it_cannot_do(prefix, rows_file, tmp_path, capsys, strange_adapter):
    def says(*flags):
        assert cli.main(["adapters", "distil", *flags, *COMMON]) == 2
        return capsys.readouterr().err

    new = str(tmp_path / "new")
    given = ("--data_path", rows_file, "--output_dir", new)
    assert "holds LoRA, which every verb takes" in says(strange_adapter, *given)
    one = tmp_path / "one.json"
    one.write_text(json.dumps([{"instruction": "Say.", "output": ""}]))
    err = says(str(prefix), "--data_path", str(one), "--output_dir", new)
    assert "one prompt alone" in err
    assert not Path(new).exists()
