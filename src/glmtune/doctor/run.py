"""`glmtune doctor`: every check, a line each, before time is spent on a run."""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from glmtune import __version__
from glmtune.config.reading import recipe_verbs
from glmtune.config.settings import DoctorSettings, TrainSettings
from glmtune.data.files import read_text, write_json
from glmtune.doctor import environment
from glmtune.doctor.explain import errors_page, explain, find_known
from glmtune.doctor.findings import OK, PROBLEM, WARNING, Check, CheckLine, Finding, run_check
from glmtune.errors import UserError


def doctor(settings: DoctorSettings) -> int:
    """Check everything a run needs, or explain an error message; print it.

    Returns:
        The exit code: 1 where a problem was found, else 0.

    Raises:
        UserError: an error text is not known, or a report cannot be written.
    """
    if settings.errors:
        print(errors_page(), end="")
        return 0
    if settings.explain is not None:
        return _explain(settings.explain)
    findings = []
    for finding in examine(settings):
        print(finding, flush=True)
        findings.append(finding)
    counts = {s: sum(f.status == s for f in findings) for s in (OK, WARNING, PROBLEM)}
    verdict = "would not start" if counts[PROBLEM] else "would start"
    recipe = f": {settings.recipe_path} {verdict}" if settings.recipe_path else ""
    print(f"{counts[PROBLEM]} problem(s), {counts[WARNING]} warning(s){recipe}")
    if settings.json_path:
        report = {
            "findings": [finding._asdict() for finding in findings],
            "counts": counts,
            "glmtune_version": __version__,
        }
        write_json(report, settings.json_path)
    return 1 if counts[PROBLEM] else 0


def _explain(text: str) -> int:
    """Explain an error's text, which may also be the name of a file, or `-` for stdin."""
    if text == "-":
        text = sys.stdin.read()
    elif len(text) < 256 and "\n" not in text and Path(text).is_file():
        text = read_text(text)
    known = find_known(text)
    if not known:
        raise UserError(
            "explain: none of the errors known here stands in this text; `glmtune doctor "
            "--errors` lists them, `glmtune doctor` looks for what else may be wrong"
        )
    print("\n".join(map(explain, known)), end="")
    return 0


def examine(settings: DoctorSettings) -> Iterator[Finding]:
    """All checks that the settings request, in order; a finding does not stop the next."""
    yield from run_check("python", environment.check_python)
    yield from run_check("packages", environment.check_packages)
    imports = list(run_check("imports", environment.check_imports))
    yield from imports
    if any(finding.status == PROBLEM for finding in imports):
        yield Finding("other checks", WARNING, "left out until the libraries load")
        return
    yield from _examine_run(settings)


def _examine_run(settings: DoctorSettings) -> Iterator[Finding]:
    # Imported here: these import torch and transformers, whose failure is a finding of its own.
    from glmtune.doctor import model, recipe
    from glmtune.models.resolve import ENVIRONMENT_VARIABLE, HUB_IDS

    plans: recipe.Plans = {}
    if path := settings.recipe_path:
        verbs: list[str] = []

        def planned_settings() -> Iterator[CheckLine]:
            verbs.extend(recipe_verbs(path))
            yield from recipe.check_settings(path, verbs, plans)

        yield from run_check("recipe", planned_settings)
        yield from run_check("files", partial(recipe.check_paths, plans))
    train = plans.get("train")
    device = train if isinstance(train, TrainSettings) else settings
    yield from run_check(
        "card", partial(environment.check_card, device.use_cpu, device.bf16, device.fp16)
    )
    yield from run_check("hub", environment.check_hub)
    yield from run_check("hub cache", partial(environment.check_hub_cache, HUB_IDS))

    found: list[Path | str] = []

    def base_model() -> Iterator[CheckLine]:
        named = [getattr(plan, "base", None) for plan in plans.values()]
        name = settings.base or next(filter(None, named), None)
        if not name and isinstance(train, TrainSettings):
            name = recipe.base_of_rows(train.dataset_path)
        base = model.find_base(name)
        if isinstance(base, str):  # if it cannot be loaded, there is nothing more to check
            is_named = bool(name or os.environ.get(ENVIRONMENT_VARIABLE))
            yield from model.check_hub_base(base, is_named)
        found.append(base)
        yield from model.check_base(base)

    yield from run_check("base model", base_model)
    if not found:
        return
    base = found[0]
    if isinstance(base, str):
        left_out = "left out until the base model is here"
        yield from (Finding(name, WARNING, left_out) for name in ("tokenizer", "stop ids"))
    checks: dict[str, Check] = {
        "tokenizer": partial(model.check_tokenizer, base),
        "stop ids": partial(model.check_stop_ids, base),
    }
    checks["memory"] = partial(model.check_memory, base, device)
    if isinstance(train, TrainSettings):
        checks["data"] = partial(recipe.check_data, train, plans, base)
        checks["memory"] = partial(recipe.check_memory, train, plans, base)
        checks["run folder"] = partial(recipe.check_run_folder, train, plans, base)
    for name, check in checks.items():
        yield from run_check(name, check)
