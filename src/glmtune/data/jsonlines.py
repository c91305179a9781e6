"""Append measurements to a file, a line of JSON each."""

import json
from pathlib import Path
from typing import Any

from glmtune.errors import UserError


def append_json(record: dict[str, Any], path: str) -> None:
    """Add a line to a JSON lines file.

    Raises:
        UserError: see `check_appendable`.
    """
    _append(json.dumps(record, ensure_ascii=False) + "\n", path)


def check_appendable(path: str | None) -> None:
    """Check, before minutes of work, that a record can be appended to a file.

    Raises:
        UserError: it cannot be written.
    """
    if path:
        _append("", path)


def _append(text: str, path: str) -> None:
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"json_path {path}: cannot be written ({error.strerror}); name another file"
        ) from error
