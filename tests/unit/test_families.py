"""The list of families: which one owns a config.json, and no other module names a family."""

import io
import re
import tokenize
from pathlib import Path

import pytest
from toy_family import CONFIG, TOY

import glmtune
from glmtune.errors import UserError
from glmtune.models import ChatGLMConfig, families

PACKAGE = Path(glmtune.__file__).parent
ROOMS = sorted(path for path in (PACKAGE / "models").iterdir() if (path / "family.py").is_file())
# A family's name, special ids, linears, norm, tensors, and its two streams of positions.
IN_CODE = re.compile(
    r"chatglm(?!_path)|gmask|(?<![a-z])sop|(?<![a-z])eop|query_key_value|h_to_4h|4h_to_h|layernorm"
    r"|(?<!tie_)word_embeddings|lm_head|num_image_tokens|position_ids_2|position_ids_B2",
    re.IGNORECASE,
)
# Messages and help may name a product; other strings are identifiers.
IN_STRINGS = re.compile(
    r"gmask|<sop>|<eop>|query_key_value|h_to_4h|4h_to_h|layernorm|final_layer|lm_head"
    r"|(?<!tie_)word_embeddings|<\|(user|assistant|system|observation)\|>|self_attn|o_proj|down_proj"
    r"|gate_up_proj|transformer\.encoder|embed_tokens",
    re.IGNORECASE,
)
STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
ALLOWED = {
    "models/families.py",  # the list
    "ops/norm.py",  # LayerNorm as a function of its weights: an operation that a family may use
    "ops/rotary.py",  # two streams, of which a family may use one
    "adapters/biases.py",  # modules that have a bias, of torch
}


def words_of_a_family(source):
    """Each word of `source` that belongs to one family alone, with its line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME or token.type in STRINGS:
            pattern = IN_CODE if token.type == tokenize.NAME else IN_STRINGS
            for found in pattern.finditer(token.string):
                yield token.start[0], found[0]


def others():
    """Modules outside the families' folders; tables of other programs' messages are not code."""
    tables = PACKAGE / "config" / "foreign", PACKAGE / "doctor" / "errors"
    for path in sorted(PACKAGE.rglob("*.py")):
        if not any(path.is_relative_to(room) for room in (*ROOMS, *tables)):
            yield path


@pytest.mark.parametrize("path", others(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_knows_a_family(path):
    if str(path.relative_to(PACKAGE)) in ALLOWED:
        return
    assert list(words_of_a_family(path.read_text(encoding="utf-8"))) == []


def test_the_walk_sees_names_and_strings_and_passes_over_messages():
    source = "import chatglm\nx.gmask_token_id\n'<sop>'\n'pass ChatGLM-6B'\nchatglm_path\n"
    assert list(words_of_a_family(source)) == [(1, "chatglm"), (2, "gmask"), (3, "<sop>")]
    assert [room.name for room in ROOMS] == ["chatglm", "glm"]


def test_each_family_knows_its_config():
    for family in families.FAMILIES:
        config = family.native().config_class.from_dict(dict(family.published_settings))
        assert families.family_of(config) is family or family.name.endswith("v1.0")
        assert family.row_rule(config).special_ids
        shape = family.shape(config)
        assert set(family.lora_target) <= set(shape.linear_names)
        assert len(shape.linears) == family.native().packed.num_linears
        assert max(family.probe_row(config)) < shape.vocab_size
    names = [family.name for family in families.FAMILIES]
    assert names == [
        "ChatGLM-6B", "ChatGLM-6B v1.0", "ChatGLM3-6B", "ChatGLM2-6B", "GLM-4-0414", "GLM-4-9B",
        "GLM-Edge",
    ]  # fmt: skip
    assert families.family_of(ChatGLMConfig()).name == "ChatGLM-6B"
    march = ChatGLMConfig(vocab_size=150_528, bos_token_id=150_004, eos_token_id=150_005)
    assert families.family_of(march).name == "ChatGLM-6B v1.0"
    assert families.family_of(march).row_rule(march).positions == "stay_late"


def test_a_family_is_found_once_it_is_on_the_list(monkeypatch):
    assert families.find_family(CONFIG.to_dict()) is None
    families.check_targets(("dense", "all"))
    with pytest.raises(UserError, match="no model has a linear 'gate_proj'; choose from dense, "):
        families.check_targets(("gate_proj",))
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, TOY])
    assert families.family_of(CONFIG) is TOY
    families.check_targets(("gate_proj", "dense"))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [(None, ("q_proj", "v_proj")), (("all",), TOY.shape(CONFIG).linear_names)],
)
def test_targets_are_the_familys_own_or_all(wanted, found):
    assert TOY.targets(wanted, TOY.shape(CONFIG)) == found


def test_a_shape_says_what_a_model_was_made_of():
    shape = TOY.shape(CONFIG)
    model = TOY.native().model_class(CONFIG)
    count = sum(weight.numel() for weight in model.parameters())
    assert shape.weight_bytes(model.dtype) == count * model.dtype.itemsize
    assert shape.matmul_parameters() == count - CONFIG.vocab_size * CONFIG.hidden_size - (
        2 * shape.norm_values + shape.final_norm_values
    )
