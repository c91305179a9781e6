"""The card of an upload: base, data, recipe, scores with their intervals, cost and licence."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import glmtune
from glmtune.config.settings import TrainSettings
from glmtune.data.files import read_json_object
from glmtune.errors import UserError, note, visible
from glmtune.evaluation.run_facts import RunFacts
from glmtune.export.parcel import CARD_FILE, LICENCE_FILES, Source
from glmtune.models.hubs import is_hub_id

COMPARISON = ("compare", "compare.json")
_ROWS = {"all": "all rows", "zh": "Chinese rows", "en": "English rows"}


def card_of(source: Source, repo_id: str) -> str:
    """README.md of an upload: that of an export, or one made of what lies beside an adapter."""
    rule = source.naming_rule
    if source.adapter is None and (own := source.named / CARD_FILE).is_file():
        text = own.read_text(encoding="utf-8")
        if rule and rule.notice not in text:
            text += f"\n{rule.notice}.\n"
        return text
    facts = RunFacts.of(source.adapter.path.parent) if source.adapter else None
    parts = [
        _front(source),
        f"# {repo_id.partition('/')[2]}",
        *([f"{rule.notice}."] if rule else []),
        "\n".join(_origin(source, facts)),
        *(["## Recipe\n\n" + _recipe(facts.recipe)] if facts and facts.recipe else []),
        "## Scores\n\n" + "\n".join(_scores(source)),
        "## Use\n\n" + _usage(source, repo_id),
        "## Licence\n\n" + _licence(source),
    ]
    return "\n\n".join(parts) + "\n"


def _front(source: Source) -> str:
    """The settings that hubs read at the head of a card."""
    found: dict[str, Any] = {"language": ["zh", "en"], "tags": ["glmtune", "lora"]}
    if source.adapter is not None:
        found["library_name"] = "peft"
    if is_hub_id(source.base_name):
        found["base_model"] = source.base_name
    found |= _licence_of(source.base_folder) or {"license": "other"}
    if source.naming_rule and "license_name" not in found:
        found["license_name"] = source.naming_rule.licence.replace(" ", "-").lower()
    return "---\n" + yaml.safe_dump(found, sort_keys=False, allow_unicode=True) + "---"


def _licence_of(folder: Path | None) -> dict[str, Any]:
    """What the base's own card says of its licence, by the names of hubs; empty without."""
    card = folder / CARD_FILE if folder else None
    if card is None or not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    head = text[4:].partition("\n---")[0] if text.startswith("---\n") else ""
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found, dict) and name in found}


def _origin(source: Source, facts: RunFacts | None) -> Iterator[str]:
    family = f" ({source.family.name})" if source.family else ""
    yield f"- Base: {source.base_name}{family}"
    if source.adapter is not None:
        yield f"- Adapter: {len(source.adapter.modules)} modules, sha256 {source.adapter.digest()}"
    if facts:
        yield from (f"- {label}: {visible(str(value))}" for label, value in facts.trained.items())
        yield from (f"- {label}: {value}" for label, value in facts.cost.items())
    else:
        yield "- Trained on: not recorded beside the adapter"
    yield f"- Made by glmtune {glmtune.__version__}"


def _recipe(recipe: TrainSettings) -> str:
    """The settings of the run that are not defaults; of paths the last name alone."""

    def shown(value: Any) -> Any:
        if isinstance(value, str):
            return value if is_hub_id(value) else Path(value).name
        return [*map(shown, value)] if isinstance(value, tuple) else value

    given = recipe.model_dump(exclude_defaults=True)
    text = yaml.safe_dump({name: shown(value) for name, value in given.items()}, sort_keys=False)
    return f"```yaml\n{text}```"


def _scores(source: Source) -> Iterator[str]:
    """The scores of `glmtune compare` that lie beside the adapter, with their intervals."""
    places = [source.named, *([source.adapter.path.parent] if source.adapter else [])]
    file = next((f for place in places if (f := place.joinpath(*COMPARISON)).is_file()), None)
    if file is None:
        yield "None: no comparison lies beside it (`glmtune compare --adapter RUN` makes one)."
        return
    try:
        yield from _score_lines(read_json_object(file))
    except (UserError, KeyError, TypeError, AttributeError) as error:
        note(f"the card has no scores ({file}: {error})")
        yield f"None: {file.name} is damaged."


def _score_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{visible(found['sentence']['en'])} ({visible(str(found['date']))})",
        "",
        "| rows | score | base | tuned | difference, 95 % interval | rows scored |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for part, verdict in found["languages"].items():
        for name, one in verdict["metrics"].items():
            low, high = one["low"], one["high"]
            bounds = "" if low is None else f" ({low:+.3f} to {high:+.3f})"
            lines.append(
                f"| {_ROWS.get(part, part)} | {visible(name)} | {one['base']:.3f} | "
                f"{one['tuned']:.3f} | {one['difference']:+.3f}{bounds} | {one['n']} |"
            )
    return lines


def _usage(source: Source, repo_id: str) -> str:
    base = source.base_name if is_hub_id(source.base_name) else "BASE"
    if source.adapter is None:
        return f"```sh\nglmtune chat --base {repo_id}\n```"
    return f"```sh\nglmtune chat --base {base} --adapter {repo_id}\n```"


def _licence(source: Source) -> str:
    folder = source.base_folder
    names = [path.name for name in LICENCE_FILES for path in (folder.glob(name) if folder else ())]
    told = _licence_of(folder)
    rule = source.naming_rule
    kind = told.get("license_name") or told.get("license") or (rule.licence if rule else None)
    where = f"its text is in {', '.join(sorted(names))}" if names else "see the base's page"
    return f"That of the base, {source.base_name}{f' ({kind})' if kind else ''}; {where}."
