"""Write the tables of docs/cards.md and docs/cards.zh.md: what a card can train, and in what time.

    python tools/cards.py

The rows are random ones as long as Chinese alpaca records, so the tables need no data.
"""

from functools import cache, partial
from pathlib import Path

import torch

from glmtune.bench.rows import random_rows
from glmtune.config.settings import TrainSettings
from glmtune.data.token_rows import TokenRows
from glmtune.hardware import Card
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.training.plan import make_plan
from glmtune.training.planning.forecast import Forecast, forecast
from glmtune.training.planning.ranks import ALONE
from glmtune.training.planning.scaling import run_time

NUM_ROWS, NUM_EPOCHS = 20_000, 3.0
CARDS = {
    8: ("RTX 4060", "RTX 5060"),
    12: ("RTX 3060 12GB", "RTX 4070"),
    16: ("RTX 4060 Ti 16GB", "RTX 5080"),
    24: ("RTX 3090", "RTX 4090"),
    80: ("A100 80GB", "H100"),
}
"""GB on the box -> cards of that size."""
FLAGS: tuple[dict[str, str], ...] = ({}, {"quantization_bit": "4"})
"""Those with which a run fits, the first that do."""
PAGES = {
    Path("docs/cards.md"): (
        "| GB | card | flags | GiB | layers recomputed | rows a second | hours | time is |",
        {True: "measured", False: "computed"},
    ),
    Path("docs/cards.zh.md"): (
        "| 显存 GB | 显卡 | 参数 | GiB | 重算的层数 | 每秒行数 | 小时 | 时间来源 |",
        {True: "实测", False: "推算"},
    ),
}
START, END = "<!-- table: python tools/cards.py -->\n", "<!-- end of table -->"


def fitting(card: Card) -> tuple[dict[str, str], TrainSettings, Forecast]:
    """The flags with which ChatGLM-6B trains on a card, and what such a run then takes."""
    of_card = partial(
        forecast, config=ChatGLMConfig(), dtype=torch.bfloat16, card=card, rows=_rows()
    )
    for flags in FLAGS:
        settings = TrainSettings(
            dataset_path="rows", output_dir="run", num_train_epochs=NUM_EPOCHS, **flags
        )
        if (found := of_card(settings)).fits:
            return flags, settings, found
    raise AssertionError(f"nothing fits {card.name}")


def table(header: str, basis: dict[bool, str]) -> str:
    """The Markdown table.

    Args:
        header: its first line.
        basis: what to call a time that was measured, and one that was not.
    """
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    for size, names in CARDS.items():
        for name in names:
            flags, settings, found = fitting(Card.named(name))
            plan = make_plan(settings, _rows(), found.pack_length, num_processes=1)
            time = run_time(found, (plan, plan), _rows(), settings, ALONE)
            written = " ".join(f"--{flag} {value}" for flag, value in flags.items())
            cells = (
                size, name, f"`{written}`" if written else "", f"{found.needed_gib:.1f}",
                found.recompute, f"{time.rows_per_second:.3g}", f"{time.hours:.2g}",
                basis[time.measured],
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, header: str, basis: dict[bool, str]) -> str:
    """A page's text with its table made anew."""
    before, rest = page.split(START)
    return before + START + table(header, basis) + END + rest.split(END)[1]


@cache
def _rows() -> TokenRows:
    return random_rows(ChatGLMConfig(), NUM_ROWS)


def main() -> None:
    """Write both pages, from the repository's root."""
    for path, words in PAGES.items():
        path.write_text(with_table(path.read_text("utf-8"), *words), encoding="utf-8")


if __name__ == "__main__":
    main()
