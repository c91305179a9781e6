"""The card of an export: what it is, from what, how good, and by what it was opened again."""

from collections.abc import Iterator
from pathlib import Path

import glmtune
from glmtune.data.files import new_file
from glmtune.errors import visible
from glmtune.evaluation.run_facts import RunFacts
from glmtune.export.card_parts import CARD_FILE, COMPARISON, front, licence, scores
from glmtune.export.job import Job
from glmtune.export.reopening import Reopened
from glmtune.models.resolve import base_name


def write_card(job: Job, folder: Path, reopened: Reopened, usage: str) -> None:
    """Write README.md of an export.

    Args:
        job: what was exported.
        folder: where to.
        reopened: how it was opened again.
        usage: how to run it, as Markdown.
    """
    source = job.source
    facts = RunFacts.of(source.adapter) if source.adapter else None
    base = base_name(source.base)
    parts = [
        front(base, job.base_folder),
        f"# {source.name}",
        "\n".join(_origin(job, facts)),
        f"## Opened again\n\n{reopened.line}."
        + "".join(f"\n\n{line[0].upper()}{line[1:]}." for line in reopened.notes),
        f"## Use\n\n{usage}",
        f"## Scores\n\n{scores(source.adapter / COMPARISON if source.adapter else None)}",
        f"## Licence\n\n{licence(base, job.base_folder)}",
    ]
    with new_file(str(folder / CARD_FILE)) as file:
        file.write("\n\n".join(parts) + "\n")


def _origin(job: Job, facts: RunFacts | None) -> Iterator[str]:
    source = job.source
    yield f"- Base: {base_name(source.base)} ({job.family.name})"
    if source.adapter is None:
        yield "- Adapter: none, or merged before"
    else:
        yield f"- Adapter: {source.name}, sha256 {job.adapter.digest()}"
    yield f"- Target: {source.settings.to}"
    if facts:
        yield from (f"- {label}: {visible(str(value))}" for label, value in facts.trained.items())
        yield from (f"- {label}: {value}" for label, value in facts.cost.items())
    yield f"- Made by glmtune {glmtune.__version__}; its models are in `pip install glmtune`"
