"""Resolve a model's name: to a folder, into a hub's cache on this disk, or to a hub.

huggingface.co (or HF_ENDPOINT, a mirror of it) and ModelScope keep downloads in cache folders of
their own layout, which users may pass directly.
"""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

from glmtune.errors import UserError
from glmtune.models.downloads import in_time

CONFIG_FILE = "config.json"
TIMEOUT_SECONDS = 5.0
MODELSCOPE_OWNER = "ZhipuAI"
"""The publisher of GLM on ModelScope, which has another name on huggingface.co."""

_FINE, _SERVER_FAULT = 200, 500


def is_hub_id(value: str) -> bool:
    """Whether a value has the form owner/name."""
    return value.count("/") == 1 and value[0] not in "./~\\" and not value.endswith("/")


def open_folder(folder: Path, holds: Sequence[str] = (CONFIG_FILE,)) -> Path:
    """A model's own folder: for a folder of snapshots in a hub's cache, one snapshot.

    That is the snapshot of the branch main, or, if there is none, the newest.

    Args:
        folder: any folder, such as `models--THUDM--chatglm-6b` or the `snapshots` within.
        holds: file names; a snapshot that has none of them holds only parts of the model.
    """
    outer = folder.parent if folder.name == "snapshots" else folder
    snapshots = outer / "snapshots"
    if not snapshots.is_dir() or any((folder / name).is_file() for name in holds):
        return folder
    main = outer / "refs" / "main"
    commit = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    found = [place for place in snapshots.iterdir() if place.is_dir()]

    def rank(place: Path) -> tuple[bool, bool, float]:
        whole = any((place / name).is_file() for name in holds)
        return whole, place.name == commit, place.stat().st_mtime

    if not found:
        raise UserError(
            f"{folder}: is a hub's cache folder without a snapshot in it; download the model again"
        )
    return max(found, key=rank)


def name_of_folder(folder: Path) -> str:
    """A folder's name in files that are shared: owner/name in a hub's cache, else its last part.

    huggingface.co's cache keeps owner/name as models--owner--name/snapshots/<commit>, ModelScope's
    as owner--name/snapshots/<branch> or owner/name, with dots in names written as three bars.
    """
    folder = folder.resolve()
    if folder.parent.name != "snapshots":
        return folder.name.replace("___", ".")
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/")


def in_modelscope_cache(hub_id: str) -> Path | None:
    """The folder in which ModelScope's cache holds a model, in any of its layouts so far.

    Source: modelscope's own search for older layouts, and its present layout.
    """
    owner, _, name = hub_id.partition("/")
    safe = name.replace(".", "___")
    root = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    for place in (root, root / "hub"):
        for parts in (
            ("models", owner, safe), ("models", f"{owner}--{name}"), ("models", f"{owner}--{safe}"),
            ("models", owner, name), (owner, safe), (owner, name),
        ):  # fmt: skip
            folder = place.joinpath(*parts)
            if folder.is_dir() and ((opened := open_folder(folder)) / CONFIG_FILE).is_file():
                return opened
    return None


def try_to_load_from_cache(hub_id: str, name: str) -> Any:
    """Call huggingface_hub's function of this name, imported at the first call."""
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(hub_id, name)


def check_endpoint() -> None:
    """Make sure that HF_ENDPOINT is an address, before any request is sent to it.

    Raises:
        UserError: it does not begin with http:// or https://, or has no host.
    """
    given = os.environ.get("HF_ENDPOINT")
    if given is None or constants.HF_HUB_OFFLINE:
        return
    parts = urlsplit(given)
    if parts.scheme in ("http", "https") and parts.netloc:
        return
    host = re.sub(r"^\w*:?/+", "", given.strip()) or "huggingface.co"
    raise UserError(
        f"HF_ENDPOINT {given!r} is no address; it begins with https://: "
        f"export HF_ENDPOINT=https://{host}"
    )


def ask(url: str, seconds: float = TIMEOUT_SECONDS) -> tuple[int, Any] | None:
    """Status and JSON of an address, None as JSON for other content; None if it does not answer.

    Nothing is kept on the disk.
    """

    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers

    def get() -> tuple[int, Any]:
        answer = get_session().get(
            url, headers=build_hf_headers(), timeout=seconds, follow_redirects=True
        )
        try:
            return answer.status_code, answer.json()
        except ValueError:
            return answer.status_code, None

    return in_time(get, seconds)


def hub_settings(hub_id: str) -> dict[str, Any] | None:
    """The config.json of a model, requested from its hub; None if that does not answer.

    Raises:
        UserError: the hub has no such model, or does not show it to this user.
    """
    check_endpoint()
    if constants.HF_HUB_OFFLINE:
        return None
    place, file = f"{constants.ENDPOINT}/{hub_id}", f"resolve/main/{CONFIG_FILE}"
    if is_on_modelscope(hub_id):  # the request of its own client
        hub = os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn"
        place, file = f"{hub}/api/v1/models/{hub_id}", f"repo?FilePath={CONFIG_FILE}"
    answer = ask(f"{place}/{file}")
    if answer is None or answer[0] >= _SERVER_FAULT:
        return None
    status, settings = answer
    if not isinstance(settings, dict) or status != _FINE:
        raise UserError(
            f"{hub_id}: {place} gives no {CONFIG_FILE} (status {status}); check the name, and "
            "whether it needs a log-in (`hf auth login`)"
        )
    return settings


def is_on_modelscope(hub_id: str) -> bool:
    """Whether an id is a name that ChatGLM's publisher uses on ModelScope."""
    return hub_id.partition("/")[0] == MODELSCOPE_OWNER


def download_command(hub_id: str) -> str:
    """The command that downloads a model."""
    if is_on_modelscope(hub_id):
        return f"modelscope download --model {hub_id}"
    return f"hf download {hub_id}"


def from_modelscope(hub_id: str, patterns: list[str]) -> Path:
    """The local folder of a model from ModelScope, with its files of the given names.

    Raises:
        UserError: ModelScope's client is needed and not installed.
        Exception: anything that this client raises.
    """
    has_client = find_spec("modelscope") is not None
    cached = in_modelscope_cache(hub_id)
    if cached and (constants.HF_HUB_OFFLINE or not has_client):
        return cached
    if not has_client:
        same = f"zai-org/{hub_id.partition('/')[2].lower()}"
        raise UserError(
            f"{hub_id}: is a name on ModelScope, whose client is not installed: pip install "
            f"modelscope and run this again, or take the same from --base {same}"
        )
    from modelscope import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=patterns))
