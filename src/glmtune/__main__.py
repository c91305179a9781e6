"""`python -m glmtune` is the command `glmtune`."""

import sys

from glmtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
