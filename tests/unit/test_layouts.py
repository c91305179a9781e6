"""Labels, embeddings, filled caches and masks, as other code hands them to the model."""

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import DynamicCache, StaticCache

from glmtune.models import ChatGLMConfig, ChatGLMForConditionalGeneration
from glmtune.models.chatglm.configuration import VOCAB_SIZE_V1_0
from glmtune.models.chatglm.modeling import CACHE_FIELD

PAD, GMASK, SOP, EOP = 3, 101, 104, 105
SPECIALS = {"bos_token_id": SOP, "eos_token_id": EOP}
# Two questions of unlike length, padded at the left, as `generate` takes them.
PROMPTS = torch.tensor([[PAD, PAD, 7, GMASK, SOP], [7, 8, 9, GMASK, SOP]])
ROW = [7, 8, GMASK, SOP, 9, 10, EOP]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=128, hidden_size=32, num_layers=2, num_attention_heads=2, inner_hidden_size=64,
        max_sequence_length=128, initializer_range=0.2, **SPECIALS,
    )  # fmt: skip
    return ChatGLMForConditionalGeneration(config).eval()


def labels(*kept):
    return torch.tensor([[id_ if i in kept else -100 for i, id_ in enumerate(ROW)]])


@pytest.mark.parametrize("kept", [(3, 4, 5, 6), (4, 5, 6), (6,), ()])
def test_labels_behind_sop_are_taken(model, kept):
    """<sop> is supervised in this project's rows, and in the original's."""
    assert model(torch.tensor([ROW]), labels=labels(*kept)).loss.isfinite()


@pytest.mark.parametrize(
    "kept, number", [((0, 1, 2, 3, 4, 5, 6), 4), ((2, 3, 4, 5, 6), 2), ((0, 6), 1), ((3,), 1)]
)
def test_labels_at_or_before_sop_are_refused(model, kept, number):
    ids = torch.tensor([ROW, ROW])
    both = torch.cat((labels(4, 5, 6), labels(*kept)))
    with pytest.raises(ValueError, match=rf"labels: row 1 has {number} at or before") as caught:
        model(ids, labels=both)
    assert "\n" not in str(caught.value)
    shifted = torch.nn.functional.pad(both[:, 1:], (0, 1), value=-100)
    if 0 not in kept:  # the first label is not predicted from anything
        with pytest.raises(ValueError, match=rf"labels: row 1 has {number} at or before"):
            model(ids, shift_labels=shifted)
    with pytest.raises(ValueError, match=rf"labels: row 1 has {number} at or before"):
        model(inputs_embeds=model.get_input_embeddings()(ids), labels=both)
    layout = model.prepare_inputs_for_generation(ids, past_key_values=static_cache(model))
    with pytest.raises(ValueError, match=rf"labels: row 1 has {number} at or before"):
        model(**layout | {"past_key_values": None, "attention_mask": square(layout)}, labels=both)


def test_a_row_of_an_empty_answer_supervises_its_sop(model):
    """As in the original's rows; <sop> is the last real token of such a row."""
    row = torch.tensor([[*ROW[:4], 3, 3]])
    assert row[0, 3] == SOP
    assert model.config.pad_token_id == 3
    there = torch.full_like(row, -100)
    there[0, 3] = SOP
    assert model(row, labels=there).loss.isfinite()
    there[0, 2] = GMASK
    with pytest.raises(ValueError, match="at or before its <sop>"):
        model(row, labels=there)


def static_cache(model):
    return StaticCache(config=model.config, max_cache_len=16)


def square(layout):
    return layout["attention_mask"][..., : layout["input_ids"].shape[1]].contiguous()


def test_rows_as_trl_makes_them_of_text_are_refused(model):
    """Question and answer, followed by the ids that should be between them."""
    row = torch.tensor([[7, 8, 9, 10, EOP, GMASK, SOP]])
    only_the_answer = row.masked_fill(torch.arange(7) < 2, -100)
    for supervised in (row, only_the_answer):
        with pytest.raises(ValueError, match="at or before its <sop>"):
            model(row, labels=supervised)


def test_shifted_labels_are_labels_one_place_on(model):
    ids, there = torch.tensor([ROW]), labels(4, 5, 6)
    shifted = torch.nn.functional.pad(there[:, 1:], (0, 1), value=-100)
    loss = model(ids, labels=there).loss
    assert torch.equal(model(ids, shift_labels=shifted).loss, loss)
    assert torch.equal(model(ids, labels=labels(6), shift_labels=shifted).loss, loss)
    # The last label is of a token after the row, as if a row were split into parts.
    beyond = shifted.clone()
    beyond[:, -1] = 12
    expected = -model(ids).logits[0, -1].log_softmax(-1)[12] + loss * (shifted != -100).sum()
    torch.testing.assert_close(model(ids, shift_labels=beyond, num_items_in_batch=1).loss, expected)
    other = shifted.where(shifted == -100, 11)
    assert not torch.equal(model(ids, labels=there, shift_labels=other).loss, loss)


