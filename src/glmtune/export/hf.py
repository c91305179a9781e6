"""`--to hf`: a folder that transformers opens, without this package where it has the classes."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from glmtune.adapters.merge import copy_tokenizer, probe, save_lossless
from glmtune.data.files import new_file, read_json_object, write_json
from glmtune.data.row_rule import as_ids
from glmtune.errors import UserError
from glmtune.export import plain_reader
from glmtune.export.job import Job
from glmtune.export.reopening import CHAT, OURS, TEXTS, Reopened, check_logits
from glmtune.models.loading import load_base_model
from glmtune.models.shim import write_shim

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_GENERAL_CLASS = "PreTrainedTokenizerFast"


def write(job: Job, folder: Path) -> Reopened:
    """Write the merged model in transformers' layout, and let transformers alone open it."""
    merged = job.merge()
    expected = merged.expected
    job.set_stops(merged.model)
    save_lossless(merged.model, merged.base_config, folder)
    del merged
    copy_tokenizer(job.base_folder, folder)
    if not job.family.native().in_transformers:
        write_shim(folder, job.family)
        found = probe(load_base_model(str(folder), dtype=torch.float32))
        return Reopened(
            OURS, False, check_logits(found, expected, OURS),
            ("transformers has no class for this model: its users need glmtune installed, and "
             "trust_remote_code=True or `import glmtune.models`",),
        )  # fmt: skip
    if job.tokenizer is not None:
        write_plain_tokenizer(job, folder)
    return _open_plainly(job, folder, expected)


def write_plain_tokenizer(job: Job, folder: Path) -> None:
    """Let the tokenizer's files name no code that is not in transformers.

    Those of a folder that transformers opens stay byte for byte, and so does a vocabulary file.

    Raises:
        UserError: no plain tokenizer gives the same ids.
    """
    tokenizer, file = job.tokenizer, folder / SETTINGS_FILE
    assert tokenizer is not None, "the caller looks"
    settings = read_json_object(file) if file.is_file() else {}
    named = settings.get("tokenizer_class")
    is_plain = isinstance(named, str) and hasattr(transformers, named)
    if not (is_plain and "auto_map" not in settings and (folder / TOKENIZER_FILE).is_file()):
        make = job.family.exports.plain_tokenizer
        assert make
        plain = make(tokenizer)
        _check_ids(plain, tokenizer)
        if not (folder / TOKENIZER_FILE).is_file():
            plain.save(str(folder / TOKENIZER_FILE))
        settings.pop("auto_map", None)
        template = settings.pop("chat_template", None)
        kept = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
        settings |= kept | {
            "tokenizer_class": _GENERAL_CLASS,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        write_json(settings, str(file))
        if isinstance(template, str) and not (folder / TEMPLATE_FILE).is_file():
            _write_text(template, folder / TEMPLATE_FILE)
        settings = {}
    if not (folder / TEMPLATE_FILE).is_file() and not settings.get("chat_template"):
        _write_text(str(tokenizer.chat_template), folder / TEMPLATE_FILE)


def _check_ids(plain: Any, tokenizer: Any) -> None:
    ours = tokenizer.encode_plain([*TEXTS])
    theirs = [plain.encode(text, add_special_tokens=False).ids for text in TEXTS]
    for text, found, wanted in zip(TEXTS, theirs, ours, strict=True):
        if found != wanted:
            raise UserError(
                f"--to hf: a plain tokenizer of this vocabulary reads {text!r} as {found[:8]}, "
                f"ours as {wanted[:8]}; use --to chatglm, whose readers have the publisher's own"
            )


def _write_text(text: str, path: Path) -> None:
    with new_file(str(path)) as file:
        file.write(text)


def _open_plainly(job: Job, folder: Path, expected: Tensor) -> Reopened:
    """Open the folder in a process that cannot import this package.

    Raises:
        UserError: it cannot, or the model, the tokenizer or the stop ids are others there.
    """
    tokenizer = job.tokenizer
    texts = [*TEXTS] if tokenizer is not None else []
    asked = {"ids": job.family.probe_row(job.config), "texts": texts, "chat": CHAT}
    with tempfile.TemporaryDirectory() as place:
        questions, answers = Path(place, "questions.json"), Path(place, "answers.safetensors")
        write_json(asked, str(questions))
        command = [sys.executable, plain_reader.__file__, *map(str, (folder, questions, answers))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"--to hf: transformers alone does not open what was written ({last})")
        told = json.loads(done.stdout.splitlines()[-1])
        logits = load_file(answers)["logits"]
    by = f"transformers {told['version']} without glmtune"
    found = check_logits(logits, expected, by)
    if missing := set(job.stop_ids) - set(as_ids(told["stops"])):
        raise UserError(f"--to hf: generation_config.json lacks the stop ids {sorted(missing)}")
    if tokenizer is None:
        return Reopened(by, True, f"{told['class']}, {found}")
    ours = tokenizer.apply_chat_template([*CHAT], add_generation_prompt=True)["input_ids"]
    parts: list[str] = []
    notes: list[str] = []
    for name, is_same in (
        (f"the ids of {len(TEXTS)} texts", told["texts"] == tokenizer.encode_plain([*TEXTS])),
        ("a conversation by the chat template", told["chat"] == list(ours)),
    ):
        (parts if is_same else notes).append(name)
    if parts:
        found += f"; {' and '.join(parts)} are the same"
    notes = [f"{name} are others than in training, by the base's own files" for name in notes]
    return Reopened(by, True, f"{told['class']}, {found}", tuple(notes))
