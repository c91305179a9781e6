"""The vocabularies of the younger family: published ids, and the classes of transformers."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from glm_folders import real_folder, toy_tiktoken, write_folder
from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM, PreTrainedTokenizerBase, pipeline

from glmtune.errors import UserError
from glmtune.models.chatglm.tokenization import ChatGLMTokenizer
from glmtune.models.chatglm.vocabulary import VOCAB_FILE as TOY_PIECES
from glmtune.models.glm import byte_pair_encoder
from glmtune.models.glm.byte_pair_encoder import tokenizer_of_tiktoken
from glmtune.models.glm.encoder import find_vocabulary, of_folder
from glmtune.models.glm.layouts import LAYOUTS
from glmtune.models.glm.tokenization import BytePairTokenizer, GLMTokenizer, PieceTokenizer
from glmtune.models.resolve import GLM_TINY

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
CHAT = [
    {"role": "user", "content": "  Why <|assistant|> [gMASK]sop[gMASK]<sop></s>?"},
    {"role": "assistant", "content": "because\n"},
    {"role": "user", "content": "再说一遍。"},
    {"role": "assistant", "content": "因为 17"},
]
VARIANTS = ("chatglm2", "chatglm3", "glm4", "glm4-0414")


@cache
def build(shared, root, variant):
    folder = real_folder(shared, root, variant)
    return folder, of_folder(folder), GLMTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def built(shared, tmp_path_factory):
    """By variant: a folder with the real vocabulary, its encoder and its tokenizer."""
    root = tmp_path_factory.mktemp("glm")
    return lambda variant: build(shared, root, variant)


@pytest.fixture(scope="module")
def cases(shared):
    golden = shared / "golden"
    pieces = json.loads((golden / "tokenizer_glm3.json").read_text())
    pairs = json.loads((golden / "glm" / "tokenizer_glm4.json").read_text())
    return lambda variant: pieces if variant.startswith("chatglm") else pairs


@pytest.fixture
def toy(tmp_path):
    """A folder of GLM-4 with a vocabulary of bytes."""
    return write_folder(tmp_path / "toy", "glm4", toy_tiktoken(), padded_vocab_size=70_000)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_ids_of_texts(variant, built, cases):
    """No text makes a special id, by either door."""
    _, encoder, tokenizer = built(variant)
    recorded = cases(variant)["cases"]
    texts, ids = [case["text"] for case in recorded], [case["ids"] for case in recorded]
    assert encoder.encode_batch(texts) == ids
    assert encoder.encode_batch(texts, num_threads=1) == ids
    assert tokenizer.encode_batch(texts) == ids
    plain = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    special = max(encoder.ids.values())
    for one in (encoder, tokenizer):  # special ids have no text
        assert one.decode_batch([[special, *row, special] for row in ids]) == plain
    assert len(texts) >= 225


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_special_ids(variant, built, cases):
    _, encoder, _ = built(variant)
    recorded = cases(variant)
    specials = recorded["special_tokens"]
    if variant == "chatglm2":
        specials = {name: id_ for name, id_ in specials.items() if "|" not in name}
    if variant.startswith("chatglm"):
        specials = specials | {"<unk>": 0, "</s>": 2}
    assert encoder.ids == specials
    assert encoder.vocab_size == (64794 if variant == "chatglm2" else recorded["vocab_size"])
    assert len(encoder.vocab_hash) == 64
    assert encoder.revision == variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_calls_and_decoding(variant, built, cases):
    _, encoder, tokenizer = built(variant)
    prefix = [encoder.ids[name] for name in encoder.layout.prefix]
    for case in cases(variant)["cases"]:
        ids = case.get("ids_special", case["ids"])
        assert tokenizer(case["text"])["input_ids"] == prefix + ids
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chat_is_the_row(variant, built):
    """Our own template writes the row: a message's special names are text, the answer ends."""
    _, encoder, tokenizer = built(variant)
    rule, write = encoder.row_rule, encoder.layout.chat.write
    (context,) = encoder.encode_contexts([write([(CHAT[0]["content"], "because\n")], "再说一遍。")])
    prompt = rule.prompt(context)
    (answer,) = encoder.encode_batch([CHAT[3]["content"]])
    asked = tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)
    assert asked["input_ids"] == prompt
    row = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    assert row["input_ids"] == prompt + rule.answer(answer)
    num_answer = len(rule.answer(answer))
    assert row["assistant_masks"][-num_answer:] == [1] * num_answer
    assert row["assistant_masks"][len(prompt) - 1] == 0
    assert sum(row["assistant_masks"]) >= num_answer + encoder.layout.has_roles


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rendered_chat_read_again(variant, built):
    """As programs do that keep the text first; of ChatGLM it says who wrote a special name."""
    _, _, tokenizer = built(variant)
    chat = [CHAT[1] | {"role": "user"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert (
        tokenizer.decode(ids, skip_special_tokens=True)
        .strip()
        .endswith("because" if tokenizer.layout.has_roles else "答：")
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_pad_on_the_left_and_are_cut(variant, built):
    _, encoder, tokenizer = built(variant)
    pad = encoder.row_rule.pad_id
    assert tokenizer.pad_token_id == pad
    assert tokenizer.eos_token_id == encoder.stop_ids[0]
    batch = tokenizer(["a", "one two three"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == pad
    assert batch["attention_mask"][0].tolist()[:2] == [0, 0]
    chats = [CHAT[:1], CHAT[:3]]
    rows = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt")
    one = tokenizer.apply_chat_template(chats[0])["input_ids"]
    assert rows["input_ids"].shape == rows["attention_mask"].shape
    assert rows["input_ids"][0].tolist()[-len(one) :] == one
    assert rows["input_ids"][0, 0] == pad
    cut = tokenizer.apply_chat_template(CHAT, truncation=True, max_length=5)
    assert len(cut["input_ids"]) == len(cut["attention_mask"]) == 5
    masked = tokenizer.apply_chat_template(
        [CHAT, CHAT[:2]], padding=True, return_assistant_tokens_mask=True
    )
    assert [len(mask) for mask in masked["assistant_masks"]] == [
        len(row) for row in masked["input_ids"]
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_tokenizer_is_the_same(variant, built, tmp_path):
    folder, encoder, tokenizer = built(variant)
    tokenizer.save_pretrained(tmp_path)
    again = GLMTokenizer.from_pretrained(tmp_path)
    assert again.vocab_hash == encoder.vocab_hash
    assert again.layout == tokenizer.layout
    assert again.row_rule == tokenizer.row_rule
    ids = tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert again.apply_chat_template(CHAT)["input_ids"] == ids
    file = find_vocabulary(folder)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_saved_byte_pair_folder_is_read_by_transformers_alone(toy, tmp_path):
    tokenizer = GLMTokenizer.from_pretrained(toy)
    tokenizer.save_pretrained(tmp_path / "saved")
    code = (
        "import sys; from transformers import AutoTokenizer as A; "
        "print(A.from_pretrained(sys.argv[1])('the <|user|>\\n你')['input_ids'])"
    )
    command = [sys.executable, "-c", code, tmp_path / "saved"]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(read) == tokenizer("the <|user|>\n你")["input_ids"]


@pytest.mark.parametrize("variant", ["chatglm3", "glm4"])
def test_added_tokens_stand_behind_the_last_id(variant, built, toy, tmp_path):
    folder = toy if variant == "glm4" else built(variant)[0]
    tokenizer = GLMTokenizer.from_pretrained(folder)
    assert type(tokenizer) is (BytePairTokenizer if variant == "glm4" else PieceTokenizer)
    last = tokenizer.vocab_size
    assert tokenizer.add_tokens(["<mark>"]) == 1
    ids = tokenizer("the <mark>the", add_special_tokens=False)["input_ids"]
    assert ids.count(last) == 1
    assert "<mark>" in tokenizer.decode(ids)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = GLMTokenizer.from_pretrained(tmp_path / "saved")
    assert again("the <mark>the", add_special_tokens=False)["input_ids"] == ids
    assert again.vocab_hash == tokenizer.vocab_hash
    assert again.joins_newline == tokenizer.joins_newline


def test_tokens_added_to_a_json_are_saved(toy, tmp_path):
    GLMTokenizer.from_pretrained(toy).save_pretrained(tmp_path / "json")
    (tmp_path / "json" / "tokenizer.model").unlink()
    tokenizer = GLMTokenizer.from_pretrained(tmp_path / "json")
    assert tokenizer.joins_newline
    tokenizer.add_tokens(["<mark>"])
    tokenizer.save_pretrained(tmp_path / "saved")
    again = GLMTokenizer.from_pretrained(tmp_path / "saved")
    assert again("the <mark>")["input_ids"] == tokenizer("the <mark>")["input_ids"]


def test_a_padded_call_changes_no_rows(toy):
    tokenizer = GLMTokenizer.from_pretrained(toy)
    rows = tokenizer.encode_batch(["the", "the the the"])
    tokenizer(["the", "the the"], padding="max_length", truncation=True, max_length=2)
    assert tokenizer.encode_batch(["the", "the the the"]) == rows


@pytest.mark.parametrize("variant", ["chatglm3", "glm4"])
def test_a_pipeline_answers_a_chat(variant, built, toy):
    folder = toy if variant == "glm4" else built(variant)[0]
    tokenizer = GLMTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0,
        eos_token_id=list(tokenizer.stop_ids),
    )  # fmt: skip
    model = GlmForCausalLM(config).eval()
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chats = [CHAT[:1], CHAT[:3]]
    said = answer(chats, max_new_tokens=5, do_sample=False, batch_size=2)
    asked = tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
    for chat, (got,), ids in zip(chats, said, asked, strict=True):
        row = torch.tensor([ids])
        new = model.generate(row, max_new_tokens=5, do_sample=False)[0, len(ids) :]
        assert got["generated_text"][:-1] == chat
        wanted = tokenizer.decode(new, skip_special_tokens=True)
        assert got["generated_text"][-1]["content"].strip() == wanted.strip()


def test_pieces_and_special_names(built):
    _, encoder, tokenizer = built("chatglm3")
    user = encoder.ids["<|user|>"]
    assert tokenizer.convert_tokens_to_ids("<|user|>") == user
    assert tokenizer.convert_ids_to_tokens([user, 2]) == ["<|user|>", "</s>"]
    vocab = tokenizer.get_vocab()
    assert (len(vocab), vocab["<|observation|>"]) == (64798, 64797)
    assert tokenizer.decode([user, 36474, 54591, 2]) == "<|user|>你好</s>"
    assert tokenizer.decode([user, 36474, 54591, 2, 65020], skip_special_tokens=True) == "你好"
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize("a b 你好")) == "a b 你好"
    row = tokenizer("a", "b")["input_ids"]
    assert (row[:2], row[-1]) == ([64790, 64792], 2)
    mask = tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True)
    assert mask == [1, 1, *[0] * (len(row) - 3), 1]
    assert tokenizer.build_inputs_with_special_tokens(row[:3]) == row[:3]


def test_what_a_chat_of_ours_refuses(built):
    for variant in VARIANTS:
        _, _, tokenizer = built(variant)
        for chat, why in (
            ([{"role": "tool", "content": "1"}], "message 1"),
            ([{"role": "user", "content": [{"text": "a"}]}], "message 1"),
        ):
            with pytest.raises(Exception, match=why):
                tokenizer.apply_chat_template(chat)
        with pytest.raises(Exception, match="tools"):
            tokenizer.apply_chat_template(CHAT, tools=[{"type": "function"}])
        with pytest.raises(UserError, match="return_assistant_tokens_mask"):
            tokenizer.apply_chat_template(CHAT, tokenize=False, return_assistant_tokens_mask=True)


def test_a_folders_own_template_and_the_ids_that_begin_an_answer(toy):
    template = (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    (toy / "chat_template.jinja").write_text(template)
    for tokenizer in (of_folder(toy), GLMTokenizer.from_pretrained(toy)):
        assert tokenizer.generation_ids == tokenizer.newline_ids != ()
    ids = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    (context,) = tokenizer.encode_contexts([CHAT[0]["content"]])
    assert ids == [*tokenizer.row_rule.prompt(context), *tokenizer.newline_ids]
    (toy / "chat_template.jinja").write_text(template.replace("<|assistant|>\n", "<|assistant|>"))
    assert of_folder(toy).generation_ids == ()
    (toy / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    assert of_folder(toy).generation_ids == ()


def test_a_long_vocabulary_is_built_in_little_time(built):
    """Without a file beside the vocabulary; a second on one core, with room for a busy machine."""
    from time import process_time

    folder, _, _ = built("glm4")
    start = process_time()
    of_folder(folder)
    assert process_time() - start < 4


MISTAKES = {
    "nothing there": (None, "tokenizer.model", {}, "has no tokenizer.model or tokenizer.json"),
    "a pointer": (POINTER, "tokenizer.model", {}, "Git-LFS pointer"),
    "a pointer as json": (POINTER, "tokenizer.json", {}, "Git-LFS pointer"),
    "no sentencepiece": (b"junk", "tokenizer.model", {}, "sentencepiece"),
    "damaged json": (b'{"model": ', "tokenizer.json", {}, "is damaged"),
    "json of nothing": (b"\xff\xfe", "tokenizer.json", {}, "is damaged"),
    "half a file": (toy_tiktoken()[:1000] + b"\n", "tokenizer.model", {}, "is damaged"),
    "too few rows": (
        toy_tiktoken(), "tokenizer.model", {"vocab_size": 100}, "config.json says 100",
    ),
    "another model": (
        toy_tiktoken(), "tokenizer.model", {"vocab_size": 151552}, "config.json says 151552",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_file_is_one_line(mistake, tmp_path):
    data, name, config, message = MISTAKES[mistake]
    config = {"vocab_size": 70_000} | config
    if mistake == "no sentencepiece":
        folder = write_folder(tmp_path / "folder", "chatglm3", data, name=name)
    else:
        folder = write_folder(tmp_path / "folder", "glm4-0414", data, name=name, **config)
    for read in (of_folder, GLMTokenizer.from_pretrained):
        with pytest.raises(UserError, match=message) as error:
            read(folder)
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)


def test_a_vocabulary_beside_another_models_config(tmp_path, toy):
    pieces = Path(GLM_TINY, TOY_PIECES).read_bytes()
    folder = write_folder(tmp_path / "pieces", "glm4-0414", pieces)
    with pytest.raises(UserError, match=r"of chatglm3 or chatglm2, .* of glm4-0414"):
        of_folder(folder)
    folder = write_folder(tmp_path / "pairs", "chatglm3", toy_tiktoken())
    with pytest.raises(UserError, match=r"of glm4-0414 .* is of chatglm3"):
        of_folder(folder)
    foreign = tokenizer_of_tiktoken(
        toy_tiktoken(), toy, LAYOUTS["glm4"]._replace(specials={"<|user|>": 1}, prefix=())
    )
    data = foreign.to_str().encode()
    folder = write_folder(
        tmp_path / "foreign", "glm4-0414", data, name="tokenizer.json", vocab_size=70_000
    )
    with pytest.raises(UserError, match="has no token"):
        of_folder(folder)


def test_chatglm2_without_a_vocabulary_names_the_one_file(tmp_path):
    folder = write_folder(tmp_path / "folder", "chatglm2", None)
    with pytest.raises(UserError, match=r"has no tokenizer\.model; take"):
        find_vocabulary(folder)


def test_tokenizers_of_one_vocabulary_share_its_byte_pairs_alone(toy, monkeypatch):
    data, layout = toy_tiktoken(), LAYOUTS["glm4"]
    first = tokenizer_of_tiktoken(data, toy, layout)
    monkeypatch.setattr(byte_pair_encoder, "_merges", None)  # is not needed again
    second = tokenizer_of_tiktoken(bytes(bytearray(data)), toy, layout)
    monkeypatch.undo()
    other = tokenizer_of_tiktoken(data + b"c29tZSA= %d\n" % data.count(b"\n"), toy, layout)
    assert other.get_vocab_size() == first.get_vocab_size() + 1
    second.add_special_tokens(["<|more|>"])
    assert first.token_to_id("<|more|>") is None
    text = "some words<|user|>"
    assert first.encode(text).ids == second.encode(text).ids


def test_rows_need_neither_torch_nor_transformers(toy):
    code = (
        "import glmtune; glmtune.is_command = True; import sys, pathlib; "
        "from glmtune.models.glm.encoder import of_folder; "
        "encoder = of_folder(pathlib.Path(sys.argv[1])); encoder.encode_contexts(['a']); "
        "encoder.generation_ids; print({'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, toy]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_no_code_of_the_folder_is_run(toy):
    (toy / "tokenization_chatglm.py").write_text("raise SystemExit('ran')")
    assert isinstance(GLMTokenizer.from_pretrained(toy), PreTrainedTokenizerBase)
    assert isinstance(
        GLMTokenizer.from_pretrained(toy, trust_remote_code=True), PreTrainedTokenizerBase
    )


def test_auto_tokenizer_of_a_published_folder(built):
    """Its settings name ChatGLMTokenizer, as those of ChatGLM-6B do."""
    folder, encoder, _ = built("chatglm3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is PieceTokenizer
    assert tokenizer.vocab_hash == encoder.vocab_hash
    assert type(AutoTokenizer.from_pretrained(GLM_TINY)) is ChatGLMTokenizer
