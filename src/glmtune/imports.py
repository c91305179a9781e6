"""What the command line does so that the libraries behind a verb are imported sooner.

A program that imports glmtune decides these things for itself: nothing is done in its process.
"""

import gc
import sys

import glmtune

NEVER_USED = ("scipy", "sklearn")
"""What transformers imports where it is installed, for losses of object detection and speculative
decoding. `glmtune[eval]` installs it for lm-evaluation-harness, which no verb runs."""
FULL_COLLECTIONS = 1000
"""Collections of the middle generation before Python looks through all objects, instead of 10."""
_left_out: set[str] = set()


def prepare_imports() -> None:
    """Make this process the command's own, before its verb imports anything.

    Garbage is collected as before among young objects. What imports leave behind are hundreds of
    thousands of lasting objects, which Python would look through again each time they have grown
    by a quarter: half of torch's time to import, and nothing found.
    """
    glmtune.is_command = True
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTIONS)
    leave_out(*NEVER_USED)


def leave_out(*packages: str) -> None:
    """Make packages absent in the command's process: libraries then do without, as they can.

    A None in sys.modules is how Python itself marks a module that must not be found. A package that
    is in memory already stays.
    """
    if glmtune.is_command:
        missing = set(packages) - set(sys.modules)
        sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]
        _left_out.update(missing)


def leave_out_nothing() -> None:
    """Undo `leave_out`, before code that is not ours runs: it may need any package."""
    while _left_out:
        name = _left_out.pop()
        if sys.modules.get(name, name) is None:  # else it was imported since, and stays whole
            del sys.modules[name]
