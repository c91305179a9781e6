"""A verb's command line: splitting it into flags, and the help that lists them.

Both are derived from the fields of the verb's settings, so a new field is at once a flag with help.
argparse was tried and dropped: it takes -1e-4 for a flag, and the recipe in `--fp16 r.yaml` for
that flag's value, and treats the value of an unknown flag as a positional argument, whereas here
the reply to another trainer's flag depends on its value. Working around that takes more lines than
the loop.
"""

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from glmtune.config.groups import Kind, PathText
from glmtune.config.names import check_name, read_as_settings, setting_named
from glmtune.config.settings import SETTINGS, Settings
from glmtune.errors import UserError, note

_TYPES: dict[Any, Kind] = {
    int: Kind("INT", "a whole number"),
    float: Kind("NUMBER", "a number"),
    str: Kind("NAME", "a name"),
    tuple[str, ...]: Kind("NAME,NAME", "names with commas between"),
    tuple[PathText, ...]: Kind("PATH", "paths"),
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def kind_of(field: FieldInfo) -> Kind:
    """Describe a field's type and bounds, such as INT and "a whole number, at least 1"."""
    columns: list[str] = []
    words: list[str] = []
    # pydantic splits off the metadata of an `Annotated` that is the whole annotation.
    own = [mark for mark in field.metadata if isinstance(mark, Kind)]
    for option in own or _options(field.annotation):
        if option is bool or get_origin(option) is Literal:
            choices = ("true", "false") if option is bool else get_args(option)
            columns += choices
            words += choices
        else:
            column, word = option if isinstance(option, Kind) else _TYPES[option]
            columns.append(column)
            words.append(word)
    listed = " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
    bounds = [
        f"{word} {getattr(mark, name)}"
        for mark in field.metadata
        for name, word in _BOUNDS.items()
        if hasattr(mark, name)
    ]
    return Kind("|".join(columns), ", ".join([listed, *bounds]))


def _options(annotation: Any) -> Iterator[Any]:
    """The types that a field's annotation allows, without None; for annotated ones, their Kind."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from (mark for mark in get_args(annotation) if isinstance(mark, Kind))
    elif _is_union(annotation):
        for member in get_args(annotation):
            yield from _options(member)
    elif annotation is not NoneType:
        yield annotation


def fields_by_group(cls: type[Settings]) -> dict[str, dict[str, FieldInfo]]:
    """Return heading -> name -> field, groups in the order of `cls`, required fields first."""
    groups: dict[str, dict[str, FieldInfo]] = {}
    left = dict(cls.model_fields)
    for group in cls.__mro__:
        if issubclass(group, Settings):
            names = [name for name in inspect.get_annotations(group) if name in left]
            groups.setdefault(group.group, {}).update({name: left.pop(name) for name in names})
    return {
        heading: dict(sorted(fields.items(), key=lambda item: not item[1].is_required()))
        for heading, fields in groups.items()
        if fields
    }


def split_arguments(
    verb: str, arguments: Sequence[str]
) -> tuple[str | None, dict[str, str | list[str]]]:
    """Split a verb's command line into its recipe, if any, and its flags, name -> text.

    If the last of the verb's positional settings takes several texts, it takes all remaining words.
    A recipe may stand before or in place of the positional settings of any verb that has some.

    `--name value`, `--name=value` and `--dash-name value` are read, and `--switch` as true. A list
    given twice grows; of another flag the last value counts, so that a script's flags can be
    overridden at its end, and a note says so.

    Raises:
        UserError: a flag that the verb does not have, one that lacks its value, a stray word.
    """
    words: list[str] = []
    flags: dict[str, str | list[str]] = {}
    rest = list(reversed(arguments))
    while rest:
        word = rest.pop()
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        check_name(verb, name, f"--{name}")
        setting = setting_named(verb, name)
        field = SETTINGS[verb].model_fields[setting] if setting else None
        is_switch = field is None or kind_of(field).is_switch
        if not equals:
            if rest and not rest[-1].startswith("--") and not (is_switch and _is_recipe(rest[-1])):
                value = rest.pop()
            elif field is None or is_switch:
                value = "true"
            else:
                raise UserError(f"--{name} lacks its value, which should be {kind_of(field).words}")
        former = flags.get(name, value)
        if field is not None and name in flags and _is_list(field):
            value = f"{former},{value}"
        elif value != former:
            note(f"--{name} is given as {former} and as {value}: the last counts, {value}")
        flags[name] = value

    places = SETTINGS[verb].bare_words
    if words and _is_recipe(words[0]) and places and not {"recipe", "recipe_path"} & {*places}:
        places = ("recipe", *places)
    placed: dict[str, str | list[str]] = dict(zip(places, words, strict=False))
    stray = words[len(places) :]
    if stray and takes_several(verb, places[-1:]):
        placed[places[-1]], stray = words[len(places) - 1 :], []
    if stray:
        raise UserError(f"unexpected {stray[0]!r}; settings are given as --name value")
    recipe = words[0] if "recipe" in placed else None
    placed.pop("recipe", None)
    for name in flags:
        if (setting := setting_named(verb, name)) in placed:
            raise UserError(
                f"{placed[setting]} and --{name} {flags[name]} say the same setting; give one"
            )
    if recipe is not None and not _is_recipe(recipe):
        raise UserError(
            f"unexpected {recipe!r}; a recipe ends in .yaml, settings are given as --name value"
        )
    return recipe, placed | flags


def takes_several(verb: str, names: Sequence[str]) -> bool:
    """Whether any of these settings of a verb is a list."""
    fields = SETTINGS[verb].model_fields
    return any(_is_list(fields[name]) for name in names if name in fields)


def _is_list(field: FieldInfo) -> bool:
    options = get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
    return any(get_origin(option) is tuple for option in options)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _is_recipe(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def verb_help(verb: str, summary: str) -> str:
    """Return the help of a verb: every flag with what it takes, what it does and its default."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    places = {"recipe": "[RECIPE.yaml]"}
    bare_words = SETTINGS[verb].bare_words
    words = " ".join(places.get(word, word.upper()) for word in bare_words)
    words += " ..." if takes_several(verb, bare_words) else ""
    lines = [f"usage: glmtune {verb} {words} [--name value ...]", "", summary]
    for heading, fields in fields_by_group(SETTINGS[verb]).items():
        lines += ["", f"{heading}:"]
        for name, field in fields.items():
            # Many choices are broken behind a stroke.
            choices = f"--{name} {kind_of(field).column}".replace("|", "| ")
            wrapped = textwrap.wrap(choices, width, initial_indent="  ", subsequent_indent="    ")
            lines += [line.replace("| ", "|") for line in wrapped]
            text = f"{field.description}{_default(field)}"
            lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ")
    if names := read_as_settings(verb):
        text = f"Deprecated names and names of other trainers, also accepted: {', '.join(names)}."
        lines += ["", *textwrap.wrap(text, width)]
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    """The end of a field's help; the description states a default that is None or computed."""
    if field.is_required():
        return " (required)"
    if field.default is None or field.default_factory:
        return ""
    value = field.default
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return f" (default: {text.lower() if isinstance(value, bool) else text})"
