"""The native models. Importing this registers them with transformers' Auto classes.

After `import glmtune.models`, `AutoConfig`, `AutoTokenizer` and `AutoModelForCausalLM` load a
published folder as downloaded, and `AutoModel` the same without the head; no code from the folder
is run. In a process of the command line they are registered when the first model is loaded.
"""

from typing import Any

import glmtune
from glmtune.models import families

if not glmtune.is_command:
    families.register()

__all__ = families.__all__


def __getattr__(name: str) -> Any:
    return getattr(families, name)
