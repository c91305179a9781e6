"""A verb's settings from a YAML recipe and flags, and a recipe from settings.

A recipe is a mapping of settings to plain values: either those of one verb, or a section per verb
(`convert:`, `tokenize:`, `train:`, ...) with settings for all of them beside the sections. Its
scalars are kept as the text they were written as, exactly like flags, and only the settings' types
interpret them: no YAML tag builds an object, `1e-4` is a number, `no` and dates stay text. Hence
the walk over PyYAML's nodes instead of `yaml.safe_load`, which reads 0777 as the number 511, 1:30
as the number 90 and 2024-01-01 as a date, silently keeps the last of a repeated setting, and drops
the line that an error must name.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TypeVar, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from glmtune import __version__
from glmtune.config.flags import fields_by_group, kind_of
from glmtune.config.foreign import FOREIGN
from glmtune.config.names import (
    Given,
    check_name,
    did_you_mean,
    knows,
    renamed,
    setting_named,
    takes_mappings,
    translate,
    with_todays_names,
)
from glmtune.config.settings import SETTINGS, Settings
from glmtune.drafts import replacing_file
from glmtune.errors import UserError

VerbSettings = TypeVar("VerbSettings", bound=Settings)

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + kind for kind in ("bool", "float", "int", "null", "str", "timestamp")}


_LINE_BREAKS = ("\x85", "\u2028", "\u2029")
# A recipe has a few kilobytes; PyYAML reads some 100 kB a second.
_MAX_BYTES = 100_000


def read_config(
    cls: type[VerbSettings], recipe_path: str | None, flags: Mapping[str, str | list[str]]
) -> VerbSettings:
    """Return the checked settings of a verb: the recipe's, overridden by the flags.

    Args:
        cls: the verb's class of settings.
        recipe_path: a YAML recipe, or None for flags alone.
        flags: name without dashes -> text.

    Raises:
        UserError: an unreadable recipe, an unknown name, a wrong or missing value, or settings
            that contradict each other.
    """
    given = recipe_settings(cls.verb, recipe_path) if recipe_path is not None else {}
    from_flags = {name: Given(text, f"--{name}") for name, text in flags.items()}
    given |= with_todays_names(cls.verb, renamed(from_flags))
    values = {
        name: None if _means_none(cls, name, setting.value) else setting.value
        for name, setting in given.items()
    }
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, cls, given)) from None


def change_setting(settings: VerbSettings, name: str, text: str) -> VerbSettings:
    """Return a copy of settings with one of them set from text.

    Raises:
        UserError: an unknown name or a wrong value.
    """
    cls, verb = type(settings), settings.verb
    check_name(verb, name, name)
    if (own := setting_named(verb, name)) != name:
        raise UserError(f"{name} is {own} here" if own else f"{name} is no setting of {verb}")
    value = None if _means_none(cls, name, text) else text
    try:
        return cls.model_validate(settings.model_dump() | {name: value})
    except ValidationError as error:
        raise UserError(_explain(error, cls, {name: Given(text, name)})) from None


def _means_none(cls: type[Settings], name: str, value: object) -> bool:
    """Whether the text is `none` where None is allowed, by which a flag unsets a recipe's value."""
    may_be_none = NoneType in get_args(cls.model_fields[name].annotation)
    return may_be_none and str(value).lower() in ("none", "null")


def _explain(error: ValidationError, cls: type[Settings], given: Mapping[str, Given]) -> str:
    """One line for the first error, or for all that is missing."""
    problems = error.errors(include_url=False)
    missing = [
        str(problem["loc"][0])
        for problem in problems
        if problem["type"] == "missing" and len(problem["loc"]) == 1
    ]
    if missing:
        return f"missing: {' '.join(f'--{name}' for name in missing)} (as a flag or in the recipe)"
    problem = problems[0]
    if problem["type"] == "conflict":
        names = problem["ctx"]["settings"] or [str(problem["loc"][0])]
        named = [given[name].source for name in names if name in given]
        return f"{problem['msg']} (given: {', '.join(named)})"
    name = str(problem["loc"][0])
    if len(place := problem["loc"][1:]) > 1:
        kinds = get_args(cls.model_fields[name].annotation)[0].model_fields
        return _explain_entry(int(place[0]), str(place[-1]), kinds, given[name])
    return f"{given[name]} should be {kind_of(cls.model_fields[name]).words}"


def _explain_entry(number: int, name: str, fields: Mapping[str, FieldInfo], given: Given) -> str:
    """One line for a wrong setting in an entry of a list, the entry being counted from 0."""
    entry = f"{given.source}, entry {number + 1}"
    value = given.value[number] if isinstance(given.value, list) else given.value
    if name not in fields:
        return f"{entry}: knows no {name}{did_you_mean(name, fields)}; it has {', '.join(fields)}"
    if isinstance(value, dict) and name not in value:
        return f"{entry}: lacks its {name}"
    shown = value[name] if isinstance(value, dict) else value
    return f"{entry}: {name} {shown!r} should be {kind_of(fields[name]).words}"


def recipe_settings(verb: str, path: str) -> dict[str, Given]:
    """Return what a recipe sets for `verb`: its section overrides what is beside the sections.

    Names are checked in every section, so that a typo is found before its verb is run. A plan reads
    the section of training, overridden by its own.
    """
    shared, sections = _read_yaml(path)
    if not sections:
        return with_todays_names(verb, shared)
    for other, section in sections.items():
        translate(other, section)
    for_verb = {}
    for name, setting in shared.items():
        if knows(verb, name):
            if setting_named(verb, name) not in SETTINGS[verb].of_section_alone:
                for_verb[name] = setting
        elif not any(knows(other, name) for other in SETTINGS):
            check_name(verb, name, setting.source)
    settings = with_todays_names(verb, for_verb)
    for other in filter(None, (SETTINGS[verb].reads_section_of, verb)):
        settings |= with_todays_names(verb, sections.get(other, {}))
    return settings


