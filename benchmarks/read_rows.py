"""Read a file of rows as convert does, without keeping them: rows, MB/s and the most memory held.

python benchmarks/read_rows.py FILE
"""

import os
import resource
import sys
import time

from glmtune.data.containers import read_batches

start = time.perf_counter()
num_rows = sum(len(batch.values) for batch in read_batches(sys.argv[1]))
seconds = time.perf_counter() - start
speed = os.path.getsize(sys.argv[1]) / 1e6 / seconds
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
print(f"{num_rows:,} rows in {seconds:.1f} s, {speed:.0f} MB/s, {memory:.0f} MB of memory")
