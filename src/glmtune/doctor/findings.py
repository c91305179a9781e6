"""The findings of checks, a line each, and their summary."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

from glmtune.errors import UserError

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"
PROBLEM: Literal["problem"] = "problem"


class Finding(NamedTuple):
    """One line of the report."""

    check: str
    status: Literal["ok", "warning", "problem"]
    text: str
    """The finding, with the fix if something is wrong."""

    def __str__(self) -> str:
        return f"{self.status:8} {self.check:11} {self.text}"


CheckLine = tuple[Literal["ok", "warning", "problem"], str]
Check = Callable[[], Iterable[CheckLine]]


def run_check(name: str, check: Check) -> Iterator[Finding]:
    """The findings of a check, line by line; an exception is a finding as well."""
    try:
        for status, text in check():
            yield Finding(name, status, text)
    except UserError as error:
        yield Finding(name, PROBLEM, str(error))
    except Exception as error:  # the doctor itself must not crash
        reason = (str(error).strip() or "no message").splitlines()[0]
        yield Finding(
            name, PROBLEM, f"the check itself failed ({type(error).__name__}: {reason[:300]})"
        )
