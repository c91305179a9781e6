"""Files of torch.save: written so that a full disk is reported as such, read as untrusted input.

Such a file is a zip archive with a pickle in it, and a pickle can call anything when it is opened.
torch's `weights_only` reader calls only what builds tensors and plain containers. This module adds
a limit on the memory that a small file may claim.
"""

import io
import pickletools
import re
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from glmtune.data.files import check_inside
from glmtune.errors import UserError

_GET_AGAIN = "get it again, from a source you trust"
_PLAIN_MODULES = ("torch", "collections")


def read_torch_file(path: Path, device: str = "cpu", *, mmap: bool = False) -> Any:
    """Read what torch.save wrote; of what its pickle calls, only torch's own functions run.

    Args:
        path: the file.
        device: where tensors go; "meta" leaves their numbers on the disk.
        mmap: map the file into memory instead of reading it, where its form allows that.

    Raises:
        UserError: the file is a link out of its folder, contains code (which is named), is damaged,
            or holds tensors that claim more numbers than it has.
    """
    check_inside(path)
    try:
        is_zip = _check_archive(path)
        content = torch.load(path, map_location=device, weights_only=True, mmap=mmap and is_zip)
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged or refused pickle
        # torch's own message also explains how to run the code in it: not repeated here.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        code = refused[1] if refused else _foreign_name(path)
        damage = f"is damaged ({type(error).__name__})"
        fault = f"has code in it ({code}), which is not run" if code else damage
        raise UserError(f"{path}: {fault}; {_GET_AGAIN}") from error
    # A head tied to its embedding occurs twice; more means views that repeat the same numbers.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(content))
    if claimed > 2 * path.stat().st_size:
        raise UserError(
            f"{path}: its tensors claim {claimed:,} bytes, more than the file has; {_GET_AGAIN}"
        )
    return content


def write_torch_file(content: Any, path: Path) -> None:
    """Write a file with torch.save. Raises OSError if the disk refuses it."""
    # Serialise in memory first: torch reports a full disk as an error of its archive writer.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def _check_archive(path: Path) -> bool:
    """Whether the file is a zip archive; refuse one that is compressed."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # torch before 1.6 wrote bare pickles
            return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(
            f"{path}: is compressed, as torch.save writes no file, so that a small one could fill "
            f"the memory; {_GET_AGAIN}"
        )
    return True


def _foreign_name(path: Path) -> str | None:
    """The first thing a pickle calls that is not torch's, found without running the pickle."""
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(path):
                return _first_call(file)
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                return _first_call(archive.open(name))
    except Exception:  # too damaged to find it
        return None


def _first_call(pickle: IO[bytes]) -> str | None:
    texts: deque[str] = deque(maxlen=2)  # a later protocol pushes module and name one by one
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            name = ".".join(texts)
        else:
            texts += [argument] if isinstance(argument, str) else []
            continue
        if name.partition(".")[0] not in _PLAIN_MODULES:
            return name
    return None


def _tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers; each container is visited once."""
    seen, left = set(), [content]
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            left += item.values() if isinstance(item, dict) else item
