"""A data set on disk as `datasets.Dataset.save_to_disk` writes it, without importing datasets.

datasets takes half the CPU time of torch to import, and is left what is unusual. pyarrow's own
functions from numpy and to it import pandas wherever that is installed; those here do not.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROWS_PER_RECORD = 1000
"""Rows of a record batch, as that function has them."""
# Where a data set of an old version lists which rows of its files count, and in which order.
_INDICES = ("_indices_files", "_indices_data_files")


def as_column(numbers: Any) -> pa.Array:
    """A column of the int32 numbers in an array, with which it shares memory."""
    buffer = pa.py_buffer(numbers)
    return pa.Array.from_buffers(pa.int32(), buffer.size // 4, [None, buffer])


def as_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The integers of a column, shared where they lie in one chunk."""
    return np.from_dlpack(
        column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    )


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


def read_dataset(folder: Path, state: Mapping[str, Any]) -> pa.Table | None:
    """All rows of a data set, mapped into memory.

    Args:
        folder: where `save_to_disk` has written it.
        state: the content of its state.json.

    Returns:
        None for the splits of a `DatasetDict`.

    Raises:
        OSError, ValueError, LookupError, TypeError: it is damaged, or no data set.
    """
    files, has_info = state.get("_data_files"), (folder / "dataset_info.json").is_file()
    if not files or not has_info or any(state.get(key) for key in _INDICES):
        import datasets

        dataset = datasets.load_from_disk(str(folder))
        return dataset.with_format("arrow")[:] if isinstance(dataset, datasets.Dataset) else None
    tables = []
    for file in files:
        mapped = pa.memory_map(str(folder / file["filename"]))
        tables.append(pa.ipc.open_stream(mapped).read_all())
    return pa.concat_tables(tables)


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How datasets describes a column."""
    if not pa.types.is_list(kind):
        return {"dtype": str(kind), "_type": "Value"}
    return {"feature": _feature(kind.value_type), "_type": "List"}
