"""`glmtune bench decode`: decoding speed, and the limit that memory bandwidth sets.

Every token reads all weights and the cache once, so the copy rate of the device, measured in the
same run, limits the speed of any decoder on it.
"""

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from glmtune.bench.limits import copy_rate
from glmtune.bench.random_model import CONFIGS, check_room, random_model
from glmtune.bench.rows import end_of_text_ids
from glmtune.bench.timing import machine
from glmtune.config.settings import BenchDecodeSettings
from glmtune.data.jsonlines import append_json, check_appendable
from glmtune.errors import UserError, note
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.generation.reference import generate_ids
from glmtune.generation.weights import num_bytes
from glmtune.hardware import (
    check_decoding,
    device_name,
    memory_gib,
    pick_device,
    pick_dtype,
)
from glmtune.models.families import family_of
from glmtune.runlog import print_pairs

REPEATS = 3


@dataclass(frozen=True)
class DecodeFigures:
    """The results. Rates count all rows of the batch; they are medians of `REPEATS` runs."""

    dtype: str
    shape: str
    decode_bits: str
    decode_compile: bool
    batch_size: int
    prompt_length: int
    max_new_tokens: int
    tokens_per_second: float
    """Tokens a second of whole answers, prefill included."""
    decode_tokens_per_second: float
    """Tokens a second after the first of each answer."""
    first_token_ms: float
    peak_memory_gib: float
    set_up_seconds: float
    """Done once: quantising, compiling, capturing, and a first batch of answers."""
    copy_gb_per_second: float
    """Device to device, read and written bytes both counted."""
    gb_per_token: float
    """Weights and cache that a step reads in the middle of an answer, a row's share."""
    limit_tokens_per_second: float
    share_of_limit: float
    generate_tokens_per_second: float | None
    generate_first_token_ms: float | None


class Times(NamedTuple):
    """Seconds of one batch of answers."""

    first: float
    """Seconds to the first token."""
    whole: float


def bench_decode(settings: BenchDecodeSettings) -> DecodeFigures:
    """Measure and print how fast a random model of a given shape answers random prompts.

    Raises:
        UserError: too little memory for the model, too many tokens for its positions, or a JSON
            file that cannot be written.
    """
    device = pick_device(settings.use_cpu)
    dtype, caution = pick_dtype(device, settings.bf16, settings.fp16)
    if caution:
        note(caution)
    model_config = CONFIGS[settings.shape]
    _check(settings, model_config, device, dtype)
    try:
        figures = _measure(settings, model_config, device, dtype)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"batch_size {settings.batch_size}: no memory for {settings.batch_size} prompts of "
            f"{settings.prompt_length} tokens and {settings.max_new_tokens} new ones; lower it"
        ) from error
    _print(figures, device)
    if settings.json_path:
        append_json({**machine(device), **asdict(figures)}, settings.json_path)
    return figures


