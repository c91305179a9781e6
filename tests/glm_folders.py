"""Folders of the younger family with real or toy vocabularies, as downloaded; no weights."""

import base64
import json
from pathlib import Path

PUBLISHED = {"model_type": "chatglm", "multi_query_attention": True}
CONFIGS = {
    "chatglm2": PUBLISHED | {"padded_vocab_size": 65024, "_name_or_path": "THUDM/chatglm2-6b"},
    "chatglm3": PUBLISHED | {"padded_vocab_size": 65024, "_name_or_path": "THUDM/chatglm3-6b"},
    "glm4": PUBLISHED | {"padded_vocab_size": 151552, "_name_or_path": "THUDM/glm-4-9b-chat"},
    "glm4-0414": {"model_type": "glm4", "vocab_size": 151552},
    "glm-edge": {"model_type": "glm", "vocab_size": 59264, "partial_rotary_factor": 1.0},
}
_TOY_WORDS = [b"\n\n", b" \n", b"an", b"th", b"the", b" the"]
_TOY_WORDS += ["你".encode()[:2], "你".encode()]


def toy_tiktoken() -> bytes:
    """All bytes and a few words, in tiktoken's form."""
    tokens = [bytes([byte]) for byte in range(256)] + _TOY_WORDS
    return b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens))


def write_folder(
    folder: Path,
    variant: str,
    vocabulary: bytes | None,
    *,
    name: str = "tokenizer.model",
    template: str | None = None,
    **config,
) -> Path:
    """A folder with a config.json, a vocabulary file and perhaps a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[variant] | config))
    if vocabulary is not None:
        (folder / name).write_bytes(vocabulary)
    settings = {
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "chat_template": template,
    }
    settings = {key: value for key, value in settings.items() if value}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
