"""`train --adapter`: the adapter that a run continues, where it does not start a new one.

Its rank, its alpha and its linears become the run's settings before anything is forecast; its
weights are the run's at step 0. What it was, its digest, is part of what identifies the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel

from glmtune.adapters.find import find_adapter
from glmtune.adapters.formats import Adapter
from glmtune.adapters.lora import read_to_continue
from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError, note
from glmtune.models.families import family_of
from glmtune.models.low_rank import has_lora, split_lora
from glmtune.training.saving.manifest import BEGINNING, read_identity

SomeSettings = TypeVar("SomeSettings", bound=TrainSettings)


@dataclass(frozen=True)
class Beginning:
    """An adapter that a run continues."""

    adapter: Adapter
    digest: str | None
    """What tells it from another; None where a resumed run has no longer got it."""

    def identity(self) -> Mapping[str, Any]:
        """What identifies a run besides its settings."""
        return {BEGINNING: self.digest}


def begin_with(
    settings: SomeSettings, config: Any, resume: Path | None = None
) -> tuple[SomeSettings, Beginning | None]:
    """Read the adapter that a run continues, if there is one.

    Args:
        settings: the run's settings.
        config: of the base model.
        resume: the checkpoint that the run is resumed from; it stands in for an adapter that is no
            longer there, since the weights come from it in any case.

    Returns:
        The settings with the adapter's rank, alpha and linears, and the adapter.

    Raises:
        UserError: it cannot be read or trained on, or the settings ask for another rank, alpha or
            other linears.
    """
    if settings.adapter is None:
        return settings, None
    try:
        folder, is_there = find_adapter(settings.adapter), True
    except UserError:
        if resume is None:
            raise
        folder, is_there = resume, False
    adapter = read_to_continue(folder, config)
    digest: str | None = adapter.digest()
    if not is_there:
        assert resume is not None
        digest = read_identity(resume).get(BEGINNING)
        note(f"adapter: {settings.adapter} is no longer there: taken to be what the run began with")
    return _settle(settings, adapter, config), Beginning(adapter, digest)


def _settle(settings: SomeSettings, adapter: Adapter, config: Any) -> SomeSettings:
    """The settings with what the adapter decides.

    Raises:
        UserError: they say otherwise, or the adapter is on more than linears of the layers.
    """
    family = family_of(config)
    shape = family.shape(config)
    adapted = {module.rpartition(".")[2] for module in adapter.modules}
    targets = tuple(name for name in shape.linear_names if name in adapted)
    if not targets:
        return settings  # of another base, as putting it on this one will say
    if others := adapted - {*targets}:
        raise UserError(
            f"{adapter.path}: adapts {', '.join(sorted(others))} as well, and linears of layers "
            "alone are trained; merge it into its base, and train a new one on that (--base MERGED)"
        )
    of_adapter = {
        "lora_rank": adapter.config.r,
        "lora_alpha": adapter.config.lora_alpha,
        "lora_target": targets,
    }
    given = {
        name: getattr(settings, name) for name in of_adapter.keys() & settings.model_fields_set
    }
    if given.get("lora_target"):
        asked = family.targets(given["lora_target"], shape)
        given["lora_target"] = tuple(name for name in shape.linear_names if name in asked)
    for name, value in given.items():
        kept = of_adapter[name]
        if value not in (None, kept):
            raise UserError(
                f"{name} {_words(value)}: the adapter {settings.adapter} has {_words(kept)}, which "
                f"a run that continues it keeps; leave {name} out, or adapter"
            )
    return settings.model_copy(update=of_adapter)


def _words(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else f"{value:g}"


def check_kind(model: PeftModel, layout: str, adapter: str) -> None:
    """Make sure that a run's passes can train an adapter of this kind.

    Args:
        model: the base with the adapter.
        layout: of the rows in a pass.
        adapter: what the message calls it.

    Raises:
        UserError: it is more than plain LoRA, which only padded rows train.
    """
    modules = (module for module in model.modules() if has_lora(module))
    if layout != "padded" and any(split_lora(module)[0] is module for module in modules):
        raise UserError(
            f"{adapter}: is a DoRA adapter, which rows laid end to end do not train; set layout "
            "padded and tokens_per_step none"
        )
