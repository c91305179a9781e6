"""What is exported and where to: found, and refused where it must be, before anything is loaded."""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glmtune.adapters.find import find_adapter, find_weights
from glmtune.config.settings import ExportSettings
from glmtune.errors import UserError
from glmtune.models.base_files import read_settings
from glmtune.models.families import Family, family_of
from glmtune.models.folders import are_there
from glmtune.models.hubs import CONFIG_FILE
from glmtune.models.resolve import base_name, resolve_base
from glmtune.models.shape import bits_of
from glmtune.run_files import (
    BEST_NAME,
    CHECKPOINT_PREFIX,
    EXPORT_RECORD,
    checkpoint_name,
    run_folder_of,
    saved_steps,
    step_in,
)

OF_ADAPTERS = ("vllm-adapter", "peft-old")
"""Targets that are an adapter, for which no base is merged."""


@dataclass(frozen=True)
class Source:
    """An adapter and its base, or a model without an adapter."""

    settings: ExportSettings
    adapter: Path | None
    base: str
    """A folder or a hub id."""
    named: Path
    """The folder that was named."""

    @cached_property
    def config(self) -> Any:
        """The base's sizes and ids, read without torch."""
        return read_settings(self.base)

    @property
    def family(self) -> Family:
        """The family of the base."""
        return family_of(self.config)

    @property
    def quant(self) -> str:
        """The number type of a GGUF file."""
        return self.settings.quant or "f16"

    @property
    def name(self) -> str:
        """A name for what is exported: of the run, with the checkpoint if one was named."""
        place = Path(str(self.named).rstrip("/")).absolute()
        if step_in(place.name) is None and place.name != BEST_NAME:
            return place.name
        return f"{run_folder_of(place).name}-{place.name}"

    @property
    def out(self) -> Path:
        """The folder to write."""
        if self.settings.out:
            return Path(self.settings.out).expanduser()
        to = self.settings.to
        ending = f"{to}-{self.quant}" if to == "gguf" else to
        ending += "-adapter" if self.settings.adapter_alone else ""
        beside = self.named.absolute()
        if step_in(beside.name) is not None or beside.name == BEST_NAME:
            beside = beside.parent
        beside = beside.parent if beside.is_dir() else Path.cwd()
        return beside / f"{self.name}-{ending}"


def find_source(settings: ExportSettings) -> Source:
    """Find what is exported.

    Raises:
        UserError: there is no such run, checkpoint, adapter, model or base.
    """
    place = Path(settings.adapter).expanduser()
    if settings.checkpoint:
        place = _checkpoint(place, settings.checkpoint)
    if _is_model(place):
        if settings.base:
            raise UserError(
                f"--base {settings.base}: {place} is a whole model, which has no base; leave "
                "--base out"
            )
        return Source(settings, None, str(place), place)
    adapter = find_adapter(place)
    return Source(settings, adapter, resolve_base(settings.base, str(place)), place)


def check_export(settings: ExportSettings) -> Source:
    """Find what is exported, and refuse what cannot be, before torch is imported.

    Raises:
        UserError: see `find_source`; or the target does not take such a model, needs a package that
            is not installed, or would be written over something.
    """
    source = find_source(settings)
    to = settings.to
    if source.adapter is None and (to in OF_ADAPTERS or settings.adapter_alone):
        what = "--adapter_alone" if settings.adapter_alone else f"--to {to}"
        raise UserError(
            f"{what}: {source.named} is a whole model and holds no adapter; name the run or the "
            "adapter's folder, or use --to hf"
        )
    if reason := source.family.exports.refused.get(to):
        raise UserError(f"--to {to}: {source.family.name} {reason}")
    if to == "gguf" and find_spec("gguf") is None:
        raise UserError("--to gguf: the package gguf is not installed: pip install 'glmtune[gguf]'")
    _check_base_is_float(source)
    check_out(source)
    return source


def check_out(source: Source) -> None:
    """Make sure that the folder to write is free, or one of ours that may be replaced.

    Raises:
        UserError: it is not.
    """
    out = source.out
    real = out.resolve()
    read = [place.resolve() for place in (source.named, source.adapter) if place]
    read += [Path(source.base).resolve()] if Path(source.base).is_dir() else []
    if any(real == place or real in place.parents for place in (*read, Path.cwd())):
        raise UserError(f"--out {out}: is a folder that is read, or one above it; name another")
    if out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not source.settings.overwrite_output:
        raise UserError(
            f"{out}: is there already and not empty; name another with --out, or replace it with "
            "--overwrite_output true"
        )
    if not (out / EXPORT_RECORD).is_file():
        raise UserError(
            f"{out}: has no {EXPORT_RECORD}, so it is no export of ours, and is not replaced; name "
            "another with --out"
        )


def _checkpoint(run: Path, wish: str) -> Path:
    """The folder of a checkpoint of a run, by its step or as the best."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder, so it has no checkpoint {wish}")
    number = wish if wish == BEST_NAME else wish.removeprefix(CHECKPOINT_PREFIX)
    place = run / (BEST_NAME if wish == BEST_NAME else checkpoint_name(int(number)))
    if not place.is_dir():
        there = [str(step) for step in saved_steps(run)]
        there += [BEST_NAME] if (run / BEST_NAME).is_dir() else []
        raise UserError(
            f"--checkpoint {wish}: {run} has no {place.name}; it has "
            f"{', '.join(there) or 'no checkpoint, and its last adapter is taken without this'}"
        )
    return place


def _is_model(place: Path) -> bool:
    """Whether a folder is a whole model, not an adapter or a run."""
    return (
        place.is_dir()
        and (place / CONFIG_FILE).is_file()
        and are_there(place)
        and find_weights(place) is None
    )


def _check_base_is_float(source: Source) -> None:
    """Refuse a base in 8 or 4 bits: an export of it would be of rounded weights.

    Raises:
        UserError: it is.
    """
    bits = getattr(source.config, "quantization_bit", 0) or bits_of(source.config)
    if not bits or source.settings.to in OF_ADAPTERS:
        return
    ways = f"pass {source.family.name} in float16 or bfloat16 as --base"
    if source.adapter is not None:
        ways += (
            f", or write the rounded weights as floats with `glmtune merge --adapter "
            f"{source.named} --base {source.base} --save_path MERGED` and export MERGED"
        )
    raise UserError(f"{base_name(source.base)}: is in {bits} bits, rounded already; {ways}")
