"""Records of figures, a line of JSON each, at the end of a file."""

import json
from pathlib import Path
from typing import Any

from glmtune.errors import UserError


def append_json(record: dict[str, Any], path: str) -> None:
    """Add a line to a JSON lines file.

    Raises:
        UserError: as `check_appendable`.
    """
    _append(json.dumps(record, ensure_ascii=False) + "\n", path)


def check_appendable(path: str | None) -> None:
    """Find out before the minutes of work whether a record can be added to a file.

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