@torch.no_grad()
def test_logits_of_some_columns(model):
    ids = torch.tensor([ROW])
    whole = model(ids).logits
    columns = torch.tensor([1, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=columns).logits, whole[:, columns])
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    with pytest.raises(ValueError, match="a loss needs all logits"):
        model(ids, labels=labels(4), logits_to_keep=2)


@torch.no_grad()
def test_a_tuple_instead_of_a_dictionary(model):
    ids, there = torch.tensor([ROW]), labels(4)
    whole = model(ids, labels=there)
    loss, logits = model(ids, labels=there, return_dict=False)
    assert torch.equal(loss, whole.loss)
    assert torch.equal(logits, whole.logits)
    model.config.return_dict = False
    assert torch.equal(model(ids, labels=there)[1], whole.logits)
    assert torch.equal(model(ids, return_dict=True).logits, whole.logits)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"position_ids": torch.arange(7)[None]}, r"position_ids: is of shape \(1, 7\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: is of shape \(1, 3\).*\(1, 7\)"),
        ({"attention_mask": torch.zeros(1, 1, 7, 7)}, "attention_mask: is float32 of shape"),
        ({"input_ids": None}, "input_ids: pass ids"),
    ],
)
def test_inputs_of_another_form_are_refused_in_a_line(model, inputs, message):
    with pytest.raises(ValueError, match=message) as caught:
        model(**{"input_ids": torch.tensor([ROW])} | inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vocab_size", [128, VOCAB_SIZE_V1_0])
@torch.no_grad()
def test_embeddings_are_laid_out_as_their_ids(vocab_size):
    config = ChatGLMConfig(
        vocab_size=vocab_size, hidden_size=8, num_layers=1, num_attention_heads=2,
        inner_hidden_size=8, pad_token_id=PAD, **SPECIALS,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).eval()
    embeds = model.get_input_embeddings()(PROMPTS)
    expected = model(PROMPTS).logits
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)
    with pytest.raises(ValueError, match="inputs_embeds: row 0 has no <sop>"):
        model(inputs_embeds=torch.rand_like(embeds))
    noisy = embeds + 0.01  # ids beside them still say where they stand
    mask = PROMPTS != PAD
    assert model(PROMPTS, inputs_embeds=noisy, attention_mask=mask).logits.isfinite().all()


def greedy(model, *args, **kwargs):
    return model.generate(*args, **kwargs, max_new_tokens=6, min_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_generation_from_embeddings(model, cache_implementation):
    embeds = model.get_input_embeddings()(PROMPTS)
    settings = {"cache_implementation": cache_implementation}
    from_ids = greedy(model, PROMPTS, attention_mask=(PROMPTS != PAD).long(), **settings)
    assert torch.equal(greedy(model, inputs_embeds=embeds, **settings), from_ids[:, 5:])


@pytest.mark.parametrize("beams", [1, 2])
def test_hidden_states_of_generation(model, beams):
    model.set_attn_implementation("eager")
    out = greedy(
        model, PROMPTS, num_beams=beams, output_hidden_states=True, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [len(step) for step in out.hidden_states] == [3] * 6
    assert out.hidden_states[0][0].shape == (2 * beams, 5, 32)
    assert out.hidden_states[5][2].shape == (2 * beams, 1, 32)
    assert out.attentions[5][1].shape == (2 * beams, 2, 1, 10)


def test_assisted_generation_is_greedy_generation(model):
    prompt = PROMPTS[1:]
    torch.manual_seed(1)
    assistant = ChatGLMForConditionalGeneration(model.config).eval()
    expected = greedy(model, prompt)
    assert torch.equal(greedy(model, prompt, assistant_model=assistant), expected)
    shown = greedy(
        model, prompt, assistant_model=assistant, output_hidden_states=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(shown.sequences, expected)
    assert shown.hidden_states[0][2].shape[:2] == (1, 5)


# Both are taken by all versions of `forward`, the new one by newer versions of `generate`.
@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE_FIELD}))
def test_generation_goes_on_from_a_cache(model, name):
    mask = (PROMPTS != PAD).long()
    expected = greedy(model, PROMPTS, attention_mask=mask)
    for read in (slice(0), slice(4)):
        cache = DynamicCache(config=model.config)
        if read.stop:  # all but the last token, by a mask and positions that are ready
            layout = model.prepare_inputs_for_generation(
                PROMPTS, past_key_values=static_cache(model), attention_mask=mask
            )
            part = {
                "input_ids": PROMPTS[:, read],
                "position_ids": layout["position_ids"][..., read],
                "attention_mask": layout["attention_mask"][:, :, read, read].contiguous(),
            }
            model(**part, **{name: cache})
        assert torch.equal(greedy(model, PROMPTS, attention_mask=mask, **{name: cache}), expected)


