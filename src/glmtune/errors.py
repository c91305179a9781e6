"""One-line messages to the user: a mistake, which ends the command, or a note beside results."""

import re
import sys

from glmtune.launched import process_number

_LONGEST = 4000
_WIDE_BLANK = "\u3000"
# Invisible characters with an effect: terminal control codes, direction marks, characters of no
# width or for private use, other line breaks, lone surrogates.
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


class UserError(ValueError):
    """A user's mistake, described in one line: what, where, its value and the fix.

    The command line prints the line without a traceback and exits with code 2; from Python it is
    an ordinary ValueError.
    """

    def __init__(self, line: str):
        super().__init__(_presentable(line))


def reason_of(error: BaseException) -> str:
    """The first line of another library's error, or its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def value_words(value: object) -> str:
    """A setting's value for a message; None is one that is not set."""
    return "not set" if value is None else str(value)


def note(*lines: str, of_each_process: bool = False) -> None:
    """Print a note for the user on stderr, apart from the results.

    Of several processes that a launcher started, only the first prints it, unless the note differs
    from process to process.
    """
    if process_number() and not of_each_process:
        return
    for line in lines:
        print(f"note: {_presentable(line)}", file=sys.stderr, flush=True)


def program(name: str = "glmtune") -> str:
    """The command that runs a program of this environment from the current folder.

    Its name if the shell finds it, as in an activated environment; otherwise its path, such as
    `.venv/bin/glmtune`, or Python's path with the module if no program was installed.
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
    """An untrusted text, made safe to show: lines stay, and invisible characters become visible.

    They are written as escapes, such as \\x1b and \\u202e.
    """
    if text.isprintable():
        return text
    return _UNSEEN.sub(lambda found: _escape(found[0]), text.replace("\r\n", "\n"))


def _presentable(line: str) -> str:
    """One printable line, whatever a damaged file has put into it.

    Line breaks, terminal control codes and lone surrogates are written as escapes; of many thousand
    characters only start and end are kept, which hold the place and the fix.
    """
    if not line.isprintable():
        line = "".join(c if c.isprintable() or c == _WIDE_BLANK else _escape(c) for c in line)
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    return line


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
