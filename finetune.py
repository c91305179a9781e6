"""A LoRA adapter from token rows. The same as `glmtune train`, from a checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))
    from glmtune.doctor.checkout import check

    check()
    from glmtune.cli import main

    sys.argv[1:1] = ["train"]
    sys.exit(main())
