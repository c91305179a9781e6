"""transformers' own tests of a tokenizer, run on ours; docs/peers.md has the outcome."""

import unittest
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from glmtune.models import ChatGLMTokenizer
from glmtune.models.chatglm.vocabulary import VOCAB_FILE, replace_blanks
from glmtune.models.resolve import GLM_TINY

MODULE = "test_tokenization_common"
# The mixin skips these tests for all but Rust tokenizers and processors.
SKIPPED = {
    "test_chat_template_return_assistant_tokens_mask",
    "test_chat_template_return_assistant_tokens_mask_truncated",
    "test_chat_template_save_loading",
    "test_integration_from_extractor",
    "test_sequence_ids",
}


@pytest.fixture(params=["glm-tiny", pytest.param("chatglm-6b", marks=pytest.mark.slow)])
def folder(request, tmp_path):
    """A folder with the embedded vocabulary, or with the published one, if present."""
    if request.param == "glm-tiny":
        return GLM_TINY
    vocabulary = request.getfixturevalue("shared") / "golden" / "ice_text.model"
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / vocabulary.name).write_bytes(vocabulary.read_bytes())
    settings = '{"tokenizer_class": "ChatGLMTokenizer", "bos_token": "<s>", "eos_token": "</s>"}'
    (tmp_path / "published" / "tokenizer_config.json").write_text(settings)
    return tmp_path / "published"


def test_transformers_own_tokenizer_tests(import_peer, monkeypatch, tmp_path, folder, root):
    # RUN_SLOW is read at import, which another test may have caused already.
    monkeypatch.setattr("transformers.testing_utils._run_slow_tests", True)
    peer = import_peer("transformers", MODULE)
    (tmp_path / "fixtures").mkdir()
    (tmp_path / "fixtures" / "sample_text.txt").write_text("Some words.\n\nA second line.\n")
    monkeypatch.setattr(peer, "get_tests_dir", lambda *_: str(tmp_path))

    class Ours(peer.TokenizerTesterMixin, unittest.TestCase):
        tokenizer_class = ChatGLMTokenizer
        from_pretrained_id = [str(folder)]  # noqa: RUF012
        test_sentencepiece = True
        test_tokenizer_from_extractor = False  # which makes one of Rust

    # The pieces that sentencepiece itself gives for the text of `test_integration`.
    text = Ours.integration_test_input_string
    vocabulary = SentencePieceProcessor(model_file=str(Path(folder, VOCAB_FILE)))
    Ours.integration_expected_tokens = vocabulary.encode(replace_blanks(text), out_type=str)
    Ours.integration_expected_token_ids = vocabulary.encode(replace_blanks(text))
    Ours.integration_expected_decoded_text = text

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Ours).run(result)

    troubles = result.errors + result.failures
    assert not troubles, "\n".join(f"{case}\n{trace}" for case, trace in troubles)
    assert result.testsRun >= 50  # the class did not lose its tests
    cases = [
        getattr(case, "test_case", case) for case, _ in result.skipped
    ]  # of a subtest its test
    skipped = {case._testMethodName for case in cases}
    assert skipped <= SKIPPED
    told = (root / "docs" / "peers.md").read_text()
    assert all(f"`{name}`" in told for name in skipped)
