"""Scores on a general set: what is computed, and the price that follows from both sides."""

import json

import numpy as np
import pytest
import torch
from glm_folders import encoder_of, write_model
from toys import randomise_adapter

from glmtune.adapters import attach_lora
from glmtune.errors import UserError
from glmtune.evaluation.price import Price
from glmtune.general.items import NUM_CHOICES, GeneralSet, Item, find_general, own_set
from glmtune.general.scores import GeneralRows, GeneralScores
from glmtune.models.families import FAMILIES
from glmtune.models.glm.layouts import LAYOUTS
from glmtune.models.likelihood import packed_layers, packed_sums, padded_sums
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.packed import base_of
from glmtune.models.resolve import GLM_TINY

TOY = find_general(True, GLM_TINY)


def few(general, step):
    return GeneralSet(general.items[::step], general.name)


def adapted(folder, std):
    torch.manual_seed(0)
    base = load_base_model(str(folder), dtype=torch.float32)
    model = attach_lora(base, dropout=0.1, targets="all")
    return (randomise_adapter(model, std) if std else model).eval()


@pytest.fixture(scope="module")
def tiny():
    return adapted(GLM_TINY, 0.1), load_tokenizer(GLM_TINY)


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    """A causal family with roles."""
    family = next(family for family in FAMILIES if "GLM-Edge" in family.name)
    folder = write_model(tmp_path_factory.mktemp("edge") / "model", family, None)
    return adapted(folder, 0.1), load_tokenizer(str(folder))


@pytest.mark.parametrize("step", [9, 1000])
@pytest.mark.parametrize("general", [own_set(), TOY], ids=["questions", "texts"])
@pytest.mark.parametrize("name", ["tiny", "edge"])
def test_a_prompt_shared_by_its_choices_gives_what_each_row_gives_alone(
    name, general, step, request
):
    model, tokenizer = request.getfixturevalue(name)
    rows = GeneralRows.of(few(general, step), tokenizer, 2048)
    found = rows.score(model).log_probs_NC
    everything = rows.rows, np.arange(len(rows.rows))
    packed = packed_sums(packed_layers(model), *everything).reshape(-1, NUM_CHOICES)
    assert np.allclose(found, packed, atol=1e-3)
    if step == 1000:
        plain = padded_sums(model, *everything).reshape(-1, NUM_CHOICES)
        assert np.allclose(found, plain, atol=1e-3)
    assert rows.num_tokens < len(rows.rows.ids_T)


@pytest.mark.parametrize("pack_length", [1, 64, 4096])
def test_packs_change_no_score(tiny, pack_length):
    model, tokenizer = tiny
    rows = GeneralRows.of(few(TOY, 40), tokenizer, 2048)
    parts = rows.parts(pack_length)
    assert sorted(np.concatenate(parts)) == list(range(len(rows.general.items)))
    assert (len(parts) == 1) == (pack_length == 4096)
    packed, whole = packed_layers(model), rows.score(model).log_probs_NC
    for part_N in parts:
        assert np.allclose(rows.sums(packed, part_N), whole[part_N], atol=1e-3)


@pytest.mark.parametrize("name", ["tiny", "edge"])
def test_the_text_of_a_choice_is_scored_and_neither_prompt_nor_end(name, request):
    _, tokenizer = request.getfixturevalue(name)
    items = [Item("facts", "en", "Who is it?", False, "Mira", ("Ben", "Eva Long", "Tom"))]
    items.append(Item("facts", "en", "The sky is", True, " blue.", (" red.", " green.", " old.")))
    rows = GeneralRows.of(GeneralSet(tuple(items), "two"), tokenizer, 2048).rows
    ends = set(tokenizer.row_rule.end_ids)
    for row, text in enumerate(
        ("Mira", "Ben", "Eva Long", "Tom", "blue.", "red.", "green.", "old.")
    ):
        tokens = slice(rows.starts_R1[row], rows.starts_R1[row + 1])
        labels = rows.labels_T[tokens]
        supervised = labels[labels >= 0].tolist()
        assert tokenizer.decode(supervised).strip() == text
        assert not ends & set(supervised)
        assert rows[row][-len(supervised) :].tolist() == supervised


def test_glm_tiny_knows_its_world_and_an_adapter_at_random_does_not(tiny):
    model, tokenizer = adapted(GLM_TINY, 0.5), tiny[1]
    general = few(TOY, 3)
    rows = GeneralRows.of(general, tokenizer, base_of(model).config.max_position_embeddings)
    with model.disable_adapter():
        base = rows.score(model)
    assert base.accuracy_N.mean() > 95
    assert base.log_prob_N.mean() > -0.2
    price = Price.of(base, rows.score(model), general.name)
    found = price.as_json()
    assert found["all"]["before"] == base.accuracy_N.mean()
    assert found["all"]["after"] < 60
    assert found["all"]["high"] < -20
    assert "general ability was lost" in price.sentence.en
    assert "通用能力有损失" in price.sentence.zh


