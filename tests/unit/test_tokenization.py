"""The tokenizer's text rules, its files, and the two published revisions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import glmtune.models  # noqa: F401
from glmtune.errors import UserError
from glmtune.models.chatglm.tokenization import ChatGLMTokenizer
from glmtune.models.chatglm.vocabulary import extend_v1_0, replace_blanks, restore_blanks
from glmtune.models.resolve import GLM_TINY


@pytest.fixture(scope="module")
def vocab_file(shared):
    return shared / "golden" / "ice_text.model"


@pytest.fixture(scope="module")
def folder(vocab_file, tiny_folder, tmp_path_factory):
    """A published folder as downloaded: the later revision's tokenizer files."""
    folder = tmp_path_factory.mktemp("chatglm-6b")
    (folder / "ice_text.model").write_bytes(vocab_file.read_bytes())
    config = json.loads((tiny_folder / "config.json").read_text()) | {
        "vocab_size": 130528,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@given(st.text(alphabet=st.sampled_from("a \n\t你<>|n")))
def test_blanks_survive(text):
    assert restore_blanks(replace_blanks(text)) == text.replace("<n>", "\n").replace(
        "<|tab|>", "\t"
    )


def test_long_runs_of_blanks_go_longest_first():
    assert replace_blanks(" " * 90) == "<|blank_80|><|blank_10|>"
    assert replace_blanks(" " * 81) == "<|blank_80|> "


def test_auto_tokenizer_on_a_published_folder(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is ChatGLMTokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (130004, 130005)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.vocab_hash == tokenizer.vocab_hash
    assert again("你好，world\n")["input_ids"] == tokenizer("你好，world\n")["input_ids"]


def test_batches_are_padded_on_the_left(folder):
    batch = AutoTokenizer.from_pretrained(folder)(["你好", "Hello, world!"], padding=True)
    assert batch["input_ids"][0] == [3, 3, 5, 74874, 130001, 130004]
    assert batch["attention_mask"][0] == [0, 0, 1, 1, 1, 1]


def test_truncation_keeps_the_special_ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("你好，world " * 9, truncation=True, max_length=7)
    assert len(ids) == 7
    assert ids[-2:] == [130001, 130004]
    assert tokenizer.encode_batch(["你好，world " * 9], add_special_tokens=True, max_length=7) == [
        ids
    ]


def test_special_ids_are_shown_unless_they_are_skipped(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [5, 74874, 130001, 130004, 130400, 3]
    assert tokenizer.decode(ids) == "你好[gMASK]<sop><pad>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "你好"
    every = range(130000, 130344)
    assert tokenizer.decode(list(every)[:8], skip_special_tokens=True) == ""
    assert tokenizer.decode(130005) == tokenizer.decode([130005]) == "<eop>"
    assert tokenizer.batch_decode([[130005], [130000]]) == ["<eop>", "[MASK]"]


def test_rows_and_image_ids_beyond_the_vocabulary_have_no_text(folder, march_vocabulary, tmp_path):
    assert AutoTokenizer.from_pretrained(folder).decode([130344, 130527]) == ""
    (tmp_path / "ice_text.model").write_bytes(march_vocabulary)
    old = ChatGLMTokenizer(str(tmp_path / "ice_text.model"))
    assert old.decode([0, 19999, 150005]) == "<eop>"
    assert len(old) == len(old.get_vocab()) == old.vocab_size == 150_344
    assert old.convert_tokens_to_ids(old.convert_ids_to_tokens([7, 20003])) == [7, 20003]


def test_the_first_revision_is_the_later_one_shifted(vocab_file, tmp_path, march_vocabulary):
    (tmp_path / "ice_text.model").write_bytes(march_vocabulary)
    old, new = (ChatGLMTokenizer(str(f)) for f in (tmp_path / "ice_text.model", vocab_file))
    assert (old.revision, new.revision) == ("v1.0", "v1.1")
    text = "你好，\tworld   \n  👋🏽 [gMASK]"
    assert old.encode(text) == [i + 20000 for i in new.encode(text)]
    assert old.decode(old.encode(text)) == new.decode(new.encode(text))
    assert (old.pad_token_id, old.eos_token_id, old.gmask_token_id) == (20003, 150005, 150001)


def test_extending_the_first_revision_gives_the_later_pieces(vocab_file, march_vocabulary):
    from sentencepiece import SentencePieceProcessor

    old = SentencePieceProcessor(model_proto=extend_v1_0(march_vocabulary))
    new = SentencePieceProcessor(model_file=str(vocab_file))
    assert old.get_piece_size() == new.get_piece_size() == 130_344
    for i in range(129_990, 130_344):
        assert old.id_to_piece(i) == new.id_to_piece(i)
        assert (old.is_control(i), old.is_byte(i)) == (new.is_control(i), new.is_byte(i))


def test_a_vocabulary_of_the_other_revision_is_refused(folder, vocab_file, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 150_528}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "ice_text.model").write_bytes(vocab_file.read_bytes())
    with pytest.raises(UserError, match=r"revision v1\.1.*revision v1\.0"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_the_first_vocabulary_without_image_tokens(folder, vocab_file, tmp_path, march_vocabulary):
    """ChatGLM-6B-Slim: March's file beside 130,528 rows has the ids of the later file."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "ice_text.model").write_bytes(march_vocabulary)
    slim, later = map(AutoTokenizer.from_pretrained, (tmp_path, folder))
    text = "你好, world\n\t  three   blanks 🦙"
    assert slim(text).input_ids == later(text).input_ids
    assert (slim.revision, slim.vocab_size, slim.pad_token_id) == ("v1.0", 130_344, 3)
    slim.save_pretrained(tmp_path / "alone")  # where no config.json describes its model
    assert AutoTokenizer.from_pretrained(tmp_path / "alone")(text) == later(text)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git-LFS pointer"),
        (b"no model at all", "no sentencepiece model"),
        (None, "no ice_text.model"),
    ],
)
def test_unusable_vocabulary_files(tmp_path, content, message):
    path = tmp_path / "ice_text.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        ChatGLMTokenizer(str(path))


def test_a_vocabulary_of_another_family_is_refused(shared):
    with pytest.raises(UserError, match="not a ChatGLM-6B vocabulary"):
        ChatGLMTokenizer(str(shared / "golden" / "glm3_tokenizer.model"))


@pytest.mark.parametrize("base", ["glm-tiny", "v1.0"])
def test_added_tokens_are_tokens_of_every_door(base, request, tmp_path):
    if base == "glm-tiny":
        tokenizer = AutoTokenizer.from_pretrained(GLM_TINY)
    else:
        file = tmp_path / "ice_text.model"
        file.write_bytes(request.getfixturevalue("march_vocabulary"))
        tokenizer = ChatGLMTokenizer(str(file))
    size = tokenizer.vocab_size
    assert len(tokenizer) == size
    assert tokenizer.add_tokens(["bimbam", "[gMASK]", "<eop>"]) == 1  # the others are there already
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["[tool]"]}) == 1
    assert len(tokenizer) == size + 2
    text = "a bimbam [tool] [gMASK] <eop>"
    for again in (tokenizer, AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "again"))):
        ids = again.encode(text, add_special_tokens=False)
        assert [i for i in ids if i >= size] == [size, size + 1]
        assert not {again.gmask_token_id, again.eos_token_id} & set(ids)
        assert again.encode_batch([text]) == [ids]
        assert again.encode_batch([text], add_special_tokens=True) == [again.encode(text)]
        assert "[tool]" in again.decode(ids)
        assert "[tool]" not in again.decode(ids, skip_special_tokens=True)
        assert "bimbam" in again.decode(ids, skip_special_tokens=True)
        assert len(again) == size + 2


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_names_for_special_tokens_that_the_vocabulary_lacks_are_added():
    tokenizer = AutoTokenizer.from_pretrained(GLM_TINY, pad_token="[PAD]", eos_token="</s>")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("[PAD]", "<eop>")
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id == tokenizer.vocab_size


def test_the_special_tokens_mask_has_a_row_of_its_own_length():
    tokenizer = AutoTokenizer.from_pretrained(GLM_TINY)
    row = tokenizer("Who?", "I.", return_special_tokens_mask=True)
    mask = row["special_tokens_mask"]
    special = [i for i, is_special in zip(row["input_ids"], mask, strict=True) if is_special]
    names = ["[gMASK]", "<sop>", "<eop>"]
    assert special == tokenizer.convert_tokens_to_ids(names)
    assert tokenizer.get_special_tokens_mask(row["input_ids"], None, True) == mask


def test_saving_leaves_no_trace_of_code_that_is_not_there(folder, tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert "auto_map" in json.loads((tiny_folder / "config.json").read_text())
    model.save_pretrained(tmp_path)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / name).read_text()
    assert model.config.auto_map == {}  # which TRL reads from every model's configuration
    assert not list(tmp_path.glob("*.py"))
