"""`infer` and `evaluate` with `engine vllm`: vLLM answers, in this process.

vLLM opens the base's folder and gets ids, not text; where an answer ends, and what its ids say, is
decided here, as by our own decoder. It draws with random numbers of its own.
"""

import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy

from glmtune.adapters.for_vllm import for_vllm, installed_vllm, largest_rank
from glmtune.adapters.formats import read_adapter, write_adapter
from glmtune.adapters.lora import load_adapter
from glmtune.config.groups import GenerationSettings
from glmtune.config.settings import EvaluateSettings, InferSettings
from glmtune.data.questions import Question
from glmtune.errors import UserError, reason_of
from glmtune.evaluation.answers import AnswerFile, ModelChoice
from glmtune.evaluation.asked import Asked
from glmtune.evaluation.references import References
from glmtune.evaluation.sides import line_of, write_lines
from glmtune.generation import Answer, EncodedPrompt, Prompt, encode_prompts, find_stop_ids
from glmtune.generation.answers import read_answer, stops
from glmtune.generation.reference import NOT_FINITE
from glmtune.generation.streaming import check_stop_strings
from glmtune.hardware import free_memory
from glmtune.imports import leave_out_nothing
from glmtune.models.base_files import fetch_base
from glmtune.models.families import family_of
from glmtune.models.loading import check_pair, load_outline
from glmtune.models.resolve import base_name

_INSTEAD = "leave engine out"
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
"""The engine runs in this process, tells nobody of it, and leaves stdout to the answers."""
_BLOCK = 256
"""Positions that an answer may take more than it has: keys and values are kept in whole blocks."""


