"""A forecast as text: whether a run fits, and which settings would make it fit."""

from dataclasses import dataclass
from typing import Any

from glmtune.config.settings import TrainSettings
from glmtune.data.packing import PACK_MULTIPLE
from glmtune.errors import UserError
from glmtune.hardware import GIB
from glmtune.runlog import print_pairs
from glmtune.training.planning.forecast import PACK_SPEEDS, Forecast, Forecaster
from glmtune.training.planning.memory import Setup


@dataclass(frozen=True)
class Remedy:
    """Settings that would make a run fit."""

    settings: dict[str, Any]
    least_gib: float
    needed_gib: float
    """Forecast with these settings, where spare memory is spent on speed."""

    def __str__(self) -> str:
        """The settings as a line of advice."""
        names = ", ".join(f"{name} {_spell(value)}" for name, value in self.settings.items())
        least, needed = f"{self.least_gib:.1f}", f"{self.needed_gib:.1f}"
        if least == needed:
            return f"{names} would take {needed} GiB"
        return f"{names} would take {least} GiB at least, {needed} to go faster"


def find_remedies(settings: TrainSettings, forecaster: Forecaster) -> list[Remedy]:
    """Changes of settings with which a run fits, those first that change the run least.

    One setting at a time; if no single one is enough, all that save memory together.
    """
    now, smaller = forecaster(settings), _smaller_steps(settings, forecaster)
    singles = [*smaller, {"gradient_checkpointing": True}]
    if now.layout == "padded" and now.card.on_gpu:
        singles.insert(0, {"layout": "exact"})
    bits: list[dict[str, Any]] = [
        {"quantization_bit": "8"},
        {"quantization_bit": "4"},
        {"quantization_bit": "4", "quantize_head": True},
    ]
    if settings.shard_base:  # which goes with 4 bits alone
        bits = bits[1:2]
    elif settings.base_dtype == "auto" and settings.bits != 8 and not settings.quantize_head:
        singles.insert(0, {"shard_base": True})  # helps several processes
    if settings.base_dtype == "auto":
        singles += bits
    tried = [_try(settings, change, forecaster) for change in singles]
    remedies = [remedy for remedy in tried if remedy]
    if remedies:
        return _without_repeats(remedies)
    together: dict[str, Any] = {"gradient_checkpointing": True}
    if settings.base_dtype == "auto":
        together |= bits[-1]
    for step in ({}, *smaller):
        if remedy := _try(settings, together | step, forecaster):
            return [remedy]
    return []


def _try(settings: TrainSettings, change: dict[str, Any], forecaster: Forecaster) -> Remedy | None:
    if all(getattr(settings, name) == value for name, value in change.items()):
        return None
    changed = forecaster(settings.model_copy(update=change))
    helps = changed.fits and changed.needed_gib < forecaster(settings).needed_gib
    least_gib = changed.least.needed_gib
    return Remedy(change, least_gib, changed.needed_gib) if helps else None


