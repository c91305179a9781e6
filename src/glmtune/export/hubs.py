"""Upload files to a hub, one commit a file: what is there already is not sent again.

So an upload that was interrupted goes on where it was when the same command is run again.
"""

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from glmtune.data.files import sha256_of
from glmtune.errors import UserError, reason_of
from glmtune.export.card_parts import CARD_FILE
from glmtune.models.hubs import check_endpoint

_AGAIN = "run the same command again, which sends only what is not there yet"


def upload_to_huggingface(files: Mapping[str, Path], repo_id: str, *, private: bool) -> str:
    """Upload to huggingface.co, or to HF_ENDPOINT; returns the repository's address.

    Raises:
        UserError: the hub cannot be reached, refuses, or has a public repository of that name
            where a private one is meant.
    """
    check_endpoint()
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is uploaded; unset it and push again")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.model_info(repo_id).private:
            raise UserError(
                f"{repo_id}: is there already and public; name another, or pass --private false"
            )
        infos: Any = api.get_paths_info(repo_id, [*files])
        there = {info.path: info for info in infos}
        for name in _in_order(files):
            if name in there and _is_same(files[name], there[name]):
                print(f"{name}: is there already", flush=True)
                continue
            operation = CommitOperationAdd(name, str(files[name]))
            api.create_commit(repo_id, [operation], commit_message=f"Upload {name}")
            print(f"{name}: uploaded", flush=True)
    except UserError:
        raise
    except Exception as error:  # the client raises many kinds
        raise UserError(_refusal(error, repo_id, "`hf auth login` or HF_TOKEN")) from error
    return url


def upload_to_modelscope(files: Mapping[str, Path], repo_id: str, *, private: bool) -> str:
    """Upload to ModelScope by its own client, which sends no large file twice.

    Raises:
        UserError: the client is not installed, or the hub cannot be reached or refuses.
    """
    check_modelscope()
    from modelscope.hub.api import HubApi
    from modelscope.hub.constants import ModelVisibility

    visibility = ModelVisibility.PRIVATE if private else ModelVisibility.PUBLIC
    try:
        api = HubApi()
        if not api.repo_exists(repo_id):
            api.create_model(repo_id, visibility=visibility)
        for name in _in_order(files):
            api.upload_file(
                repo_id=repo_id,
                path_or_fileobj=str(files[name]),
                path_in_repo=name,
                commit_message=f"Upload {name}",
            )
            print(f"{name}: uploaded", flush=True)
    except Exception as error:  # the client raises many kinds
        raise UserError(
            _refusal(error, repo_id, "`modelscope login --token TOKEN` or MODELSCOPE_API_TOKEN")
        ) from error
    return f"https://modelscope.cn/models/{repo_id}"


def check_modelscope() -> None:
    """Raise a UserError where ModelScope's client is not installed."""
    if find_spec("modelscope") is None:
        raise UserError(
            "--to modelscope: its client is not installed: pip install modelscope, or leave --to "
            "out for huggingface.co"
        )


def _in_order(files: Mapping[str, Path]) -> list[str]:
    """Small files first, and the card last: it says that everything is there."""
    return sorted(files, key=lambda name: (name == CARD_FILE, files[name].stat().st_size, name))


def _is_same(path: Path, info: Any) -> bool:
    """Whether a file on the hub is this one, by its hash: git's of small files, else sha256."""
    if path.stat().st_size != info.size:
        return False
    if info.lfs is not None:
        return info.lfs.sha256 == sha256_of(path)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == info.blob_id


def _refusal(error: Exception, repo_id: str, login: str) -> str:
    reason = reason_of(error)[:300]
    is_login = any(word in reason for word in ("401", "403", "Unauthorized", "token", "login"))
    fix = f"log in with {login}, as somebody who may write there" if is_login else _AGAIN
    return f"{repo_id}: the hub did not take it ({reason}); {fix}"