def recipe_verbs(path: str) -> list[str]:
    """Return the verbs that a recipe has settings for, by its sections or by its names.

    A recipe without sections is for the verb that knows most of its names.

    Raises:
        UserError: the file is no recipe.
    """
    shared, sections = _read_yaml(path)
    if sections:
        return list(sections)
    return [max(SETTINGS, key=lambda verb: sum(knows(verb, name) for name in shared))]


def shared_setting(path: str, name: str) -> str | None:
    """Return the text of one setting beside the sections of a recipe, None where there is none.

    Raises:
        UserError: the file is no recipe.
    """
    setting = _read_yaml(path)[0].get(name)
    return setting.value if setting and isinstance(setting.value, str) else None


def _read_yaml(path: str) -> tuple[dict[str, Given], dict[str, dict[str, Given]]]:
    """Return a recipe's top-level settings, and section -> its settings."""
    try:
        if (size := os.path.getsize(path)) > _MAX_BYTES:
            raise UserError(f"{path}: {size:,} bytes are no recipe; pass the YAML of a few lines")
        text = Path(path).read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a recipe") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        parts = [getattr(error, name, None) for name in ("context", "problem", "reason")]
        raise UserError(f"{where}: not YAML: {', '.join(filter(None, parts))}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is lines of `name: value`, this is not")
    shared: dict[str, Given] = {}
    sections: dict[str, dict[str, Given]] = {}
    for name, (where, node) in _pairs(root, path).items():
        if name in SETTINGS and (isinstance(node, yaml.MappingNode) or node.tag == _TAG + "null"):
            pairs = _pairs(node, path) if isinstance(node, yaml.MappingNode) else {}
            sections[name] = renamed({key: _given(key, *pair) for key, pair in pairs.items()})
        elif isinstance(node, yaml.MappingNode) and name not in FOREIGN:
            raise UserError(f"{where}: {name} is no section{did_you_mean(name, SETTINGS)}")
        else:
            shared[name] = _given(name, where, node)
    return renamed(shared), sections


def _pairs(mapping: yaml.MappingNode, path: str) -> dict[str, tuple[str, yaml.Node]]:
    """Return key -> (file:line, value node) of a mapping, its keys being plain and unique."""
    if mapping.tag != _TAG + "map":
        raise UserError(f"{path}:{mapping.start_mark.line + 1}: take out the tag {mapping.tag}")
    pairs: dict[str, tuple[str, yaml.Node]] = {}
    for key, node in mapping.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}: the name of a setting is one word")
        if key.value in pairs:
            raise UserError(f"{where}: {key.value} stands twice; keep one")
        pairs[key.value] = where, node
    return pairs


def _given(name: str, where: str, node: yaml.Node) -> Given:
    """Return the text of a scalar, or the texts of a list."""
    source = f"{where}: {name}"
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        if all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return Given([item.value for item in node.value], source)
        if takes_mappings(name):
            return Given([_entry(item, where.rpartition(":")[0]) for item in node.value], source)
    elif isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS:
        return Given(None if node.tag == _TAG + "null" else node.value, source)
    if name in FOREIGN and isinstance(node, yaml.CollectionNode):
        return Given("{...}" if node.value else None, source)  # the error will be about its name
    raise UserError(f"{source} should be plain text, a number, true or false, or a list of texts")


def _entry(node: yaml.Node, path: str) -> str | dict[str, str | None]:
    """An entry of a list: a text, or a mapping of texts."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    where = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: an entry is a text, or lines of `name: value`")
    return {name: _text(*pair, name) for name, pair in _pairs(node, path).items()}


def _text(where: str, node: yaml.Node, name: str) -> str | None:
    value = _given(name, where, node).value
    if isinstance(value, list):
        raise UserError(f"{where}: {name} should be plain text or a number")
    return value


def write_recipe(settings: Settings, path: str) -> None:
    """Write settings as a recipe that the same verb reads back to equal ones.

    Raises:
        UserError: the file cannot be written.
    """
    again = f"glmtune {settings.verb} {Path(path).name}"
    text = f"# As run by glmtune {__version__}; to run it again: {again}\n"
    for heading, fields in fields_by_group(type(settings)).items():
        text += f"\n# {heading}\n"
        text += _yaml({name: getattr(settings, name) for name in fields})
    _write_text(text, path)


def write_sections(verbs: Sequence[Settings], path: str) -> None:
    """Write the settings of several verbs as one recipe, a section each, of those that are set.

    Raises:
        UserError: the file cannot be written.
    """
    name = Path(path).name
    text = f"# As run by glmtune {__version__}; to run one of them again: glmtune VERB {name}\n"
    for settings in verbs:
        values = settings.model_dump(mode="json", exclude_unset=True)
        text += "\n" + _yaml({settings.verb: values})
    _write_text(text, path)


def _yaml(values: Mapping[str, object]) -> str:
    """Settings as YAML, in readable letters where that keeps every line break of a text."""
    for readable in (True, False):
        text = yaml.safe_dump(values, allow_unicode=readable, sort_keys=False, width=sys.maxsize)
        # YAML treats these as line breaks, and folds them into a blank, unless they are escaped.
        if not any(mark in text for mark in _LINE_BREAKS):
            break
    return text


def _write_text(text: str, path: str) -> None:
    try:
        with replacing_file(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot write the recipe: {error.strerror}") from None
