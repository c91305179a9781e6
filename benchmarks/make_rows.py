"""Write a long file of alpaca rows, each unlike the others, out of a short one.

    python benchmarks/make_rows.py SHORT.json LONG.jsonl 2000

writes about 2,000 MB of JSON lines, or one JSON list on one line if the name ends in .json.
"""

import itertools
import json
import sys


def main(source: str, target: str, megabytes: str) -> None:
    """Repeat the records of `source`, numbered, until `target` is long enough."""
    with open(source, encoding="utf-8") as file:
        records = json.load(file)
    start, between, end = ("", "\n", "\n") if target.endswith(".jsonl") else ("[", ", ", "]")
    size = 0
    with open(target, "wb") as out:
        out.write(start.encode())
        for number, record in enumerate(itertools.cycle(records), start=1):
            row = record | {"instruction": f"{record['instruction']} #{number}"}
            text = (between if number > 1 else "") + json.dumps(row, ensure_ascii=False)
            size += out.write(text.encode())
            if size >= float(megabytes) * 1e6:
                break
        out.write(end.encode())
    print(f"{number:,} rows, {size / 1e6:,.0f} MB")


main(*sys.argv[1:])
