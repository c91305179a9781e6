"""Weight files on disk: what they hold, and whether that fits the model.

Everything here reads headers only: tensors stay on disk, and no code in a file is run.
"""

import json
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from glmtune.errors import UserError
from glmtune.models.folders import WEIGHT_FILES, some, weight_files
from glmtune.models.torch_files import read_torch_file

_LONG_BYTES = 1e9

Outline = dict[str, Tensor]  # on the meta device: shapes and types, no numbers


@contextmanager
def indexed(folder: Path) -> Iterator[Path]:
    """A folder that transformers can read: this one, or another if its shards lack their index.

    The other one is temporary and holds an index made from the shards' own headers. The shards stay
    in place, and nothing is written beside them.
    """
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        yield folder
        return
    files = weight_files(folder)
    shard_of = {name: str(path.resolve()) for path in files for name in read_outline([path])}
    stem = "model" if files[0].suffix == ".safetensors" else "pytorch_model"
    with TemporaryDirectory() as place:
        index = Path(place, f"{stem}{files[0].suffix}.index.json")
        # transformers joins folder and shard, and an absolute path is its own
        index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}), encoding="utf-8")
        for path in folder.glob("*config.json"):  # generation_config.json, or config.json for it
            shutil.copyfile(path, Path(place, path.name))
        yield Path(place)


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
    except (SafetensorError, KeyError) as error:  # KeyError: an unknown number type
        raise UserError(f"{path}: is damaged ({error}); download it again") from error
    return outline


def load_bin(path: Path, device: str = "cpu", *, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.bin` file, read without running any code in it.

    Raises:
        UserError: see `read_torch_file`; or the file holds anything but named tensors.
    """
    tensors = read_torch_file(path, device, mmap=mmap)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) and tensor.layout == torch.strided
        for name, tensor in tensors.items()
    ):
        raise UserError(f"{path}: holds something else than named tensors; pass a file of weights")
    return tensors


def load_mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, each of which is read from the disk when it is used.

    Raises:
        UserError: the file is damaged, or is a pickle with more than tensors in it.
    """
    if path.suffix != ".safetensors":
        return load_bin(path, mmap=True)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}); download it again") from error


def tensors_differ(files: Iterable[Path], first: str, second: str) -> bool:
    """Whether two tensors are both present and differ (a head that is not tied)."""
    found = read_named(files, {first, second})
    return len(found) == 2 and not torch.equal(found[first], found[second])


def read_named(files: Iterable[Path], names: set[str]) -> dict[str, Tensor]:
    """Some tensors of a checkpoint, those of these names that it has; no other is read."""
    found: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in names & set(file.keys())}
        else:
            mapped = load_bin(path, mmap=True)
            found |= {name: mapped[name] for name in names & set(mapped)}
    return found


def check_outline(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    folder: Path,
    *,
    optional: Collection[str] = (),
    exact: Collection[str] = (),
) -> None:
    """Compare the tensors on disk with those of the model, by name, shape and type.

    Args:
        found: tensors of the files.
        expected: tensors of the model.
        folder: named in the error.
        optional: names that may be missing, because they are tied to another tensor.
        exact: names whose type must be the model's; the others may have any float type.

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
    parts = [f"{fault} {some(names)}" for fault, names in faults.items() if names]
    if parts:
        raise UserError(
            f"{folder}: the weights do not fit config.json: {'; '.join(parts)}; "
            "take config.json and all weight files from the same download"
        )


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def bar_if_long(folder: Path) -> Iterator[None]:
    """Show transformers' progress bar only in a terminal, and only for gigabytes."""
    files = (path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    is_long = sum(path.stat().st_size for path in files if path.is_file()) > _LONG_BYTES
    silent = is_progress_bar_enabled() and not (is_long and sys.stderr.isatty())
    if silent:
        disable_progress_bar()
    try:
        yield
    finally:
        if silent:
            enable_progress_bar()
