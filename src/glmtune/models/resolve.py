"""Which base model is meant: a folder, a hub id, the published model, or else glm-tiny."""

import os
from functools import cache
from pathlib import Path

from huggingface_hub.constants import HF_HUB_OFFLINE

from glmtune.config.reading import shared_setting
from glmtune.errors import UserError, note
from glmtune.models import folders
from glmtune.models.downloads import in_time
from glmtune.models.families import DEFAULT
from glmtune.models.hubs import (
    CONFIG_FILE,
    check_endpoint,
    in_modelscope_cache,
    is_hub_id,
    name_of_folder,
    open_folder,
    try_to_load_from_cache,
)
from glmtune.run_files import RECIPE_FILE, find_around

ENVIRONMENT_VARIABLE = "GLMTUNE_MODEL"
# Where nothing is named. The publisher renamed itself: the hub cache of a long-time user has the
# older name.
HUB_IDS = DEFAULT.published[:2]
HUB_TIMEOUT_SECONDS = 5.0
# The tiny model that comes with the package.
GLM_TINY = str(Path(__file__).resolve().with_name("glm-tiny"))


def resolve_base(
    named: str | None = None, run_folder: str | None = None, *, needs_weights: bool = True
) -> str:
    """Decide which base model is meant.

    In this order: the setting, the environment variable GLMTUNE_MODEL, the recipe that a run folder
    keeps, the published model from the hub cache, or from the hub; and where there is none of
    these, glm-tiny, with a note on stderr.

    Args:
        named: `--base`: a folder, a hub id, or the name glm-tiny.
        run_folder: of the adapter that is to be used, if any.
        needs_weights: without, the published model is meant where none is named, be it here or not.

    Returns:
        A folder that exists, or a hub id.

    Raises:
        UserError: a path that does not exist, or HF_ENDPOINT is no address.
    """
    for value, source in (
        (named, "--base"),
        (os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE),
        (base_of_run(run_folder), f"base in {run_folder}/{RECIPE_FILE}"),
    ):
        if value:
            return _folder_or_hub_id(value, source)
    for hub_id in HUB_IDS:
        if isinstance(try_to_load_from_cache(hub_id, CONFIG_FILE), str):
            return hub_id
    if not needs_weights:
        return HUB_IDS[0]
    check_endpoint()
    if not HF_HUB_OFFLINE and _hub_has(HUB_IDS[0]):
        return HUB_IDS[0]
    _tell_of_glm_tiny()
    return GLM_TINY


@cache  # once is enough for a process
def _tell_of_glm_tiny() -> None:
    note(
        "no base model is given or found, so this uses glm-tiny, which knows a toy world and "
        f"nothing else; name the real one with --base FOLDER (or {ENVIRONMENT_VARIABLE})"
    )


def base_of_run(run_folder: str | None) -> str | None:
    """The base that the recipe of a run names, beside its adapter; None without a recipe."""
    recipes = find_around(Path(run_folder), RECIPE_FILE) if run_folder else []
    return shared_setting(str(recipes[0]), "base") if recipes else None


def _folder_or_hub_id(value: str, source: str) -> str:
    path = Path(value).expanduser()
    if path.is_dir():
        return str(open_folder(path))
    if value == Path(GLM_TINY).name:
        return GLM_TINY
    if path.exists() or not is_hub_id(value):
        raise UserError(
            f"{source}: {value} is no folder; pass the folder of a downloaded {DEFAULT.name} or a "
            f"hub id such as {HUB_IDS[0]}"
        )
    cached = in_modelscope_cache(value)
    return str(cached) if cached and folders.are_there(cached) else value


@cache
def _hub_has(hub_id: str) -> bool:
    from huggingface_hub import HfApi

    info = in_time(
        lambda: HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_SECONDS), HUB_TIMEOUT_SECONDS
    )
    return info is not None


def base_name(base: str) -> str:
    """What to call a base model in files that travel: a hub id or a folder's last name."""
    path = Path(base)
    return name_of_folder(path) if path.is_dir() else base
