"""The time and the price of a run as text, with what they assume."""

from glmtune.config.settings import PlanSettings
from glmtune.hardware import GIB, Card
from glmtune.training.planning.forecast import Forecast
from glmtune.training.planning.ranks import Link, World, gradient_bytes
from glmtune.training.planning.scaling import (
    DISK_BYTES_PER_SECOND,
    NETWORK_SHARE,
    RunTime,
    gathering_seconds,
    spell_hours,
)

_LEAST_TOLD = 1.0
"""GiB of rows in a process that are worth a word."""


def describe_time(time: RunTime, basis: str) -> dict[str, str]:
    """The speed and the length of the steps, for `print_pairs`.

    Args:
        time: of the run.
        basis: where the speed comes from.
    """
    return {
        "speed": f"{time.rows_per_second:,.1f} rows a second, "
        f"{time.tokens_per_second:,.0f} tokens ({basis}; docs/cards.md)",
        "run": f"{spell_hours(time.hours)} for {time.num_steps:,} steps, {time.num_epochs:.2g} x "
        f"{time.num_rows:,} rows",
    }


def name_world(card: Card, world: World) -> str:
    """The processes in a few words, such as "2 nodes of 8 x H200"."""
    nodes = "1 node" if world.nodes == 1 else f"{world.nodes:,} nodes"
    return f"{nodes} of {world.gpus} x {card.name}"


def describe_world(
    time: RunTime, forecast: Forecast, world: World, settings: PlanSettings
) -> dict[str, str]:
    """What several processes gain and lose, and what is assumed of them, for `print_pairs`."""
    num_ranks, step = world.num_ranks, time.step
    size = gradient_bytes(forecast.setup.parameters()) / 1e6
    base, held = forecast.estimate.weights / GIB, "holds and reads the whole base"
    if forecast.setup.num_shares > 1:
        held = "reads the whole base, and holds a share of it"
    rows, reads = time.row_bytes / GIB, "and reads all rows"
    if rows >= _LEAST_TOLD:
        reads += f", for which its host takes {rows:,.1f} GiB, {world.gpus * rows:,.1f} a node"
    pairs = {
        "step": f"{_spell_seconds(step.all)}: {_spell_seconds(step.passes)} the heaviest card's "
        f"passes (the mean card waits {_spell_seconds(step.waiting)}), "
        f"{_spell_seconds(step.summing)} the sum of {size:,.1f} MB a card",
        "speedup": f"{time.speedup:.1f} times one card, {100 * time.speedup / num_ranks:.0f} % of "
        f"{num_ranks:,} times",
        "batch": f"{num_ranks:,} times that of one card: {time.num_steps:,} steps where that takes "
        f"{time.steps_of_one:,}",
        "each card": f"{held}, {base:.1f} GiB, {world.gpus * base:.1f} a node, {reads}",
    }
    if gathering := gathering_seconds(forecast, world):
        pairs["gathering"] = (
            f"{_spell_seconds(gathering)} of each pass, in which the other shares come twice"
        )
    if time.num_evaluations:
        pairs["evaluating"] = (
            f"{spell_hours(time.evaluation_hours)} in all, {time.num_evaluations:,} time(s), "
            "shared by the cards"
        )
    pairs["saving"] = (
        f"{spell_hours(time.saving_hours)} in all, {time.num_saves:,} checkpoint(s) by one "
        "process, for which the others wait"
    )
    pairs["in all"] = f"{spell_hours(time.whole_hours)} with {_spell_start(time)} to start"
    pairs["links"] = ", ".join(_links(world, settings))
    pairs["assumed"] = "; ".join(_assumptions(world))
    return pairs


def _links(world: World, settings: PlanSettings) -> list[str]:
    """What joins the processes."""
    links = []
    if world.gpus > 1:
        links.append(f"{_spell_link(world.inside)} within a node")
    if world.nodes > 1:
        share = f"{NETWORK_SHARE:.0%} of --network_gbit {settings.network_gbit:g}"
        links.append(f"{_spell_link(world.between)} between nodes ({share})")
    return links


def _assumptions(world: World) -> list[str]:
    """What a plan takes for granted beside the links."""
    assumed = ["the links; sums in a ring, after the last pass of a step"]
    if world.cores:
        shared = f"{world.gpus} processes on {world.cores:g} core(s), one thread each"
        more = f", so each pass takes {world.sharing:g} times as long" if world.sharing > 1 else ""
        assumed.append(shared + more)
    return [*assumed, f"checkpoints at {DISK_BYTES_PER_SECOND / 1e9:g} GB/s; docs/scaling.md"]


def describe_price(price: float, time: RunTime, world: World, price_per_hour: float) -> str:
    """What a run costs, and how that is computed."""
    return (
        f"{price:,.2f} = {time.whole_hours:,.3f} hours x {world.num_ranks:,} card(s) x "
        f"{price_per_hour:g} (with {_spell_start(time)} to start, evaluations and checkpoints)"
    )


def _spell_start(time: RunTime) -> str:
    seconds = 3600 * time.start_hours
    return f"{seconds:.0f} s" if seconds < 120 else spell_hours(time.start_hours)


def _spell_link(link: Link) -> str:
    return f"{link.bytes_per_second / 1e9:.1f} GB/s and {1e6 * link.latency:.0f} us a message"


def _spell_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
