"""The command line: a function for each verb, which imports what it needs after `early` checks.

So `glmtune --help` is fast: nothing heavy is imported before a verb is chosen.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import glmtune
from glmtune.errors import UserError
from glmtune.imports import prepare_imports
from glmtune.launched import is_first_to_say

if TYPE_CHECKING:
    from glmtune.config import settings as config


def validate(settings: config.ValidateSettings) -> None:
    """Find all problems in files of rows."""
    from glmtune.data.validation import validate
    from glmtune.models.families import special_names

    validate(settings, special_names())


def convert(settings: config.ConvertSettings) -> None:
    """Turn alpaca records into JSONL rows of context and target."""
    from glmtune.data.convert import convert

    convert(settings)


def tokenize(settings: config.TokenizeSettings) -> None:
    """Turn rows or conversations into token rows on disk."""
    from glmtune.data.tokenizing import tokenize
    from glmtune.models.base_files import load_row_tokenizer
    from glmtune.models.resolve import base_name, resolve_base

    base = resolve_base(settings.base)
    if settings.own_share is not None:
        from glmtune.evaluation.replay_rows import own_rows

        settings = settings.with_own_rows(str(own_rows(base)))
    tokenize(settings, load_row_tokenizer(base), base_name(base))


def inspect(settings: config.InspectSettings) -> None:
    """Show rows as the model sees them, token by token."""
    from glmtune.early import check_rows

    check_rows(settings)
    from glmtune.evaluation.inspect import inspect

    inspect(settings)


def train(settings: config.TrainSettings) -> None:
    """Train a LoRA adapter on token rows."""
    from glmtune.early import check_training

    check_training(settings)
    from glmtune.evaluation.checkup import check_after_training
    from glmtune.training.loop import train

    if train(settings, at_end=check_after_training).interrupted:
        raise KeyboardInterrupt


def plan(settings: config.PlanSettings) -> int:
    """Estimate memory and time of training, and list settings that fit."""
    from glmtune.training.planning.preview import plan

    return 1 if plan(settings)["cannot_fit"] else 0


def infer(settings: config.InferSettings) -> None:
    """Answer alpaca records, with the tuned weights or the base's."""
    from glmtune.early import check_answering

    check_answering(settings)
    from glmtune.evaluation.infer import infer

    infer(settings)


def replay_rows(settings: config.ReplayRowsSettings) -> None:
    """Let the base answer general questions, as rows that keep what it knows in a training."""
    from glmtune.early import check_replay_rows

    check_replay_rows(settings)
    from glmtune.evaluation.replay_rows import write_replay_rows

    write_replay_rows(settings)


def compare(settings: config.CompareSettings) -> int:
    """Answer the same records with base and tuned weights, and say which is better."""
    from glmtune.early import check_answering

    check_answering(settings)
    from glmtune.evaluation.compare import compare

    return 0 if compare(settings).passes_gate else 1


def evaluate(settings: config.EvaluateSettings) -> None:
    """Score the base and any number of its adapters on the same records."""
    from glmtune.early import check_answering

    check_answering(settings)
    from glmtune.evaluation.evaluate import evaluate

    evaluate(settings)


def merge(settings: config.MergeSettings) -> None:
    """Write base and adapter as one merged model."""
    from glmtune.early import check_merge

    check_merge(settings)
    from glmtune.adapters import merge_adapter

    merge_adapter(settings)


def export(settings: config.ExportSettings) -> None:
    """Write a tuned model for transformers, llama.cpp, Ollama, vLLM or old PEFT, and reopen it."""
    from glmtune.export.source import check_export

    check_export(settings)
    from glmtune.export.run import export

    export(settings)


def convert_adapter(settings: config.ConvertAdapterSettings) -> None:
    """Convert an adapter of any format to PEFT's current one, or to the published names."""
    from glmtune.early import check_conversion

    check_conversion(settings)
    from glmtune.adapters import convert_adapter

    convert_adapter(settings.old, settings.new, settings.to, settings.base)


def doctor(settings: config.DoctorSettings) -> int:
    """Find what would stop a run, or explain an error message."""
    from glmtune.doctor.run import doctor

    return doctor(settings)


def demo(settings: config.DemoSettings) -> None:
    """Train the tiny model in the package, and show the effect on a page."""
    from pathlib import Path

    from glmtune.demo.folder import claim_folder

    claim_folder(Path(settings.out))
    from glmtune.demo.run import demo

    demo(settings)


