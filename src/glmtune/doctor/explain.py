"""Explain error messages: `glmtune doctor --explain` and `--errors`, and failed verbs."""

import re
from collections.abc import Iterator

from glmtune.doctor.errors import KNOWN_ERRORS, KnownError

_PAGE_HEAD = """\
# Known errors · 常见错误

What users of ChatGLM have met, the twenty most frequent first, the cause of each, and the command
that fixes it. Explain one with `glmtune doctor --explain "ERROR TEXT"`. `glmtune doctor --errors`
prints this page.

ChatGLM 用户遇到的报错（前二十个最常见）、原因以及解决命令。用 `glmtune doctor --explain "报错文字"`
可查询单个错误。
"""


def find_known(text: str) -> list[KnownError]:
    """The known errors whose messages occur in a text, such as a traceback or a log."""
    # Terminals and log viewers wrap long messages at any place.
    joined = re.sub(r"\s*\n\s*", " ", text)
    return [
        known
        for known in KNOWN_ERRORS
        if re.search(known.pattern, text) or re.search(known.pattern, joined)
    ]


def explain(known: KnownError) -> str:
    """A known error for the terminal: its cause in both languages, and the command."""
    return f"{known.message}\n\n  {known.cause}\n\n  {known.cause_zh}\n\n  $ {known.command}\n"


def errors_page() -> str:
    """All known errors as one Markdown page."""
    return "\n".join([_PAGE_HEAD, *_entries()])


def _entries() -> Iterator[str]:
    for number, known in enumerate(KNOWN_ERRORS, 1):
        threads = ", ".join(map(_link, filter(None, known.threads.split(", "))))
        seen = f"\nSeen in · 见于 {threads}\n" if threads else ""
        yield f"""\
## {number}

```
{known.message}
```

{known.cause}

{known.cause_zh}

```bash
{known.command}
```
{seen}"""


def _link(thread: str) -> str:
    repository, number = thread.split("#")
    return f"[{thread}](https://github.com/{repository}/issues/{number})"
