"""Who wrote a special name in a rendered chat: the template, or somebody in a message.

What a template writes around messages has to become special ids, and a name that a message spells
has to stay text. So while a template runs, the names within messages are broken up by `GUARD`; of
those found whole afterwards the template is the author, and they get `MARK` before them, which a
tokenizer reads. Both are among the code points that Unicode keeps for use within a program (U+FDD0
to U+FDEF, no characters); in a message they become U+FFFD, the sign for what cannot be shown.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glmtune.data.spelled import pattern_of
from glmtune.errors import UserError

MARK, GUARD = "\ufdd0", "\ufdd1"

_OPENING = re.compile(r"[\[<]")
_INTERNAL = re.compile(f"[{MARK}{GUARD}]")


def beginning_of(names: Iterable[str]) -> re.Pattern:
    """What finds the first character of any of some names, where the rest follows."""
    return re.compile("|".join(f"{re.escape(n[0])}(?={re.escape(n[1:])})" for n in names))


def guard(value: Any, beginning: re.Pattern = _OPENING) -> Any:
    """Break up special names in all strings of messages, tools, documents or variables.

    Objects become dictionaries, as a template reads them; keys without a value are left out.

    Args:
        value: any of these.
        beginning: what finds the beginning of a name, behind which it is broken up.
    """
    if isinstance(value, str):
        return beginning.sub(rf"\g<0>{GUARD}", _INTERNAL.sub("\ufffd", value))
    if hasattr(value, "messages"):
        return guard(value.messages, beginning)
    if isinstance(value, Mapping):
        return {key: guard(part, beginning) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [guard(part, beginning) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return guard({f.name: getattr(value, f.name) for f in fields}, beginning)
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
        return guard(dump(), beginning)
    return value


def guard_chat(
    conversation: Any,
    tools: list | None,
    documents: list[dict[str, str]] | None,
    variables: Mapping[str, Any],
    beginning: re.Pattern = _OPENING,
) -> tuple[Any, dict[str, Any]]:
    """What `apply_chat_template` was given, with all special names in it broken up.

    Returns:
        The conversation, and the other variables of the template, tools as JSON schemas.
    """
    from transformers.utils import get_json_schema

    schemas = [get_json_schema(tool) if callable(tool) else tool for tool in tools or []]
    given = {
        "tools": guard(schemas, beginning) or None,
        "documents": guard(documents, beginning),
        **guard(variables, beginning),
    }
    return guard(conversation, beginning), given


def encode_around(
    texts: Iterable[str],
    names: Mapping[str, Sequence[int]],
    encode: Callable[[list[str]], list[list[int]]],
) -> list[list[int]]:
    """The ids of texts in which special names become ids, as `allow_special` wishes.

    Args:
        texts: any number of texts.
        names: the ids that each name becomes; one without ids stays text.
        encode: texts to ids, in which names are ordinary text.
    """
    meant = {name: ids for name, ids in names.items() if ids}
    pattern = re.compile(f"({pattern_of(meant).pattern})")
    split = [pattern.split(text) for text in texts]
    encoded = iter(encode([part for parts in split for part in parts[::2] if part]))
    rows = []
    for parts in split:
        row: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:
                row += meant[part]
            elif part:
                row += next(encoded)
        rows.append(row)
    return rows


def check_mask_can_be(
    tokenize: bool, return_dict: bool, continue_final_message: bool | str
) -> None:
    """Make sure that `apply_chat_template` can return `assistant_masks`, which are wanted.

    Raises:
        UserError: its other arguments leave no place for them, or an answer that is not whole.
    """
    if not tokenize or not return_dict or continue_final_message:
        raise UserError(
            "return_assistant_tokens_mask: needs tokenize=True, return_dict=True and a whole "
            "answer, so no continue_final_message"
        )


def mark(rendered: str, names: re.Pattern) -> str:
    """Mark the names that the template wrote, and mend those of the messages."""
    return names.sub(rf"{MARK}\g<0>", rendered).replace(GUARD, "")
