"""Names of settings: today's, and those that users bring from elsewhere.

A name of transformers, of another trainer or of another verb of ours is listed in `foreign` with
how it is handled: read as today's name, accepted with a note if it has no effect, or refused with
what to do instead. Any other name gets a "did you mean", if one is so close that it can only be a
typo.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, get_args

from glmtune.config.foreign import FOREIGN
from glmtune.config.foreign.fates import Becomes, Fate, Idle, Refused, spellings
from glmtune.config.groups import Settings
from glmtune.config.settings import SETTINGS
from glmtune.errors import UserError, note

RENAMED = {"chatglm_path": "base", "model_path": "adapter"}
"""Deprecated names of settings, read silently: older recipes and commands have them."""


class Given(NamedTuple):
    """A setting as the user gave it.

    Args:
        value: the text, several (a YAML list) or several mappings of texts, or None (null).
        source: what to call it in an error: `--lora_rank`, or `recipe.yaml:7: lora_rank`.
    """

    value: str | list[Any] | None
    source: str

    @property
    def text(self) -> str:
        """The value as a flag would give it."""
        return ",".join(map(str, self.value)) if isinstance(self.value, list) else self.value or ""

    def __str__(self) -> str:
        """The setting with its value, for the start of an error line."""
        value = "null" if self.value is None else repr(self.value)
        return f"{self.source} {value if len(value) <= 200 else f'{value[:197]}...'}"


def takes_mappings(name: str) -> bool:
    """Whether a setting of that name is a list of groups of settings."""
    fields = [verb.model_fields[name] for verb in SETTINGS.values() if name in verb.model_fields]
    kinds = [kind for field in fields for kind in get_args(field.annotation)]
    return any(isinstance(kind, type) and issubclass(kind, Settings) for kind in kinds)


def renamed(given: Mapping[str, Given]) -> dict[str, Given]:
    """The same settings with deprecated names replaced.

    Raises:
        UserError: one setting under both names.
    """
    found: dict[str, Given] = {}
    for name, setting in given.items():
        today = RENAMED.get(name, name)
        if today in found:
            raise UserError(f"{found[today].source} and {setting.source} are one setting; keep one")
        found[today] = setting
    return found


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean X?" for the candidate that `word` is a typo of, or "" if none is."""
    slips = {name: _slips(word, name) for name in candidates}
    near = [(count, name) for name, count in slips.items() if count is not None]
    return f"; did you mean {prefix}{min(near)[1]}?" if near else ""


def _slips(word: str, name: str) -> int | None:
    """The number of typos in a word if `name` was meant, None if that is unlikely.

    Other digits make another name, and so do too many typos: one is allowed in a word of four
    letters, two from eight letters on.
    """
    if [c for c in word if c.isdigit()] != [c for c in name if c.isdigit()]:
        return None
    if word.replace("_", "") == name.replace("_", "") or word == name.partition(" ")[0]:
        return 0
    words, parts = word.split("_"), name.split("_")
    if len(words) != len(parts):
        words, parts = ["".join(words)], ["".join(parts)]
    counts = [_distance(a, b) for a, b in zip(words, parts, strict=True)]
    allowed = [0 if len(b) < 4 else 1 if len(b) < 8 else 2 for b in parts]
    fits = all(count <= most for count, most in zip(counts, allowed, strict=True))
    return sum(counts) if fits and sum(counts) <= 2 else None


def _distance(a: str, b: str) -> int:
    """Count letters to add, drop, replace or swap with a neighbour (optimal string alignment)."""
    rows = [list(range(len(b) + 1))]
    for i in range(1, len(a) + 1):
        rows.append([i])
        for j in range(1, len(b) + 1):
            replaced = rows[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            costs = [rows[i - 1][j] + 1, rows[i][j - 1] + 1, replaced]
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 1] + b[j - 2]:
                costs.append(rows[i - 2][j - 2] + 1)
            rows[i].append(min(costs))
    return rows[-1][-1]


