"""A data set on disk as `datasets.Dataset.save_to_disk` writes it, without importing datasets."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

# As that function has them: rows of a record batch, and bytes from which on it cuts files.
ROWS_PER_RECORD, MOST_BYTES = 1000, 500_000_000
ARROW_FILE = "data-00000-of-00001.arrow"


def write_dataset(table: pa.Table, folder: Path) -> None:
    """Write token rows for `datasets.load_from_disk`; what needs several files is left to datasets.

    Args:
        table: columns of int32 and of lists of int32.
        folder: is there.
    """
    if table.nbytes >= MOST_BYTES:
        import datasets

        datasets.Dataset(table).save_to_disk(str(folder))
        return
    features = {field.name: _feature(field.type) for field in table.schema}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = table.replace_schema_metadata(metadata)
    file = folder / ARROW_FILE
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=ROWS_PER_RECORD)
    with file.open("rb") as written:
        fingerprint = hashlib.file_digest(written, "sha256").hexdigest()[:16]
    state: dict[str, Any] = {
        "_data_files": [{"filename": ARROW_FILE}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    for name, content in (("state.json", state), ("dataset_info.json", info)):
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """How datasets describes a column."""
    if not pa.types.is_list(kind):
        return {"dtype": str(kind), "_type": "Value"}
    return {"feature": _feature(kind.value_type), "_type": "List"}
