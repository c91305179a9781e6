"""Make a model's folder loadable for programs that use transformers alone."""

from pathlib import Path

from glmtune.data.files import read_json_object, write_json
from glmtune.models.family import Family

SHIM_FILE = "modeling_glmtune.py"
SHIM = "from glmtune.models import *  # noqa: F403  (pip install glmtune)\n"


def write_shim(folder: Path, family: Family) -> None:
    """Name this package as the folder's own code, in one line that imports it.

    With `trust_remote_code=True` transformers runs that line and has the classes; after
    `import glmtune.models` it needs neither. A tokenizer's settings are changed only if they name
    other code: a folder whose configuration needs code has that loaded before them, and the others
    get the tokenizer of transformers without.

    Args:
        folder: a model's folder; its config.json gets an `auto_map`, unless transformers has
            classes for the model.
        family: the model's family.
    """
    native = family.native()
    module = SHIM_FILE.removesuffix(".py")
    if not native.in_transformers:
        settings = read_json_object(folder / "config.json")
        settings["auto_map"] = {
            "AutoConfig": f"{module}.{native.config_class.__name__}",
            "AutoModelForCausalLM": f"{module}.{native.model_class.__name__}",
        }
        write_json(settings, folder / "config.json")
    file = folder / "tokenizer_config.json"
    settings = read_json_object(file) if file.is_file() else {}
    if names_code := "auto_map" in settings:
        tokenizer = f"{module}.{native.tokenizer_class.__name__}"
        settings["auto_map"] = {"AutoTokenizer": [tokenizer, None]}
        write_json(settings, file)
    if names_code or not native.in_transformers:
        (folder / SHIM_FILE).write_text(SHIM, encoding="utf-8")