def _smaller_steps(settings: TrainSettings, forecaster: Forecaster) -> list[dict[str, Any]]:
    """Fewer tokens or rows a pass, halved each time, largest first."""
    now = forecaster(settings)
    if now.pack_length:
        lengths = [*PACK_SPEEDS, 512, 256, 128, PACK_MULTIPLE]
        return [{"tokens_per_step": length} for length in lengths if length < now.pack_length]
    size = settings.per_device_train_batch_size
    counted = "passes_per_step" if settings.passes_per_step else "gradient_accumulation_steps"
    passes = getattr(settings, counted)
    sizes = [fewer for fewer in range(size - 1, 0, -1) if size % fewer == 0]
    return [
        {"per_device_train_batch_size": fewer, counted: passes * size // fewer} for fewer in sizes
    ]


def _without_repeats(remedies: list[Remedy]) -> list[Remedy]:
    """Keep the first of the remedies that change the same settings."""
    first: dict[tuple[str, ...], Remedy] = {}
    for remedy in remedies:
        first.setdefault(tuple(remedy.settings), remedy)
    return list(first.values())


def print_forecast(forecast: Forecast, settings: TrainSettings, base: str) -> None:
    """Print the memory that a run needs, part by part, and whether that fits."""
    lying = {"padded": "padded rows", "exact": "rows end to end", "packed": "packs"}
    targets = ", ".join(forecast.setup.targets)
    print_pairs(
        f"Memory for {base} with rank {forecast.setup.rank} on {targets}, "
        f"in {lying[forecast.layout]}",
        {"lora": reach_words(forecast.setup), **describe(forecast)},
    )


def reach_words(setup: Setup) -> str:
    """What `lora_target` reaches, of what an adapter of that rank on all linears would have."""
    shape = setup.shape
    most = shape.adapter_parameters(setup.rank, shape.linear_names)
    return (
        f"reaches {_spell_count(setup.parameters())} of {_spell_count(most)}: "
        f"{', '.join(setup.targets)} in {shape.num_layers} layers"
    )


def _spell_count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def describe(forecast: Forecast) -> dict[str, str]:
    """The parts of a forecast, for `print_pairs`."""
    parts, setup = forecast.estimate, forecast.setup
    dtype = str(setup.dtype).removeprefix("torch.")
    held = f"{setup.bits} bits" if setup.bits else "float8" if setup.is_fp8 else dtype
    held += ", embedding and head in 8 bits" if setup.quantize_head else ""
    if setup.num_shares > 1:
        held += f", one of {setup.num_shares} shares"
    pairs = {
        "at least": f"{forecast.least.needed_gib:7.2f} GiB  in all, {passes_words(forecast.least)}",
        "weights": _size(parts.weights, held),
        "adapter": _size(parts.adapter, f"{setup.parameters():,} parameters and their gradients"),
        "optimiser": _size(parts.optimiser, "two moments of each"),
        "activations": _size(parts.activations, passes_words(forecast)),
        "logits": _size(parts.logits, f"{setup.shape.vocab_size:,} ids"),
    }
    if parts.way_back >= 0.005 * GIB:
        pairs["backward pass"] = _size(
            parts.way_back, "gradients within a layer, beyond the logits"
        )
    if parts.buffers:
        weight = ", one weight as floats" if setup.bits else ""
        layers = ", weights that are gathered" if setup.num_shares > 1 else ""
        pairs["buffers"] = _size(parts.buffers, f"workspaces of the libraries{weight}{layers}")
    pairs["at most"] = _size(parts.allocated, "allocated")
    if forecast.frugal:
        more = parts.needed - forecast.frugal.estimate.needed
        pairs["spent"] = _size(more, "more than the least, to go faster")
    pairs["on the card" if setup.on_gpu else "in all"] = verdict(forecast)
    return pairs


def passes_words(forecast: Forecast) -> str:
    """How much is computed at once, and how many layers are recomputed."""
    return f"{forecast.batch.num_tokens:,} tokens a pass, {recompute_words(forecast)}"


def recompute_words(forecast: Forecast) -> str:
    """How many layers are recomputed."""
    num_layers = forecast.setup.shape.num_layers
    if not forecast.recompute:
        return "recomputing no layer"
    return f"recomputing {forecast.recompute} of {num_layers} layers"


def verdict(forecast: Forecast) -> str:
    """Whether it fits, in a few words."""
    card, needed = forecast.card, forecast.needed_gib
    text = f"{needed:.1f} GiB"
    if not card.gib:
        return f"{text}; the memory of {card.name} is not known"
    taken = card.gib - card.free_gib
    others = f", {taken:.1f} taken by other programs" if taken > 0.05 * card.gib else ""
    text += f" of {card.gib:.1f} ({card.name}{others}): "
    if forecast.fits:
        return text + "fits"
    return text + ("does not fit" if forecast.cannot_fit else "may not fit")


def check_fit(forecast: Forecast, settings: TrainSettings, forecaster: Forecaster) -> None:
    """Refuse a run that cannot fit even if the estimate is a tenth too high.

    Raises:
        UserError: the run cannot fit.
    """
    if forecast.cannot_fit:
        raise UserError(f"memory: {verdict(forecast)}; {advise(settings, forecaster)}")


def advise(settings: TrainSettings, forecaster: Forecaster) -> str:
    """What to change, in one line."""
    remedies = find_remedies(settings, forecaster)
    if not remedies:
        return "no setting makes it fit: take a larger card, or a smaller base model"
    return "; or ".join(map(str, remedies[:4]))


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(size: float, what: str) -> str:
    in_gib = size >= 0.1 * GIB
    number, unit = (size / GIB, "GiB") if in_gib else (size / 2**20, "MiB")
    return f"{number:7.2f} {unit}  {what}"
