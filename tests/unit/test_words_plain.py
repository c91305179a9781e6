"""Prose in the words of the field: no private term in src/, docs/ or the READMEs."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmtune.evaluation.verdict import VERDICTS

ROOT = Path(__file__).parents[2]

PRIVATE = {
    r"\bway back\b": "backward pass",
    r"\bway forward\b": "forward pass",
    r"\blearn(ed|t)\b": "supervised, or trained",
    r"\bby heart\b": "memorised",
    r"\bplain way\b": "reference path",
    r"\bso (many|few)\b": "a number: N, or the name of the setting",
    r"\bof former days\b": "deprecated",
    r"\bof (every|any) age\b": "of every version",
    r"\bgone on with\b": "resumed",
    r"\bgo(es|ing)? on (with|from)\b": "resume",
    r"\bneeded to go on\b|\bgoing on needs\b": "needed to resume",
    r"\blikewise\b": "repeat what is meant",
    r"\bin vain\b": "for nothing",
    r"\bin words\b": "as text",
    r"\bnonsense\b": "meaningless, or what really happens",
    r"\b(is|are|be|been|was|were) told\b": "reported, or given",
    r"\btells? of\b": "reports",
    r"\b(be|to be) had\b": "available",
    r"\bheld? against\b": "compared with, or checked against",
    r"\bby way of memory\b": "serialise in memory first",
    r"\bword of caution\b": "a warning",
    r"\bin the midst\b|\bamid\b": "during",
    r"\bof like length\b": "of similar length",
    r"\bwish(es|ed)? to stop\b|\bwished? for the stop\b": "asked to stop",
    r"\bwhat (\w+ ){0,2}(came|comes|come) (to|of)\b": "the result of",
    r"\b(says?|said) so in\b|\bsays? (it|so) in many kinds\b": "raises",
    r"\bof theirs\b": "their",
    r"\b(are|is) a slip of\b|\bmay be a slip\b": "a typo",
    r"\bits way to\b|\bon their way\b": "being copied",
    r"\bturned queries\b|\bnot turned\b": "rotated",
}
"""What nobody outside this project says, and what the field says instead."""


def prose_of(path: Path) -> Iterator[str]:
    """The text of a page, or a module's comments and strings, without variable names."""
    text = path.read_text()
    if path.suffix == ".md":
        yield text
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.removeprefix("#")
        elif token.type == tokenize.STRING:
            yield re.sub(r"^[rfb]*['\"]+|['\"]+$|\{[^{}\n]*\}", "", token.string)


def joined(texts: Iterator[str]) -> str:
    """One line, so that a term is found across the ends of lines, comments and strings."""
    return " ".join(" ".join(texts).split())


def fragments(source: str) -> list[str]:
    """Docstrings, also of variables, that begin as a continuation of the name."""
    values = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    texts = [value.value for value in values if isinstance(value, ast.Constant)]
    return [
        text
        for text in texts
        if isinstance(text, str) and re.match(r"\s*(Of|As|By|Likewise)\b", text)
    ]


MODULES = sorted((ROOT / "src").rglob("*.py"))
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES + PAGES if path.name != "log.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_private_term(path):
    prose = joined(prose_of(path))
    prose = re.sub(VERDICTS["undecided"].en, "", prose, flags=re.IGNORECASE)  # what users read
    found = {
        match[0]: better
        for term, better in PRIVATE.items()
        if (match := re.search(term, prose, re.IGNORECASE))
    }
    assert not found, f"better: {found}"


def test_no_docstring_is_a_fragment():
    found = {str(path.relative_to(ROOT)): fragments(path.read_text()) for path in MODULES}
    assert not {path: texts for path, texts in found.items() if texts}
