"""Rows of any format to JSON lines that `tokenize` reads as the same rows, in readable UTF-8."""

import json
from dataclasses import dataclass

from glmtune.config.settings import ConvertSettings
from glmtune.data.fields import FieldUse
from glmtune.data.files import new_file
from glmtune.data.questions import lacks_answer, written_row
from glmtune.data.records import BadRow, has_turns, list_bad_rows, name_rows, read_typed
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
    """Write a line for each row, in order: of records {"context": ..., "target": ...}.

    Conversations, which records with a system text or earlier rounds are, become {"messages": ...},
    and texts stay {"text": ...}.

    Prints the summary that it returns. Raises UserError for what read_typed refuses and for a
    save_path that cannot be written.
    """
    rows, bad_rows = read_typed(
        settings.data_path, settings.format, settings.on_bad_row, settings.encoding
    )
    turns = has_turns(rows)
    fields = FieldUse.of(rows)
    if turns:
        fields.num_with_history = 0  # they are turns like any others
    with new_file(settings.save_path) as file:
        for row in rows:
            file.write(json.dumps(written_row(row, turns), ensure_ascii=False) + "\n")
    summary = ConvertSummary(
        data_path=settings.data_path,
        save_path=settings.save_path,
        num_written=len(rows),
        bad_rows=bad_rows,
        empty_outputs=[row.row for row in rows if lacks_answer(row)],
        fields=fields,
    )
    print(visible(str(summary)))
    return summary
