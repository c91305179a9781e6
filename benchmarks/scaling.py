"""How many times faster are 2 and 4 processes of one machine than one, and what does the plan say?

Trains glm-tiny on a CPU with one thread a process, as torchrun starts them, over gloo, in rounds
of 1, 2 and 4 processes by turns. The plan is given the speed of one process and the time of a sum
between two, both of the same rounds, and predicts the rest.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py FOLDER --rounds 3
"""

import argparse
import json
import os
import subprocess
import sys
import time
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


def work(folder: Path, name: str) -> None:
    """What each launched process does: train with each adapter, then time sums."""
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    speeds = {}
    for adapter in ADAPTERS:
        run = train(settings_of(folder, adapter, num_processes, f"{name}-{adapter}"))
        told = [record for record in run.log_history if "tokens_per_second" in record]
        speeds[adapter] = told[-1]["tokens_per_second"]  # of the second epoch
    sums = {}
    for size in MESSAGES if num_processes > 1 else ():
        array, seconds = torch.ones(size // 4), []
        for _ in range(30):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(array)
            seconds.append(time.perf_counter() - started)
        sums[size] = median(seconds[5:])
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps({"sums": sums, "speeds": speeds}))


def launch(folder: Path, num_processes: int, number: int) -> dict[str, Any]:
    """Start so many processes; gives their speeds and the times of their sums."""
    name = f"{num_processes}-{number}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={num_processes}", __file__, str(folder), "--work", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads((folder / f"{name}.json").read_text())
    result["sums"] = {int(size): seconds for size, seconds in result["sums"].items()}
    return result | {"load": os.getloadavg()[0]}


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


def measure(folder: Path, num_rounds: int) -> list[dict[str, Any]]:
    """A record for each adapter and number of processes: measured and predicted speed."""
    import datasets

    rows = random_rows(read_settings(GLM_TINY), NUM_ROWS)
    listed = [
        {"input_ids": rows[row].tolist(), "seq_len": int(rows.prompt_lengths_R[row])}
        for row in range(len(rows))
    ]
    datasets.Dataset.from_list(listed).save_to_disk(str(folder / "rows"))
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in PROCESSES}
    for number in range(num_rounds):
        for count in PROCESSES if number % 2 == 0 else reversed(PROCESSES):
            found[count].append(launch(folder, count, number))
    sums = {
        count: {size: median(one["sums"][size] for one in found[count]) for size in MESSAGES}
        for count in PROCESSES[1:]
    }
    link, cores = link_of_two(sums[2]), num_cores()
    records = []
    for adapter in ADAPTERS:
        one = median(round_["speeds"][adapter] for round_ in found[1])
        for count in PROCESSES[1:]:
            world = World(count, 1, link, link, cores)
            time_ = predict(folder, adapter, rows, one, world)
            ratios = [
                many["speeds"][adapter] / alone["speeds"][adapter]
                for many, alone in zip(found[count], found[1], strict=True)
            ]
            records.append(
                machine(torch.device("cpu"))
                | {
                    "adapter": adapter,
                    "processes": count,
                    "cores": cores,
                    "load": [round(one["load"], 1) for one in found[count]],
                    "one": one,
                    "measured": median(ratios),
                    "ratios": ratios,
                    "predicted": time_.speedup,
                    "off": time_.speedup / median(ratios) - 1,
                    "step": time_.step._asdict(),
                    "sums": sums[count],
                    "link": [link.bytes_per_second, link.latency],
                }
            )
    return records


def main() -> None:
    """Run it, or be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work")
    given = parser.parse_args()
    if given.work:
        work(given.folder, given.work)
        return
    given.folder.mkdir(parents=True)
    for record in measure(given.folder, given.rounds):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
