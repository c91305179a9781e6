"""The models that a server offers: a base, its adapters, and two of them at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.adapters.find import find_adapter
from glmtune.config.serving import ServeSettings
from glmtune.evaluation.answers import ModelChoice, name_of_adapter
from glmtune.evaluation.chat import taught_format
from glmtune.evaluation.conversation import CHAT
from glmtune.generation import Decoder, find_stop_ids
from glmtune.generation.mixed import BASE as NO_ADAPTER
from glmtune.generation.mixed import read_adapters

BASE, BOTH = "base", "both"


@dataclass(frozen=True)
class Side:
    """Weights that answer: the base, or it with an adapter."""

    name: str
    adapter: int
    """The adapter's number in a batch, 0 for the base."""
    format: str
    """How it is asked: "chat" as the family's chat models are, or "alpaca"."""
    folder: str | None = None
    """The last name of the adapter's folder."""


@dataclass(frozen=True)
class Model:
    """What a request may name: one side, or the base and an adapter at once."""

    name: str
    kind: str
    """"base", "adapter" or "both"."""
    sides: tuple[Side, ...]


def offer(sides: Sequence[Side]) -> dict[str, Model]:
    """The models of a base and its adapters, by name.

    Args:
        sides: the base first.
    """
    base, *adapters = sides
    models = [Model(BASE, "base", (base,))]
    models += [Model(side.name, "adapter", (side,)) for side in adapters]
    if adapters:
        models.append(Model(BOTH, "both", (base, adapters[0])))
    if len(adapters) > 1:
        models += [Model(f"{BOTH}:{side.name}", "both", (base, side)) for side in adapters]
    return {model.name: model for model in models}


@dataclass(frozen=True)
class Loaded:
    """A decoder with all adapters, and what it answers as."""

    model: Any
    decoder: Decoder
    tokenizer: Any
    models: dict[str, Model]
    base: str
    """What the base is called; never a path."""


def load(settings: ServeSettings) -> Loaded:
    """Load the base and put the adapters beside it.

    Raises:
        UserError: base or an adapter cannot be read, or they do not belong together.
    """
    folders = {name: find_adapter(folder) for name, folder in settings.adapters.items()}
    choice = ModelChoice.to_serve(settings, folders.values())
    base, tokenizer = choice.load()
    adapters = read_adapters([choice.with_adapter(folder) for folder in folders.values()], base)
    decoder = Decoder(
        base,
        find_stop_ids(base),
        bits=settings.decoder_bits,
        compiled=settings.decode_compile,
        device=choice.device,
        separate=True,
        adapters=adapters if folders else None,
    )
    sides = [Side(BASE, NO_ADAPTER, CHAT)]
    sides += [
        Side(name, number, taught_format(folder)[0], _last_name(folder))
        for number, (name, folder) in enumerate(folders.items(), start=1)
    ]
    return Loaded(base, decoder, tokenizer, offer(sides), choice.identity()["base"])


def _last_name(folder: Path) -> str:
    return name_of_adapter(folder)
