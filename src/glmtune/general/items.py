"""The items of a general set, and which set a base is asked.

A set is JSON lines, one item each: ``{"kind", "question", "answer", "wrong": [3 texts]}``. Instead
of `question` an item may have `text`, the beginning of a text that its choices continue, for a
base that knows no questions. All four choices are scored, so their order does not matter.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from glmtune.data.files import read_text
from glmtune.data.flaws import show
from glmtune.data.mixing import CHINESE, language_of
from glmtune.errors import UserError, visible

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")
NUM_WRONG = 3
NUM_CHOICES = 1 + NUM_WRONG
OF_BASE = "general_{}.jsonl"
"""What a base's folder calls a set of its own, by language."""
PROMPTS_OF_BASE, OWN_PROMPTS = "replay_prompts.jsonl", "prompts.jsonl"
"""Questions for the base to answer itself, none of them scored: a base's own, and ours."""
AUTO = "auto"
"""What a run's settings say where the run decides whether it scores a set."""
OWN_NAME = "glmtune's own"
_FIELDS = ("kind", "question", "text", "answer", "wrong", "language")


class Item(NamedTuple):
    """A question, or the beginning of a text, with one right answer and three wrong ones."""

    kind: str
    language: Language
    asked: str
    is_text: bool
    """Whether `asked` is the beginning of a text that a choice continues, blank included."""
    answer: str
    wrong: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        """The right answer, then the wrong ones."""
        return (self.answer, *self.wrong)


@dataclass(frozen=True)
class GeneralSet:
    """All items that a base is asked."""

    items: tuple[Item, ...]
    name: str
    """Where they come from, for pages and messages."""

    @property
    def digest(self) -> str:
        """The beginning of a sha256 over all items, by which kept scores are recognised."""
        text = json.dumps(self.items, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_general(wish: bool | str, base: str) -> GeneralSet | None:
    """The set that a base is asked: a file's, else that of the base's own folder, else ours.

    Args:
        wish: false for none, true for the set that goes with the base, or the path of a file.
        base: folder or hub id. A folder may hold a set of its own, as `OF_BASE` names its files.

    Raises:
        UserError: a file cannot be read, or an item of it is none.
    """
    if not wish:
        return None
    if isinstance(wish, str):
        return GeneralSet(_read(wish), visible(Path(wish).name))
    files = [(language, Path(base, OF_BASE.format(language))) for language in LANGUAGES]
    files = [(language, path) for language, path in files if path.is_file()]
    if files:
        items = [item for language, path in files for item in _read(str(path), language)]
        return GeneralSet(tuple(items), visible(f"{Path(base).name}'s own"))
    return own_set()


def find_prompts(base: str) -> Path:
    """The file of questions that a base answers for replay: of its own folder, else ours."""
    of_base = Path(base, PROMPTS_OF_BASE)
    return of_base if of_base.is_file() else Path(__file__).with_name(OWN_PROMPTS)


def own_set() -> GeneralSet:
    """The set that comes with glmtune."""
    folder = resources.files(__package__)
    items: list[Item] = []
    for language in LANGUAGES:
        path = f"{language}.jsonl"
        items += parse(folder.joinpath(path).read_text("utf-8"), path, language)
    return GeneralSet(tuple(items), OWN_NAME)


def _read(path: str, language: Language | None = None) -> tuple[Item, ...]:
    return parse(read_text(path), path, language)


def parse(text: str, path: str, language: Language | None = None) -> tuple[Item, ...]:
    """Read the lines of a set.

    Args:
        text: JSON lines.
        path: what messages call them.
        language: of items that name none; None for that in which they are written.

    Raises:
        UserError: a line is no item, there is one twice, or there is none at all.
    """
    items: dict[tuple[str, str], int] = {}
    found, flaws = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _item(line, language)
            first = items.setdefault((item.asked, item.answer), number)
            if first != number:
                raise ValueError(f"the same item as line {first}; remove one of them")
        except ValueError as error:
            flaws.append(f"{path}:{number}: {error}")
            continue
        found.append(item)
    if flaws:
        num = len(flaws) - 1
        more = f"{num:,} more line{'s have' if num > 1 else ' has'} a flaw"
        raise UserError(flaws[0] + (f" ({more})" if num else ""))
    if not found:
        raise UserError(f"{path}: holds no item; write one a line, as docs/verdict.md shows")
    return tuple(found)


def _item(line: str, language: Language | None) -> Item:
    """An item of a line; raises ValueError, in a user's words, where it is none."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON; write one object a line") from None
    if not isinstance(fields, dict):
        raise ValueError(f'{show(fields)} is no object; write {{"kind": ..., "question": ...}}')
    if unknown := [name for name in fields if name not in _FIELDS]:
        raise ValueError(f"{show(unknown)} is no field of an item; it has {', '.join(_FIELDS)}")
    is_text = "text" in fields
    if is_text == ("question" in fields):
        raise ValueError("give either question, or text, which the choices continue")
    wrong = fields.get("wrong")
    if not isinstance(wrong, list) or len(wrong) != NUM_WRONG:
        raise ValueError(f"wrong is {show(wrong)}; give a list of {NUM_WRONG} wrong answers")
    asked = "text" if is_text else "question"
    texts = {"kind": fields.get("kind"), asked: fields[asked], "answer": fields.get("answer")}
    texts |= {f"wrong answer {place}": text for place, text in enumerate(wrong, start=1)}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name} is {show(value)}; give a text that is not empty")
    choices = [fields["answer"], *wrong]
    same = {choice.strip() for choice in choices}
    if len(same) < NUM_CHOICES:
        raise ValueError(f"{show(choices)} are not {NUM_CHOICES} different choices")
    named = fields.get("language", language)
    if named is None:
        spoken = language_of([fields[asked], fields["answer"]])
        named = "zh" if spoken == CHINESE else "en"
    if named not in LANGUAGES:
        raise ValueError(f"language is {show(named)}; give zh or en, or leave it out")
    if not is_text:
        choices = [choice.strip() for choice in choices]
    answer, *others = choices
    return Item(fields["kind"], named, fields[asked], is_text, answer, tuple(others))
