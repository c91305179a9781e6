"""`glmtune adapters convert`: any adapter in today's format, in its own or published names."""

from pathlib import Path
from typing import Any, Literal

from glmtune.adapters.find import refuse_existing
from glmtune.adapters.formats import Adapter, read_adapter, write_adapter
from glmtune.adapters.naming import family_of_adapter, in_own_names, in_published_names
from glmtune.errors import UserError, note
from glmtune.models.base_files import read_settings
from glmtune.models.families import family_of
from glmtune.models.hubs import CONFIG_FILE
from glmtune.models.resolve import base_of_run, resolve_base


def convert_adapter(
    old: str | Path,
    new: str | Path,
    to: Literal["peft", "chatglm"] = "peft",
    base: str | None = None,
) -> Path:
    """Write the adapter in folder `old`, of any format and naming, in today's to folder `new`.

    Args:
        old: an adapter folder, or a run folder, whose newest checkpoint is taken.
        new: the folder to write.
        to: "peft" for the names of the classes that this project and transformers load the base
            with; "chatglm" for those of the publisher's own code.
        base: folder or hub id of the base model, whose sizes are then known; by default that of
            the run's recipe, if it is here. Only adapters that do not say sizes need it.

    Returns:
        The folder that was read: `old` or its newest checkpoint.

    Raises:
        UserError: `new` exists already, `old` holds no adapter or one without effect, or it cannot
            be written in those names.
    """
    refuse_existing(new)
    adapter = read_adapter(old)
    adapter.check_effect()
    note(*adapter.notices)
    config = read_settings(resolve_base(base)) if base else _settings_of_run(str(old))
    family = family_of(config) if config else family_of_adapter(adapter)
    if family:
        adapter = in_own_names(adapter, family.adapter_names, config)
    if to != "peft":
        if family is None:
            raise UserError(
                f"{adapter.path}: adapts {adapter.modules[0]}, which is of no model that is known "
                f"here; pass its base as --base, or leave --to out"
            )
        adapter = in_published_names(adapter, family, config)
    write_adapter(adapter.config, adapter.weights, new, adapter.config.base_model_name_or_path)
    source = adapter.path.parent
    print(f"{source} -> {new}: {len(adapter.modules)} modules, {_ranks(adapter)}")
    return source


def _settings_of_run(folder: str) -> Any:
    """The settings of the base that a run's recipe names, if that is a folder here; else None.

    Its adapter's linears alone do not tell a family: GLM-4-0414 has those of ChatGLM3-6B.
    """
    base = base_of_run(folder)
    return read_settings(base) if base and Path(base, CONFIG_FILE).is_file() else None


def _ranks(adapter: Adapter) -> str:
    pattern: dict[str, Any] = adapter.config.rank_pattern or {}
    ranks = {adapter.config.r, *pattern.values()}
    return f"rank {adapter.config.r}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
