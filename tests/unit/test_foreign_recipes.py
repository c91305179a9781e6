"""Recipes written for other trainers."""

import pytest

from glmtune.config.reading import read_config, recipe_verbs
from glmtune.config.settings import SETTINGS
from glmtune.errors import UserError

from .test_config import REQUIRED


def test_what_a_recipe_shares_is_for_the_verbs_that_call_it_so(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "output_dir: out\nmodel_path: out\nbase_model: m\noptim: adamw_torch\n"
        "tokenize:\n  cutoff_len: 100\ntrain:\n  lora_r: 4\n"
    )
    rows = read_config(SETTINGS["tokenize"], str(recipe), REQUIRED["tokenize"])
    assert (rows.save_path, rows.base, rows.max_seq_length) == ("tokens", "m", 100)
    train = read_config(SETTINGS["train"], str(recipe), REQUIRED["train"])
    assert (train.base, train.lora_rank) == ("m", 4)
    assert read_config(SETTINGS["chat"], str(recipe), {}).adapter == "out"
    assert recipe_verbs(str(recipe)) == ["tokenize", "train"]
    recipe.write_text("tokenize:\n  optim: sgd\ntrain:\n")
    with pytest.raises(UserError, match=r"r\.yaml:2: optim concerns train, plan, not tokenize"):
        read_config(SETTINGS["train"], str(recipe), REQUIRED["train"])


LLAMA_FACTORY = """\
### model
model_name_or_path: THUDM/chatglm-6b
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
### output
output_dir: saves/chatglm
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
AXOLOTL = """\
base_model: THUDM/chatglm-6b
load_in_8bit: false
load_in_4bit: true
strict: false
val_set_size: 0.02
output_dir: ./out
adapter: qlora
lora_model_dir:
sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
resume_from_checkpoint:
flash_attention: true
weight_decay: 0.0
special_tokens:
"""


def test_whole_recipes_of_others(tmp_path):
    """Other trainers' own settings, except for the rows, which a verb of ours writes."""
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(LLAMA_FACTORY)
    config = read_config(SETTINGS["train"], str(recipe), {"dataset_path": "rows"})
    assert (config.base, config.eval_ratio) == ("THUDM/chatglm-6b", 0.1)
    assert (config.warmup_steps, config.lora_target, config.bf16) == (0.1, ("all",), True)
    recipe.write_text(LLAMA_FACTORY + "dataset: identity\n")
    with pytest.raises(UserError, match=r"theirs.yaml:37: dataset 'identity': training reads rows"):
        read_config(SETTINGS["train"], str(recipe), {})
    recipe.write_text(AXOLOTL)
    config = read_config(SETTINGS["train"], str(recipe), {"dataset_path": "rows"})
    assert (config.quantization_bit, config.lora_rank, config.layout) == ("4", 32, "packed")
    assert (config.num_train_epochs, config.per_device_train_batch_size) == (4, 2)
    recipe.write_text(AXOLOTL + "datasets:\n  - path: a\n    type: alpaca\n")
    with pytest.raises(UserError, match=r"datasets \[.*\]: training reads rows"):
        read_config(SETTINGS["train"], str(recipe), {})
