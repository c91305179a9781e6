"""How many times faster are 2 and 4 processes of one machine than one, and what does the plan say?

Trains glm-tiny on a CPU with one thread a process, as torchrun starts them, over gloo. Three groups
of 1, 2 and 4 processes are started once and take turns, while the others sleep. The plan is given
the speed of one process and the time of a sum between two, both of the same rounds, and predicts
the rest.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py FOLDER --rounds 3
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from glmtune.bench.rows import random_rows
from glmtune.bench.timing import machine
from glmtune.config.settings import TrainSettings
from glmtune.data.token_rows import TokenRows
from glmtune.hardware import FLOAT32, Card, num_cores
from glmtune.models.base_files import read_settings
from glmtune.models.resolve import GLM_TINY
from glmtune.training.loop import train
from glmtune.training.passes import PaddedPass
from glmtune.training.plan import make_plan
from glmtune.training.planning.forecast import forecast
from glmtune.training.planning.ranks import Link, World
from glmtune.training.planning.scaling import RunTime, run_time

PROCESSES = (1, 2, 4)
NUM_ROWS = 102  # 17 passes of six rows: the last step of an epoch has fewer for 2 and for 4
ADAPTERS: dict[str, dict[str, Any]] = {
    "small": {"lora_rank": 8},
    "large": {"lora_rank": 64, "lora_target": "all"},
}
Turn = dict[str, Any]
"""What a group of processes measured in its turn."""
MESSAGES = (8, 4_000_000)
"""Bytes of the sums that are timed."""


def settings_of(folder: Path, adapter: str, num_processes: int, name: str) -> TrainSettings:
    """A run of two epochs, which logs the speed of each."""
    size = TrainSettings.model_fields["per_device_train_batch_size"].default
    steps = -(-NUM_ROWS // (size * num_processes))
    return TrainSettings(
        dataset_path=str(folder / "rows"),
        output_dir=str(folder / name),
        base=GLM_TINY,
        use_cpu=True,
        max_steps=2 * steps,
        logging_steps=steps,
        save_steps=10_000,
        report_to="none",
        general_set=False,
        disable_tqdm=True,
        **ADAPTERS[adapter],
    )


def work(folder: Path, num_processes: int) -> None:
    """What each launched process does, turn after turn: train with each adapter, then time sums."""
    done, turn = "", ""
    while (turn := (folder / "turn").read_text()) != "end":
        if turn == done or not turn.startswith(f"{num_processes}-"):
            time.sleep(0.05)
            continue
        result = measure_turn(folder, num_processes, turn)
        if os.environ["RANK"] == "0":
            (folder / f"{turn}.draft").write_text(json.dumps(result))
            (folder / f"{turn}.draft").rename(folder / f"{turn}.json")
        done = turn


def measure_turn(folder: Path, num_processes: int, turn: str) -> Turn:
    """With each adapter, the speed of the second epoch and of passes alone; the seconds of sums."""
    speeds, passes = {}, {}
    for adapter in ADAPTERS:
        with timed_passes() as (tokens, seconds):
            run = train(settings_of(folder, adapter, num_processes, f"{turn}-{adapter}"))
        logged = [record for record in run.log_history if "tokens_per_second" in record]
        speeds[adapter] = logged[-1]["tokens_per_second"]
        half = len(seconds) // 2  # the second epoch
        work = torch.tensor([sum(tokens[half:]), sum(seconds[half:])])
        if num_processes > 1:
            dist.all_reduce(work)
        passes[adapter] = float(work[0] / work[1])
    sums = {}
    for size in MESSAGES if num_processes > 1 else ():
        array, seconds = torch.ones(size // 4), []
        for _ in range(30):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(array)
            seconds.append(time.perf_counter() - started)
        sums[str(size)] = median(seconds[5:])
    return {"sums": sums, "speeds": speeds, "passes": passes, "load": os.getloadavg()[0]}


@contextmanager
def timed_passes() -> Iterator[tuple[list[int], list[float]]]:
    """The tokens and the seconds of each pass that this process makes meanwhile."""
    tokens: list[int] = []
    seconds: list[float] = []
    plain = PaddedPass.run

    def timed(self: PaddedPass, row_ids: Any, *how: Any) -> Any:
        started = time.perf_counter()
        result = plain(self, row_ids, *how)
        seconds.append(time.perf_counter() - started)
        tokens.append(len(row_ids) * int(self.rows.lengths_R[row_ids].max()))
        return result

    PaddedPass.run = timed  # type: ignore[method-assign]
    try:
        yield tokens, seconds
    finally:
        PaddedPass.run = plain  # type: ignore[method-assign]


def launch(folder: Path, num_processes: int) -> "subprocess.Popen[bytes]":
    """Start a group of processes, which wait for their turn."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={num_processes}", __file__, str(folder)]
    command += ["--work", str(num_processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / f"{num_processes}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def take_turn(folder: Path, turn: str, group: "subprocess.Popen[bytes]") -> None:
    """Let a group have its turn, and wait for its file."""
    (folder / "draft").write_text(turn)
    (folder / "draft").rename(folder / "turn")
    while not (folder / f"{turn}.json").exists():
        assert group.poll() is None, f"a process ended: see {folder}/*.log"
        time.sleep(0.1)


def link_of_two(sums: dict[int, float]) -> Link:
    """The link with which two processes take as long as measured: bytes / rate + 2 latencies."""
    few, many = MESSAGES
    rate = (many - few) / max(sums[many] - sums[few], 1e-9)
    return Link(rate, max(sums[few] - few / rate, 0.0) / 2)


def predict(folder: Path, adapter: str, rows: TokenRows, speed: float, world: World) -> RunTime:
    """What the plan says of these processes, from the speed of one and the link of two."""
    settings = settings_of(folder, adapter, world.num_ranks, "planned")
    card = Card("CPU", 0, 0, None)
    now = forecast(settings, read_settings(GLM_TINY), FLOAT32, card, rows, world.num_ranks)
    plans = tuple(make_plan(settings, rows, now.pack_length, n) for n in (world.num_ranks, 1))
    return run_time(now, plans, rows, settings, world, measured_speed=speed)


def rows_of() -> TokenRows:
    """The rows to train on."""
    return random_rows(read_settings(GLM_TINY), NUM_ROWS)


def measure(folder: Path, num_rounds: int) -> None:
    """Let the groups take their turns, round after round; each turn writes a file."""
    import datasets

    rows = rows_of()
    listed = [
        {"input_ids": rows[row].tolist(), "seq_len": int(rows.prompt_lengths_R[row])}
        for row in range(len(rows))
    ]
    datasets.Dataset.from_list(listed).save_to_disk(str(folder / "rows"))
    (folder / "turn").write_text("")
    groups = {count: launch(folder, count) for count in PROCESSES}
    for number in range(num_rounds + 1):  # the first round warms up
        for count in PROCESSES if number % 2 == 0 else reversed(PROCESSES):
            take_turn(folder, f"{count}-{number}", groups[count])
    (folder / "turn").write_text("end")
    for group in groups.values():
        group.wait()


def read_turn(folder: Path, num_processes: int, number: int) -> Turn:
    """What a group measured in a round."""
    turn = json.loads((folder / f"{num_processes}-{number}.json").read_text())
    turn["sums"] = {int(size): seconds for size, seconds in turn["sums"].items()}
    return turn | {"processes": num_processes}


def compare_rounds(folder: Path, num_rounds: int) -> list[dict[str, Any]]:
    """A record for each adapter and number of processes: medians, and the error of each round."""
    rows, rounds_ = rows_of(), range(1, num_rounds + 1)
    found = {count: [read_turn(folder, count, n) for n in rounds_] for count in PROCESSES}
    records = []
    for adapter in ADAPTERS:
        for count in PROCESSES[1:]:
            rounds = [
                compare(folder, adapter, rows, *turns)
                for turns in zip(found[1], found[2], found[count], strict=True)
            ]
            middle = {name: median(one[name] for one in rounds) for name in rounds[0]}
            loads = [round(turn["load"], 1) for turn in found[count]]
            facts = {"adapter": adapter, "processes": count, "cores": num_cores(), "load": loads}
            record = machine(torch.device("cpu")) | facts | middle
            each = [round(one["off, cores as measured"], 3) for one in rounds]
            ratios = [round(one["measured"], 2) for one in rounds]
            records.append(record | {"of each round": ratios, "off, of each round": each})
    return records


def compare(
    folder: Path, adapter: str, rows: TokenRows, alone: Turn, two: Turn, many: Turn
) -> dict[str, float]:
    """Speedups of one round: measured, and predicted with the cores counted and as measured.

    Other programs take part of the cores, and which part depends on how many processes ask. So the
    slowdown of a pass is also measured, from the passes of the same turns.
    """
    link, count = link_of_two(two["sums"]), many["processes"]
    measured = many["speeds"][adapter] / alone["speeds"][adapter]
    slowdown = alone["passes"][adapter] / many["passes"][adapter]
    found = {"measured": measured, "slowdown": slowdown, "sum": many["sums"][MESSAGES[1]]}
    # Where other programs left the one process less than each of several, it was slower than they.
    given = alone["speeds"][adapter] / min(1.0, slowdown)
    for name, cores, speed in (
        ("counted", num_cores(), alone["speeds"][adapter]),
        ("as measured", count / max(1.0, slowdown), given),
    ):
        world = World(count, 1, link, link, cores)
        time_ = predict(folder, adapter, rows, speed, world)
        predicted = time_.tokens_per_second / alone["speeds"][adapter]
        found |= {
            f"predicted, cores {name}": predicted,
            f"off, cores {name}": predicted / measured - 1,
            f"sum, cores {name}": world.sum_seconds(MESSAGES[1]),
        }
    return found


def main() -> None:
    """Run it, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=int)
    parser.add_argument("--read", action="store_true", help="compare rounds of an earlier call")
    given = parser.parse_args()
    if given.work:
        work(given.folder, given.work)
        return
    if not given.read:
        given.folder.mkdir(parents=True)
        measure(given.folder, given.rounds)
    for record in compare_rounds(given.folder, given.rounds):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
