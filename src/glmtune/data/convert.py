"""Alpaca records to JSON lines of context and target, in readable UTF-8."""

import json
from dataclasses import dataclass

from glmtune.config.settings import ConvertSettings
from glmtune.data.fields import FieldUse
from glmtune.data.files import new_file
from glmtune.data.records import BadRow, list_bad_rows, name_rows, read_alpaca
from glmtune.data.templates import context_of
from glmtune.errors import visible


@dataclass(frozen=True, slots=True)
class ConvertSummary:
    """The result of converting a file of records; printed, it lists every row that was left out.

    `empty_outputs` are the numbers of the rows of the source whose output is empty (they are
    kept), `fields` counts what the records have beside instruction, input and output.
    """

    data_path: str
    save_path: str
    num_written: int
    bad_rows: list[BadRow]
    empty_outputs: list[int]
    fields: FieldUse

    def __str__(self) -> str:
        num_bad, empty = len(self.bad_rows), self.empty_outputs
        lines = [
            f"{self.data_path} -> {self.save_path}",
            f"  {self.num_written + num_bad:,} records read, {self.num_written:,} rows written",
        ]
        if num_bad:
            lines.append(f"  {num_bad:,} bad, skipped:")
            lines += [f"    {line}" for line in list_bad_rows(self.bad_rows)]
        if empty:
            lines.append(f"  {len(empty):,} with an empty output, kept: {name_rows(empty)}")
        return "\n".join([*lines, *(f"  {line}" for line in self.fields.lines())])


def convert(settings: ConvertSettings) -> ConvertSummary:
    """Write a line {"context": ..., "target": ...} for each alpaca record, in order.

    Prints the summary that it returns. Raises UserError for what read_alpaca refuses and for a
    save_path that cannot be written.
    """
    records, bad_rows = read_alpaca(settings.data_path, settings.on_bad_row, settings.encoding)
    with new_file(settings.save_path) as file:
        for record in records:
            row = {
                "context": context_of(record.instruction, record.input, record.history),
                "target": record.output,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    summary = ConvertSummary(
        data_path=settings.data_path,
        save_path=settings.save_path,
        num_written=len(records),
        bad_rows=bad_rows,
        empty_outputs=[record.row for record in records if not record.output.strip()],
        fields=FieldUse.of(records),
    )
    print(visible(str(summary)))
    return summary
