"""The structure of a known error, and the commands that several of them share."""

from typing import NamedTuple

DOWNLOAD = "hf download zai-org/chatglm-6b --local-dir chatglm-6b"
CHAT = "glmtune chat --base chatglm-6b"
TRAIN = "glmtune train --dataset_path data --output_dir output"
TOKENIZE = "glmtune tokenize --jsonl_path data.jsonl --save_path data"


class KnownError(NamedTuple):
    """A message, and its cause."""

    message: str
    pattern: str
    """Regular expression that finds the message, whatever paths and numbers it contains."""
    cause: str
    cause_zh: str
    command: str
    threads: str = ""
    """Where users met it: repository and number, with commas between."""
