"""A folder's chat template beside the rows: what is followed, and what is reported."""

import json

import pytest
from glm_folders import toy_tiktoken, write_folder

from glmtune.models.glm.byte_pair_encoder import tokenizer_of_tiktoken
from glmtune.models.glm.encoder import of_folder
from glmtune.models.glm.layouts import LAYOUTS
from glmtune.models.glm.template import check_template, read_template, render
from glmtune.models.glm.tokenization import GLMTokenizer

ROWS = {"glm4": {"padded_vocab_size": 70_000}, "glm-edge": {"vocab_size": 70_000}}
PLAIN = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def folder_of(tmp_path):
    """A folder with a toy vocabulary of bytes; GLM-Edge's as tokenizer.json."""

    def write(variant="glm4", template=PLAIN):
        data, name = toy_tiktoken(), "tokenizer.model"
        if variant == "glm-edge":
            data = tokenizer_of_tiktoken(data, tmp_path, LAYOUTS[variant]).to_str().encode()
            name = "tokenizer.json"
        folder = tmp_path / variant
        return write_folder(folder, variant, data, name=name, template=template, **ROWS[variant])

    return write


@pytest.fixture(scope="module")
def published(shared):
    return json.loads((shared / "golden" / "glm" / "chat_layouts.json").read_text())


def template_of(published, name):
    family = published["families"][name]
    return family.get("template") or family["vllm"]


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("chatglm3", 27), ("chatglm3_space", 27), ("glm4_chat", 27), ("glm4_0414", 27),
        ("glm_z1", 27), ("glm_edge", 27), ("glm4_5", 27), ("glm4_7", 27),
    ],
)  # fmt: skip
def test_templates_are_rendered_as_transformers_does(name, least, published):
    num_equal = 0
    for conversation in published["conversations"]:
        rendered = published["rendered"][name].get(conversation["name"], {})
        if "tools" in json.dumps(conversation) or "full" not in rendered:
            continue
        messages = rendered.get("messages", conversation["messages"])
        template = template_of(published, name)
        assert render(template, messages, add_generation_prompt=False) == rendered["full"]
        num_equal += 1
    assert num_equal >= least


@pytest.mark.parametrize(
    ("name", "variant", "begins"),
    [
        ("chatglm2", "chatglm2", False),
        ("chatglm3", "chatglm3", False),
        ("chatglm3_space", "chatglm3", False),
        ("glm4_chat", "glm4", False),
        ("glm4_chat_newline", "glm4", True),
        ("glm4_0414", "glm4", False),
        ("glm4_0414_newline", "glm4", True),
        ("glm_edge", "glm-edge", False),
    ],
)
def test_published_templates_are_followed(name, variant, begins, published, shared, folder_of):
    """With a newline behind the last role or without; each end of GLM-Edge; ChatGLM3's blanks."""
    template = template_of(published, name)
    if variant in ROWS:
        folder = folder_of(variant, template)
    else:
        pieces = (shared / "golden" / "glm3_tokenizer.model").read_bytes()
        folder = write_folder(folder_of().parent / variant, variant, pieces, template=template)
    encoder = of_folder(folder)
    assert check_template(encoder) == []
    assert encoder.generation_ids == (encoder.newline_ids if begins else ())


def test_a_thought_that_the_template_opens_is_reported(published, folder_of):
    encoder = of_folder(folder_of(template=template_of(published, "glm_z1")))
    (message,) = check_template(encoder)
    assert message.startswith("chat template: a prompt goes on behind the newline")
    assert "'th'" in message
    assert encoder.generation_ids == encoder.newline_ids


def test_a_difference_is_shown_token_by_token(folder_of):
    encoder = of_folder(folder_of(template=PLAIN.replace("|>\n", "|>")))
    (message,) = check_template(encoder)
    first, ours, theirs = message.split("\n")
    user, (newline,) = encoder.ids["<|user|>"], encoder.newline_ids
    assert first == "chat template: differs from the rows at token 4 of one turn:"
    assert ours.startswith("  rows:     ")
    assert theirs.startswith("  template: ")
    assert f"{user} '<|user|>' {newline} '\\n' " in ours
    assert f"{user} '<|user|>' {ord('W') - 0x21} 'W' " not in ours
    assert f"{user} '<|user|>' {newline}" not in theirs
    assert " 'W' " in theirs


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PLAIN.replace("[gMASK]<sop>", ""), "token 1 of one turn"),
        (PLAIN.replace("messages", "messages[-1:]"), "of two turns"),
        (PLAIN.replace("in messages", "in messages if m.role != 'system'"), "of a system message"),
        (PLAIN + "{% if not add_generation_prompt %}!{% endif %}", "of a whole conversation"),
        (PLAIN + "{{ raise_exception('no') }}", "fails on one turn (no)"),
        ("{{ nothing.there }}", "fails on one turn"),
        ("{% if %}", "fails on one turn"),
        (PLAIN.replace("{% if add", "{% if 1 or add") + "<|assistant|>", "differs"),
    ],
)
def test_what_is_reported(template, message, folder_of):
    (found,) = check_template(of_folder(folder_of(template=template)))
    assert message in found
    assert found.startswith("chat template: ")


def test_names_in_messages_stay_text_beside_those_of_the_template(folder_of):
    """A probe could not tell otherwise; a message of a user does."""
    tokenizer = GLMTokenizer.from_pretrained(folder_of())
    chat = [{"role": "user", "content": "<|assistant|>"}]
    ids = tokenizer.apply_chat_template(chat)["input_ids"]
    assert tokenizer.ids["<|assistant|>"] not in ids
    assert check_template(tokenizer) == []


def test_a_template_in_its_own_file_comes_first(folder_of):
    folder = folder_of(template="second")
    assert read_template(folder) == "second"
    (folder / "chat_template.jinja").write_text("first")
    assert read_template(folder) == "first"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_template(folder) == "b"
    (folder / "tokenizer_config.json").unlink()
    assert read_template(folder) is None
    assert check_template(of_folder(folder)) == []


def generation(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return check_template(of_folder(folder))


def test_stop_ids_of_the_folder(folder_of):
    folder = folder_of()
    encoder = of_folder(folder)
    stops = list(encoder.stop_ids)
    assert generation(folder, eos_token_id=stops, pad_token_id=encoder.row_rule.pad_id) == []
    assert generation(folder, eos_token_id=stops[:2]) == []
    (message,) = generation(folder, eos_token_id=stops[0])
    assert f"ends answers at [{stops[0]}], rows at {encoder.ids['<|user|>']} (<|user|>)" in message
    (message,) = generation(folder, eos_token_id=[*stops, 5])
    assert message.startswith("generation_config.json: ends answers at")
    (message,) = generation(folder, pad_token_id=0)
    assert message.startswith("generation_config.json: pads with 0, rows with ")


def test_special_ids_of_the_folder(folder_of):
    folder = folder_of(template=None)
    encoder = of_folder(folder)
    user = encoder.ids["<|user|>"]
    for listed, message in ((user, None), (user + 1, f"<|user|> has id {user + 1}")):
        settings = {"added_tokens_decoder": {str(listed): {"content": "<|user|>"}, "7": {}}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        found = check_template(of_folder(folder))
        assert (message is None and found == []) or message in found[0]
    # A vocabulary as long as the published one ought to have its ids.
    encoder.layout = encoder.layout._replace(num_rows=encoder.vocab_size)
    (folder / "tokenizer_config.json").unlink()
    assert f"<|user|>: the vocabulary has id {user}, the published one 151336" in check_template(
        encoder
    )
