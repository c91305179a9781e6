"""Weight files on disk: which there are, what they hold, and whether that fits the model.

Everything here reads headers only: tensors stay on disk, and no pickle is run beyond torch's own
`weights_only` reader.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from glmtune.errors import UserError

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
MAX_NAMED = 3
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")

Shapes = dict[str, tuple[int, ...]]


def fetch(name_or_path: str, **hub_arguments) -> Path:
    """The local folder of a checkpoint: the folder itself, or the hub's files in the hub cache.

    Only data is fetched (JSON, vocabularies, weights), never code.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    patterns = ["*.json", "*.model", "*.safetensors", "*.bin"]
    return Path(snapshot_download(name_or_path, allow_patterns=patterns, **hub_arguments))


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, by its index or as one file.

    Raises:
        UserError: no weights there, a shard that is missing, is a Git-LFS pointer or lies outside
            the folder.
    """
    for index_name in INDEX_FILES:
        if (folder / index_name).is_file():
            names = _read_index(folder / index_name)
            break
    else:
        names = [name for name in SINGLE_FILES if (folder / name).is_file()][:1]
    if not names:
        raise UserError(
            f"{folder}: holds no weights (looked for {', '.join(INDEX_FILES + SINGLE_FILES)}); "
            "pass the folder of a downloaded model"
        )
    for name in names:
        path = folder / name
        if Path(name).name != name:
            raise UserError(
                f"{folder}: the index names {name!r} outside the folder; download it again"
            )
        if not path.is_file():
            raise UserError(f"{path}: a shard that the index names is missing; download it again")
        if is_lfs_pointer(path):
            raise UserError(
                f"{path}: is a Git-LFS pointer, not weights; run `git lfs pull` in that folder"
            )
    return [folder / name for name in names]


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git leaves in the place of a large file that was not fetched."""
    with path.open("rb") as file:
        return file.read(24).startswith(b"version https://git-lfs")


def _read_index(path: Path) -> list[str]:
    try:
        return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: is no index of weight shards ({error}); download it again"
        ) from error


def read_shapes(files: Iterable[Path]) -> Shapes:
    """Name and shape of every tensor, without reading the tensors.

    Raises:
        UserError: a file is damaged, or is a pickle with more than tensors in it.
    """
    shapes: Shapes = {}
    for path in files:
        if path.suffix == ".safetensors":
            shapes |= _read_safetensors_shapes(path)
        else:
            tensors = load_bin(path, device="meta")
            shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes


def _read_safetensors_shapes(path: Path) -> Shapes:
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}); download it again") from error


def load_bin(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, read with `weights_only`, so that no code in it can run.

    Raises:
        UserError: the file is damaged, or holds something else than named tensors.
    """
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or refused pickle
        # torch's own message goes on to explain how to run the code in it: not repeated here.
        raise UserError(
            f"{path}: cannot be read as plain tensors ({type(error).__name__}): it is damaged or "
            "has code in it; download it again, from a source you trust"
        ) from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise UserError(f"{path}: holds something else than named tensors; pass a file of weights")
    return tensors


def tensors_differ(files: Iterable[Path], first: str, second: str) -> bool:
    """Whether two tensors are both there and not equal (a head that is not tied)."""
    found: dict[str, torch.Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = {first, second} & set(file.keys())
                found |= {name: file.get_tensor(name) for name in names}
        else:
            mapped = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
            found |= {name: mapped[name] for name in {first, second} & set(mapped)}
    return len(found) == 2 and not torch.equal(found[first], found[second])


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def check_shapes(
    found: Shapes, expected: Shapes, folder: Path, optional: Iterable[str] = ()
) -> None:
    """Hold the tensors on disk against those of the model.

    Args:
        found: of the files.
        expected: of the model.
        folder: named in the error.
        optional: names that may be missing, because they are tied to another tensor.

    Raises:
        UserError: one line that names what is missing, extra and misshapen.
    """
    missing = [name for name in expected if name not in found and name not in optional]
    extra = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    parts = [
        f"{title} {_some(names)}"
        for title, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if names
    ]
    if parts:
        raise UserError(
            f"{folder}: the weights do not fit config.json: {'; '.join(parts)}; "
            "take config.json and all weight files from the same download"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
