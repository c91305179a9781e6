"""Find and load the base model: a folder, a hub id, the hub's ChatGLM-6B, or else glm-tiny."""

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import PreTrainedConfig, PreTrainedModel

from glmtune.config import shared_setting
from glmtune.data.files import read_json_object
from glmtune.errors import UserError, note
from glmtune.models import weights
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.chatglm.tokenization import ChatGLMTokenizer
from glmtune.models.downloads import in_time
from glmtune.models.hubs import (
    CONFIG_FILE,
    check_endpoint,
    family_by_name,
    hub_settings,
    in_modelscope_cache,
    is_hub_id,
    is_on_modelscope,
    name_of_folder,
    open_folder,
)
from glmtune.models.quantised import bits_of, check_quantising, quantising
from glmtune.run_files import RECIPE_FILE, find_around

T = TypeVar("T")

ENVIRONMENT_VARIABLE = "GLMTUNE_MODEL"
# The publisher renamed itself; the hub cache of a long-time user has the older name.
HUB_IDS = ("zai-org/chatglm-6b", "THUDM/chatglm-6b")
PUBLISHED = (*HUB_IDS, "ZhipuAI/ChatGLM-6B")
"""Names of the float16 model, on ModelScope as well."""
HUB_TIMEOUT_SECONDS = 5.0
# The tiny model that comes with the package.
GLM_TINY = str(Path(__file__).resolve().with_name("glm-tiny"))
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER_FILES = ("*.json", "*.model")


def resolve_base(
    chatglm_path: str | None = None, run_folder: str | None = None, *, needs_weights: bool = True
) -> str:
    """Decide which base model is meant.

    In this order: the setting, the environment variable GLMTUNE_MODEL, the recipe that a run folder
    keeps, ChatGLM-6B from the hub cache, ChatGLM-6B from the hub; and where there is none of all
    these, glm-tiny, with a note on stderr.

    Args:
        chatglm_path: `--chatglm_path`: a folder, a hub id, or the name glm-tiny.
        run_folder: of the adapter that is to be used, if any.
        needs_weights: without, ChatGLM-6B is meant where none is named, be it here or not.

    Returns:
        A folder that exists, or a hub id.

    Raises:
        UserError: a path that does not exist, or HF_ENDPOINT is no address.
    """
    for value, source in (
        (chatglm_path, "--chatglm_path"),
        (os.environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE),
        (_recipe_base(run_folder), f"chatglm_path in {run_folder}/{RECIPE_FILE}"),
    ):
        if value:
            return _folder_or_hub_id(value, source)
    for hub_id in HUB_IDS:
        if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            return hub_id
    if not needs_weights:
        return HUB_IDS[0]
    check_endpoint()
    if not HF_HUB_OFFLINE and _hub_has(HUB_IDS[0]):
        return HUB_IDS[0]
    _tell_of_glm_tiny()
    return GLM_TINY


@cache  # once is enough for a process
def _tell_of_glm_tiny() -> None:
    note(
        "no base model is given or found, so this uses glm-tiny, which knows a toy world and "
        f"nothing else; name the real one with --chatglm_path FOLDER (or {ENVIRONMENT_VARIABLE})"
    )


def _recipe_base(run_folder: str | None) -> str | None:
    recipes = find_around(Path(run_folder), RECIPE_FILE) if run_folder else []
    return shared_setting(str(recipes[0]), "chatglm_path") if recipes else None


def _folder_or_hub_id(value: str, source: str) -> str:
    path = Path(value).expanduser()
    if path.is_dir():
        return str(open_folder(path))
    if value == Path(GLM_TINY).name:
        return GLM_TINY
    if path.exists() or not is_hub_id(value):
        raise UserError(
            f"{source}: {value} is no folder; pass the folder of a downloaded ChatGLM-6B or a hub "
            f"id such as {HUB_IDS[0]}"
        )
    cached = in_modelscope_cache(value)
    return str(cached) if cached and weights.are_there(cached) else value


@cache
def _hub_has(hub_id: str) -> bool:
    info = in_time(
        lambda: HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_SECONDS), HUB_TIMEOUT_SECONDS
    )
    return info is not None


def base_name(base: str) -> str:
    """What to call a base model in files that travel: a hub id or a folder's last name."""
    path = Path(base)
    return name_of_folder(path) if path.is_dir() else base


