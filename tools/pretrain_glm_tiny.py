"""Pre-train glm-tiny, the model of the demonstration, on the toy world's plain text alone.

    python tools/pretrain_glm_tiny.py --out src/glmtune/models/glm-tiny --minutes 4
    python tools/pretrain_glm_tiny.py --out build/glm-tiny --steps 2000 --batch_size 128   # a CPU

The objective is GLM's: a passage is cut at a random place into `prefix [gMASK] <sop> continuation
<eop>`, the prefix is seen in both directions, and the continuation is learned. The published layout
is written: float16 safetensors, config.json, generation_config.json, tokenizer files, and a model
card. With --probe, LoRA is tried at the end on the training questions (see probe_lora.py).

Shapes: B rows of a batch, S tokens of a row, L tokens of a passage, P passages.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from glmtune.demo.world import load_world, passages
from glmtune.hardware import device_name, pick_device
from glmtune.models import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from glmtune.models.chatglm.layout import read_layout
from glmtune.models.chatglm.vocabulary import VOCAB_FILE
from glmtune.ops.attention import prefix_lm_mask
from glmtune.ops.loss import IGNORED

BLANK = "\u2581"
ROW_LENGTH = 64
MAX_TEXT = ROW_LENGTH - 4  # [gMASK], <sop>, the blank that may begin the continuation, <eop>
PASSAGES_PER_TASK = 25_000
NUM_HELD_OUT = 4_096
SEED_HELD_OUT = 1_000_000
WARMUP_STEPS = 200
MEASURED_STEPS = 100
"""Steps after the first few that tell how many fit into the time given."""


def main() -> None:
    """Read the flags, make the data, train, write, and probe if asked."""
    flags = _flags()
    started = time.monotonic()
    torch.manual_seed(flags.seed)
    torch.set_float32_matmul_precision("high")
    device = pick_device(flags.use_cpu)
    tokenizer = ChatGLMTokenizer(str(flags.vocabulary))
    texts = encode_passages(tokenizer, flags.seed, flags.passages, flags.vocabulary).to(device)
    held_out = encode_passages(tokenizer, SEED_HELD_OUT, NUM_HELD_OUT, flags.vocabulary).to(device)
    print(
        f"{len(texts.lengths_P):,} passages, {int(texts.lengths_P.sum()):,} tokens; "
        f"entropy of the grammar at most {held_out.entropy:.3f} nats/token "
        f"({time.monotonic() - started:.0f} s)",
        flush=True,
    )
    model = ChatGLMForConditionalGeneration(build_config(tokenizer, flags)).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, on {device_name(device)}", flush=True)
    cutter = Cutter(tokenizer, device)
    cutter.check(model, texts)
    report = train(model, cutter, texts, held_out, flags)
    report |= {"parameters": num_parameters, "device": device_name(device), "seed": flags.seed}
    report |= {
        "drawn": flags.passages,
        "passages": len(texts.lengths_P),
        "entropy": round(held_out.entropy, 4),
    }
    save(model.half(), flags.vocabulary, report, flags.out)
    print(f"{flags.out}: written, {time.monotonic() - started:.0f} s in all", flush=True)
    if flags.probe:
        import probe_lora

        probe_lora.probe(flags.out, device, flags.probe)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    home = Path(__file__).resolve().parent.parent / "src" / "glmtune" / "models" / "glm-tiny"
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--vocabulary", type=Path, default=home / VOCAB_FILE)
    add("--minutes", type=float, default=4.0, help="time of training, unless --steps is given")
    add("--steps", type=int, help="steps of training")
    add("--passages", type=int, default=1_500_000)
    add("--batch_size", type=int, default=512)
    add("--learning_rate", type=float, default=1.2e-3)
    add("--weight_decay", type=float, default=0.05)
    add("--hidden_size", type=int, default=256)
    add("--num_layers", type=int, default=6)
    add("--num_attention_heads", type=int, default=8)
    add("--initializer_range", type=float, default=0.02)
    add("--seed", type=int, default=0)
    add("--use_cpu", action="store_true")
    add("--compile", choices=("auto", "true", "false"), default="auto")
    add(
        "--probe", type=int, default=0, metavar="N", help="try the first N LoRA settings at the end"
    )
    return parser.parse_args()


@dataclass
class Texts:
    """Encoded passages, padded at the right."""

    ids_PL: Tensor
    lengths_P: Tensor
    entropy: float
    """Nats per token of the draws that made the passages, <eop> counted as a token."""

    def to(self, device: torch.device) -> "Texts":
        """The same on another device."""
        return Texts(self.ids_PL.to(device), self.lengths_P.to(device), self.entropy)


def encode_passages(tokenizer: ChatGLMTokenizer, seed: int, count: int, vocabulary: Path) -> Texts:
    """Write and encode passages, on all cores; those longer than a row holds are left out."""
    tasks = [
        (str(vocabulary), seed + place, min(PASSAGES_PER_TASK, count - start))
        for place, start in enumerate(range(0, count, PASSAGES_PER_TASK))
    ]
    num_workers = min(len(tasks), os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        ids, lengths, nats = zip(*pool.starmap(_encode_task, tasks), strict=True)
    lengths_P = torch.from_numpy(np.concatenate(lengths)).long()
    num_tokens = int(lengths_P.sum()) + len(lengths_P)
    ids_PL = torch.from_numpy(np.concatenate(ids))
    return Texts(ids_PL, lengths_P, sum(nats) / num_tokens)


def _encode_task(vocabulary: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    tokenizer = ChatGLMTokenizer(vocabulary)
    written = list(passages(seed, count))
    encoded = tokenizer.encode_batch([passage.text for passage in written], num_threads=1)
    kept = [place for place, ids in enumerate(encoded) if len(ids) <= MAX_TEXT]
    rows = np.full((len(kept), MAX_TEXT), tokenizer.pad_token_id, dtype=np.int16)
    for row, place in zip(rows, kept, strict=True):
        row[: len(encoded[place])] = encoded[place]
    lengths = np.array([len(encoded[place]) for place in kept], dtype=np.int16)
    return rows, lengths, sum(written[place].nats for place in kept)


class Cutter:
    """Cuts passages into rows of `prefix [gMASK] <sop> continuation <eop>`, on the device.

    The continuation is encoded as a text of its own, as an answer will be: it begins with a blank.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, device: torch.device):
        self.gmask, self.sop = tokenizer.gmask_token_id, tokenizer.bos_token_id
        self.eop, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.blank = tokenizer.convert_tokens_to_ids(BLANK)
        vocab = tokenizer.get_vocab()
        begins = {
            i: i if piece.startswith(BLANK) else vocab.get(BLANK + piece, -1)
            for piece, i in vocab.items()
        }
        # How each piece is written at the beginning of a text; -1: after a blank of its own.
        self.first_V = torch.tensor([begins[i] for i in range(len(vocab))], device=device)

    def cut(self, ids_BL: Tensor, lengths_B: Tensor, cuts_B: Tensor) -> dict[str, Tensor]:
        """Rows cut before the given token, with mask, both position streams and labels."""
        ids_BL = ids_BL.long()
        place_S = torch.arange(ROW_LENGTH, device=ids_BL.device)
        before_B1 = ids_BL.gather(1, (cuts_B[:, None] - 1).clamp(min=0))
        cut_B1 = cuts_B[:, None] - ((before_B1 == self.blank) & (cuts_B[:, None] > 0)).long()
        first_B1 = self.first_V[ids_BL.gather(1, cut_B1)]
        needs_blank_B1 = first_B1 < 0
        shift_B1 = 2 + needs_blank_B1.long()
        end_B1 = lengths_B[:, None] + shift_B1

        source_BS = torch.where(place_S < cut_B1, place_S, place_S - shift_B1)
        row_BS = ids_BL.gather(1, source_BS.clamp(0, ids_BL.shape[1] - 1))
        row_BS = torch.where(place_S == cut_B1, self.gmask, row_BS)
        row_BS = torch.where(place_S == cut_B1 + 1, self.sop, row_BS)
        opening_B1 = torch.where(needs_blank_B1, self.blank, first_B1)
        row_BS = torch.where(place_S == cut_B1 + 2, opening_B1, row_BS)
        row_BS = torch.where(place_S == end_B1, self.eop, row_BS)
        row_BS = torch.where(place_S > end_B1, self.pad, row_BS)

        in_prefix_BS = place_S <= cut_B1
        position_BS = torch.where(in_prefix_BS, place_S, cut_B1)
        block_BS = (place_S - cut_B1).clamp(min=0)
        is_label_BS = (place_S > cut_B1) & (place_S <= end_B1)
        return {
            "input_ids": row_BS,
            "attention_mask": prefix_lm_mask(cut_B1[:, 0] + 1, row_BS != self.pad),
            "position_ids": torch.stack((position_BS, block_BS), dim=1),
            "labels": torch.where(is_label_BS, row_BS, IGNORED),
        }

    def draw(self, texts: Texts, batch_size: int) -> dict[str, Tensor]:
        """Random passages, cut anywhere; a quarter of them near their beginning."""
        device = texts.ids_PL.device
        chosen_B = torch.randint(len(texts.lengths_P), (batch_size,), device=device)
        lengths_B = texts.lengths_P[chosen_B]
        is_near_B = torch.rand(batch_size, device=device) < 0.25
        range_B = torch.where(is_near_B, lengths_B.clamp(max=4), lengths_B)
        cuts_B = (torch.rand(batch_size, device=device) * range_B).long()
        return self.cut(texts.ids_PL[chosen_B], lengths_B, cuts_B)

    def check(self, model: ChatGLMForConditionalGeneration, texts: Texts) -> None:
        """Mask and positions are those that the model reads off such rows by itself."""
        batch = self.draw(texts, 256)
        layout = read_layout(batch["input_ids"], model.config)
        mask = prefix_lm_mask(layout.prefix_end_B, layout.valid_BS)
        real_BS = layout.valid_BS
        seen = (mask == batch["attention_mask"])[:, 0][real_BS]
        places = (layout.position_ids_B2S == batch["position_ids"]).all(1)[real_BS]
        assert bool(seen.all())
        assert bool(places.all())


