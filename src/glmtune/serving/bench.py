"""`glmtune bench serve`: the server as clients meet it, over HTTP and in processes of its own.

Beside it the same model's decoder answers as many prompts at a time without a server, as
`bench decode` does.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch

from glmtune.bench.decode import REPEATS, medians, random_prompts, time_decoder
from glmtune.bench.random_model import CONFIGS, check_room, random_model
from glmtune.bench.timing import machine
from glmtune.config.serving import ServeSettings
from glmtune.config.settings import BenchServeSettings
from glmtune.data.jsonlines import append_json
from glmtune.errors import UserError, note
from glmtune.evaluation.conversation import CHAT
from glmtune.generation import Decoder, GenerationSettings, find_stop_ids
from glmtune.generation.mixed import MixedAdapters
from glmtune.hardware import check_decoding, device_name, memory_gib, pick_device, pick_dtype
from glmtune.models.families import family_of
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import resolve_base
from glmtune.runlog import print_pairs
from glmtune.serving.clients import Answered, Asking, Client, Question, ask_all
from glmtune.serving.engine import Engine
from glmtune.serving.http import create_app
from glmtune.serving.listening import bind
from glmtune.serving.load import BASE, Loaded, Side, offer
from glmtune.serving.run import BACKLOG, run

_CLIENTS_OF_A_PROCESS = 16
_MIB = 1 << 20


@dataclass(frozen=True)
class ServeFigures:
    """The results. Rates count all clients; times are of requests sent after the first of each."""

    dtype: str
    model: str
    decode_bits: str
    slots: int
    clients: int
    seconds: float
    pause: float
    """Mean seconds that a client waits before each request; 0: all ask together."""
    prompt_length: int
    max_new_tokens: int
    adapters: int
    """Random adapters, among which the clients' requests are divided; 0: the base answers."""
    requests: int
    errors: int
    prompts: int
    """Different prompts, each of which was asked alone as well."""
    other_answers: int
    """Answers unlike the one to the same prompt alone."""
    tokens_per_second: float
    first_token_ms_p50: float
    first_token_ms_p99: float
    decoder_tokens_per_second: float
    """The rate of the decoder without a server, for as many rows, prefill included."""
    share_of_decoder: float
    memory_mib_half: float
    """Memory of the server's process in the middle of the time, without that of a GPU."""
    memory_mib_end: float
    memory_growth: float
    peak_memory_gib: float
    first_error: str | None


class Told(NamedTuple):
    """What a server's process says of itself."""

    moment: float
    num_tokens: int
    memory_mib: float
    peak_memory_gib: float


def bench_serve(settings: BenchServeSettings) -> list[ServeFigures]:
    """Measure and print how a server answers many clients; with adapters, a second one.

    Raises:
        UserError: too little memory for the model, or too many tokens for its positions.
    """
    device = pick_device(settings.use_cpu)
    dtype, caution = pick_dtype(device, settings.bf16, settings.fp16)
    if caution:
        note(caution)
    check_decoding(device, settings.decoder_bits, settings.decode_compile)
    if settings.base is None:
        check_room(settings.shape, device, dtype)
        config = CONFIGS[settings.shape]
        limit = family_of(config).shape(config).max_positions
        if settings.prompt_length + settings.max_new_tokens > limit:
            raise UserError(
                f"prompt_length {settings.prompt_length} with max_new_tokens "
                f"{settings.max_new_tokens} is more than the model's {limit} positions; lower one"
            )
    figures = []
    for adapters in dict.fromkeys((0, settings.adapters)):
        print(f"serving {settings.clients} clients, {adapters or 'no'} adapters", flush=True)
        figures.append(_measure(settings, adapters, str(dtype).removeprefix("torch.")))
        _print(figures[-1], device, figures[0])
        if settings.json_path:
            append_json({**machine(device), **asdict(figures[-1])}, settings.json_path)
    return figures


