"""What the cards of tuned models share: the head that hubs read, scores, the licence."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from glmtune.data.files import read_json_object
from glmtune.errors import UserError, note, visible
from glmtune.models.hubs import is_hub_id

CARD_FILE = "README.md"
COMPARISON = Path("compare", "compare.json")
LICENCE_FILES = ("LICENSE*", "MODEL_LICENSE*", "LICENCE*")
"""Files of a base's folder that hold its licence; they are copied beside what is made of it."""
_ROWS = {"all": "all rows", "zh": "Chinese rows", "en": "English rows"}


def front(base: str, folder: Path | None, **more: Any) -> str:
    """The settings at the head of a card.

    Args:
        base: its name, named as the origin where it is a hub id.
        folder: of the base, whose own card says under what licence it is.
        more: further settings, of which None is left out.
    """
    found: dict[str, Any] = {"language": ["zh", "en"], "tags": ["glmtune", "lora"]}
    if is_hub_id(base) and "/" in base:
        found["base_model"] = base
    found |= {"license": "other"} | {name: value for name, value in more.items() if value}
    found |= licence_of(folder)
    return "---\n" + yaml.safe_dump(found, sort_keys=False, allow_unicode=True) + "---"


def licence_of(folder: Path | None) -> dict[str, Any]:
    """What the card of a base's folder says of its licence, by the names of hubs."""
    card = folder / CARD_FILE if folder else None
    if card is None or not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    head, end, _ = text[4:].partition("\n---")
    if not (text.startswith("---\n") and end):
        return {}
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found, dict) and name in found}


def licence(base: str, folder: Path | None, otherwise: str | None = None) -> str:
    """The licence of a base, in a sentence.

    Args:
        base: its name.
        folder: of the base.
        otherwise: the licence where the folder's card names none.
    """
    files = [path.name for name in LICENCE_FILES for path in (folder.glob(name) if folder else ())]
    told = licence_of(folder)
    kind = told.get("license_name") or otherwise or told.get("license")
    where = f"its text is in {', '.join(sorted(files))}" if files else "see the base's page"
    return f"That of the base, {base}{f' ({kind})' if kind else ''}; {where}."


def scores(file: Path | None) -> str:
    """The scores of a compare.json with their intervals, as Markdown; damage is noted."""
    if file is None or not file.is_file():
        return (
            "None: no comparison lies beside the adapter "
            "(`glmtune compare --adapter RUN --data_path ROWS` makes one)."
        )
    try:
        return "\n".join(_score_lines(read_json_object(file)))
    except (UserError, KeyError, TypeError, AttributeError) as error:
        note(f"the card has no scores ({file}: {error})")
        return f"None: {file.name} beside the adapter is damaged."


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
                f"| {_ROWS.get(part, part)} | {visible(name)} | {one['base']:.3f} | "
                f"{one['tuned']:.3f} | {one['difference']:+.3f}{bounds} | {one['n']} |"
            )
