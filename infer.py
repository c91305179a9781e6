"""Answers to alpaca records. The same as `glmtune infer`, printed as in 2023, from a checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
    from glmtune.doctor.checkout import check

    check()
    from glmtune.cli import main

    as_in_2023 = ["--print_form", "original", "--print_limit", "none"]
    sys.argv[1:1] = ["infer", *as_in_2023]
    sys.exit(main())