def load_tokenizer(base: str) -> ChatGLMTokenizer:
    """The tokenizer of a base model.

    Raises:
        UserError: no vocabulary there, or one of another family.
    """
    _read_config(base, _fetch(base, [CONFIG_FILE]))
    folder = _fetch(base, _TOKENIZER_FILES)
    for name in TOKENIZER_SETTINGS:
        if (folder / name).is_file():
            read_json_object(folder / name)
    return _built(folder, lambda: ChatGLMTokenizer.from_pretrained(folder))


def load_config(base: str) -> ChatGLMConfig:
    """The configuration of a base model, as it lies there; no weights are fetched for it.

    That of the published model is known, and is not asked for at the hub.

    Raises:
        UserError: no model there, or one of another family.
    """
    if base in PUBLISHED and not isinstance(try_to_load_from_cache(base, CONFIG_FILE), str):
        return ChatGLMConfig()
    return _read_config(base, _fetch(base, [CONFIG_FILE]))


def load_base_model(
    base: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    keep_packed: bool = False,
    bits: int | None = None,
    quantize_head: bool = False,
) -> ChatGLMForConditionalGeneration:
    """The base model, in evaluation mode.

    What becomes of weights that the folder holds quantised is printed as a note on stderr.

    Args:
        base: a folder or a hub id, as `resolve_base` gives it.
        dtype: by default bfloat16 on a GPU that has it, float32 on a CPU.
        device: by default the CPU.
        keep_packed: leave the weights of a published int8 or int4 folder packed, as is enough to
            answer with them; else they are dequantised to `dtype`, to train on or to merge into.
        bits: 8 or 4 to quantise the layers' linears with bitsandbytes, one by one while they load;
            those of a published int8 or int4 folder are requantised.
        quantize_head: round embedding and head to 8 bits.

    Raises:
        UserError: no model there, of another family, weights that do not fit, or a wish for bits
            that folder or device cannot grant.
    """
    config = _read_config(base, _fetch(base, [CONFIG_FILE]))  # before gigabytes are fetched
    folder = _fetch(base)
    has, packed = bits_of(config), config.quantization_bit
    if bits and has:
        raise _quantised_already(f"quantization_bit {bits}", base, has)
    if quantize_head and packed and keep_packed and not bits:
        raise _quantised_already("quantize_head true", base, packed)
    loading: dict[str, Any] = {"dtype": dtype}
    if bits or has:
        wish = f"quantization_bit {bits}" if bits else f"{base_name(base)}, which is in {has} bits"
        check_quantising(wish, bits or has or 0, device)
        device = device or "cpu"  # left to itself, transformers would take a GPU
    if device:
        loading["device_map"] = str(device)
    if bits and not packed:
        loading["quantization_config"] = quantising(bits, dtype)
    with weights.bar_if_long(folder):
        model: Any = _built(
            folder,
            lambda: ChatGLMForConditionalGeneration.from_pretrained(
                folder, config=config, **loading
            ),
        )
    model.name_or_path = model.config.name_or_path = base
    if has or packed:
        done = "stay packed"
        if packed and bits:
            model.quantize(bits)
            done = f"are requantised to {'LLM.int8' if bits == 8 else 'NF4'}"
        elif packed and not keep_packed:
            model.dequantize()
            done = f"are dequantised to {str(model.dtype).removeprefix('torch.')}"
        note(f"the int{has or packed} weights of {base_name(base)} {done}")
    if quantize_head and not model.config.quantization_embeddings:
        model.quantize_head()
    return model.eval()


def _quantised_already(wish: str, base: str, bits: int) -> UserError:
    return UserError(
        f"{wish}: {base_name(base)} is in {bits} bits already; leave {wish.split()[0]} out, or "
        "pass ChatGLM-6B in float16"
    )


@cache
def hub_config(base: str) -> ChatGLMConfig | None:
    """The configuration of a hub's model, of which nothing is kept here; None if no hub answers.

    Raises:
        UserError: it is of another family, by its config or, where no hub answers, by its name; or
            the hub has no such model.
    """
    settings = hub_settings(base)
    if settings is None:
        if family := family_by_name(base):
            raise UserError(
                f"{base}: is {family} by its name, which is not loaded here; pass ChatGLM-6B, such "
                f"as {HUB_IDS[0]}"
            )
        return None
    _check_family(base, settings)
    if "pre_seq_len" in settings:
        raise UserError(
            f"{base}: config.json has pre_seq_len, so it is a P-Tuning v2 checkpoint, which is not "
            "loaded here; pass the base it was trained on"
        )
    try:
        return _built(Path(base), lambda: ChatGLMConfig.from_dict(settings))
    except UserError as error:
        raise UserError(f"{base}: {error}") from error