def scores_of(rights, languages=None, length=2):
    """Scores of made-up items, the right answer likelier by 1 or less likely by 1."""
    languages = languages or ["en"] * len(rights)
    items = [
        Item("facts" if i % 2 else "sums", language, f"{i}?", False, "x" * length, ("a", "b", "c"))
        for i, language in enumerate(languages)
    ]
    log_probs = [[-1.0 * length, *[-2.0 if right else -0.5] * 3] for right in rights]
    return GeneralScores(items, np.array(log_probs), np.full(len(items), 4))


def test_a_choice_is_judged_by_its_log_probability_a_character():
    # -2 over 2 characters against -1.5 over one: less in all, and more a character.
    items = scores_of([1]).items
    found = GeneralScores(items, np.array([[-2.0, -1.5, -1.5, -1.5]]), np.array([4]))
    assert found.accuracy_N.tolist() == [100.0]
    assert found.log_prob_N.tolist() == [-0.5]
    even = GeneralScores(items, np.array([[-2.0, -1.0, -3.0, -3.0]]), np.array([4]))
    assert even.accuracy_N.tolist() == [0.0]  # not likelier than every wrong one
    nothing = GeneralScores(items, np.full((1, 4), np.nan), np.array([4]))
    assert nothing.accuracy_N.tolist() == [0.0]


def test_a_price_has_each_language_its_kinds_and_an_interval():
    languages = ["zh"] * 10 + ["en"] * 10
    price = Price.of(scores_of([1] * 20, languages), scores_of([0] * 8 + [1] * 12, languages), "x")
    found = price.as_json()
    assert list(found) == ["zh", "en", "all"]
    assert (found["zh"]["n"], found["zh"]["before"], found["zh"]["after"]) == (10, 100.0, 20.0)
    assert found["zh"]["low"] < -40 < found["zh"]["high"] + 60
    assert (found["en"]["low"], found["en"]["high"]) == (0.0, 0.0)
    assert found["zh"]["kinds"]["sums"] == {"n": 5, "before": 100.0, "after": 20.0}
    assert found["all"]["kinds"]["facts"] == {"n": 10, "before": 100.0, "after": 60.0}
    assert found["zh"]["log_prob"]["before"] == -0.5
    assert "100.0 % right and the tuned weights 60.0 %" in price.sentence.en
    assert json.loads(json.dumps(found)) == found
    (_, rows), (_, kinds) = price.tables()
    assert [str(cell) for cell in rows[1][1:4]] == ["100.0", "20.0", "\u221280.0"]
    assert [row[0].zh for row in kinds[1:]] == ["计算", "事实"]
    assert [cell.en for cell in kinds[2][1:]] == ["100", "20", "100", "100", "100", "60"]


def test_no_change_is_no_loss_and_few_items_have_no_interval():
    price = Price.of(scores_of([1] * 9), scores_of([1] * 9), "mine.jsonl")
    assert "no loss of general ability is seen" in price.sentence.en
    assert list(price.as_json()) == ["en", "all"]
    found = Price.of(scores_of([1] * 7), scores_of([0] * 7), "mine.jsonl")
    assert (found.as_json()["all"]["low"], found.as_json()["all"]["high"]) == (None, None)
    assert "too few for an interval" in found.sentence.en
    better = Price.of(scores_of([0] * 9), scores_of([1] * 9), "mine.jsonl")
    assert "no general ability was lost" in better.sentence.en


def test_an_item_longer_than_the_base_reads_is_refused(tiny):
    _, tokenizer = tiny
    general = GeneralSet((Item("facts", "en", "word " * 60, False, "a", ("b", "c", "d")),), "long")
    with pytest.raises(UserError, match=r"general set long: an item has .* this base has 20 pos"):
        GeneralRows.of(general, tokenizer, 20)


@pytest.mark.parametrize("variant", sorted({*LAYOUTS} - {"glm-edge"}))  # which is `edge`
def test_in_every_layout_the_text_of_a_choice_is_scored_and_nothing_else(variant, shared, tmp_path):
    tokenizer = encoder_of(shared, tmp_path, variant)
    general = few(own_set(), 20)
    rows = GeneralRows.of(general, tokenizer, 2048).rows
    choices = [choice for item in general.items for choice in item.choices]
    for row, choice in enumerate(choices):
        labels = rows.labels_T[rows.starts_R1[row] : rows.starts_R1[row + 1]]
        num_scored = int((labels >= 0).sum())
        assert (labels[-num_scored:] >= 0).all()
        assert rows[row][-num_scored:].tolist() in (
            tokenizer.encode_batch([choice])[0],
            tokenizer.encode_batch(["\n" + choice])[0][-num_scored:],
        )
    shared_NC = (rows.lengths_R - rows.num_labels_R).reshape(-1, NUM_CHOICES)
    assert (shared_NC == shared_NC[:, :1]).all()
