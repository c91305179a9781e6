"""`from_pretrained`: the bare model, the tie of embedding and head, and what is not offered."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from glmtune.errors import UserError
from glmtune.models import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel

IDS = torch.tensor([[7, 8, 101, 104, 9, 10, 105]])
CONFIG = {
    "vocab_size": 128, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
    "inner_hidden_size": 64, "bos_token_id": 104, "eos_token_id": 105,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG)).eval()


@pytest.fixture
def folder(model, tmp_path):
    """Of one tensor for embedding and head."""
    model.save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


@pytest.fixture
def separate(tmp_path):
    """Of two."""
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG, tie_word_embeddings=False))
    assert not torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight)
    model.save_pretrained(tmp_path / "separate")
    return tmp_path / "separate"


@torch.no_grad()
def test_the_bare_model_has_no_head(model, folder, tmp_path):
    expected = model.transformer(IDS).last_hidden_state
    bare = AutoModel.from_pretrained(folder).eval()
    assert type(bare) is ChatGLMModel
    assert torch.equal(bare(IDS).last_hidden_state, expected)
    bare.save_pretrained(tmp_path / "bare")
    again = AutoModel.from_pretrained(tmp_path / "bare").eval()
    assert torch.equal(again(IDS).last_hidden_state, expected)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "bare").eval()
    assert torch.equal(whole(IDS).logits, model(IDS).logits)  # the head is the embedding
    assert type(AutoModel.from_config(model.config)) is ChatGLMModel


@torch.no_grad()
def test_the_bare_model_of_packed_weights(model, folder, write_quantised, tmp_path):
    for bits, embeddings in ((8, False), (4, False), (4, True)):
        packed = write_quantised(folder, tmp_path / f"int{bits}-{embeddings}", bits, embeddings)
        whole = AutoModelForCausalLM.from_pretrained(packed).eval()
        bare = AutoModel.from_pretrained(packed).eval()
        expected = whole.transformer(IDS).last_hidden_state
        assert torch.equal(bare(IDS).last_hidden_state, expected)


def test_the_bare_model_is_held_against_its_weights(folder):
    settings = json.loads((folder / "config.json").read_text()) | {"inner_hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"misshapen transformer\.layers\.0\.mlp"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, ChatGLMForConditionalGeneration])
@torch.no_grad()
def test_a_head_of_its_own_where_that_is_asked_for(model, folder, tmp_path, loader):
    loaded = loader.from_pretrained(folder, tie_word_embeddings=False).eval()
    embedding, head = loaded.transformer.word_embeddings.weight, loaded.lm_head.weight
    assert not loaded.config.tie_word_embeddings
    assert head.data_ptr() != embedding.data_ptr()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    head[5] += 1
    assert not torch.equal(head, embedding)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    assert not again.config.tie_word_embeddings


def test_a_head_of_its_own_that_is_equal_stays_its_own(folder, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.lm_head.weight.data_ptr() != again.transformer.word_embeddings.weight.data_ptr()


def test_a_head_of_its_own_from_a_configuration(model):
    for made in (
        AutoModelForCausalLM.from_config(ChatGLMConfig(**CONFIG, tie_word_embeddings=False)),
        ChatGLMForConditionalGeneration(ChatGLMConfig(**CONFIG, tie_word_embeddings=False)),
    ):
        assert not torch.equal(made.lm_head.weight, made.transformer.word_embeddings.weight)


def test_a_head_of_its_own_of_packed_weights(folder, write_quantised, tmp_path):
    packed = write_quantised(folder, tmp_path / "packed", 8, True)
    tied = AutoModelForCausalLM.from_pretrained(packed)
    loaded = AutoModelForCausalLM.from_pretrained(packed, tie_word_embeddings=False)
    assert loaded.lm_head.weight is not loaded.transformer.word_embeddings.weight
    assert torch.equal(loaded(IDS).logits, tied(IDS).logits)


def test_a_missing_head_that_should_be_there_is_named(folder):
    settings = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"missing lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, ChatGLMForConditionalGeneration])
def test_a_head_that_would_be_lost_is_not_tied(separate, loader):
    with pytest.raises(UserError, match="another tensor than its word_embeddings") as caught:
        loader.from_pretrained(separate, tie_word_embeddings=True)
    assert "\n" not in str(caught.value)
    assert not loader.from_pretrained(separate).config.tie_word_embeddings


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"variant": "fp16"}, r"from_pretrained\(variant='fp16'\): is not looked for"),
        ({"subfolder": "model"}, r"from_pretrained\(subfolder='model'\): is not looked into"),
        ({"gguf_file": "model.gguf"}, r"from_pretrained\(gguf_file='model.gguf'\): is of a format"),
    ],
)
@pytest.mark.parametrize("loader", [ChatGLMModel, ChatGLMForConditionalGeneration])
def test_what_is_not_offered_is_said(folder, loader, argument, message):
    with pytest.raises(UserError, match=message) as caught:
        loader.from_pretrained(folder, **argument)
    assert "\n" not in str(caught.value)


def test_mismatched_sizes_are_not_ignored(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert loaded.config.vocab_size == 128
    with pytest.raises(
        UserError, match=r"misshapen.*ignore_mismatched_sizes=True is not"
    ) as caught:
        AutoModelForCausalLM.from_pretrained(folder, vocab_size=130, ignore_mismatched_sizes=True)
    assert "\n" not in str(caught.value)


def test_settings_beside_a_folder_are_settings_of_the_model(folder):
    for loader in (AutoModelForCausalLM, ChatGLMForConditionalGeneration):
        assert loader.from_pretrained(folder, use_cache=False).config.use_cache is False
    with pytest.raises(TypeError, match="use_cash"):
        ChatGLMForConditionalGeneration.from_pretrained(folder, use_cash=False)