def knows(verb: str, name: str) -> bool:
    """Whether a name that a recipe has for all verbs is meant for this one as well.

    A name of one verb does not stand for a setting that another verb names differently: an
    `output_dir` beside the sections is no `save_path`. Names of the adapter apply to all verbs.
    """
    if name in SETTINGS[verb].model_fields:
        return True
    is_ours = any(name in settings.model_fields for settings in SETTINGS.values())
    return bool(_fates(verb, name)) and (not is_ours or setting_named(verb, name) == "adapter")


def setting_named(verb: str, name: str) -> str | None:
    """The setting of `verb` that a name stands for whatever its value, if there is one."""
    name = RENAMED.get(name, name)
    if name in SETTINGS[verb].model_fields:
        return name
    first = next(iter(_fates(verb, name)), None)
    return _setting(verb, first) if isinstance(first, Becomes) and first.values is None else None


def read_as_settings(verb: str) -> list[str]:
    """The foreign names that `verb` reads as settings of its own, by name."""
    fields = SETTINGS[verb].model_fields
    return [
        name
        for name in sorted(FOREIGN)
        if name not in fields and any(isinstance(fate, Becomes) for fate in _fates(verb, name))
    ]


def check_name(verb: str, name: str, source: str) -> None:
    """Raise UserError, with the likeliest fix, for a name that `verb` does not know."""
    name = RENAMED.get(name, name)
    if name in SETTINGS[verb].model_fields or _fates(verb, name):
        return
    if verbs := _verbs_that_have(name):
        raise UserError(
            f"{source} is a setting of {', '.join(verbs)}, not of {verb}; give it there, or take "
            "it out"
        )
    if name in FOREIGN:
        raise UserError(f"{source} {_elsewhere(verb, name)}")
    dashes = "--" if source.startswith("--") else ""
    known = [*SETTINGS[verb].model_fields, *read_as_settings(verb)]
    hint = did_you_mean(name, known, prefix=dashes)
    hint = hint or f"; `glmtune {verb} --help` lists its settings"
    raise UserError(f"{source} is not a setting of {verb}{hint}")


def with_todays_names(verb: str, given: Mapping[str, Given]) -> dict[str, Given]:
    """Return the settings under today's names, with a note on stderr for each foreign one.

    Raises:
        UserError: the verb has no such name, a value is not available, or one setting is given
            under two names.
    """
    settings, notes = translate(verb, given)
    note(*notes)
    return settings


def translate(verb: str, given: Mapping[str, Given]) -> tuple[dict[str, Given], list[str]]:
    """Like `with_todays_names`, but return the notes."""
    own = {
        name: setting
        for name, setting in given.items()
        if name in SETTINGS[verb].model_fields and not _is_a_word(verb, name, setting)
    }
    read: dict[str, Given] = {}
    defaults: dict[str, Given] = {}
    notes: list[str] = []
    for name, setting in given.items():
        check_name(verb, name, setting.source)
        if name in own:
            continue
        target, value, word = _read_foreign(verb, name, given)
        notes.append(word)
        here = Given(value, setting.source)
        if not target:
            continue
        if value is None:  # "not in 4 bits" beside "in 8 bits" contradicts nothing
            default = SETTINGS[verb].model_fields[target].default
            defaults[target] = Given(default, setting.source)
            continue
        other = own.get(target, read.get(target, here))
        if target in own or other.value != value:
            both = [
                one.source for one in given.values() if one.source in (other.source, here.source)
            ]
            raise UserError(f"{' and '.join(both)} are one setting; keep one")
        read[target] = here
    return defaults | read | own, notes


