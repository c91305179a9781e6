"""The original's stack, to compare with: its remote code, peft 0.9 and transformers 4.38.

    pip install --target old --no-deps transformers==4.38.2 tokenizers==0.15.2 peft==0.9.0 \
        huggingface_hub==0.25.2 accelerate==0.27.2
    PYTHONPATH=old python benchmarks/original_stack.py ROWS REMOTE_CODE --modes nf4-6 int8-6 bf16-6

ROWS is a folder that `glmtune tokenize` wrote, REMOTE_CODE one with the published
`modeling_chatglm.py` and `configuration_chatglm.py`; torch and bitsandbytes are today's. A mode is
the base's numbers and the rows of a batch. Weights are random, every layer is recomputed, and
optimiser and LoRA are those of the recipe: rank 8 on query_key_value, alpha 32, dropout 0.1.
`--small` shows on a CPU that it runs. Nothing of glmtune is imported, which needs newer libraries.
"""

import argparse
import gc
import importlib
import json
import sys
import time
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pyarrow as pa
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

# peft 0.9 asks for it, and bitsandbytes has it no more.
bnb.MatmulLtState.memory_efficient_backward = False
V1_1 = {
    "vocab_size": 130528, "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000,
    "gmask_token_id": 130001, "pad_token_id": 3, "max_sequence_length": 2048,
}  # fmt: skip
SMALL = {"hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 256}
DTYPES = {"bf16": torch.bfloat16, "nf4": torch.bfloat16, "int8": torch.float16}


def load_code(folder: str):
    """The published classes: configuration and model."""
    path = Path(folder).resolve()
    sys.path.insert(0, str(path.parent))
    modeling = importlib.import_module(f"{path.name}.modeling_chatglm")
    configuration = importlib.import_module(f"{path.name}.configuration_chatglm")
    return configuration.ChatGLMConfig, modeling


def read_batches(folder: str, size: int, count: int, device: torch.device):
    """Inputs, labels and the number of real tokens of batches in a fixed random order."""
    (file,) = Path(folder).glob("data-*.arrow")
    table = pa.ipc.open_stream(file).read_all()
    rows, starts = table["input_ids"].to_pylist(), table["seq_len"].to_pylist()
    order = np.random.default_rng(0).permutation(len(rows))
    for i in range(count):
        part = order[i * size : (i + 1) * size]
        longest = max(len(rows[j]) for j in part)
        inputs = torch.full((size, longest), V1_1["pad_token_id"])
        labels = torch.full((size, longest), -100)
        for k, j in enumerate(part):
            row, start = torch.tensor(rows[j]), starts[j]
            inputs[k, : len(row)] = row
            labels[k, start : len(row)] = row[start:]
        yield inputs.to(device), labels.to(device), sum(len(rows[j]) for j in part)


def build(code, kind: str, sizes: dict, device: torch.device) -> nn.Module:
    """The base with random weights, quantised or not, with LoRA on it."""
    config_class, modeling = code
    dtype = DTYPES[kind]
    modeling.skip_init = lambda cls, *given, **named: cls(*given, **(named | {"device": device}))
    modeling.skip_init_function = modeling.skip_init
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = modeling.ChatGLMForConditionalGeneration(config_class(**V1_1, **sizes))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.requires_grad_(False)
            if name.endswith("bias"):
                weight.zero_()
            elif "layernorm" in name:
                weight.fill_(1)
            else:
                weight.normal_(std=0.02)
    model = model.to(dtype)
    model.lm_head.weight = model.transformer.word_embeddings.weight
    if kind != "bf16":
        quantise(model, kind, dtype)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.1,
        target_modules=["query_key_value"],
    )  # fmt: skip
    peft_model = get_peft_model(model, lora)
    model.transformer.gradient_checkpointing = True
    model.enable_input_require_grads()
    for weight in peft_model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return peft_model.train()


def quantise(model: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """As transformers does it: every linear but the head."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear) or name == "lm_head":
                continue
            sizes, device = (linear.in_features, linear.out_features, True), linear.weight.device
            weight = linear.weight.data.cpu()
            if kind == "int8":
                new = bnb.nn.Linear8bitLt(
                    *sizes, has_fp16_weights=False, threshold=6.0, device="meta"
                )
                new.weight = bnb.nn.Int8Params(weight, requires_grad=False)
            else:
                new = bnb.nn.Linear4bit(
                    *sizes, compute_dtype=dtype, quant_type="nf4", device="meta"
                )
                new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            new.bias = nn.Parameter(linear.bias.data, requires_grad=False)
            setattr(parent, name, new.to(device))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


def measure(code, mode: str, given: argparse.Namespace, device: torch.device) -> dict:
    """Speed of some steps after five others, and the most memory that they held."""
    kind, size = mode.split("-")
    on_gpu = device.type == "cuda"
    model = build(code, kind, SMALL if given.small else {}, device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=on_gpu)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, tokens = [], []
    for inputs, labels, real in read_batches(given.rows, int(size), 5 + given.steps, device):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=inputs, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        tokens.append(real)
    return {
        "mode": mode,
        "real_tokens_per_second": sum(tokens[5:]) / sum(times[5:]),
        "ms": 1e3 * float(np.median(times[5:])),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def main() -> None:
    """Measure each mode, and print a line of JSON for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("remote_code")
    parser.add_argument("--modes", nargs="+", default=["nf4-6", "int8-6", "bf16-6"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    code = load_code(given.remote_code)
    for mode in given.modes:
        print(json.dumps(measure(code, mode, given, device)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
