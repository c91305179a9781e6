"""PEFT's own tests of decoders, run on a tiny ChatGLM; see test_peft_peers.py.

pytest finds this file only by its name, because what it inherits has to be there when it is read.
"""

import fcntl
import importlib
import importlib.util
import os
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from glmtune.models import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from glmtune.models.resolve import GLM_TINY

# These load a model of another family from the hub.
OTHER_MODELS = (
    "test_generate_adalora_no_dropout",
    "test_lora_embed_scale_is_applied",
    "test_lora_embed_scale_is_applied_mixed_batch",
    "test_lora_layer_replication",
    "test_merge_and_unload_fixes_tie_word_embeddings_config",
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped",
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped",
    "test_prefix_tuning_gemma4_works",
    "test_prefix_tuning_mistral",
    "test_prefix_tuning_offsets_position_ids_in_forward",
    "test_prefix_tuning_qwen2_with_grouped_query_attention",
    "test_prefix_tuning_qwen3_with_grouped_query_attention",
    "test_prompt_learning_with_gradient_checkpointing",
    "test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask",
    "test_prompt_tuning_text_tokenizer_kwargs",
    "test_prompt_tuning_trust_remote_code",
    "test_save_pretrained_targeting_lora_to_embedding_layer",
)


def import_tests():
    path = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("peers_conftest", path)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    tests = conftest.find_tests("peft")
    if isinstance(tests, str):
        pytest.skip(tests, allow_module_level=True)
    # They need a pipeline class, which none of the tests here has.
    diffusers = types.ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules.setdefault("diffusers", diffusers)
    package = sys.modules.setdefault("peers_of_peft", types.ModuleType("peers_of_peft"))
    package.__path__ = [str(tests)]
    return importlib.import_module("peers_of_peft.test_decoder_models")


def write_model(folder):
    """A random model of two layers with the embedded vocabulary."""
    config = ChatGLMConfig.from_pretrained(
        GLM_TINY, num_layers=2, hidden_size=32, num_attention_heads=4, inner_hidden_size=64,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest workers may run this at once
        if not (folder / "config.json").is_file():
            ChatGLMTokenizer.from_pretrained(GLM_TINY).save_pretrained(folder)
            ChatGLMForConditionalGeneration(config).float().save_pretrained(folder)
    return config


PEER = import_tests()
# One for all workers of a run.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
FOLDER = Path(tempfile.gettempdir(), f"glmtune-peers-{RUN}", "tiny-chatglm")
CONFIG = write_model(FOLDER)
# In place, because the tests' decorators hold references to the lists.
PEER.PEFT_DECODER_MODELS_TO_TEST[:] = [str(FOLDER)]
for _, settings in PEER.ALL_CONFIGS:
    # Most methods have no default for this family.
    if settings.get("target_modules", "") is None:
        settings["target_modules"] = ["query_key_value"]
    if "feedforward_modules" in settings:
        settings |= {"target_modules": ["query_key_value", "dense_4h_to_h"]}
        settings |= {"feedforward_modules": ["dense_4h_to_h"]}


class TestDecoderModels(PEER.TestDecoderModels):
    def prepare_inputs_for_testing(self):
        specials = [CONFIG.gmask_token_id, CONFIG.bos_token_id]
        ids = torch.tensor([[1, 1, *specials, 1], [1, 2, *specials, 1]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _test_generate_half_prec(self, model_id, config_cls, config_kwargs):
        # PEFT's own rows are text only, which is not valid for this family.
        model = self.transformers_class.from_pretrained(model_id, dtype=torch.bfloat16)
        config = config_cls(base_model_name_or_path=model_id, **config_kwargs)
        get_peft_model(model, config).generate(**self.prepare_inputs_for_testing())


for name in OTHER_MODELS:
    setattr(TestDecoderModels, name, None)
