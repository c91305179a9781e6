"""Check what was downloaded from a hub or its mirror against the published hashes.

The hub cache names each file's content by its hash (sha256 of large files, git's sha1 of small
ones), but takes that name from the server that sent the file, and never reads the content again.
Here each file is read once: its content must have the hash that it is named by and the one that
huggingface.co states for it. If that does not answer, a family's published files are checked
against the hashes that it knows.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TypeVar

from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

from glmtune.data.files import sha256_of
from glmtune.errors import UserError, note

T = TypeVar("T")

PUBLISHER = "https://huggingface.co"
PUBLISHER_TIMEOUT_SECONDS = 10.0
_CHECKED_FILE = "glmtune-checked.json"
_SHA256_DIGITS = 64
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def in_time(ask: Callable[[], T], seconds: float) -> T | None:
    """The result of a request to a server, or None if no answer comes in time.

    Raises:
        RevisionNotFoundError: the server answers that there is no such revision.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    found: list[T] = []
    unknown: list[RevisionNotFoundError] = []

    def run() -> None:
        try:
            found.append(ask())
        except RevisionNotFoundError as error:
            unknown.append(error)
        except Exception:  # a missing network raises many kinds; each means "no answer"
            return

    # A client's timeout does not cover the look-up of the server's address, which may hang for long
    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if unknown:
        raise unknown[0]
    return found[0] if found else None


def check_download(hub_id: str, snapshot: Path) -> None:
    """Check the files of a hub's snapshot against their hashes, each file once.

    Files found good are recorded beside the snapshots, with size and time of change.

    Args:
        hub_id: owner/name.
        snapshot: the hub cache's folder of one commit.

    Raises:
        UserError: a file is not the published one, or the publisher knows no such commit.
    """
    record = snapshot.parent.parent / _CHECKED_FILE
    checked = _read_record(record)
    files = [path for path in sorted(snapshot.iterdir()) if path.is_file()]
    states = {str(path.resolve()): _state(path) for path in files}
    unchecked = [path for path in files if checked.get(key := str(path.resolve())) != states[key]]
    if not unchecked:
        return
    gigabytes = sum(path.stat().st_size for path in unchecked) / 1e9
    print(f"checking {len(unchecked)} files of {hub_id} ({gigabytes:.1f} GB)", file=sys.stderr)
    published = _ask_publisher(hub_id, snapshot.name)
    for path in unchecked:
        # Without links, as on Windows, a file of the cache is not named by its hash.
        stated = {path.resolve().name, published.get(path.name, "")}
        digests = set(filter(_DIGEST.fullmatch, stated))
        for digest in digests:
            _check_file(path, digest)
        known = set() if path.name in published else _known_sha256(hub_id, path.name)
        checked_sha256 = {digest for digest in digests if len(digest) == _SHA256_DIGITS}
        if known and not known & (checked_sha256 or {sha256_of(path)}):
            raise UserError(
                f"{path}: is none of the published files that are known here, and {PUBLISHER} is "
                f"not there to ask; delete {path.resolve()} and download it again, or, if you know "
                f"where it comes from, pass the folder itself: --base {snapshot}"
            )
    with suppress(OSError):  # a cache that is not writable is checked again next time
        record.write_text(json.dumps(checked | states), encoding="utf-8")


def _known_sha256(hub_id: str, name: str) -> set[str]:
    """Allowed sha256 hashes of a publisher's file; empty if no family knows it."""
    from glmtune.models.families import FAMILIES  # here: it imports this module

    return set().union(*(family.known_sha256(hub_id, name) for family in FAMILIES))


def _check_file(path: Path, digest: str) -> None:
    found = sha256_of(path) if len(digest) == _SHA256_DIGITS else _git_sha1(path)
    if found != digest:
        raise UserError(
            f"{path}: is not the published file (hash {found[:12]}..., published "
            f"{digest[:12]}...): damaged on its way, or changed by a mirror; delete "
            f"{path.resolve()} and download it again, from {PUBLISHER} if you can"
        )


def _ask_publisher(hub_id: str, commit: str) -> dict[str, str]:
    """File name to the hash that the publisher's hub states; empty if the hub cannot be reached."""
    if HF_HUB_OFFLINE:
        return {}
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        info = in_time(
            lambda: HfApi(endpoint=PUBLISHER).model_info(
                hub_id, revision=commit, files_metadata=True, timeout=PUBLISHER_TIMEOUT_SECONDS
            ),
            PUBLISHER_TIMEOUT_SECONDS,
        )
    except RevisionNotFoundError as error:
        raise UserError(
            f"{hub_id}: {PUBLISHER} knows no revision {commit[:12]} of it, so {ENDPOINT} made it "
            "up; download it from elsewhere"
        ) from error
    if info is None:
        note(
            f"{PUBLISHER} does not answer; the files of {hub_id} are checked against the hashes "
            f"of {ENDPOINT} and those that glmtune knows"
        )
        return {}
    stated = {
        file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id
        for file in info.siblings or []
    }
    return {name: digest for name, digest in stated.items() if digest}


def _read_record(path: Path) -> dict[str, list[int]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _git_sha1(path: Path) -> str:
    """The id that git gives a file's content. Source: git's documentation, Git Objects."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()
