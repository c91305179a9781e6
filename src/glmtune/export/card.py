"""The card of an export: what it is, from what, how good, and by what it was opened again."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import glmtune
from glmtune.data.files import new_file, read_json_object
from glmtune.errors import UserError, note, visible
from glmtune.evaluation.run_facts import RunFacts
from glmtune.export.job import Job
from glmtune.export.reopening import Reopened
from glmtune.models.hubs import is_hub_id
from glmtune.models.resolve import base_name

CARD_FILE = "README.md"
COMPARISON = "compare/compare.json"
LICENCE_FILES = ("LICENSE*", "MODEL_LICENSE*", "LICENCE*")
"""Files of a base's folder that hold its licence; they are copied beside what is made of it."""
_NAMES = {"all": "all rows", "zh": "Chinese rows", "en": "English rows"}


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
    parts = [
        _front(job),
        f"# {source.name}",
        "\n".join(_origin(job, facts)),
        f"## Opened again\n\n{reopened.line}."
        + "".join(f"\n\n{line[0].upper()}{line[1:]}." for line in reopened.notes),
        f"## Use\n\n{usage}",
        "\n".join(["## Scores", "", *_scores(job)]),
        f"## Licence\n\n{_licence(job)}",
    ]
    with new_file(str(folder / CARD_FILE)) as file:
        file.write("\n\n".join(parts) + "\n")


def _front(job: Job) -> str:
    """The settings that hubs read at the head of a card."""
    base = base_name(job.source.base)
    found: dict[str, Any] = {"language": ["zh", "en"], "tags": ["glmtune", "lora"]}
    if is_hub_id(base) and "/" in base:
        found["base_model"] = base
    found |= licence_of(job.base_folder) or {"license": "other"}
    return "---\n" + yaml.safe_dump(found, sort_keys=False, allow_unicode=True) + "---"


def licence_of(base: Path) -> dict[str, Any]:
    """What the base's own card says of its licence, by the names of hubs; empty without."""
    card = base / CARD_FILE
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found, dict) and name in found}


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


def _scores(job: Job) -> Iterator[str]:
    """The scores of `glmtune compare` that lie beside the adapter, with their intervals."""
    adapter = job.source.adapter
    file = adapter / COMPARISON if adapter else None
    if file is None or not file.is_file():
        yield (
            "None: no comparison lies beside the adapter. "
            "`glmtune compare --adapter RUN --data_path ROWS` makes one."
        )
        return
    try:
        found = read_json_object(file)
        lines = [*_score_lines(found)]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        note(f"the card has no scores ({file}: {error})")
        lines = [f"None: {file.name} beside the adapter is damaged."]
    yield from lines


def _score_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{visible(found['sentence']['en'])} ({visible(str(found['date']))})"
    yield ""
    yield "| rows | score | base | tuned | difference, 95 % interval | rows scored |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for part, verdict in found["languages"].items():
        for name, one in verdict["metrics"].items():
            low, high = one["low"], one["high"]
            bounds = "" if low is None else f" ({low:+.3f} to {high:+.3f})"
            yield (
                f"| {_NAMES.get(part, part)} | {visible(name)} | {one['base']:.3f} | "
                f"{one['tuned']:.3f} | {one['difference']:+.3f}{bounds} | {one['n']} |"
            )


def _licence(job: Job) -> str:
    names = [file.name for pattern in LICENCE_FILES for file in job.base_folder.glob(pattern)]
    base = base_name(job.source.base)
    told = licence_of(job.base_folder).get("license_name") or licence_of(job.base_folder).get(
        "license"
    )
    where = f"; its text is in {', '.join(sorted(names))}" if names else "; see the base's page"
    return f"That of the base, {base}{f': {told}' if told else ''}{where}."
