"""What `glmtune push` uploads: which files of a folder, under which names, and that they are clean.

Only files that a model or an adapter is made of are taken, by their names; everything else in the
folder stays. An adapter is written anew, in today's format and without paths, whatever its own.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from glmtune.adapters.find import find_adapter, refuse_prefix
from glmtune.adapters.formats import Adapter, read_adapter, write_adapter
from glmtune.adapters.merge import TOKENIZER_FILES
from glmtune.config.reading import shared_setting
from glmtune.data.files import read_json_object
from glmtune.errors import UserError
from glmtune.export.card_parts import CARD_FILE, LICENCE_FILES
from glmtune.models.families import find_family, naming_rule_of
from glmtune.models.family import Family, NamingRule
from glmtune.models.hubs import CONFIG_FILE
from glmtune.models.resolve import base_name
from glmtune.models.shim import SHIM_FILE
from glmtune.run_files import (
    ADAPTER_CONFIG_FILE,
    EXPORT_RECORD,
    RECIPE_FILE,
    WEIGHTS_FILE,
    find_around,
)

_OF_MODELS = (
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
    "pytorch_model*.bin", "pytorch_model.bin.index.json", "*.gguf", "Modelfile", *TOKENIZER_FILES,
    ADAPTER_CONFIG_FILE, EXPORT_RECORD, CARD_FILE, SHIM_FILE, *LICENCE_FILES,
)  # fmt: skip
"""Names of the files of an exported or merged model."""
_TEXTS = ("*.json", "*.md", "*.py", "*.jinja", "Modelfile", *LICENCE_FILES)
_VOCABULARIES = ("tokenizer.json", "added_tokens.json")
"""Texts whose words are not ours to judge: a vocabulary may have "/home/" in it."""
_PATH = re.compile(
    r"(?<![\w.:/-])/(?:home|root|Users|mnt|data|tmp|var|opt|srv|work|workspace|private)/[^\s\"'`)]+"
    r"|(?<!\w)[A-Za-z]:\\\\?[^\s\"'`)]+"
)
_TOKEN = re.compile(
    rb"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}"
    rb"|ms-[0-9a-f]{8}-[0-9a-f-]{20,}|AKIA[0-9A-Z]{16})\b"
)
_TOKEN_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY",
)  # fmt: skip
_NUM_READ = 16 * 2**20
"""Bytes of a file's beginning that are searched: settings come before tensors."""


@dataclass(frozen=True)
class Source:
    """What is uploaded: an adapter, or the folder of a whole model."""

    named: Path
    """The folder that was named."""
    adapter: Adapter | None
    base: str
    """The base's hub id, or its folder."""

    @classmethod
    def of(cls, folder: str, base: str | None) -> "Source":
        """Find it.

        Raises:
            UserError: there is nothing there that can be uploaded, or nothing says which base it
                is of.
        """
        place = Path(folder).expanduser()
        if is_model(place):
            return cls(place, None, base or _base_of_model(place) or str(place))
        found = find_adapter(place)
        refuse_prefix(found)
        adapter = read_adapter(found)
        adapter.check_effect()
        named = base or _base_of_run(found) or adapter.config.base_model_name_or_path
        if not named:
            raise UserError(
                f"{found}: nothing says which base it was trained on, which its card needs; name "
                "it with --base"
            )
        return cls(place, adapter, named)

    @cached_property
    def base_folder(self) -> Path | None:
        """The base's folder, where it is on this disk."""
        folder = Path(self.base).expanduser()
        return folder if folder.is_dir() else None

    @cached_property
    def family(self) -> Family | None:
        """The family, by a config.json that is at hand."""
        for folder in (self.named if self.adapter is None else None, self.base_folder):
            if folder and (folder / CONFIG_FILE).is_file():
                return find_family(read_json_object(folder / CONFIG_FILE))
        return None

    @property
    def base_name(self) -> str:
        """What the base is called on the card: never a path."""
        return base_name(self.base)

    @property
    def naming_rule(self) -> NamingRule | None:
        """What the base's licence asks of the name."""
        return naming_rule_of(self.base_name, self.family)

    def check_name(self, repo_id: str) -> None:
        """Make sure that a name keeps to the licence of the base.

        Raises:
            UserError: the licence asks for another.
        """
        rule, (owner, _, name) = self.naming_rule, repo_id.partition("/")
        if rule and not name.lower().startswith(rule.begins.lower()):
            raise UserError(
                f"repo_id {repo_id}: the {rule.licence} of {self.base_name} asks that the names of "
                f"models made of it begin with {rule.begins}; name it {owner}/{rule.begins}-{name}"
            )


