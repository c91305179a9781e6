"""Try LoRA settings on glm-tiny in a plain loop: does tuning teach it to answer?

    python tools/probe_lora.py --model src/glmtune/models/glm-tiny --settings 3

For each setting: exact match on the held-out questions, by language and by kind, before and after.
The demonstration itself runs through `glmtune train`; measure_demo.py measures that.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from glmtune.data.templates import alpaca
from glmtune.demo.questions import Asked, held_out_questions, num_right, training_questions
from glmtune.hardware import pick_device
from glmtune.models import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from glmtune.models.chatglm.vocabulary import VOCAB_FILE
from glmtune.ops.loss import IGNORED

ALL = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True)
class Setting:
    """A LoRA recipe."""

    targets: tuple[str, ...]
    rank: int
    learning_rate: float
    batch_size: int
    num_epochs: float
    dropout: float = 0.0
    scale: float = 1.0
    """Training records, compared with the demonstration's."""


# All but the last take about as long on two CPU cores; the last shows what patience would give.
SETTINGS = [
    Setting(ALL, rank=8, learning_rate=2e-3, batch_size=16, num_epochs=1.8),
    Setting(ALL, rank=8, learning_rate=1e-3, batch_size=16, num_epochs=1.8),
    Setting(ALL, rank=8, learning_rate=1e-3, batch_size=8, num_epochs=1.8),
    Setting(ALL, rank=8, learning_rate=3e-3, batch_size=32, num_epochs=1.8),
    Setting(ALL, rank=8, learning_rate=2e-3, batch_size=16, num_epochs=0.9, scale=2.0),
    Setting(("query_key_value",), rank=8, learning_rate=3e-3, batch_size=16, num_epochs=2.1),
    Setting(ALL, rank=16, learning_rate=2e-3, batch_size=16, num_epochs=4, dropout=0.1),
]


def main() -> None:
    """Read the flags and try the settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="try the first so many")
    parser.add_argument("--use_cpu", action="store_true")
    flags = parser.parse_args()
    probe(flags.model, pick_device(flags.use_cpu), flags.settings)


def probe(folder: Path, device: torch.device, num_settings: int) -> None:
    """Print base and tuned exact match for the first so many settings."""
    tokenizer = ChatGLMTokenizer(str(folder / VOCAB_FILE))
    questions = held_out_questions()
    for number, setting in enumerate(SETTINGS[:num_settings]):
        model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        model.to(device)
        if number == 0:
            answers = answer(model, tokenizer, questions)
            print(f"base: {_summary(questions, answers)}")
            for question, given in list(zip(questions, answers, strict=True))[:10]:
                print(f"  {question.instruction} | {question.input} -> {given[:80]!r}")
        tuned, seconds, losses = tune(model, tokenizer, setting, seed=number)
        answers = answer(tuned, tokenizer, questions)
        print(f"{setting}\n  {seconds:.0f} s, loss {losses}")
        print(f"  tuned: {_summary(questions, answers)}", flush=True)
        wrong = [
            f"{question.kind}/{question.language} {question.instruction} | {question.input} -> "
            f"{given[:40]!r}, not {question.output!r}"
            for question, given in zip(questions, answers, strict=True)
            if given.strip() != question.output
        ]
        print("  " + "\n  ".join(wrong[:12]), flush=True)


def tune(
    model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer, setting: Setting, seed: int
) -> tuple[torch.nn.Module, float, list[float]]:
    """Train an adapter on the training questions; returns model, seconds, losses by tenths."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=32,
        lora_dropout=setting.dropout,
        target_modules=list(setting.targets),
    )
    peft_model = get_peft_model(model, config)
    peft_model.train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0.0)
    rows = _rows(tokenizer, training_questions(setting.scale))
    num_steps = int(len(rows) * setting.num_epochs / setting.batch_size)
    order = np.concatenate([np.random.default_rng(e).permutation(len(rows)) for e in range(9)])
    started, losses = time.monotonic(), []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / (0.05 * num_steps))
            group["lr"] = setting.learning_rate * min(warm, 1 - step / num_steps)
        chosen = order[step * setting.batch_size : (step + 1) * setting.batch_size]
        batch = _collate([rows[place] for place in chosen], tokenizer.pad_token_id)
        loss = peft_model(**{name: t.to(model.device) for name, t in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    means = [round(float(torch.stack(part).mean()), 3) for part in _tenths(losses)]
    return peft_model, time.monotonic() - started, means


def _tenths(losses: list[Tensor]) -> list[list[Tensor]]:
    size = -(-len(losses) // 10)
    return [losses[start : start + size] for start in range(0, len(losses), size)]


def _rows(tokenizer: ChatGLMTokenizer, questions: list[Asked]) -> list[tuple[list[int], int]]:
    contexts = [alpaca(question.instruction, question.input) for question in questions]
    prompts = tokenizer.encode_batch(contexts, add_special_tokens=True)
    targets = tokenizer.encode_batch([question.output for question in questions])
    return [
        ([*prompt, *target, tokenizer.eos_token_id], len(prompt))
        for prompt, target in zip(prompts, targets, strict=True)
    ]


def _collate(rows: list[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    shape = len(rows), max(len(ids) for ids, _ in rows)
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    for place, (ids, prompt_length) in enumerate(rows):
        input_ids[place, : len(ids)] = torch.tensor(ids)
        labels[place, prompt_length - 1 : len(ids)] = torch.tensor(ids[prompt_length - 1 :])
    return {"input_ids": input_ids, "labels": labels}


@torch.no_grad()
def answer(
    model: torch.nn.Module, tokenizer: ChatGLMTokenizer, questions: list[Asked]
) -> list[str]:
    """Greedy answers of at most 16 tokens, in batches padded at the left."""
    model.eval()
    answers = []
    for start in range(0, len(questions), 100):
        contexts = [alpaca(q.instruction, q.input) for q in questions[start : start + 100]]
        prompts = tokenizer.encode_batch(contexts, add_special_tokens=True)
        width = max(map(len, prompts))
        padded = [[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in prompts]
        input_ids = torch.tensor(padded, device=model.device)
        mask = (input_ids != tokenizer.pad_token_id).long()
        written = model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=16, do_sample=False
        )
        answers += [tokenizer.decode(row[width:].tolist()) for row in written]
    return answers


def _summary(questions: list[Asked], answers: list[str]) -> str:
    count = num_right(questions, answers)
    begins = sum(
        given.strip().startswith(question.output)
        for question, given in zip(questions, answers, strict=True)
    )
    languages = ", ".join(f"{name} {count[name][0] / count[name][1]:.1%}" for name in ("en", "zh"))
    kinds = " ".join(
        f"{name} {right}/{asked}"
        for name, (right, asked) in count.items()
        if name not in ("en", "zh") and right < asked
    )
    return f"{languages}; begins right {begins / len(questions):.1%}; below full: {kinds}"


if __name__ == "__main__":
    main()
