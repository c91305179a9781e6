"""What a check found: a line each, and what all of them come to."""

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
    """What was found, and the fix where something is to be mended."""

    def __str__(self) -> str:
        return f"{self.status:8} {self.check:11} {self.text}"


CheckLine = tuple[Literal["ok", "warning", "problem"], str]
Check = Callable[[], Iterable[CheckLine]]


def run_check(name: str, check: Check) -> Iterator[Finding]:
    """What a check tells, line by line. Whatever it raises is a finding as well."""
    try:
        for status, text in check():
            yield Finding(name, status, text)
    except UserError as error:
        yield Finding(name, PROBLEM, str(error))
    except Exception as error:  # the doctor must not fall ill itself
        reason = (str(error).strip() or "no message").splitlines()[0]
        yield Finding(
            name, PROBLEM, f"the check itself failed ({type(error).__name__}: {reason[:300]})"
        )
