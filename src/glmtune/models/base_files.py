"""Read a base model's family, sizes and vocabulary from its folder, without torch."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from glmtune.data.dataset import RowTokenizer
from glmtune.data.files import read_json_object
from glmtune.errors import UserError, note, reason_of
from glmtune.models import families, folders
from glmtune.models.families import (
    DEFAULT,
    FAMILIES,
    Family,
    family_not_loaded,
    family_of,
    find_family,
    names_of_families,
    what_is_not_loaded,
)
from glmtune.models.hubs import CONFIG_FILE, is_on_modelscope, try_to_load_from_cache
from glmtune.models.resolve import HUB_IDS

T = TypeVar("T")

TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = ("*.json", "*.model", "*.jinja")


def read_settings(base: str) -> Any:
    """Sizes and special ids of a base model; see `Family.read_settings`.

    Those of the published model are known, and are not asked for at the hub.

    Raises:
        UserError: no model there, or one of another family.
    """
    if known := published_family(base):
        return known.read_settings(known.published_settings)
    folder = fetch_base(base, [CONFIG_FILE])
    family, settings = find_base(base, folder)
    return built(folder, lambda: family.read_settings(settings))


def check_targets(wanted: tuple[str, ...] | None, base: str) -> None:
    """Make sure that a base model has all the linears that `lora_target` names.

    Of a base whose config.json is not here yet it is only known what some family has.

    Raises:
        UserError: it has not; or its config.json cannot be read.
    """
    if Path(base).is_dir() or published_family(base):
        config = read_settings(base)
        family = family_of(config)
        family.targets(wanted, family.shape(config))
    else:
        families.check_targets(wanted)


def load_row_tokenizer(base: str) -> RowTokenizer:
    """The tokenizer of a base model, for rows only, made by `load_tokenizer` where it must be.

    Raises:
        UserError: no vocabulary there, or one of another family.
    """
    family, settings = find_base(base, fetch_base(base, [CONFIG_FILE]))
    folder = fetch_base(base, TOKENIZER_FILES)
    built(folder, lambda: family.read_settings(settings))
    if (encoder := built(folder, lambda: family.row_tokenizer(folder))) is not None:
        tell_differences(base, family, encoder)
        return encoder
    from glmtune.models.loading import load_tokenizer  # which imports torch

    return load_tokenizer(base)


_told: set[str] = set()


def tell_differences(base: str, family: Family, tokenizer: Any) -> None:
    """Print once, as notes, where a folder's chat template is not how its rows are laid out."""
    key = str(Path(base).resolve())
    if key not in _told:
        _told.add(key)
        note(*(line for text in family.check_tokenizer(tokenizer) for line in text.splitlines()))


def published_family(base: str) -> Family | None:
    """The family that published a model of this name, if no config.json of it is cached."""
    family = next((family for family in FAMILIES if base in family.published), None)
    if family and not isinstance(try_to_load_from_cache(base, CONFIG_FILE), str):
        return family
    return None


def find_base(base: str, folder: Path) -> tuple[Family, dict[str, Any]]:
    """The family of a base model, and its config.json.

    Raises:
        UserError: it is of none that is known here.
    """
    settings = read_json_object(folder / CONFIG_FILE)
    return family_by_settings(base, settings), settings


def family_by_settings(base: str, settings: dict[str, Any]) -> Family:
    """The family of a config.json; raises UserError where there is none."""
    family = find_family(settings)
    if family is None:
        raise UserError(
            f"{base}: is {what_is_not_loaded(settings)}, by its config.json (model_type "
            f"{settings.get('model_type')!r}), which is not loaded here; pass "
            f"{names_of_families()}"
        )
    return family


def built(folder: Path, build: Callable[[], T]) -> T:
    """Call what builds an object from a folder's files.

    Raises:
        UserError: it fails; transformers raises many kinds of exceptions.
    """
    try:
        return build()
    except (UserError, AssertionError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported here
            raise
        reason = reason_of(error)
        raise UserError(
            f"{folder}: cannot be loaded ({reason[:300]}); take its files from the published folder"
        ) from error


def fetch_base(base: str, only: Iterable[str] = folders.DATA_FILES) -> Path:
    """The local folder of a base model, downloaded if need be, with files of these names.

    Raises:
        UserError: no model there, or the hub gives none.
    """
    try:
        folder = folders.fetch(base, only)
    except UserError:
        raise
    except Exception as error:  # hub clients raise many kinds of exceptions
        reason = reason_of(error).rstrip(" .")
        raise UserError(
            f"{base}: {_not_given(base)} ({reason[:300]}); {_other_ways(base)}"
        ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: has no config.json; pass the folder of a downloaded "
            f"{DEFAULT.name}" + _model_within(folder)
        )
    return folder


def _not_given(base: str) -> str:
    if family := family_not_loaded(base):
        return f"is {family} by its name, which is not loaded here, and the hub does not answer"
    return "the hub does not give this model"


def _other_ways(base: str) -> str:
    if family_not_loaded(base):
        return f"pass {DEFAULT.name}, such as {HUB_IDS[0]}"
    ways = "check the name and the network, or pass --base FOLDER with a downloaded copy"
    if is_on_modelscope(base):
        return ways
    return f"{ways}; is it a name on ModelScope, `modelscope download --model {base}` gets one"


def _model_within(folder: Path) -> str:
    """Where a model lies in a folder, as the end of a sentence."""
    depths = ("*", "*/*", "*/snapshots/*")
    found = (path for depth in depths for path in sorted(folder.glob(f"{depth}/{CONFIG_FILE}")))
    place = next(found, None)
    return f", such as {place.parent}" if place else ""
