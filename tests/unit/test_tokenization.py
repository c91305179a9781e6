"""The tokenizer's text rules, its files, and the two published revisions."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import glmtune.models  # noqa: F401
from glmtune.errors import UserError
from glmtune.models.chatglm.tokenization import (
    ChatGLMTokenizer,
    extend_v1_0,
    replace_blanks,
    restore_blanks,
)


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


def test_special_and_unknown_ids_have_no_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [5, 74874, 130001, 130004, 130400, 3]
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == "你好"


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
    slim.save_pretrained(tmp_path / "alone")  # where no config.json tells of its model
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
