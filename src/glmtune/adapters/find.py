"""Find an adapter by file names alone, so that a wrong path is reported at once.

Where a folder has neither today's name nor that of 2023, its other weight files are looked into:
scripts of 2023 saved LoRA and P-Tuning v2 prefixes as the Trainer's whole model, or as a `.pt`.
"""

from pathlib import Path

from glmtune.config.reading import read_config
from glmtune.config.settings import TrainSettings
from glmtune.data.files import read_json_object
from glmtune.errors import UserError, program, reason_of
from glmtune.models.folders import fetch
from glmtune.models.hubs import is_hub_id, open_folder, try_to_load_from_cache
from glmtune.run_files import (
    ADAPTER_CONFIG_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILE_2023,
    find_around,
    newest_checkpoint,
)

_WEIGHTS_FILES = (WEIGHTS_FILE, WEIGHTS_FILE_2023)
_OTHER_FILES = ("pytorch_model.bin", "model.safetensors")
PREFIX_ENCODER, PREFIX_OF_PEFT = "prefix_encoder.", "prompt_embeddings"
"""Parts of the names of a prefix's tensors: of the published scripts, and of PEFT."""


def find_adapter(folder: str | Path) -> Path:
    """The folder that holds the adapter: `folder` itself, else its newest `checkpoint-N`.

    A folder of a hub's cache is resolved to its snapshot; a hub id is looked up there, or
    downloaded.

    Raises:
        UserError: there is no such folder, or no adapter in it; the message lists what is there.
    """
    name, folder = str(folder), Path(folder).expanduser()
    if folder.is_dir():
        folder = open_folder(folder, holds=_WEIGHTS_FILES)
        if find_weights(folder):
            return folder
        place = newest_checkpoint(folder) or folder
        if find_weights(place):
            return place
        # Answers of an adapter from a hub go into a folder of its name.
        cached = try_to_load_from_cache(name, ADAPTER_CONFIG_FILE) if is_hub_id(name) else None
        if isinstance(cached, str):
            return Path(cached).parent
        found = ", ".join(sorted(entry.name for entry in place.iterdir())[:12]) or "nothing"
        raise UserError(
            f"{place}: no adapter here, wanted {WEIGHTS_FILE} or {WEIGHTS_FILE_2023}, found "
            f"{found}; pass a folder that holds one"
        )
    if folder.exists():
        raise UserError(
            f"{folder}: is a file: pass the folder it lies in (an adapter is a folder with "
            f"{WEIGHTS_FILE})"
        )
    fault = "no such folder"
    if is_hub_id(name):
        try:
            fetched = fetch(name, (ADAPTER_CONFIG_FILE, *_WEIGHTS_FILES))
            if find_weights(fetched) is None:  # then it may be of 2023, under another name
                fetched = fetch(name, ("*.json", _OTHER_FILES[0], "*.pt"))
            return find_adapter(fetched)
        except UserError:
            raise
        except Exception as error:  # hub clients raise many kinds of exceptions
            reason = reason_of(error)
            fault = f"no such folder, and the hub does not give it ({reason[:200]})"
    raise UserError(f"{folder}: {fault} (an adapter is a folder with {WEIGHTS_FILE})")


def find_weights(folder: Path) -> Path | None:
    """The weights file of an adapter folder: today's, that of 2023, or another that holds one.

    Raises:
        UserError: several other files hold an adapter.
    """
    files = (folder / name for name in _WEIGHTS_FILES)
    if found := next((file for file in files if file.is_file()), None):
        return found
    others = [*(folder / name for name in _OTHER_FILES), *sorted(folder.glob("*.pt"))]
    holding = [file for file in others if file.is_file() and _holds_adapter(_names_in(file))]
    if len(holding) > 1:
        names = ", ".join(file.name for file in holding)
        raise UserError(f"{folder}: {names} all hold adapters; leave one of them there")
    return holding[0] if holding else None


def is_prefix(folder: Path) -> bool:
    """Whether a folder from `find_adapter` holds a P-Tuning v2 prefix, which is no LoRA.

    Raises:
        UserError: its weights file, or adapter_config.json, is damaged.
    """
    path = find_weights(folder)
    if path is None:
        return False
    if path.name in _WEIGHTS_FILES:  # of PEFT, which says the kind beside them
        config = folder / ADAPTER_CONFIG_FILE
        if config.is_file() and read_json_object(config).get("peft_type") == "PREFIX_TUNING":
            return True
        if path.name == WEIGHTS_FILE or config.is_file():
            return False
    return any(map(_is_of_prefix, _names_in(path)))


def refuse_prefix(folder: Path) -> None:
    """Raise a UserError where a folder from `find_adapter` holds a prefix, and LoRA is needed."""
    if is_prefix(folder):
        raise UserError(
            f"{folder}: is a P-Tuning v2 prefix, not LoRA; infer, compare and chat take it, and "
            f"for everything else `{program()} adapters distil {folder} --data_path FILE "
            "--output_dir NEW` makes a LoRA adapter of it"
        )


def _names_in(path: Path) -> list[str]:
    """The names of the tensors in a file; none where it is no file of weights."""
    from glmtune.models.weights import read_outline  # which imports torch

    try:
        return [*read_outline([path])]
    except UserError:  # an optimiser's state, for example
        return []


def _holds_adapter(names: list[str]) -> bool:
    return any(_is_of_prefix(name) or ".lora_A" in name for name in names)


def _is_of_prefix(name: str) -> bool:
    return PREFIX_ENCODER in name or name == PREFIX_OF_PEFT


def refuse_existing(folder: str | Path) -> None:
    """Raise a UserError where a result would overwrite existing files."""
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not empty; name a new folder or remove it")


def check_held_out(adapter: Path) -> None:
    """Make sure that the run an adapter came from held rows out.

    Raises:
        UserError: it did not, its recipe cannot be read, or there is no recipe beside the adapter.
    """
    fix = "name a file of rows with --data_path"
    recipe = next(iter(find_around(adapter, RECIPE_FILE)), None)
    if recipe is None:
        raise UserError(f"{adapter}: no {RECIPE_FILE} says which rows its run held out; {fix}")
    run = read_config(TrainSettings, str(recipe), {})
    if not run.eval_ratio and not run.eval_dataset_path:
        raise UserError(
            f"{recipe}: eval_ratio 0, so the run held no row out; {fix}, or train with "
            "--eval_ratio 0.05"
        )