def _measure(
    settings: BenchDecodeSettings, model_config: Any, device: torch.device, dtype: torch.dtype
) -> DecodeFigures:
    bytes_per_second = copy_rate(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    print(f"making a random model ({settings.shape}) on {device_name(device)}", flush=True)
    model = random_model(model_config, device, dtype).eval()
    prompts = random_prompts(model_config, settings.batch_size, settings.prompt_length)
    how = GenerationSettings(max_new_tokens=settings.max_new_tokens)

    print("setting up the decoder" + ", compiling" * settings.decode_compile, flush=True)
    start = time.perf_counter()
    # Without stop ids every answer has its full length.
    bits, compiled = settings.decoder_bits, settings.decode_compile
    decoder = Decoder(model, [], bits=bits, compiled=compiled)
    time_decoder(decoder, prompts, how)
    set_up = time.perf_counter() - start
    print("decoding", flush=True)
    times = medians([time_decoder(decoder, prompts, how) for _ in range(REPEATS)])
    peak = memory_gib(device)
    reference = None
    if settings.compare:
        print("decoding with transformers' generate", flush=True)
        reference = _time_generate(model, prompts, how)

    num_rows, num_tokens = settings.batch_size, settings.batch_size * settings.max_new_tokens
    rate = (num_tokens - num_rows) / (times.whole - times.first)
    middle = settings.prompt_length + settings.max_new_tokens / 2
    shape = family_of(model_config).shape(model_config)
    a_column = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    token_bytes = num_bytes(decoder.weights) / num_rows + a_column * middle
    limit = bytes_per_second / token_bytes
    return DecodeFigures(
        dtype=str(dtype).removeprefix("torch."),
        shape=settings.shape,
        decode_bits=settings.decode_bits,
        decode_compile=settings.decode_compile,
        batch_size=num_rows,
        prompt_length=settings.prompt_length,
        max_new_tokens=settings.max_new_tokens,
        tokens_per_second=num_tokens / times.whole,
        decode_tokens_per_second=rate,
        first_token_ms=1e3 * times.first,
        peak_memory_gib=peak,
        set_up_seconds=set_up,
        copy_gb_per_second=bytes_per_second / 1e9,
        gb_per_token=token_bytes / 1e9,
        limit_tokens_per_second=limit,
        share_of_limit=rate / limit,
        generate_tokens_per_second=num_tokens / reference.whole if reference else None,
        generate_first_token_ms=1e3 * reference.first if reference else None,
    )


def _check(
    settings: BenchDecodeSettings, config: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse what would fail only after minutes of work."""
    check_appendable(settings.json_path)
    check_decoding(device, settings.decoder_bits, settings.decode_compile)
    limit = family_of(config).shape(config).max_positions
    if settings.prompt_length + settings.max_new_tokens > limit:
        raise UserError(
            f"prompt_length {settings.prompt_length} with max_new_tokens "
            f"{settings.max_new_tokens} is more than the model's {limit} positions; lower one"
        )
    check_room(settings.shape, device, dtype)


def random_prompts(config: Any, num_prompts: int, length: int) -> list[EncodedPrompt]:
    """Prompts of random ids, all of one length, special ids included."""
    rule = family_of(config).row_rule(config)
    size = num_prompts, length - rule.num_prompt_specials
    texts = torch.randint(5, end_of_text_ids(config) - 1, size).tolist()
    return [EncodedPrompt(rule.prompt(text), number) for number, text in enumerate(texts)]


def time_decoder(
    decoder: Decoder, prompts: list[EncodedPrompt], settings: GenerationSettings
) -> Times:
    """The time that one batch of answers takes."""
    start = time.perf_counter()
    stream = decoder.stream(prompts, settings)
    next(stream)
    first = time.perf_counter() - start
    for _ in stream:
        pass
    return Times(first, time.perf_counter() - start)


def _time_generate(
    model: PreTrainedModel,
    prompts: list[EncodedPrompt],
    settings: GenerationSettings,
) -> Times:
    """`generate` returns only at the end: an answer of one token gives the time to the first."""

    def seconds(max_new_tokens: int) -> float:
        start = time.perf_counter()
        generate_ids(model, prompts, GenerationSettings(max_new_tokens=max_new_tokens), [])
        return time.perf_counter() - start

    seconds(2)  # warm-up
    return medians([Times(seconds(1), seconds(settings.max_new_tokens)) for _ in range(REPEATS)])


def medians(times: list[Times]) -> Times:
    """The median of each."""
    return Times(*map(median, zip(*times, strict=True)))


def _print(figures: DecodeFigures, device: torch.device) -> None:
    bits = figures.decode_bits if figures.decode_bits != "16" else figures.dtype
    pairs = {
        "model": f"{figures.shape}, {bits}{' bits' * (bits != figures.dtype)}"
        f"{', compiled' * figures.decode_compile}, batch {figures.batch_size}",
        "tokens/s": f"{figures.tokens_per_second:,.1f} with the prompt of {figures.prompt_length}, "
        f"{figures.decode_tokens_per_second:,.1f} after the first token",
        "first token": f"{figures.first_token_ms:,.1f} ms",
        "peak memory": f"{figures.peak_memory_gib:,.2f} GiB",
        "copy rate": f"{figures.copy_gb_per_second:,.0f} GB/s, {figures.gb_per_token:,.3f} GB a "
        "token to read",
        "limit": f"{figures.limit_tokens_per_second:,.1f} tokens/s, of which "
        f"{figures.share_of_limit:.0%} reached",
    }
    if figures.generate_tokens_per_second is not None:
        times = figures.tokens_per_second / figures.generate_tokens_per_second
        pairs["generate"] = (
            f"{figures.generate_tokens_per_second:,.1f} tokens/s ({times:.2f} times as fast here), "
            f"first token {figures.generate_first_token_ms:,.1f} ms"
        )
    print_pairs(f"Decoding on {device_name(device)}", pairs)
