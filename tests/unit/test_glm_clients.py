"""transformers' and PEFT's own programs on folders of the younger family, as downloaded."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from glm_folders import write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from glmtune.adapters.merge import merge_adapter
from glmtune.config.settings import MergeSettings
from glmtune.errors import UserError
from glmtune.models import ChatGLMConfig, GLMTokenizer
from glmtune.models.families import FAMILIES
from glmtune.models.glm.byte_pair_encoder import tokenizer_of_tiktoken
from glmtune.models.glm.layouts import LAYOUTS
from glmtune.models.glm.modeling import GlmForCausalLM, GlmModel
from glmtune.models.glm.tokenization import BytePairTokenizer, PieceTokenizer
from glmtune.models.loading import load_base_model, load_tokenizer

# Name of the entry, its vocabulary, and the class that its tokenizer_config.json names.
PUBLISHED = {
    "chatglm2": ("ChatGLM2-6B", "glm3_tokenizer.model", "ChatGLMTokenizer"),
    "chatglm3": ("ChatGLM3-6B", "glm3_tokenizer.model", "ChatGLMTokenizer"),
    "glm4": ("GLM-4-9B", "glm/glm4_tokenizer.model", "ChatGLM4Tokenizer"),
}
CODE = "raise SystemExit('code of the folder was run')\n"
CHAT = [{"role": "user", "content": "你好 <|user|>"}, {"role": "assistant", "content": "好 17"}]
kinds = pytest.mark.parametrize("kind", PUBLISHED)


@pytest.fixture(scope="module")
def folder_of(shared, tmp_path_factory):
    """By kind: a folder in the publisher's layout, with remote code that must not run."""
    made = {}

    def make(kind):
        if kind not in made:
            name, vocabulary, tokenizer_class = PUBLISHED[kind]
            family = next(family for family in FAMILIES if family.name == name)
            folder = tmp_path_factory.mktemp(kind) / "base"
            write_model(folder, family, shared / "golden" / vocabulary, published=True)
            add_code(folder, tokenizer_class)
            made[kind] = folder
        return made[kind]

    return make


def change(file, **settings):
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(found | settings))


def add_code(folder, tokenizer_class):
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_chatglm.py").write_text(CODE)
    auto = "modeling_chatglm.ChatGLMForConditionalGeneration"
    classes = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    classes |= {"AutoModel": auto, "AutoModelForCausalLM": auto, "AutoModelForSeq2SeqLM": auto}
    change(folder / "config.json", auto_map=classes)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class=tokenizer_class,
        auto_map={"AutoTokenizer": [f"tokenization_chatglm.{tokenizer_class}", None]},
    )


def logits_of(model, ids):
    with torch.inference_mode():
        return model.eval().float()(ids).logits


@kinds
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["", "trust"])
def test_auto_classes_give_the_native_ones(folder_of, kind, trust):
    """With the flag that every script for these models passes, too."""
    folder = folder_of(kind)
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    assert config.model_type == "glm"
    assert type(model) is GlmForCausalLM
    assert type(tokenizer) in (PieceTokenizer, BytePairTokenizer)
    ids = tokenizer("你好", return_tensors="pt")["input_ids"]
    assert (
        ids.tolist()
        == load_tokenizer(str(folder))("你好", return_tensors="pt")["input_ids"].tolist()
    )
    expected = logits_of(load_base_model(str(folder), dtype=torch.float32), ids)
    assert logits_of(model, ids).equal(expected)
    assert expected.std() > 0.1
    others = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, **trust)
    assert logits_of(others, ids).equal(expected)
    body = AutoModel.from_pretrained(folder, dtype=torch.float32, **trust)
    assert type(body) is GlmModel
    with torch.inference_mode():
        hidden = body.eval()(ids).last_hidden_state
        assert model.lm_head(hidden).equal(expected)


