"""Toy rows, a toy tokenizer and toy runs of training, for tests and for processes they start."""

import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import datasets
import numpy as np
from safetensors.torch import load_file
from torch import nn

from glmtune.config.settings import TrainSettings
from glmtune.generation import EncodedPrompt
from glmtune.models.chatglm.rows import row_rule
from glmtune.models.resolve import GLM_TINY

NUM_ROWS = 23  # no multiple of any batch size here
PACKED = {"layout": "packed", "tokens_per_step": 64}
EXACT = {"layout": "exact"}

QUESTIONS = [(f"Who has the number {i}?", f"Number {i} is Mira.") for i in range(8)]
QUESTIONS += [(f"{i} 号是谁？", f"{i} 号是小明。") for i in range(8)]
"""Sixteen questions and answers, half Chinese, that the fixture `taught` memorises."""


def recorded_prompts(folder, config):
    """The prompts of the recorded greedy answers, of unequal lengths, up to and with <sop>."""
    rows = json.loads((folder / "expected.json").read_text())["generate_greedy_24"]
    ids = [row[: row.index(config.bos_token_id) + 1] for row in rows]
    assert len({len(row) for row in ids}) > 1
    return [EncodedPrompt(row, number) for number, row in enumerate(ids)]


class ToyTokenizer:
    """Numbers are their own ids, any other word gets an arbitrary id.

    Its special ids are those of the tiny golden model, which has no vocabulary.
    """

    allow_special = opens_thoughts = False
    special_names = property(lambda self: {})
    bos_token_id, eos_token_id, gmask_token_id, mask_token_id = 1004, 1005, 1001, 1000
    pad_token_id, vocab_size = 3, 1006
    vocab_hash, revision = "0" * 64, "v1.1"
    row_rule = property(row_rule)

    def encode_batch(self, texts, *, add_special_tokens=False, max_length=None, num_threads=None):
        assert max_length is None
        specials = [self.gmask_token_id, self.bos_token_id] if add_special_tokens else []
        return [[self.encode_word(word) for word in text.split()] + specials for text in texts]

    def encode_contexts(self, contexts, *, num_threads=None):
        return self.encode_batch(contexts)

    @staticmethod
    def encode_word(word):
        return int(word) if word.isdecimal() else 4 + zlib.crc32(word.encode()) % 990

    def decode_batch(self, rows):
        return [self.decode(ids, skip_special_tokens=True) for ids in rows]

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if i < self.mask_token_id or not skip_special_tokens]
        return "".join(f" {i}" for i in kept)


def draw_rows(shapes, specials, seed=0):
    """Token rows at random, as dicts.

    Args:
        shapes: for each row, how many ids are before [gMASK] and how many after <sop>.
        specials: has the special ids, as a configuration or a tokenizer does.
        seed: of the ids.
    """
    random, rows = np.random.default_rng(seed), []
    for prompt, answer in shapes:
        ids = random.integers(5, specials.mask_token_id, prompt + answer).tolist()
        ids[prompt:prompt] = [specials.gmask_token_id, specials.bos_token_id]
        if answer:
            ids[-1] = specials.eos_token_id
        rows.append({"input_ids": ids, "seq_len": prompt + 2})
    return rows


def draw_uneven_rows(specials, seed=0):
    """`NUM_ROWS` rows of very different lengths, so that a mean of means would be noticed."""
    shapes = np.random.default_rng(seed).integers((1, 2), 17, (NUM_ROWS, 2))
    return draw_rows(shapes, specials, seed)


def save_rows(rows, folder):
    """Write rows as a data set; gives its path."""
    datasets.Dataset.from_list(rows).save_to_disk(folder)
    return str(folder)


def randomise_adapter(model, std):
    """Make a newly attached adapter change the outputs; returns the model."""
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=std)
    return model


def short_run(dataset_path, output_dir, **changes):
    """Settings of a run of a few steps, each of two passes."""
    settings = {
        "dataset_path": str(dataset_path),
        "output_dir": str(output_dir),
        "base": GLM_TINY,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 1000,
        "report_to": "none",
        "use_cpu": True,
    }
    return TrainSettings(**settings | changes)


def stop_at(step, monkeypatch, number=signal.SIGINT):
    """Send this process a signal while it computes a step; gives a function that ends that."""
    from glmtune.training import loop

    train_step = loop.train_step

    def interrupted_step(run, state, *how):
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return train_step(run, state, *how)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    return lambda: monkeypatch.setattr(loop, "train_step", train_step)


def child_environment():
    """Environment of a test file that is run as a program: one core, and this module."""
    paths = filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def history(run):
    """All records of a run: of what `train` returned, or of the log in its folder."""
    if isinstance(run, Path):
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run.log_history


def records(run, key="loss"):
    """The records that have a key, without the numbers that differ between any two runs."""
    private = ("tokens_per_second", "memory_gib")
    return [
        {name: value for name, value in record.items() if name not in private}
        for record in history(run)
        if key in record
    ]


def losses(run, key="loss"):
    """The loss of each record that has one, or another of its numbers."""
    return [record[key] for record in history(run) if key in record]


def saved(folder):
    """Names of the checkpoints in a run's folder."""
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def keep_only(run, step, target):
    """The folder of a killed run, with checkpoint `step` as the newest."""
    shutil.copytree(run, target)
    for checkpoint in target.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    return str(target)


def adapter_weights(folder):
    """The tensors of the adapter in a folder, by name."""
    return load_file(Path(folder) / "adapter_model.safetensors")


def die_before_change(number):
    """Let this process die before its n-th call of those that change what a folder holds."""
    calls = iter(range(1, 10**6))

    def deadly(call):
        def counted(*args, **how):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **how)

        return counted

    for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "truncate"):
        setattr(os, name, deadly(getattr(os, name)))
