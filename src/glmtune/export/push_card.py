"""The card of an upload: base, data, recipe, scores with their intervals, cost and licence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import glmtune
from glmtune.config.settings import TrainSettings
from glmtune.errors import visible
from glmtune.evaluation.run_facts import RunFacts
from glmtune.export.card_parts import CARD_FILE, COMPARISON, front, licence, scores
from glmtune.export.parcel import Source
from glmtune.models.hubs import is_hub_id


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
        "## Scores\n\n" + _scores(source),
        "## Use\n\n" + _usage(source, repo_id),
        "## Licence\n\n"
        + licence(source.base_name, source.base_folder, rule.licence if rule else None),
    ]
    return "\n\n".join(parts) + "\n"


def _front(source: Source) -> str:
    rule = source.naming_rule
    return front(
        source.base_name,
        source.base_folder,
        library_name="peft" if source.adapter else None,
        license_name=rule.licence.replace(" ", "-").lower() if rule else None,
    )


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


def _scores(source: Source) -> str:
    """The scores of the comparison beside the adapter."""
    places = [source.named, *([source.adapter.path.parent] if source.adapter else [])]
    return scores(next((f for place in places if (f := place / COMPARISON).is_file()), None))


def _usage(source: Source, repo_id: str) -> str:
    base = source.base_name if is_hub_id(source.base_name) else "BASE"
    if source.adapter is None:
        return f"```sh\nglmtune chat --base {repo_id}\n```"
    return f"```sh\nglmtune chat --base {base} --adapter {repo_id}\n```"
