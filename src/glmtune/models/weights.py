"""Weight files on disk: which there are, what they hold, and whether that fits the model.

Everything here reads headers only: tensors stay on disk, and no pickle is run beyond torch's own
`weights_only` reader.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from glmtune.errors import UserError

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
MAX_NAMED = 3
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")

Outline = dict[str, Tensor]  # on the meta device: shapes and types, no numbers


def fetch(name_or_path: str, only: str | None = None, **hub_arguments) -> Path:
    """The local folder of a checkpoint: the folder itself, or the hub's files in the hub cache.

    Only data is fetched (JSON, vocabularies, weights), never code; of it, where that is enough,
    one file alone.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    patterns = [only] if only else ["*.json", "*.model", "*.safetensors", "*.bin"]
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


def read_outline(files: Iterable[Path]) -> Outline:
    """Name, shape and type of every tensor, without reading the tensors.

    Raises:
        UserError: a file is damaged, or is a pickle with more than tensors in it.
    """
    outline: Outline = {}
    for path in files:
        if path.suffix == ".safetensors":
            outline |= _read_safetensors_outline(path)
        else:
            outline |= load_bin(path, device="meta")
    return outline


def _read_safetensors_outline(path: Path) -> Outline:
    outline: Outline = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                header = file.get_slice(name)
                dtype = str_to_torch_dtype[header.get_dtype()]
                outline[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, KeyError) as error:  # KeyError: a type of number not known here
        raise UserError(f"{path}: is damaged ({error}); download it again") from error
    return outline


def load_bin(path: Path, device: str = "cpu") -> dict[str, Tensor]:
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
    found: dict[str, Tensor] = {}
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


def check_outline(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    folder: Path,
    *,
    optional: Collection[str] = (),
    exact: Collection[str] = (),
) -> None:
    """Hold the tensors on disk against those of the model, by name, shape and type.

    Args:
        found: of the files.
        expected: of the model.
        folder: named in the error.
        optional: names that may be missing, because they are tied to another tensor.
        exact: names whose type has to be the model's; of the others any float type will do.

    Raises:
        UserError: one line that names what is missing, extra, misshapen and mistyped.
    """
    missing = [name for name in expected if name not in found and name not in optional]
    extra = [name for name in found if name not in expected]
    both = [(name, found[name], expected[name]) for name in expected if name in found]
    misshapen = [
        f"{name} {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        for name, ours, theirs in both
        if ours.shape != theirs.shape
    ]
    mistyped = [
        f"{name} {_type_name(ours)} instead of {_type_name(theirs)}"
        for name, ours, theirs in both
        if ours.dtype != theirs.dtype and (name in exact or not ours.is_floating_point())
    ]
    faults = {"missing": missing, "extra": extra, "misshapen": misshapen, "mistyped": mistyped}
    parts = [f"{fault} {_some(names)}" for fault, names in faults.items() if names]
    if parts:
        raise UserError(
            f"{folder}: the weights do not fit config.json: {'; '.join(parts)}; "
            "take config.json and all weight files from the same download"
        )


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