def new_model(settings: config.NewModelSettings) -> None:
    """Write a model with random weights in the published layout."""
    from glmtune.models.families import DEFAULT

    assert DEFAULT.new_model is not None
    DEFAULT.new_model(settings)


def bench_train(settings: config.BenchTrainSettings) -> None:
    """Measure a training step: speed, memory, its upper limit, and the reference path."""
    from glmtune.early import check_bench

    check_bench(settings)
    from glmtune.bench.train import bench_train

    bench_train(settings)


def bench_decode(settings: config.BenchDecodeSettings) -> None:
    """Measure decoding speed on random weights, and the limit of memory bandwidth."""
    from glmtune.early import check_bench

    check_bench(settings)
    from glmtune.bench.decode import bench_decode

    bench_decode(settings)


def bench_serve(settings: config.BenchServeSettings) -> None:
    """Measure the server over HTTP: speed, time to a first token, the cost of adapters."""
    from glmtune.early import check_bench, check_serving_packages

    check_bench(settings)
    check_serving_packages()
    from glmtune.serving.bench import bench_serve

    bench_serve(settings)


def bench_memory(settings: config.BenchMemorySettings) -> None:
    """Measure memory of training, beside the estimate of `plan`."""
    from glmtune.early import check_bench

    check_bench(settings)
    from glmtune.bench.memory import bench_memory

    bench_memory(settings)


def bench_startup(settings: config.BenchStartupSettings) -> None:
    """Measure CPU time of each verb before its work begins, beside `import torch`."""
    from glmtune.bench.startup import bench_startup

    bench_startup(settings)


def reproduce(settings: config.ReproduceSettings) -> None:
    """Print the commands that repeat a published result, and the figures to compare with."""
    from glmtune.bench.published import reproduce

    reproduce(settings)


def chat(settings: config.ChatSettings) -> None:
    """Chat with the base or the tuned model in the terminal."""
    if settings.server:
        from glmtune.evaluation.server_chat import chat_with_server

        chat_with_server(settings)
        return
    from glmtune.early import check_answering

    check_answering(settings)
    from glmtune.evaluation.chat import chat

    chat(settings)


def serve(settings: config.ServeSettings) -> None:
    """Serve base and adapters to OpenAI's clients over HTTP."""
    from glmtune.early import check_serving

    check_serving(settings)
    if settings.shows_run_alone:
        from glmtune.serving.watching import serve_run

        serve_run(settings)
        return
    from glmtune.serving.run import serve

    serve(settings)


def replay(settings: config.ReplaySettings) -> int:
    """Compute again the step that stopped a run, from its crash-N folder."""
    from glmtune.early import check_replay

    check_replay(settings)
    from glmtune.training.faults.replay import replay

    return 0 if replay(settings) else 1


def check(settings: config.CheckSettings) -> int:
    """Check whether an adapter changes what it should, or whether an endpoint serves it."""
    from glmtune.early import check_answering

    check_answering(settings)
    if settings.url:
        from glmtune.evaluation.endpoint import check_endpoint

        return 0 if check_endpoint(settings).is_sound else 1
    from glmtune.evaluation.checkup import check

    return 0 if check(settings).is_fine else 1


def ledger(settings: config.LedgerSettings) -> None:
    """List training rows that stayed hard, were memorised or made worse, or contradict others."""
    from glmtune.early import check_scoring

    check_scoring(settings)
    from glmtune.evaluation.ledger import ledger

    ledger(settings)


def dial(settings: config.DialSettings) -> None:
    """Score scales of an adapter's update, gain beside price, and recommend one."""
    from glmtune.early import check_scoring

    check_scoring(settings)
    from glmtune.evaluation.dial import dial

    dial(settings)


def distil(settings: config.DistilSettings) -> int:
    """Train a LoRA adapter that answers as a P-Tuning v2 prefix does."""
    from glmtune.early import check_distilling

    check_distilling(settings)
    from glmtune.evaluation.distil import distil

    return 0 if distil(settings).is_nearer else 1


def push(settings: config.PushSettings) -> None:
    """Show what of a tuned model would go to a hub, and upload it with --yes true."""
    from glmtune.early import check_push

    check_push(settings)
    from glmtune.export.push import push

    push(settings)


def tune(settings: config.TuneSettings) -> int:
    """Train an adapter on a file of alpaca records, and report how good it is."""
    from glmtune.early import check_tuning

    check_tuning(settings)
    from glmtune.tune.run import tune

    return 0 if tune(settings) else 1