class NumberTexts:
    """A tokenizer of random models: the text of an answer is its ids, so that none is lost."""

    template, allow_special, opens_thoughts = CHAT, False, False

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The ids in decimal."""
        return "".join(f"{id_} " for id_ in ids)


def _load(settings: BenchServeSettings, adapters: int) -> Loaded:
    device = pick_device(settings.use_cpu)
    dtype, _ = pick_dtype(device, settings.bf16, settings.fp16)
    tokenizer: Any = NumberTexts()
    if settings.base is None:
        model = random_model(CONFIGS[settings.shape], device, dtype).eval()
        name: str = settings.shape
        stop_ids: list[int] = []
    else:
        base = resolve_base(settings.base)
        model, name = load_base_model(base, dtype=dtype, device=device), Path(base).name
        tokenizer, stop_ids = load_tokenizer(base), find_stop_ids(model)
    mixed = MixedAdapters()
    for number in range(1, adapters + 1):
        _add_random(model, mixed, number)
    decoder = Decoder(
        model,
        stop_ids,
        bits=settings.decoder_bits,
        compiled=settings.decode_compile,
        separate=True,
        adapters=mixed if adapters else None,
    )
    sides = [Side(BASE, 0, CHAT)]
    sides += [Side(f"adapter{n}", n, CHAT) for n in range(1, adapters + 1)]
    return Loaded(model, decoder, tokenizer, offer(sides), name)


def _add_random(model: Any, mixed: MixedAdapters, number: int) -> None:
    """Remember an adapter of the family's usual linears and rank that changes answers."""
    from glmtune.adapters import attach_lora

    torch.manual_seed(number)
    family = family_of(model.config)
    adapted = attach_lora(model, rank=family.lora_rank)
    for parameter_name, weight in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(weight, std=0.05)
    mixed.add(adapted, f"adapter{number}")
    adapted.unload()


def serve_in_child(settings: BenchServeSettings, adapters: int, pipe: Any) -> None:
    """Serve until the pipe says stop; each other word on it is answered with what is so far.

    Args:
        settings: of the benchmark.
        adapters: random ones to serve.
        pipe: first gets the port, the rate of the decoder alone, and the prompts.
    """
    loaded = _load(settings, adapters)
    device, config = loaded.decoder.device, loaded.decoder.config
    torch.manual_seed(0)
    prompts = random_prompts(config, settings.prompts, settings.prompt_length)
    repeated = [prompts[place % len(prompts)] for place in range(settings.clients)]
    plain = Decoder(loaded.model, [], bits=settings.decoder_bits, compiled=settings.decode_compile)
    how = GenerationSettings(max_new_tokens=settings.max_new_tokens)
    time_decoder(plain, repeated, how)
    times = medians([time_decoder(plain, repeated, how) for _ in range(REPEATS)])
    rate = settings.clients * settings.max_new_tokens / times.whole
    del plain
    served = ServeSettings(
        port=0,
        slots=settings.slots or settings.clients,
        max_waiting=2 * settings.clients,
        use_cpu=settings.use_cpu,
        grace=5,
    )
    engine, listener = Engine(loaded, served), bind(served.host, served.port)
    listener.listen(BACKLOG)
    pipe.send((listener.getsockname()[1], rate, [prompt.ids for prompt in prompts]))

    def tell() -> None:
        while pipe.recv() != "stop":
            memory = _memory_mib()
            told = Told(time.monotonic(), engine.scheduler.num_tokens, memory, memory_gib(device))
            pipe.send(told)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    run(create_app(engine, served), engine, listener, served.grace)


def _memory_mib() -> float:
    """Resident memory of this process; 0 where the system does not say."""
    file = Path("/proc/self/statm")
    if not file.is_file():
        return 0.0
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _MIB


def _measure(settings: BenchServeSettings, adapters: int, dtype: str) -> ServeFigures:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve_in_child, args=(settings, adapters, theirs))
    server.start()
    theirs.close()
    try:
        try:
            port, rate, prompts = pipe.recv()
        except EOFError:
            raise UserError("the server did not start; its message stands above") from None
        models = [f"adapter{n}" for n in range(1, adapters + 1)] or [BASE]
        answered, moments = _ask(settings, port, prompts, models, context, pipe)
        other = _compare_alone(settings, port, prompts, answered)
        pipe.send("stop")
    finally:
        server.join(30)
        server.kill()
    begin, half, end = moments
    timed = [one for one in answered if one.sent >= begin.moment and one.error is None]
    failed = [one.error for one in answered if one.error is not None]
    waits = [1e3 * (one.first - one.sent) for one in timed]
    percent = quantiles(waits, n=100) if len(waits) > 1 else [float("nan")] * 99
    made = (end.num_tokens - begin.num_tokens) / (end.moment - begin.moment)
    return ServeFigures(
        dtype=dtype,
        model=settings.base or settings.shape,
        decode_bits=settings.decode_bits,
        slots=settings.slots or settings.clients,
        clients=settings.clients,
        seconds=end.moment - begin.moment,
        pause=settings.pause,
        prompt_length=settings.prompt_length,
        max_new_tokens=settings.max_new_tokens,
        adapters=adapters,
        requests=len(answered),
        errors=len(failed),
        prompts=settings.prompts,
        other_answers=other,
        tokens_per_second=made,
        first_token_ms_p50=percent[49],
        first_token_ms_p99=percent[98],
        decoder_tokens_per_second=rate,
        share_of_decoder=made / rate,
        memory_mib_half=half.memory_mib,
        memory_mib_end=end.memory_mib,
        memory_growth=end.memory_mib / half.memory_mib - 1 if half.memory_mib else float("nan"),
        peak_memory_gib=end.peak_memory_gib,
        first_error=failed[0] if failed else None,
    )


