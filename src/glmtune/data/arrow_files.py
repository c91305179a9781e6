"""A data set on disk as `datasets.Dataset.save_to_disk` writes it, without importing datasets."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

ROWS_PER_RECORD = 1000
"""Rows of a record batch, as that function has them."""


def write_dataset(table: pa.Table, folder: Path) -> None:
    """Write token rows in one file for `datasets.load_from_disk`.

    Args:
        table: columns of int32 and of lists of int32.
        folder: is there.
    """
    name = file_name(0, 1)
    write_lists(table.schema, folder, [name], [write_file(table, folder / name)])


def file_name(number: int, count: int) -> str:
    """The name of a data set's file, by its number from 0 and how many there are."""
    return f"data-{number:05}-of-{count:05}.arrow"


def write_file(table: pa.Table, file: Path) -> str:
    """Write a file of a data set, and return the sha256 of its content."""
    metadata = {"huggingface": json.dumps({"info": {"features": _features(table.schema)}})}
    table = table.replace_schema_metadata(metadata)
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=ROWS_PER_RECORD)
    with file.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


def write_lists(
    schema: pa.Schema, folder: Path, names: Sequence[str], digests: Sequence[str]
) -> None:
    """Write what datasets reads first: the columns, and which files hold them.

    Args:
        schema: of the columns.
        folder: holds the files.
        names: of the files, in the order of their rows.
        digests: the sha256 of each.
    """
    fingerprint = digests[0]
    if len(digests) > 1:
        fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {
        "citation": "",
        "description": "",
        "features": _features(schema),
        "homepage": "",
        "license": "",
    }
    for name, content in (("state.json", state), ("dataset_info.json", info)):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _features(schema: pa.Schema) -> dict[str, Any]:
    return {field.name: _feature(field.type) for field in schema}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How datasets describes a column."""
    if not pa.types.is_list(kind):
        return {"dtype": str(kind), "_type": "Value"}
    return {"feature": _feature(kind.value_type), "_type": "List"}
