"""The native models. Importing this registers them with transformers' Auto classes.

After `import glmtune.models`, `AutoConfig`, `AutoTokenizer` and `AutoModelForCausalLM` load a
published folder as downloaded, and `AutoModel` the same without the head; no code from the folder
is run.
"""

from glmtune.models.families import *  # noqa: F403
from glmtune.models.families import register

register()
