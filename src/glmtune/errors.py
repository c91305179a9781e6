"""What a user is told in a line: a mistake, which ends the command, or a note beside results."""

import os
import re
import sys

_LONGEST = 4000
_WIDE_BLANK = "\u3000"
# What acts in a text without being seen: a terminal's commands, marks that turn the direction of
# letters, letters without width or for machines, other line breaks, halves of characters.
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


class UserError(ValueError):
    """A mistake of the user's, told in one line: what, where, its value and the fix.

    The command line prints the line without a traceback and exits with code 2; from Python it is
    an ordinary ValueError.
    """

    def __init__(self, line: str):
        super().__init__(_presentable(line))


def note(*lines: str, of_each_process: bool = False) -> None:
    """Tell, apart from the results, of what the user should know of.

    Of several processes that a launcher started the first tells it for all, unless each has its own
    to tell.
    """
    if not of_each_process and os.environ.get("RANK", "0") != "0":
        return
    for line in lines:
        print(f"note: {_presentable(line)}", file=sys.stderr, flush=True)


def program(name: str = "glmtune") -> str:
    """What to type for a program of this environment, so that it is found from this folder.

    Its name where the shell finds it by that, as in an environment that is activated; else its
    place, such as `.venv/bin/glmtune`, or Python's with the module where no program was installed.
    """
    import shlex
    import shutil
    from pathlib import Path

    python = Path(sys.executable)
    found, here = shutil.which(name), shutil.which(name, path=str(python.parent))
    if found and (here is None or Path(found).samefile(here)):
        return name
    place = Path(here) if here else python
    if place.is_relative_to(Path.cwd()):
        place = place.relative_to(Path.cwd())
    return shlex.quote(str(place)) + ("" if here else f" -m {name}")


def visible(text: str) -> str:
    """A text of a stranger's as it may be shown: lines stay, and nothing in it acts unseen.

    What would is written as an escape, such as \\x1b and \\u202e.
    """
    if text.isprintable():
        return text
    return _UNSEEN.sub(lambda found: _escape(found[0]), text.replace("\r\n", "\n"))


def _presentable(line: str) -> str:
    """One line that can be printed and read, whatever a damaged file has brought into it.

    Line breaks, a terminal's commands and halves of characters are written as escapes; of many
    thousand characters start and end are kept, which are the place and the fix.
    """
    if not line.isprintable():
        line = "".join(c if c.isprintable() or c == _WIDE_BLANK else _escape(c) for c in line)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return line


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
