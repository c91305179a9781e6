"""A tokenizer for the tiny golden model, whose folder has no vocabulary."""

import zlib

import pytest


class WordTokenizer:
    """Numbers are their own ids, any other word has an id of its own by chance."""

    bos_token_id, eos_token_id, gmask_token_id, mask_token_id = 1004, 1005, 1001, 1000
    pad_token_id, vocab_size = 3, 1006

    def encode_batch(self, texts, *, add_special_tokens=False, max_length=None, num_threads=None):
        assert max_length is None
        specials = [self.gmask_token_id, self.bos_token_id] if add_special_tokens else []
        return [[self.encode_word(word) for word in text.split()] + specials for text in texts]

    @staticmethod
    def encode_word(word):
        return int(word) if word.isdecimal() else 4 + zlib.crc32(word.encode()) % 990

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if i < self.mask_token_id or not skip_special_tokens]
        return "".join(f" {i}" for i in kept)


@pytest.fixture(scope="session")
def word_tokenizer():
    return WordTokenizer()