@torch.no_grad()
def test_a_cache_is_continued_where_a_mask_says_what_it_holds(model):
    ids = torch.tensor([[PAD, *ROW], [7, *ROW]])
    whole = model(ids, attention_mask=ids != PAD).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], attention_mask=(ids != PAD)[:, :6], past_key_values=cache)
    with pytest.raises(ValueError, match=r"has to be \(2, 8\)"):
        model(ids[:, 6:], attention_mask=torch.ones(2, 2), past_key_values=cache)
    step = model(ids[:, 6:], attention_mask=ids != PAD, past_key_values=cache).logits
    torch.testing.assert_close(step, whole[:, 6:], atol=1e-5, rtol=0)
    cache.crop(3 - 8)
    with pytest.raises(ValueError, match="inside a prefix"):
        model(ids[:, 3:], attention_mask=ids != PAD, past_key_values=cache)


@torch.no_grad()
def test_all_of_a_row_sees_a_virtual_prompt_and_no_position_counts_it(model):
    """Of a cache filled with the keys of one token k times, each row sees that token, once or k."""
    ids = torch.tensor([ROW])
    source = DynamicCache(config=model.config)
    model(torch.tensor([[9, GMASK, SOP]]), past_key_values=source)
    seen = []
    for times in (1, 4):
        cache = DynamicCache(config=model.config)
        for i, layer in enumerate(source.layers):
            pair = (x[:, :, :1].repeat(1, 1, times, 1) for x in (layer.keys, layer.values))
            cache.update(*pair, i)
        mask = torch.ones(1, times + 7)
        mask[:, 1:times] = 0
        seen.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=0)
    assert (seen[0] - model(ids).logits).abs()[:, 0].max() > 1e-3


TASK = {"task_type": "CAUSAL_LM"}
PROMPT_LEARNING = {
    "prompt": PromptTuningConfig(**TASK, num_virtual_tokens=4),
    "prefix": PrefixTuningConfig(**TASK, num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(**TASK, num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.parametrize("method", PROMPT_LEARNING)
def test_prompt_learning_learns_and_answers(model, method):
    torch.manual_seed(0)
    tuned = get_peft_model(model, PROMPT_LEARNING[method])
    ids = torch.tensor([ROW])
    mask = torch.ones_like(ids)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = tuned(input_ids=ids, attention_mask=mask, labels=labels(4, 5, 6)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    tuned.eval()
    for row in (ids[:, :4], torch.tensor([[PAD, PAD, *ROW[:4]]])):
        valid = (row != PAD).long()
        answer = greedy(tuned, input_ids=row, attention_mask=valid)[:, row.shape[1] :]
        picked = row
        for _ in range(6):  # the same without a cache
            now = torch.cat((valid, torch.ones(1, picked.shape[1] - row.shape[1])), dim=1).long()
            with torch.no_grad():
                logits = tuned(input_ids=picked, attention_mask=now).logits[:, -1]
            logits[:, EOP] = -torch.inf
            picked = torch.cat((picked, logits.argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(answer, picked[:, row.shape[1] :])


@torch.no_grad()
def test_a_virtual_prompt_before_padding_counts_no_padding(model):
    tuned = get_peft_model(model, PROMPT_LEARNING["prompt"]).eval()
    ids = torch.tensor([ROW])
    padded = torch.tensor([[PAD, PAD, PAD, *ROW]])
    alone = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -7:]
    beside = tuned(input_ids=padded, attention_mask=(padded != PAD).long()).logits[:, -7:]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=0)


def test_prompt_learning_of_a_row_without_its_ids_is_refused(model):
    tuned = get_peft_model(model, PROMPT_LEARNING["prompt"])
    ids = torch.tensor([[7, 8, 9]])
    with pytest.raises(ValueError, match="inputs_embeds: row 0 has no <sop>"):
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_the_layout_under_lora_on_the_embedding(model):
    lora = LoraConfig(**TASK, target_modules=["word_embeddings"], init_lora_weights=False)
    tuned = get_peft_model(model, lora).eval()
    embeds = tuned.get_input_embeddings()(PROMPTS)
    torch.testing.assert_close(tuned(inputs_embeds=embeds).logits, tuned(PROMPTS).logits)
