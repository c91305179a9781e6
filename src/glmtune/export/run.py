"""`glmtune export`: a tuned model for another program, which is opened again before it is kept."""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import glmtune
from glmtune.config.settings import ExportSettings
from glmtune.data.files import new_folder, write_json
from glmtune.disk import check_room, free_bytes
from glmtune.errors import note
from glmtune.evaluation.run_facts import RunFacts
from glmtune.export.card import write_card
from glmtune.export.card_parts import LICENCE_FILES
from glmtune.export.job import Job
from glmtune.export.reopening import Reopened
from glmtune.export.source import OF_ADAPTERS, check_export
from glmtune.export.usage import usage_of
from glmtune.hardware import FLOAT16, FLOAT32
from glmtune.models.resolve import base_name
from glmtune.run_files import EXPORT_RECORD

_MODULES = {
    "hf": "hf",
    "chatglm": "published",
    "gguf": "gguf_target",
    "vllm-adapter": "vllm_adapter",
    "peft-old": "peft_old",
}
"""Target to its module, whose `write` fills a folder and opens it again."""


class Exported(NamedTuple):
    """A folder that was written, and how it was opened again."""

    folder: Path
    reopened: Reopened


def export(settings: ExportSettings) -> Exported:
    """Write a run, an adapter or a merged model for another program.

    The folder gets its name when it is whole and has been opened again: by the target's own reader
    where that is installed, else by ours, with the same logits or the same greedy answers.

    Raises:
        UserError: see `source.check_export`; the disk has no room; or what was written is not what
            it was made of, in which case nothing is kept.
    """
    job = Job(source := check_export(settings))
    _check_disk(job)
    _tell_of_bits(job)
    write: Callable[[Job, Path], Reopened] = import_module(
        f"glmtune.export.{_MODULES[settings.to]}"
    ).write
    with new_folder(str(source.out)) as folder:
        print(f"writing {source.out}")
        reopened = write(job, folder)
        for pattern in LICENCE_FILES:
            for file in job.base_folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        write_card(job, folder, reopened, usage_of(job, folder))
        record = {
            "target": settings.to,
            "base": base_name(source.base),
            "adapter": job.adapter.digest() if source.adapter else None,
            "glmtune": glmtune.__version__,
            "opened_by": reopened.by,
            "by_the_targets_own_reader": reopened.is_targets,
            "found": reopened.found,
        }
        write_json(record, str(folder / EXPORT_RECORD))
    print(reopened.line)
    note(*reopened.notes)
    print(f"written: {source.out}")
    return Exported(source.out, reopened)


def bytes_needed(job: Job) -> int:
    """About how many bytes an export takes on disk, from the sizes of the model."""
    source = job.source
    shape = job.family.shape(source.config)
    half, whole = FLOAT16, FLOAT32
    if source.settings.to in OF_ADAPTERS or source.settings.adapter_alone:
        of_adapter = 2 * sum(t.numel() * whole.itemsize for t in job.adapter.weights.values())
        # llama.cpp opens an adapter on a file of the base, which is written for the time being.
        return of_adapter + source.settings.adapter_alone * shape.weight_bytes(whole)
    if source.settings.to == "gguf":
        sizes = {"f32": whole.itemsize, "f16": half.itemsize, "q8_0": 34 / 32}
        return int(shape.weight_bytes(half) / half.itemsize * sizes[source.quant])
    needed = shape.weight_bytes(half)
    if source.adapter is not None:  # what is merged is kept in float32
        adapted = {name.rpartition(".")[2] for name in job.adapter.modules}
        needed += shape.num_layers * sum(
            linear.outputs * linear.inputs * (whole.itemsize - half.itemsize)
            for linear in shape.linears
            if linear.name in adapted
        )
    return needed


def _check_disk(job: Job) -> None:
    out, needed = job.source.out, bytes_needed(job)
    print(f"{needed / 1e9:.2f} GB will be written, {free_bytes(out) / 1e9:.1f} GB are free")
    check_room(
        out.absolute(), needed, f"--to {job.source.settings.to} writes about",
        "name a folder on another disk with --out",
    )  # fmt: skip


def _tell_of_bits(job: Job) -> None:
    """Say where a run trained on rounded weights and the export has the whole ones."""
    if (source := job.source).adapter is None or source.settings.to in OF_ADAPTERS:
        return
    facts = RunFacts.of(source.adapter)
    bits = facts.recipe.quantization_bit if facts and facts.recipe else None
    if bits:
        note(
            f"the run trained on the base in {bits} bits; the export has the base's whole weights, "
            "so its answers may differ from those in training"
        )