def _read_foreign(
    verb: str, name: str, settings: Mapping[str, Given]
) -> tuple[str, str | list[str] | None, str]:
    """Return setting ("" for none), value and a note about them.

    Args:
        verb: whose settings are read.
        name: the foreign name, one of `settings`.
        settings: all settings given together.

    Raises:
        UserError: the value is not available.
    """
    given = settings[name]
    found = spellings(given.text)
    if given.value is None or (found & {"", "none", "null"} and not setting_named(verb, name)):
        return "", None, f"{name} is not set by an empty value"
    for fate in _fates(verb, name):
        match fate:
            case Becomes(values=None):
                setting = _setting(verb, fate)
                return setting, given.value, f"{name} is {setting} here: {fate.word}"
            case Becomes(values=Mapping() as table) if _stand_beside(fate.beside, settings):
                if hit := found & table.keys():
                    value, setting = table[min(hit)], _setting(verb, fate)
                    now = f"{setting} {value}" if value else f"without {setting}"
                    return setting, value, f"{name} {given.text} is {now} here: {fate.word}"
            case Becomes(values=convert) if callable(convert):
                setting = _setting(verb, fate)
                try:
                    value = convert(given.text)
                except ValueError as error:
                    raise UserError(f"{given} {error}") from None
                return setting, value, f"{name} is {setting} here, {value}: {fate.word}"
            case Idle() if fate.takes(given.text):
                return "", None, f"{name} has no effect here: {fate.word}"
            case Refused():
                raise UserError(f"{given}: {fate.way}")
    choices = [
        value
        for fate in _fates(verb, name)
        if isinstance(fate, Becomes) and isinstance(fate.values, Mapping)
        for value in fate.values
    ]
    if not choices:
        raise UserError(f"{given} {_elsewhere(verb, name)}")
    raise UserError(f"{given} should be {' or '.join(dict.fromkeys(choices))}")


def _is_a_word(verb: str, name: str, given: Given) -> bool:
    """Whether a setting of a verb has a value of another program, such as axolotl's adapter: lora.

    A folder of that name is meant where there is one.
    """
    found = spellings(given.text)
    return not os.path.isdir(given.text) and any(
        verb in fate.verbs
        and (
            (
                isinstance(fate, Becomes)
                and isinstance(fate.values, Mapping)
                and not found.isdisjoint(fate.values)
            )
            or (isinstance(fate, Idle) and fate.values is not None and fate.takes(given.text))
        )
        for fate in _fates(verb, name)
    )


def _stand_beside(others: Mapping[str, str], settings: Mapping[str, Given]) -> bool:
    """Whether other names are given as well, each with its value."""
    return all(
        name in settings and value in spellings(settings[name].text)
        for name, value in others.items()
    )


def _fates(verb: str, name: str) -> list[Fate]:
    """The fates of a foreign name that concern a verb."""
    if name not in FOREIGN:
        return []
    return [
        fate
        for fate in FOREIGN[name].fates
        if (verb in fate.verbs or not fate.verbs)
        and (not isinstance(fate, Becomes) or _setting(verb, fate))
    ]


def _setting(verb: str, fate: Becomes) -> str:
    """The setting of a verb that a name is converted to, "" if it has none of them."""
    fields = SETTINGS[verb].model_fields
    return next((name for name in fate.settings if name in fields), "")


def _verbs_that_have(name: str) -> list[str]:
    """The verbs with this setting, where a user would look for it.

    Benchmarks, plans and `tune` are left out: they borrow the settings of other verbs.
    """
    verbs = [verb for verb in SETTINGS if name in SETTINGS[verb].model_fields]
    asked = [verb for verb in verbs if not verb.startswith(("bench", "plan", "tune"))]
    return asked or verbs


def _elsewhere(verb: str, name: str) -> str:
    """The rest of the error for a foreign name that other verbs accept."""
    for fate in FOREIGN[name].fates:
        if isinstance(fate, Becomes) and (verbs := _verbs_that_have(fate.settings[0])):
            return (
                f"is {fate.settings[0]} here, a setting of {', '.join(verbs)}, not of {verb}; give "
                "it there, or take it out"
            )
    verbs = list(dict.fromkeys(verb for fate in FOREIGN[name].fates for verb in fate.verbs))
    return f"concerns {', '.join(verbs)}, not {verb}; take it out"