def _read_config(base: str, folder: Path) -> ChatGLMConfig:
    settings = read_json_object(folder / CONFIG_FILE)
    _check_family(base, settings)
    return _built(folder, lambda: ChatGLMConfig.from_pretrained(folder))


def _check_family(base: str, settings: dict[str, Any]) -> None:
    if settings.get("model_type") != "chatglm":
        raise UserError(
            f"{base}: config.json says model_type {settings.get('model_type')!r}, not 'chatglm'; "
            "pass a ChatGLM-6B folder"
        )


def _built(folder: Path, build: Callable[[], T]) -> T:
    """What transformers builds from a folder's files.

    Raises:
        UserError: it fails on what stands in them, which shows in many kinds of exception.
    """
    try:
        return build()
    except (UserError, torch.OutOfMemoryError, AssertionError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder}: cannot be loaded ({reason[:300]}); take its files from the published "
            "ChatGLM-6B folder"
        ) from error


def _fetch(base: str, only: Iterable[str] = weights.DATA_FILES) -> Path:
    try:
        folder = weights.fetch(base, only)
    except UserError:
        raise
    except Exception as error:  # a hub that gives nothing shows in many kinds of exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .")
        raise UserError(
            f"{base}: {_not_given(base)} ({reason[:300]}); {_other_ways(base)}"
        ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder}: has no config.json; pass the folder of a downloaded ChatGLM-6B"
            + _model_within(folder)
        )
    return folder


def _not_given(base: str) -> str:
    if family := family_by_name(base):
        return f"is {family} by its name, which is not loaded here, and the hub does not answer"
    return "the hub does not give this model"


def _other_ways(base: str) -> str:
    if family_by_name(base):
        return f"pass ChatGLM-6B, such as {HUB_IDS[0]}"
    ways = "check the name and the network, or pass --chatglm_path FOLDER with a downloaded copy"
    if is_on_modelscope(base):
        return ways
    return f"{ways}; is it a name on ModelScope, `modelscope download --model {base}` gets one"


def _model_within(folder: Path) -> str:
    """Where in a folder a model lies, as the end of a sentence."""
    depths = ("*", "*/*", "*/snapshots/*")
    found = (path for depth in depths for path in sorted(folder.glob(f"{depth}/{CONFIG_FILE}")))
    place = next(found, None)
    return f", such as {place.parent}" if place else ""


def check_pair(model: PreTrainedModel, tokenizer: ChatGLMTokenizer) -> None:
    """Make sure that a model and a tokenizer name the same ids.

    Answers end where generation_config.json or else config.json says, and rows teach the end that
    the tokenizer knows: were they not one, answers would never stop, or stop at once.

    Raises:
        UserError: they are of different revisions, or disagree on a special id.
    """
    check_ids(model.config, tokenizer)
    if model.generation_config:
        check_ends(model.generation_config.eos_token_id, tokenizer)


def check_ends(ends: int | list[int] | None, tokenizer: ChatGLMTokenizer) -> None:
    """Make sure that generation_config.json names the end that a tokenizer teaches, or none.

    Raises:
        UserError: it names another.
    """
    if any(end != tokenizer.eos_token_id for end in _as_list(ends)):
        raise UserError(
            f"generation_config.json: eos_token_id says {ends}, but answers are taught to end with "
            f"the tokenizer's {tokenizer.eos_token_id} (<eop>); set it to that in the model's "
            "folder, or remove the file"
        )


def check_ids(config: PreTrainedConfig, tokenizer: ChatGLMTokenizer) -> None:
    """Make sure that a config.json and a tokenizer name the same ids.

    Raises:
        UserError: they are of different revisions, or disagree on a special id.
    """
    for name in ("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id"):
        of_model, of_tokenizer = getattr(config, name), getattr(tokenizer, name)
        if not _as_list(of_model) or any(id_ != of_tokenizer for id_ in _as_list(of_model)):
            raise UserError(
                f"{name}: the model says {of_model}, the tokenizer {of_tokenizer}; they are of "
                "different revisions of ChatGLM-6B, take both from the same download"
            )
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"vocab_size: the tokenizer has {tokenizer.vocab_size} ids, the model only "
            f"{config.vocab_size} rows; take both from the same download"
        )


def _as_list(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
