"""Files of a hub against their hashes; the hub is a folder here, and no network is used."""

import hashlib
import json
import time
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import RevisionNotFoundError

from glmtune.errors import UserError
from glmtune.models import downloads, folders
from glmtune.models.chatglm.published import KNOWN_SHARDS, known_sha256
from glmtune.models.downloads import check_download, in_time
from glmtune.models.resolve import GLM_TINY, HUB_IDS

HUB_ID = HUB_IDS[0]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


FILES = {"config.json": (b"{}", git_sha1), "model.safetensors": (b"weights" * 99, sha256)}


class Hub:
    """A hub cache on the disk, and what the publisher would answer."""

    def __init__(self, folder):
        self.root = folder / "models--zai-org--chatglm-6b"
        self.snapshot = self.root / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)
        (self.root / "blobs").mkdir()
        self.stated, self.asked, self.answer = {}, [], None
        for name, (content, digest) in FILES.items():
            self.add(name, content, digest(content))

    def add(self, name, content, digest):
        (self.root / "blobs" / digest).write_bytes(content)
        (self.snapshot / name).unlink(missing_ok=True)
        (self.snapshot / name).symlink_to(f"../../blobs/{digest}")
        self.stated[name] = digest

    def damage(self, name):
        path = (self.snapshot / name).resolve()
        path.write_bytes(path.read_bytes()[:-1] + b"!")

    def model_info(self, _, hub_id, *, revision, files_metadata, timeout):
        self.asked.append((hub_id, revision))
        assert files_metadata
        if self.answer:
            raise self.answer
        return SimpleNamespace(
            siblings=[
                SimpleNamespace(
                    rfilename=name,
                    lfs=SimpleNamespace(sha256=digest) if len(digest) == 64 else None,
                    blob_id=digest[:40],
                )
                for name, digest in self.stated.items()
            ]
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(downloads, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: hub.model_info(*a, **k))
    return hub


def test_good_files_are_read_once(hub, capsys, monkeypatch):
    check_download(HUB_ID, hub.snapshot)
    assert hub.asked == [(HUB_ID, COMMIT)]
    assert "checking 2 files of zai-org/chatglm-6b (0.0 GB)" in capsys.readouterr().err
    monkeypatch.setattr(downloads, "sha256_of", lambda _: pytest.fail("read again"))
    check_download(HUB_ID, hub.snapshot)
    assert len(hub.asked) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_damaged(hub, name):
    hub.damage(name)
    with pytest.raises(UserError, match=rf"{name}: is not the published file \(hash ") as caught:
        check_download(HUB_ID, hub.snapshot)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_good_file_that_changed_later(hub, name):
    check_download(HUB_ID, hub.snapshot)
    time.sleep(0.01)
    hub.damage(name)
    with pytest.raises(UserError, match="is not the published file"):
        check_download(HUB_ID, hub.snapshot)


def test_a_mirror_that_swaps_a_file_and_its_hash(hub):
    """The mirror's own hash fits what it sent; only the publisher's shows the difference."""
    published = hub.stated["model.safetensors"]
    content = b"other weights"
    hub.add("model.safetensors", content, sha256(content))
    hub.stated["model.safetensors"] = published
    with pytest.raises(UserError, match="changed by a mirror"):
        check_download(HUB_ID, hub.snapshot)


def test_a_mirror_with_a_revision_of_its_own(hub):
    response = SimpleNamespace(headers={}, request=None)
    hub.answer = RevisionNotFoundError("404", response=response)
    with pytest.raises(UserError, match="knows no revision 0123456789ab"):
        check_download(HUB_ID, hub.snapshot)


def test_a_publisher_that_does_not_answer(hub, capsys, monkeypatch):
    hub.answer = OSError("no route")
    check_download(HUB_ID, hub.snapshot)
    assert "does not answer" in capsys.readouterr().err
    hub.damage("config.json")
    with pytest.raises(UserError, match="is not the published file"):
        check_download(HUB_ID, hub.snapshot)


def test_offline_the_publisher_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr(downloads, "HF_HUB_OFFLINE", True)
    check_download(HUB_ID, hub.snapshot)
    assert hub.asked == []


def test_the_known_vocabulary(hub, shared, monkeypatch):
    monkeypatch.setattr(downloads, "HF_HUB_OFFLINE", True)
    content = (shared / "golden" / "ice_text.model").read_bytes()
    for digest in (sha256, git_sha1):  # the latter where a mirror keeps it as a small file
        hub.add("ice_text.model", content, digest(content))
        check_download(HUB_ID, hub.snapshot)
    hub.add("ice_text.model", b"another", sha256(b"another"))
    check_download("someone/chatglm-6b-tuned", hub.snapshot)
    (hub.root / "glmtune-checked.json").unlink()
    with pytest.raises(UserError, match=r"ice_text\.model: is none of the published files"):
        check_download(HUB_ID, hub.snapshot)


SHARD = "pytorch_model-00003-of-00008.bin"


@pytest.mark.parametrize("linked", [True, False], ids=["linked", "as on Windows"])
@pytest.mark.parametrize("revision", KNOWN_SHARDS)
def test_known_shards_pass_whoever_sends_them(hub, revision, linked, monkeypatch):
    """Only a mirror answers, as if huggingface.co could not be reached."""
    hub.answer = OSError("no route")
    digest = KNOWN_SHARDS[revision][2]
    if linked:
        hub.add(SHARD, b"what has this hash", digest)
    else:
        (hub.snapshot / SHARD).write_bytes(b"what has this hash")

    def sha256_of(path):
        content = path.read_bytes()
        return digest if content == b"what has this hash" else sha256(content)

    monkeypatch.setattr(downloads, "sha256_of", sha256_of)
    check_download(HUB_ID, hub.snapshot)


def test_a_mirror_s_own_shard_is_told_where_the_publisher_cannot_be_asked(hub):
    hub.add(SHARD, b"another", sha256(b"another"))
    check_download(HUB_ID, hub.snapshot)  # the publisher states it: newer than what is known here
    hub.answer = OSError("no route")
    for unpublished in ("someone/chatglm-6b", f"{HUB_ID}-int8"):
        (hub.root / "glmtune-checked.json").unlink()
        check_download(unpublished, hub.snapshot)
    (hub.root / "glmtune-checked.json").unlink()
    with pytest.raises(UserError, match=rf"{SHARD}: is none of .* --base ") as caught:
        check_download(HUB_ID, hub.snapshot)
    assert "\n" not in str(caught.value)


def test_in_a_cache_without_links_a_shard_is_read_for_its_hash(hub):
    hub.answer = OSError("no route")
    (hub.snapshot / SHARD).write_bytes(b"another")
    with pytest.raises(UserError, match=f"{SHARD}: is none of"):
        check_download(HUB_ID, hub.snapshot)


def test_the_known_hashes_are_hashes_and_no_two_alike():
    known = [digest for shards in KNOWN_SHARDS.values() for digest in shards]
    assert {len(shards) for shards in KNOWN_SHARDS.values()} == {8}
    assert len(set(known)) == len(known) == 16
    assert all(len(bytes.fromhex(digest)) == 32 for digest in known)
    assert known_sha256("THUDM/chatglm-6b", SHARD) == {known[2], known[10]}


@pytest.mark.parametrize("record", ["[]", "{", "\xff", "[" * 100_000, '{"x": 5}'])
def test_a_damaged_record_counts_as_none(hub, record):
    (hub.root / "glmtune-checked.json").write_text(record, encoding="latin-1")
    check_download(HUB_ID, hub.snapshot)
    assert len(hub.asked) == 1
    assert len(json.loads((hub.root / "glmtune-checked.json").read_text())) >= len(FILES)


def test_fetch_checks_what_it_downloads_and_no_folder(hub, monkeypatch):
    patterns = []

    def snapshot_download(name, allow_patterns, **_):
        patterns.extend(allow_patterns)
        return str(hub.snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert folders.fetch(HUB_ID) == hub.snapshot
    assert not any(pattern.endswith(("py", "*")) for pattern in patterns)
    assert hub.asked
    monkeypatch.setattr(folders, "check_download", lambda *_: pytest.fail("a folder of the user's"))
    assert str(folders.fetch(GLM_TINY)) == GLM_TINY


def test_a_call_gives_its_result_or_nothing_in_time():
    assert in_time(lambda: 5, 5) == 5
    assert in_time(lambda: time.sleep(5), 0.01) is None
