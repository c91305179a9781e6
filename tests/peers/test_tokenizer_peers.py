"""transformers' own tests of a tokenizer, run on ours."""

import unittest

import pytest

from glmtune.models import ChatGLMTokenizer
from glmtune.models.checkpoints import GLM_TINY

MODULE = "test_tokenization_common"


def run_mixin(import_peer, monkeypatch, folder, scratch):
    """Run TokenizerTesterMixin on the tokenizer of a folder; returns a result of unittest."""
    peer = import_peer("transformers", MODULE)
    (scratch / "fixtures").mkdir()
    (scratch / "fixtures" / "sample_text.txt").write_text("A text of some words.\n\nAnother.\n")
    monkeypatch.setattr(peer, "get_tests_dir", lambda *_: str(scratch))

    class Ours(peer.TokenizerTesterMixin, unittest.TestCase):
        tokenizer_class = ChatGLMTokenizer
        from_pretrained_id = str(folder)
        test_sentencepiece = True

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Ours).run(result)
    return result


def names(cases):
    return sorted({case.id().split()[0].rpartition(".")[2] for case, _ in cases})


def test_transformers_own_tokenizer_tests(import_peer, monkeypatch, tmp_path):
    result = run_mixin(import_peer, monkeypatch, GLM_TINY, tmp_path)
    print(result.testsRun, len(result.skipped), names(result.skipped))
    for case, trace in result.errors + result.failures:
        print(case, trace)
    assert names(result.errors + result.failures) == []