VERBS: dict[str, Callable[[Any], int | None]] = {
    "validate": validate,
    "convert": convert,
    "tokenize": tokenize,
    "inspect": inspect,
    "train": train,
    "plan": plan,
    "replay": replay,
    "infer": infer,
    "replay-rows": replay_rows,
    "compare": compare,
    "evaluate": evaluate,
    "chat": chat,
    "serve": serve,
    "check": check,
    "ledger": ledger,
    "merge": merge,
    "export": export,
    "adapters convert": convert_adapter,
    "adapters dial": dial,
    "adapters distil": distil,
    "push": push,
    "new-model": new_model,
    "doctor": doctor,
    "demo": demo,
    "bench train": bench_train,
    "bench decode": bench_decode,
    "bench serve": bench_serve,
    "bench memory": bench_memory,
    "bench startup": bench_startup,
    "reproduce": reproduce,
    "tune": tune,
}

_HELP = {"-h", "--help"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's own, and return its exit code.

    Returns:
        0; 1 if a verb's finding is bad, or for a known error that is not the user's, which is
        printed with its fix; 2 for a user's mistake, printed in one line on stderr; 130 after
        Ctrl+C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal cannot encode (Chinese in ASCII) must not stop a run.
        sys.stdout.reconfigure(errors="backslashreplace")
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's threads wait for each other in a busy loop; if another program uses one of the
        # cores, a run on the CPU becomes many times slower. So they sleep early (docs/log.md). The
        # variable is read when torch is loaded.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    _silence_libraries()
    if argv is None:  # started as the command, not called by another program
        prepare_imports()
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except UserError as error:
        if is_first_to_say(str(error)):  # several processes find the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141
    except Exception as error:
        from glmtune.doctor.explain import explain, find_known

        if not (known := find_known(f"{type(error).__name__}: {error}")):
            raise
        traceback.print_exc()
        print("", *map(explain, known), sep="\n", file=sys.stderr)
        return 1
    return code


def _silence_libraries() -> None:
    """Suppress output of libraries that does not help the user of a command.

    It is bitsandbytes' note that it has no faster 4-bit kernel for CPUs, and progress bars of
    steps that take milliseconds. A program that imports glmtune decides this for itself.
    """
    import logging

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _reader_is_gone() -> bool:
    """Whether the reader of stdout (`| head`) has closed it; if so, discard further output."""
    try:
        print(flush=True)  # print, since the buffer may be discarded already, and flush then passes
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def run(arguments: list[str]) -> int:
    """Find the verb, read its settings and run it.

    Returns:
        0, or 1 if the verb reports a bad result.

    Raises:
        UserError: an unknown verb, and whatever the settings or the verb itself refuse.
    """
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in _HELP:
        print(overview())
        return 0
    if arguments[0] in ("version", "--version"):
        print(f"glmtune {glmtune.__version__}")
        return 0
    group = f"{arguments[0]} "
    if not _HELP.isdisjoint(arguments[1:2]) and any(verb.startswith(group) for verb in VERBS):
        print(overview(group))
        return 0
    # Imported late: pydantic alone takes a tenth of a second.
    from glmtune.config.flags import split_arguments, verb_help
    from glmtune.config.names import did_you_mean
    from glmtune.config.reading import read_config
    from glmtune.config.settings import SETTINGS

    two_words = " ".join(arguments[:2])
    verb = two_words if two_words in VERBS else arguments[0]
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS) or "; `glmtune --help` lists the verbs"
        raise UserError(f"there is no verb {verb!r}{hint}")
    arguments = arguments[len(verb.split()) :]
    if not _HELP.isdisjoint(arguments):
        print(verb_help(verb, summary(verb)))
        return 0
    recipe, flags = split_arguments(verb, arguments)
    return VERBS[verb](read_config(SETTINGS[verb], recipe, flags)) or 0


def summary(verb: str) -> str:
    """What a verb does, in one line."""
    return VERBS[verb].__doc__ or ""


def overview(group: str = "") -> str:
    """The text of `glmtune --help`, or of `glmtune bench --help` where `group` is "bench "."""
    verbs = "\n".join(f"  {verb:18}{summary(verb)}" for verb in VERBS if verb.startswith(group))
    recipe = "" if group else "[RECIPE.yaml] "
    settings = f"`glmtune {group}VERB --help` lists a verb's settings."
    settings += "" if group else " Each is a key of its recipe and a flag; flags win."
    return f"""\
usage: glmtune {group}VERB {recipe}[--name value ...]

Fine-tune the GLM family with LoRA, and see what it changed.

verbs:
{verbs}

{settings}"""