@dataclass(frozen=True)
class Parcel:
    """The files of an upload, by their names on the hub."""

    files: dict[str, Path]
    left_out: list[str]
    """Names in the folder that are not uploaded."""

    @classmethod
    def pack(cls, source: Source, card: str, draft: Path) -> "Parcel":
        """Lay the files ready.

        Args:
            source: what is uploaded.
            card: the text of README.md.
            draft: an empty folder for files that are made for the upload.
        """
        files: dict[str, Path] = {}
        if source.adapter is not None:
            adapter = source.adapter
            write_adapter(adapter.config, adapter.weights, draft / "adapter", source.base_name)
            files = {name: draft / "adapter" / name for name in (ADAPTER_CONFIG_FILE, WEIGHTS_FILE)}
            taken = {ADAPTER_CONFIG_FILE, adapter.path.name, CARD_FILE}
            licences = source.base_folder
        else:
            for path in sorted(source.named.iterdir()):
                if path.is_file() and any(fnmatch(path.name, name) for name in _OF_MODELS):
                    files[path.name] = path
            taken, licences = set(files), source.named
        if licences:
            found = [path for name in LICENCE_FILES for path in licences.glob(name)]
            files |= {path.name: path for path in found if path.is_file()}
        (draft / CARD_FILE).write_text(card, encoding="utf-8")
        files[CARD_FILE] = draft / CARD_FILE
        there = sorted(path.name for path in source.named.iterdir())
        return cls(files, [name for name in there if name not in taken and name not in files])

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(path.stat().st_size for path in self.files.values())

    def check(self, private_paths: Sequence[Path]) -> None:
        """Make sure that no file holds an absolute path or a token.

        Args:
            private_paths: folders of this machine that no file may name.

        Raises:
            UserError: one does.
        """
        for name, path in self.files.items():
            for what, found in _faults(name, path, private_paths):
                raise UserError(
                    f"{path}: holds {what} ({found}), which is not uploaded; take it out of "
                    f"{name} and push again"
                )


def is_model(folder: Path) -> bool:
    """Whether a folder is a whole model or an export, not an adapter or a run of training."""
    if not folder.is_dir():
        return False
    if (folder / EXPORT_RECORD).is_file():
        return True
    if (folder / ADAPTER_CONFIG_FILE).is_file() or (folder / RECIPE_FILE).is_file():
        return False
    names = [path.name for path in folder.iterdir() if path.is_file()]
    weights = ("*.gguf", "model*.safetensors", "pytorch_model*.bin")
    has_weights = any(fnmatch(name, pattern) for name in names for pattern in weights)
    if not has_weights or not ((folder / CONFIG_FILE).is_file() or any("gguf" in n for n in names)):
        return False
    try:
        find_adapter(folder)  # a Trainer's pytorch_model.bin of 2023
    except UserError:
        return True
    return False


def _base_of_run(adapter: Path) -> str | None:
    recipes = find_around(adapter, RECIPE_FILE)
    return shared_setting(str(recipes[0]), "base") if recipes else None


def _base_of_model(folder: Path) -> str | None:
    """The base that the record of an export names."""
    record = folder / EXPORT_RECORD
    named = read_json_object(record).get("base") if record.is_file() else None
    return named if isinstance(named, str) else None


def _faults(name: str, path: Path, private_paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        data = file.read(_NUM_READ)
    secrets = [os.environ.get(variable, "") for variable in _TOKEN_VARIABLES]
    if any(len(secret) >= 8 and secret.encode() in data for secret in secrets):
        yield "a token of yours", "its value is in the environment"
    if found := _TOKEN.search(data):
        yield "what looks like a token", found[0][:6].decode() + "..."
    for private in private_paths:
        if len(str(private)) > 6 and str(private).encode() in data:
            yield "an absolute path", str(private)
    is_text = any(fnmatch(name, pattern) for pattern in _TEXTS) and name not in _VOCABULARIES
    if is_text and (place := _PATH.search(data.decode("utf-8", errors="replace"))):
        yield "an absolute path", place[0]