class VllmEngine:
    """A base in vLLM, with adapters of it, that answers prompts.

    Args:
        subject: the base, and the number format to compute in.
        adapters: folders of adapters; each is written anew in vLLM's names.
        settings: how to answer; `per_device_eval_batch_size` prompts are answered at a time.
        outline: the base without its weights.
        longest: tokens of the longest prompt.

    Raises:
        UserError: an adapter cannot be written for vLLM, or vLLM does not open it or the base.
    """

    def __init__(
        self,
        subject: ModelChoice,
        adapters: Sequence[Path],
        settings: InferSettings | EvaluateSettings,
        outline: Any,
        longest: int,
    ) -> None:
        self._settings, self._tokenizer = settings, subject.tokenizer
        self._stop_ids = find_stop_ids(outline)
        self._folder = tempfile.TemporaryDirectory(prefix="glmtune-vllm-")
        written = {adapter: self._write(adapter, subject.base, outline) for adapter in adapters}
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        leave_out_nothing()
        print(f"vLLM opens {base_name(subject.base)}", file=sys.stderr)
        with _in_one_line(f"does not open {base_name(subject.base)}"), _silent_stderr():
            self._engine, self._loras = _open(subject, settings, outline, longest, written)

    def _write(self, adapter: Path, base: str, outline: Any) -> tuple[Path, int]:
        """Write an adapter in vLLM's names; returns where, and the rank to make room for."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors whose numbers an outline does not take
            load_adapter(outline, adapter).unload()  # for its checks: vLLM has others
        read = read_adapter(adapter)
        found = for_vllm(read, base, installed_vllm(), "engine vllm", _INSTEAD)
        place = Path(tempfile.mkdtemp(dir=self._folder.name), "adapter")
        write_adapter(found.config, found.weights, place, base_name(base))
        return place, largest_rank(found.config.r)

    def answers(self, prompts: Sequence[EncodedPrompt], adapter: Path | None) -> Iterator[Answer]:
        """Answer prompts, and deliver the answers in order, each once those before it have ended.

        Args:
            prompts: the prompts, or some of them.
            adapter: one of those that were given; None for the base alone.

        Raises:
            UserError: the model's logits are not finite, or vLLM fails.
        """
        engine, lora = self._engine, self._loras[adapter] if adapter else None
        found: dict[int, Answer] = {}
        most = 2 * self._settings.per_device_eval_batch_size  # so that none has to be waited for
        num_asked = num_given = 0
        while num_given < len(prompts):
            with _in_one_line("does not go on"):
                while num_asked < len(prompts) and num_asked - num_given - len(found) < most:
                    prompt = prompts[num_asked]
                    engine.add_request(
                        str(num_asked),
                        {"prompt_token_ids": prompt.ids},
                        sampling_of(self._settings, self._stop_ids, prompt.number),
                        lora_request=lora,
                    )
                    num_asked += 1
                outputs = engine.step()
            for output in outputs:
                (answer,) = output.outputs
                ids = list(answer.token_ids)
                if not math.isfinite(answer.cumulative_logprob):
                    raise UserError(NOT_FINITE)
                if not output.finished:
                    if not stops(ids, self._settings, self._tokenizer):
                        continue
                    engine.abort_request([output.request_id])
                elif answer.finish_reason not in ("stop", "length"):
                    raise UserError(
                        f"engine vllm: vLLM ended an answer with {answer.finish_reason}; run the "
                        f"same command again, or {_INSTEAD}"
                    )
                found[int(output.request_id)] = read_answer(
                    ids, self._stop_ids, self._settings, self._tokenizer
                )
            while num_given in found:
                yield found.pop(num_given)
                num_given += 1


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Let vLLM, which does not know of sys.stderr, print nothing there meanwhile."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Say in one line what vLLM did not do; it raises many kinds of exceptions."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"engine vllm: vLLM {what} ({reason_of(error)[:300]}); {_INSTEAD}"
        ) from error


def _open(
    subject: ModelChoice,
    settings: InferSettings | EvaluateSettings,
    outline: Any,
    longest: int,
    adapters: Mapping[Path, tuple[Path, int]],
) -> tuple[Any, dict[Path, Any]]:
    """vLLM's engine for a base, and its requests for adapters that have been written for it."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    loading: dict[str, Any] = {}
    num_positions, num_rows = longest + settings.max_new_tokens, settings.per_device_eval_batch_size
    if subject.device.type == "cpu":  # else it wants 92 % of the machine's memory to be free
        shape = family_of(outline.config).shape(outline.config)
        a_position = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        num_kept = num_rows * (num_positions + _BLOCK)
        loading["kv_cache_memory_bytes"] = a_position * subject.dtype.itemsize * num_kept
    if adapters:
        most = max(rank for _, rank in adapters.values())
        loading |= {"enable_lora": True, "max_lora_rank": most, "max_loras": 1}
    engine = LLM(
        str(fetch_base(subject.base)),
        dtype=str(subject.dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        generation_config="vllm",
        max_model_len=num_positions,
        max_num_seqs=num_rows,
        use_tqdm_on_load=False,
        **loading,
    ).llm_engine
    loras = {}
    for number, (adapter, (place, _)) in enumerate(adapters.items(), start=1):
        loras[adapter] = LoRARequest(str(number), number, str(place))
        engine.add_lora(loras[adapter])
    return engine, loras


def sampling_of(settings: GenerationSettings, stop_ids: Sequence[int], number: int) -> Any:
    """vLLM's SamplingParams for the answer to one prompt.

    Args:
        settings: how to answer.
        stop_ids: tokens at which an answer ends; vLLM's own are left out.
        number: of the prompt's random stream.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    seed = int(numpy.random.default_rng((settings.seed, number)).integers(2**63))
    every, last = RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
    return SamplingParams(
        max_tokens=settings.max_new_tokens,
        temperature=(settings.temperature or 1.0) if settings.draws else 0.0,
        top_p=settings.top_p or 1.0,
        top_k=settings.top_k or 0,
        repetition_penalty=settings.repetition_penalty or 1.0,
        seed=seed if settings.draws else None,
        ignore_eos=True,
        stop_token_ids=list(stop_ids),
        detokenize=False,
        logprobs=0,  # the chosen token's, which is a number only if the logits are
        output_kind=every if settings.stop_strings else last,
    )


def answers_of(
    subject: ModelChoice, prompts: Sequence[Prompt], settings: InferSettings
) -> Iterator[Answer]:
    """Answers to prompts, in their order, by vLLM; see `generation.generate_answers`.

    Raises:
        UserError: see `encode_prompts` and `VllmEngine`.
    """
    outline = _outline(subject, settings)
    encoded = encode_prompts(outline, subject.tokenizer, prompts, settings.max_new_tokens)
    adapters = [subject.adapter] if subject.adapter else []
    longest = max(len(prompt.ids) for prompt in encoded)
    engine = VllmEngine(subject, adapters, settings, outline, longest)
    return engine.answers(encoded, subject.adapter)


def answer_sides(
    subjects: Mapping[str, ModelChoice],
    files: Mapping[str, AnswerFile],
    todo: Mapping[str, Sequence[Question]],
    asked: Asked,
    settings: EvaluateSettings,
    scores: bool,
) -> list[dict[str, float]]:
    """Answer the records of each side by vLLM, and write their lines with our own scores.

    References are scored first, by our own model, which is dropped before vLLM opens the base.

    Args:
        subjects: base and adapter of each side; the base is the same one.
        files: each side's, which gets its lines.
        todo: each side's records that have none.
        asked: all records.
        settings: how they are answered.
        scores: whether any has a reference.

    Returns:
        What each side took, scoring not included; see `sides.answer_sides`.

    Raises:
        UserError: a prompt cannot be encoded, see `VllmEngine`, or a file cannot be written.
    """
    subject = next(iter(subjects.values()))
    outline = _outline(subject, settings)
    prompts = {
        name: asked.prompts(outline, subject.tokenizer, records, settings.max_new_tokens)
        for name, records in todo.items()
    }
    scored = _score(subjects, files, todo, asked) if scores else {}
    free_memory()
    adapters = [adapter for name in todo if (adapter := subjects[name].adapter)]
    longest = max(len(prompt.ids) for of_side in prompts.values() for prompt in of_side)
    engine = VllmEngine(subject, adapters, settings, outline, longest)
    costs = []
    for name, records in todo.items():
        answers = engine.answers(prompts[name], subjects[name].adapter)
        of_side = scored.get(name) or repeat(None)
        lines = ([line_of({"answer": a}, of)] for a, of in zip(answers, of_side, strict=False))
        costs.append(write_lines(lines, ["answer"], files[name], records, settings, subject.device))
    return costs


def _score(
    subjects: Mapping[str, ModelChoice],
    files: Mapping[str, AnswerFile],
    todo: Mapping[str, Sequence[Question]],
    asked: Asked,
) -> dict[str, list[dict[str, float | int] | None]]:
    """What the references of each side's records are scored with."""
    found = {}
    base, tokenizer = next(iter(subjects.values())).load(computes=True)
    for name, records in todo.items():
        first = len(files[name].lines)
        model = subjects[name].attach(base)
        probes = asked.references(tokenizer, first + len(records))
        references = References(model, probes, {"answer": nullcontext})
        found[name] = [references.of(first + place) for place in range(len(records))]
        if subjects[name].adapter is not None:
            model.unload()
    return found


def _outline(subject: ModelChoice, settings: GenerationSettings) -> Any:
    """The base without weights, checked as a loaded one is."""
    outline = load_outline(subject.base)
    check_pair(outline, subject.tokenizer)
    check_stop_strings(settings.stop_strings or (), subject.tokenizer)
    return outline