def _ask(
    settings: BenchServeSettings,
    port: int,
    prompts: list[list[int]],
    models: list[str],
    context: Any,
    pipe: Any,
) -> tuple[list[Answered], list[Told]]:
    """Let the clients ask; what they got, and what the server said at the begin, half and end."""
    questions = [
        [
            Question(models[client % len(models)], (client + turn) % len(prompts))
            for turn in range(len(prompts))
        ]
        for client in range(settings.clients)
    ]
    count = min(-(-settings.clients // _CLIENTS_OF_A_PROCESS), max(1, (os.cpu_count() or 2) // 2))
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        for _ in pool.map(_nothing, range(4 * count)):  # starts the processes
            pass
        # A first request of each client: whatever is set up once is not measured.
        first = Asking(port, prompts, settings.max_new_tokens, 0.0)
        warm = [
            one for some in pool.map(ask_all, *_shared(first, questions, count)) for one in some
        ]
        begin = _told(pipe)
        asking = first._replace(until=begin.moment + settings.seconds, pause=settings.pause)
        work = [
            pool.submit(ask_all, *each)
            for each in zip(*_shared(asking, questions, count), strict=True)
        ]
        time.sleep(settings.seconds / 2)
        half = _told(pipe)
        time.sleep(max(0.0, begin.moment + settings.seconds - time.monotonic()))
        end = _told(pipe)
        answered = warm + [one for each in work for one in each.result()]
    return answered, [begin, half, end]


def _nothing(_: int) -> None:
    time.sleep(0.1)


def _shared(
    asking: Asking, questions: list[list[Question]], count: int
) -> tuple[list[Asking], list[list[list[Question]]]]:
    return [asking] * count, [questions[place::count] for place in range(count)]


def _told(pipe: Any) -> Told:
    pipe.send("now")
    return pipe.recv()


def _compare_alone(
    settings: BenchServeSettings,
    port: int,
    prompts: list[list[int]],
    answered: list[Answered],
) -> int:
    """Ask each prompt alone; how many answers differed from that."""
    texts = defaultdict(list)
    for one in answered:
        if one.error is None:
            texts[one.question].append(one.text)
    asking = Asking(port, prompts, settings.max_new_tokens, 0.0)
    different = 0
    for question, found in texts.items():
        alone = asyncio.run(Client().ask(asking, question)).text
        different += sum(text != alone for text in found)
    return different


def _print(figures: ServeFigures, device: torch.device, base: ServeFigures) -> None:
    bits = "" if figures.decode_bits == "16" else f", {figures.decode_bits} bits"
    how = f"each wait {figures.pause:g} s on average" if figures.pause else "ask together"
    pairs = {
        "model": f"{figures.model}, {figures.dtype}{bits}, {figures.adapters or 'no'} adapters",
        "clients": f"{figures.clients} that {how}, {figures.slots} answers at a time, prompts of "
        f"{figures.prompt_length} tokens, answers of {figures.max_new_tokens}",
        "requests": f"{figures.requests:,}, {figures.errors} errors; {figures.other_answers} "
        f"answers unlike the same prompt's alone ({figures.prompts} prompts)",
        "tokens/s": f"{figures.tokens_per_second:,.1f}, {figures.share_of_decoder:.0%} of "
        f"{figures.decoder_tokens_per_second:,.1f} without a server",
        "first token": f"{figures.first_token_ms_p50:,.1f} ms at half of the requests, "
        f"{figures.first_token_ms_p99:,.1f} ms at 99 %",
        "memory": f"{figures.memory_mib_end:,.0f} MiB of the process, "
        f"{figures.memory_growth:+.1%} in the second half; "
        f"{figures.peak_memory_gib:,.2f} GiB at most on the device",
    }
    if figures is not base and base.tokens_per_second:
        cost = 1 - figures.tokens_per_second / base.tokens_per_second
        pairs["mixing"] = f"costs {cost:.1%} of the tokens/s without adapters"
    if figures.first_error:
        pairs["an error"] = figures.first_error
    print_pairs(f"Serving on {device_name(device)}", pairs)
