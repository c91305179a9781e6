"""`--to chatglm`: the publisher's own layout, which other tools read of this family."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from glmtune.adapters.merge import copy_tokenizer, downcast_lossless, probe
from glmtune.data.files import read_json_object, write_json
from glmtune.export.job import Job
from glmtune.export.reopening import OURS, Reopened, check_logits
from glmtune.models.base_files import TOKENIZER_SETTINGS
from glmtune.models.hubs import CONFIG_FILE
from glmtune.models.loading import load_base_model

SETTINGS_FILE = TOKENIZER_SETTINGS[0]


def write(job: Job, folder: Path) -> Reopened:
    """Write the merged model under the publisher's names, and open it as a published folder."""
    from huggingface_hub import save_torch_state_dict

    merged = job.merge()
    model, expected = merged.model, merged.expected
    job.set_stops(model)
    stored = merged.base_config.dtype
    stored = stored if isinstance(stored, torch.dtype) else torch.float32
    downcast_lossless(model, stored)
    as_published = job.family.exports.as_published
    assert as_published, "refused before"
    settings, tensors = as_published(model.state_dict(), model.config)
    state = dict(tensors)
    save_torch_state_dict(state, folder)
    settings["torch_dtype"] = str(stored).removeprefix("torch.")
    settings |= _code(job.base_folder, folder)
    write_json(settings, str(folder / CONFIG_FILE))
    model.generation_config.save_pretrained(folder)
    copy_tokenizer(job.base_folder, folder)
    _keep_code_that_is_there(folder)
    del merged, model, state, tensors
    found = probe(load_base_model(str(folder), dtype=torch.float32))
    return Reopened(OURS, False, check_logits(found, expected, OURS))


def _keep_code_that_is_there(folder: Path) -> None:
    """Let the tokenizer's settings name no code that was not copied."""
    file = folder / SETTINGS_FILE
    settings = read_json_object(file) if file.is_file() else {}
    named = json.dumps(settings.get("auto_map") or {})
    modules = set(re.findall(r"\"([\w-]+)\.\w+\"", named))
    if not all((folder / f"{module}.py").is_file() for module in modules):
        del settings["auto_map"]
        write_json(settings, str(file))


def _code(base: Path, folder: Path) -> dict[str, Any]:
    """Copy the publisher's code where the base's folder has all of it; else nothing names it.

    The code is copied, never run.
    """
    found = read_json_object(base / CONFIG_FILE).get("auto_map") or {}
    names = {str(value).partition(".")[0] + ".py" for value in found.values()}
    files = sorted(base.glob("*.py"))
    if not found or not names <= {file.name for file in files}:
        return {}
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return {"auto_map": found}