@pytest.mark.parametrize("name", ["chatglm2-6b-tiny", "chatglm3-6b-32k-tiny"])
def test_auto_model_has_the_recorded_logits(shared, name):
    folder = shared / "golden" / name
    recorded = load_file(folder / "forward.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (logits_of(model, recorded["input_ids"]) - recorded["logits"]).abs().max() < 1e-5


def test_a_class_that_cannot_read_the_weights_makes_none(folder_of):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(folder_of("chatglm3"))


def test_a_later_config_is_read_or_named():
    later = {"model_type": "chatglm", "padded_vocab_size": 65_024, "num_attention_heads": 32}
    assert ChatGLMConfig.from_dict(later).published_as == "chatglm3"
    with pytest.raises(UserError, match=r"^config\.json: is GLM-4V-9B, which sees pictures"):
        ChatGLMConfig.from_dict(later | {"padded_vocab_size": 151_552, "vision_config": {}})
    with pytest.raises(UserError, match=r"AutoConfig\.from_pretrained or ChatGLMConfig\.from_dict"):
        ChatGLMConfig(**later)


def test_a_tokenizer_of_a_hubs_cache(shared, tmp_path):
    """The name in its settings is that of ChatGLM-6B's class; config.json says which it is."""
    place = tmp_path / "models--zai-org--chatglm3-6b"
    snapshot = place / "snapshots" / ("0" * 40)
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copyfile(shared / "golden" / "glm3_tokenizer.model", snapshot / "tokenizer.model")
    change(snapshot / "config.json", model_type="chatglm", padded_vocab_size=65_024)
    change(snapshot / "tokenizer_config.json", tokenizer_class="ChatGLMTokenizer")
    tokenizer = AutoTokenizer.from_pretrained("zai-org/chatglm3-6b", cache_dir=tmp_path)
    assert type(tokenizer) is PieceTokenizer


@kinds
@pytest.mark.parametrize("settings", ["kept", "without"])
def test_auto_tokenizer_of_a_saved_folder(folder_of, kind, settings, tmp_path):
    """Its config.json is transformers'; without tokenizer_config.json the family is known still."""
    folder, saved = folder_of(kind), tmp_path / "saved"
    tokenizer = load_tokenizer(str(folder))
    load_base_model(str(folder)).save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    if settings == "without":
        (saved / "tokenizer_config.json").unlink()
    again = AutoTokenizer.from_pretrained(saved)
    assert type(again) is type(tokenizer)
    assert again.vocab_hash == tokenizer.vocab_hash
    assert again("<|user|> 你好") == tokenizer("<|user|> 你好")
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert type(model) is transformers.GlmForCausalLM
    assert model.generation_config.eos_token_id == {
        "chatglm2": 2, "chatglm3": [2, 64795, 64797], "glm4": [151329, 151336, 151338]
    }[kind]  # fmt: skip


def test_a_folder_of_transformers_own_keeps_its_tokenizer(shared, tmp_path):
    """As the -hf folders are: a tokenizer.json, and the name of the general class."""
    file = shared / "golden" / "glm" / "glm4_tokenizer.model"
    tokenizer = tokenizer_of_tiktoken(file.read_bytes(), file, LAYOUTS["glm4"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    change(tmp_path / "config.json", model_type="glm", vocab_size=151_552)
    change(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert type(found) is PreTrainedTokenizerFast
    assert type(GLMTokenizer.from_pretrained(tmp_path)) is BytePairTokenizer


@kinds
def test_a_pipeline_chats(folder_of, kind):
    folder = folder_of(kind)
    ask = pipeline("text-generation", model=str(folder), device="cpu", dtype=torch.float32)
    ids = ask.tokenizer.apply_chat_template(
        CHAT[:1], add_generation_prompt=True, return_tensors="pt"
    )
    chosen = {"max_new_tokens": 4, "do_sample": False}
    row = ask.model.generate(**ids, **chosen)[0, ids["input_ids"].shape[1] :]
    expected = ask.tokenizer.decode(row, skip_special_tokens=True)
    (answer,) = ask(CHAT[:1], **chosen)
    assert answer["generated_text"] == [*CHAT[:1], {"role": "assistant", "content": expected}]
    long = [{"role": "user", "content": "Write a long text about 17 trees."}]
    (together, _) = ask([CHAT[:1], long], batch_size=2, **chosen)
    assert together[0]["generated_text"] == answer["generated_text"]


@kinds
def test_tokenizers_go_to_other_processes(folder_of, kind):
    tokenizer = AutoTokenizer.from_pretrained(folder_of(kind))
    chats = Dataset.from_list([{"messages": CHAT}] * 4)
    again = pickle.loads(pickle.dumps(tokenizer))
    row = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    for one in (tokenizer, again):
        rows = chats.map(
            lambda chat, one=one: one.apply_chat_template(
                chat["messages"], return_assistant_tokens_mask=True
            ),
            num_proc=2 if one is again else None,
        )
        assert [rows[3][key] for key in row] == [*row.values()]
    texts = Dataset.from_list([{"text": "你好"}, {"text": "one two three"}])
    mapped = texts.map(lambda rows: tokenizer(rows["text"], padding=True), batched=True)
    assert [row["input_ids"] for row in mapped] == again([*texts["text"]], padding=True)[
        "input_ids"
    ]


def supervised(tokenizer, chat):
    row = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    labels = [
        id_ if mask else -100
        for id_, mask in zip(row["input_ids"], row.pop("assistant_masks"), strict=True)
    ]
    return row | {"labels": labels}


@kinds
def test_trainer_with_padded_rows_and_label_smoothing(folder_of, kind, tmp_path):
    folder = folder_of(kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longer = [
        {"role": "user", "content": "Write the number 17 twice, please."},
        {**CHAT[1], "content": "17 17"},
    ]
    data = [supervised(tokenizer, chat) for chat in (CHAT, longer)]
    collate = DataCollatorForSeq2Seq(tokenizer)
    batch = collate([dict(row) for row in data])
    assert batch["input_ids"][:, 0].tolist().count(tokenizer.pad_token_id) == 1
    assert batch["labels"][:, 0].tolist() == [-100, -100]
    smoothing, wanted = 0.1, []
    for row in data:  # each by itself, without padding
        log_probs = logits_of(model, torch.tensor([row["input_ids"]]))[0, :-1].log_softmax(-1)
        targets = torch.tensor(row["labels"][1:])
        kept, targets = log_probs[targets != -100], targets[targets != -100]
        losses = F.nll_loss(kept, targets, reduction="none")
        wanted.append((1 - smoothing) * losses - smoothing * kept.mean(-1))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True,
            label_smoothing_factor=smoothing, report_to="none", learning_rate=1e-2,
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.cat(wanted).mean().item(), 1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < torch.cat(wanted).mean() - 0.01
    trainer.save_model(tmp_path / "saved")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "saved")) is type(tokenizer)


@kinds
def test_an_adapter_of_peft_goes_on_any_form_of_the_base(folder_of, kind, tmp_path):
    folder = folder_of(kind)
    torch.manual_seed(0)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "gate_up_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    ids = torch.arange(40, 60)[None]
    plain = load_base_model(str(folder), dtype=torch.float32)
    before = logits_of(plain, ids)
    model = get_peft_model(plain, lora)
    adapted = logits_of(model, ids)
    assert (adapted - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    named = json.loads(Path(tmp_path, "adapter", "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert logits_of(again, ids).equal(adapted)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits_of(merged, ids) - adapted).abs().max() < 1e-4


LOADING = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
how, folder = sys.argv[1:]
trust = {"trust_remote_code": True} if how == "trust" else {}
if how == "import":
    import glmtune.models
for kind in (AutoTokenizer, AutoModelForCausalLM):
    print(type(kind.from_pretrained(folder, **trust)).__module__)
"""


@pytest.mark.parametrize("how", ["trust", pytest.param("import", marks=pytest.mark.slow)])
def test_a_merged_folder_is_loaded_by_transformers(folder_of, tmp_path, how):
    """The base's settings name code for the tokenizer that is not copied; this package is it."""
    folder, lora = folder_of("chatglm3"), LoraConfig(target_modules=["o_proj"])
    lora.init_lora_weights = False
    model = get_peft_model(load_base_model(str(folder), dtype=torch.float32), lora)
    model.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    merge_adapter(
        MergeSettings(adapter=str(tmp_path / "adapter"), base=str(folder), save_path=str(merged))
    )
    command = [sys.executable, "-c", LOADING, how, str(merged)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.split() == [
        "glmtune.models.glm.tokenization", "transformers.models.glm.modeling_glm"
    ], done.stderr  # fmt: skip
    assert [path.name for path in merged.glob("*.py")] == ["modeling_glmtune.py"]
