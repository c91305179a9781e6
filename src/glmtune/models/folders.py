"""A model's folder: where its files come from, and which of them hold its weights.

Only names are looked at, so that a wrong path is reported before torch is imported.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from glmtune.data.files import check_inside, read_json_object
from glmtune.errors import UserError
from glmtune.models.downloads import check_download
from glmtune.models.hubs import check_endpoint, from_modelscope, is_on_modelscope, open_folder

# In the order in which transformers looks for them: what is checked here is what it loads.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Data alone, never code.
DATA_FILES = ("*.json", "*.model", "*.jinja", "*.safetensors", "*.bin")
MAX_NAMED = 3
_SHARD = re.compile(r"([\w.-]+)-(\d{5})-of-(\d{5})\.(bin|safetensors)")
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def fetch(name_or_path: str, only: Iterable[str] = DATA_FILES, **hub_arguments) -> Path:
    """The local folder of a checkpoint: the folder itself, or the hub's files in the hub's cache.

    Only data is downloaded (JSON, vocabularies, weights), never code, and checked against its
    hashes; of the data, only what matches `only`.

    Raises:
        UserError: a file is not the published one, HF_ENDPOINT is no address, or the client of
            ModelScope is needed and not installed.
        Exception: the hub does not provide the model; clients raise many kinds.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return open_folder(folder)
    if is_on_modelscope(name_or_path):
        return from_modelscope(name_or_path, list(only))
    check_endpoint()
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(name_or_path, allow_patterns=list(only), **hub_arguments))
    check_download(name_or_path, snapshot)
    return snapshot


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: one, those of its index, or numbered shards.

    Raises:
        UserError: there are no weights, or a shard is missing, is a Git-LFS pointer or is outside
            the folder.
    """
    found = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        names = _numbered_shards(folder)
    else:
        check_inside(folder / found)
        names = _read_index(folder / found) if found.endswith(".json") else [found]
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: a shard that the index names is missing; download it again")
        check_inside(path)
        if is_lfs_pointer(path):
            raise UserError(
                f"{path}: is a Git-LFS pointer, not weights; run `git lfs pull` in that folder"
            )
    return [folder / name for name in names]


def are_there(folder: Path) -> bool:
    """Whether a folder has all its weights; an unfinished download does not."""
    try:
        return bool(weight_files(folder))
    except UserError:
        return False


def _numbered_shards(folder: Path) -> list[str]:
    """The shards of a folder without its index: their names state how many there are."""
    shards = [found for path in sorted(folder.iterdir()) if (found := _SHARD.fullmatch(path.name))]
    kinds = {found.expand(r"\1 \3 \4"): found for found in shards}
    if not kinds:
        raise UserError(
            f"{folder}: holds no weights (looked for {', '.join(WEIGHT_FILES)} and numbered "
            "shards); pass the folder of a downloaded model"
        )
    if len(kinds) > 1:
        names = " and ".join(found[0] for found in list(kinds.values())[:MAX_NAMED])
        raise UserError(
            f"{folder}: holds shards of several downloads ({names}) and no index that says which "
            "are the weights; leave those of one there"
        )
    (kind,) = kinds.values()
    there = {found[0] for found in shards}
    wanted = [f"{kind[1]}-{i:05}-of-{kind[3]}.{kind[4]}" for i in range(1, int(kind[3]) + 1)]
    if missing := [name for name in wanted if name not in there]:
        raise UserError(
            f"{folder}: of {len(wanted)} shards these are missing: {some(missing)}; download them "
            "again"
        )
    return wanted


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the pointer that git leaves for a large file that was not fetched."""
    with path.open("rb") as file:
        return file.read(24).startswith(b"version https://git-lfs")


def _read_index(path: Path) -> list[str]:
    """The shards that an index names: files beside it, of the index's own kind."""
    shards = read_json_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path}: is no index of weight shards; download it again")
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    for name in shards.values():
        if not isinstance(name, str) or not re.fullmatch(rf"\w[\w.-]{{0,200}}\{suffix}", name):
            raise UserError(
                f"{path}: names {str(name)[:200]!r}, no {suffix} file inside the folder; download "
                "the index again"
            )
    return sorted(set(shards.values()))


def some(names: list[str]) -> str:
    """The first names of some, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
