"""A family from outside the project: every verb works with it through one entry of the list."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from toy_family import CONFIG, TOY, ByteTokenizer

from glmtune.adapters import load_adapter
from glmtune.cli import main
from glmtune.data.dataset import load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.general.items import OWN_NAME, own_set
from glmtune.models import families
from glmtune.models.loading import load_base_model


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, TOY])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    TOY.native().model_class(CONFIG).save_pretrained("base")
    return "base"


@pytest.fixture
def rows(base):
    """Token rows of that family."""
    pairs = [(f"say {word}", word * 2) for word in ("ha", "la", "na", "好", "ba", "da", "ta", "wa")]
    with open("rows.jsonl", "w", encoding="utf-8") as file:
        for context, target in pairs:
            file.write(json.dumps({"context": context, "target": target}) + "\n")
    assert main(["tokenize", *words("--jsonl_path rows.jsonl --save_path tokens")]) == 0
    return "tokens"


def words(text):
    return [*text.split(), "--base", "base"]


def train(name, *flags):
    line = f"train --dataset_path tokens --output_dir {name} --max_steps 6 --logging_steps 1 "
    line += "--per_device_train_batch_size 8 --learning_rate 0.02 --lora_target all "
    line += "--lora_dropout 0 --use_cpu true --report_to none"
    assert main([*words(line), *flags]) == 0
    lines = Path(name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_padded_and_packed_training_have_the_same_losses(rows):
    padded = train("padded", "--layout", "padded")
    packed = train("packed", "--layout", "packed", "--tokens_per_step", "256")
    assert packed == pytest.approx(padded, abs=1e-5)
    assert padded[-1] < padded[0] - 0.5


@pytest.fixture
def adapter(rows):
    train("run", "--layout", "packed", "--tokens_per_step", "256", "--max_steps", "30")
    return "run"


def test_check_compare_and_infer_use_the_adapter(adapter, capsys):
    records = [{"instruction": "say ha", "input": "", "output": "haha"}]
    Path("records.json").write_text(json.dumps(records), encoding="utf-8")
    capsys.readouterr()
    asked = "--data_path records.json --max_new_tokens 8 --use_cpu true"
    assert main([*words(f"check {asked} --adapter run")]) in (0, 1)
    assert "14 of 14 linears" in capsys.readouterr().out
    assert main([*words(f"infer {asked} --adapter run --output_path tuned.jsonl")]) == 0
    assert main([*words(f"infer {asked} --output_path base.jsonl")]) == 0
    answers = [Path(name).read_text(encoding="utf-8") for name in ("tuned.jsonl", "base.jsonl")]
    assert answers[0] != answers[1]
    assert main([*words(f"compare {asked} --adapter run --output_dir page")]) == 0
    assert Path("page/compare.html").is_file()
    found = json.loads(Path("page/compare.json").read_text(encoding="utf-8"))
    assert (found["general_set"], found["price"]["all"]["n"]) == (OWN_NAME, len(own_set().items))


def test_a_merged_folder_is_the_family_s_own_and_gives_the_same_logits(adapter, capsys):
    assert main([*words("merge --adapter run --save_path merged")]) == 0
    assert "merged 14 modules" in capsys.readouterr().out
    merged = TOY.native().model_class.from_pretrained("merged", dtype=torch.float32)
    tuned = load_adapter(load_base_model("base", dtype=torch.float32), "run")
    ids = torch.tensor([TOY.probe_row(CONFIG)])
    with torch.inference_mode():
        assert (merged(ids).logits - tuned(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("line", ["plan --dataset_path tokens", "doctor"])
def test_plan_and_doctor_know_its_sizes(rows, capsys, line):
    assert main([*words(line), "--use_cpu", "true"]) == 0
    told = capsys.readouterr().out
    its_own = "rank 3 on q_proj, v_proj" if line.startswith("plan") else "2 layers, vocabulary 272"
    assert its_own in told


@pytest.mark.parametrize(("given", "rank"), [((), 3), (("--lora_rank", "5"), 5)])
def test_a_run_has_the_family_s_rank_unless_told_otherwise(rows, given, rank, capsys):
    flags = "--dataset_path tokens --output_dir run --max_steps 1 --use_cpu true --report_to none"
    assert main([*words(f"train {flags}"), *given]) == 0
    assert f"LoRA of rank {rank} on q_proj, v_proj" in capsys.readouterr().out
    settings = json.loads(Path("run/adapter_config.json").read_text(encoding="utf-8"))
    assert settings["r"] == rank
    assert f"lora_rank: {rank}" in Path("run/recipe.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["query_key_value", "q_proj,query_key_value"])
def test_a_linear_of_another_family_is_refused(rows, capsys, name):
    flags = "--dataset_path tokens --output_dir run --use_cpu true --lora_target"
    assert main([*words(f"train {flags} {name}")]) == 2
    told = capsys.readouterr().err
    assert "Toy has no linear 'query_key_value'; choose from q_proj" in told


def test_rows_of_another_family_are_refused(rows, capsys):
    with_them = "train --dataset_path tokens --output_dir run --use_cpu true"
    assert main([*with_them.split(), "--base", "glm-tiny"]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_a_label_on_disk_says_what_is_supervised(rows, capsys):
    """Rows of more than one prompt and one answer bring labels, as transformers has them."""
    dataset = datasets.load_from_disk("tokens")

    def only_the_end(row):
        ids = row["input_ids"]
        return {"labels": [-100] * (len(ids) - 1) + ids[-1:]}

    dataset.map(only_the_end).save_to_disk("labelled")
    Path("labelled/glmtune_data.json").write_bytes(Path("tokens/glmtune_data.json").read_bytes())
    rule = ByteTokenizer.row_rule
    read = TokenRows.from_table(load_dataset("labelled")[0], rule)
    assert read.num_labels_R.tolist() == [1] * 8
    flags = ["--dataset_path", "labelled"]
    padded = train("padded", "--layout", "padded", *flags)
    packed = train("packed", "--layout", "packed", "--tokens_per_step", "256", *flags)
    assert packed == pytest.approx(padded, abs=1e-5)
    assert padded != pytest.approx(train("whole", "--layout", "padded"), abs=0.1)


def test_conversations_of_a_family_without_roles_teach_their_last_answers(base, capsys):
    def turns(*texts):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

    talks = [{"messages": turns("say ha", "haha", f"say {w}", 2 * w)} for w in ("la", "na", "ba")]
    Path("talks.json").write_text(json.dumps(talks), encoding="utf-8")
    assert main([*words("tokenize talks.json --save_path tokens")]) == 0
    assert "6 answers are rows of their own, since the base reads" in capsys.readouterr().out
    _, first, *_ = datasets.load_from_disk("tokens")
    text = ByteTokenizer().decode(first["input_ids"][: first["seq_len"]])
    assert text == "[('say ha', 'haha'), 'say la']"
    assert train("packed", "--layout", "packed", "--tokens_per_step", "256")[-1] > 0
    talks[1]["tools"] = [{"name": "f"}]
    Path("talks.json").write_text(json.dumps(talks), encoding="utf-8")
    assert main([*words("tokenize talks.json --save_path tokens")]) == 2
    assert "talks.json:1 (row 2): tools, which this base knows none of" in capsys.readouterr().err
