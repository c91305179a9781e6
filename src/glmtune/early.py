"""A user's mistakes that show in names alone, told before torch is imported, which takes seconds.

Each check is the verb's own, with its words; the verb makes it again where it uses what is named.
"""

from pathlib import Path

from glmtune.adapters.find import find_adapter, refuse_existing
from glmtune.config.settings import (
    BenchDecodeSettings,
    BenchMemorySettings,
    BenchTrainSettings,
    ChatSettings,
    CheckSettings,
    CompareSettings,
    ConvertAdapterSettings,
    InferSettings,
    MergeSettings,
    ReplaySettings,
    TrainSettings,
)
from glmtune.data.dataset import check_is_folder
from glmtune.data.files import open_bytes
from glmtune.data.jsonlines import check_appendable
from glmtune.models.base_files import read_settings
from glmtune.models.families import check_targets
from glmtune.models.resolve import resolve_base
from glmtune.run_files import check_bundle


def check_answering(
    settings: InferSettings | CompareSettings | ChatSettings | CheckSettings,
) -> None:
    """Records, adapter and base of a verb that answers are there.

    Raises:
        UserError: one is not.
    """
    if not isinstance(settings, ChatSettings) and settings.data_path:
        with open_bytes(settings.data_path):
            pass
    if settings.model_path:
        find_adapter(settings.model_path)
    check_base(settings.chatglm_path, settings.model_path)


def check_training(settings: TrainSettings) -> None:
    """The linears exist, and data and base are there.

    Raises:
        UserError: one is not.
    """
    check_targets(settings.lora_target)
    check_is_folder(settings.dataset_path)
    if settings.chatglm_path or not settings.resume_from_checkpoint:
        check_base(settings.chatglm_path)


def check_merge(settings: MergeSettings) -> None:
    """Adapter and base are there, and nothing is where the model goes.

    Raises:
        UserError: one is not, or something is.
    """
    refuse_existing(settings.save_path)
    find_adapter(settings.model_path)
    check_base(settings.chatglm_path, settings.model_path)


def check_conversion(settings: ConvertAdapterSettings) -> None:
    """The adapter is there, and nothing is where the new one goes.

    Raises:
        UserError: it is not, or something is.
    """
    refuse_existing(settings.new)
    find_adapter(settings.old)


def check_replay(settings: ReplaySettings) -> None:
    """Bundle and base are there.

    Raises:
        UserError: one is not.
    """
    check_bundle(Path(settings.bundle))
    if settings.chatglm_path:
        check_base(settings.chatglm_path)


def check_bench(
    settings: BenchTrainSettings | BenchDecodeSettings | BenchMemorySettings,
) -> None:
    """The record can be written, and rows that are named are there.

    Raises:
        UserError: it cannot, or they are not.
    """
    check_appendable(settings.json_path)
    if isinstance(settings, BenchTrainSettings) and settings.dataset_path:
        check_is_folder(settings.dataset_path)


def check_base(chatglm_path: str | None, run_folder: str | None = None) -> None:
    """A base model is there and of a family that is known, as far as its config.json says.

    Raises:
        UserError: it is not.
    """
    base = resolve_base(chatglm_path, run_folder)
    if Path(base).is_dir():
        read_settings(base)