def build_config(tokenizer: ChatGLMTokenizer, flags: argparse.Namespace) -> ChatGLMConfig:
    """The shape of glm-tiny; the embedding is padded to whole tiles of 64 rows."""
    return ChatGLMConfig(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,
        hidden_size=flags.hidden_size,
        inner_hidden_size=4 * flags.hidden_size,
        num_layers=flags.num_layers,
        num_attention_heads=flags.num_attention_heads,
        initializer_range=flags.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train(
    model: ChatGLMForConditionalGeneration,
    cutter: Cutter,
    texts: Texts,
    held_out: Texts,
    flags: argparse.Namespace,
) -> dict:
    """AdamW, warm-up and cosine; returns what the model card tells of the run."""
    device = texts.ids_PL.device
    on_gpu = device.type == "cuda"
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=flags.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=flags.weight_decay,
        fused=True,
    )
    forward: nn.Module = model
    if flags.compile == "true" or (flags.compile == "auto" and on_gpu):
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        forward = torch.compile(model)  # type: ignore[assignment]
    model.train()
    num_steps: int | None = flags.steps
    begun = measured_from = time.monotonic()
    seen, loss_sum, num_since, reported = 0, torch.zeros((), device=device), 0, begun
    for step in itertools.count():
        if step == 20:
            _wait(device)
            measured_from = time.monotonic()
        if num_steps is None and step == 20 + MEASURED_STEPS:
            _wait(device)
            now = time.monotonic()
            rate = MEASURED_STEPS / (now - measured_from)
            left = flags.minutes * 60 - (now - begun)
            num_steps = max(step + 1, step + int(left * rate))
            print(f"{rate:.1f} steps/s: {num_steps:,} steps in {flags.minutes} minutes", flush=True)
        if step == num_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = flags.learning_rate * _schedule(step, num_steps)
        batch = cutter.draw(texts, flags.batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = forward(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.detach()
        num_since += 1
        seen += 1
        if _is_due(step, num_steps, on_gpu):
            _wait(device)
            now = time.monotonic()
            tokens = num_since * flags.batch_size * float(texts.lengths_P.float().mean())
            print(
                f"step {step + 1:,}  loss {float(loss_sum) / num_since:.4f}  held out "
                f"{evaluate(model, cutter, held_out, 512):.4f} (entropy {held_out.entropy:.3f})  "
                f"{tokens / (now - reported):,.0f} tokens/s  {now - begun:.0f} s",
                flush=True,
            )
            loss_sum.zero_()
            num_since, reported = 0, time.monotonic()
    return {
        "steps": seen,
        "batch_size": flags.batch_size,
        "learning_rate": flags.learning_rate,
        "minutes": round((time.monotonic() - begun) / 60, 2),
        "held_out_loss": round(evaluate(model, cutter, held_out), 4),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_due(step: int, num_steps: int | None, on_gpu: bool) -> bool:
    every = 500 if on_gpu else 20
    return step + 1 == num_steps or (step + 1) % every == 0


def _schedule(step: int, num_steps: int | None) -> float:
    """Warm-up, then a half cosine down to a hundredth."""
    if step < WARMUP_STEPS or num_steps is None:
        return min(1.0, (step + 1) / WARMUP_STEPS)
    done = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def evaluate(
    model: ChatGLMForConditionalGeneration, cutter: Cutter, texts: Texts, count: int | None = None
) -> float:
    """Nats per token of whole passages after an empty prefix, <eop> counted as a token.

    Of the first so many passages, or of all.
    """
    model.eval()
    size = 256
    nats, num_tokens = 0.0, 0
    for ids_BL, lengths_B in zip(
        texts.ids_PL[:count].split(size), texts.lengths_P[:count].split(size), strict=True
    ):
        batch = cutter.cut(ids_BL, lengths_B, torch.zeros_like(lengths_B))
        batch["labels"][:, 1] = IGNORED  # <sop>, which is no text
        nats += float(model(**batch, num_items_in_batch=1).loss)
        num_tokens += int(lengths_B.sum()) + len(lengths_B)
    model.train()
    return nats / num_tokens


def save(model: ChatGLMForConditionalGeneration, vocabulary: Path, report: dict, out: Path) -> None:
    """Write the folder in the published layout, with a model card."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.generation_config._from_model_config = False
    model.save_pretrained(out)
    for weights in out.glob("*.safetensors"):
        weights.chmod(0o644)  # written readable by its owner alone
    if vocabulary.resolve() != (out / VOCAB_FILE).resolve():
        shutil.copyfile(vocabulary, out / VOCAB_FILE)
    settings = {"tokenizer_class": "ChatGLMTokenizer", "padding_side": "left"}
    settings |= {"bos_token": "<sop>", "eos_token": "<eop>", "mask_token": "[MASK]"}
    settings |= {"pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 2048}
    text = json.dumps(settings, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (out / "README.md").write_text(_card(model.config, report), encoding="utf-8")


def _card(config: ChatGLMConfig, report: dict) -> str:
    world = load_world()
    heads = f"{config.num_attention_heads} heads"
    size = f"hidden {config.hidden_size}, {config.num_layers} layers, {heads}"
    return f"""# glm-tiny

A ChatGLM of {report["parameters"]:,} parameters ({size}, vocabulary
{config.vocab_size:,}, tied head) that knows one toy world and nothing else. It belongs to glmtune,
whose demonstration tunes it; it is of no other use.

- **Data**: plain sentences in English and Chinese about a closed world (`glmtune.demo.world`), all
  written by rule by our own code: {world.num_sentences():,} distinct ones about
  {sum(map(len, world.facts.values())):,} facts, and lists without end. No foreign text, no
  instruction, no question with its answer.
- **Objective**: GLM's [gMASK] continuation of a passage cut at a random place.
- **Recipe**: `python tools/pretrain_glm_tiny.py --steps {report["steps"]}
  --passages {report["drawn"]} --batch_size {report["batch_size"]}
  --learning_rate {report["learning_rate"]} --seed {report["seed"]}`
  on {report["passages"]:,} passages (the rest is longer than a row); {report["minutes"]} minutes
  on {report["device"]}.
- **Loss** on passages never seen: {report["held_out_loss"]} nats/token. The draws that made them
  come to {report["entropy"]} nats/token: no model can be better, but for passages that may be drawn
  in more than one way.
- **Vocabulary**: `tools/train_vocabulary.py`, in the layout of the published `ice_text.model`.
- **Licence**: that of glmtune; weights, vocabulary and data are our own.
"""


if __name__ == "__main__":
    main()
