"""Checks of a recipe: its settings, the files it names, and whether training would start."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS, Settings, TokenizeSettings, TrainSettings
from glmtune.data.dataset import CARD_FILE, DataCard, check_data_card, load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.disk import free_bytes
from glmtune.doctor.findings import OK, PROBLEM, WARNING, CheckLine
from glmtune.doctor.model import config_of
from glmtune.errors import UserError
from glmtune.hardware import Card, pick_device, pick_dtype
from glmtune.models.base_files import check_targets
from glmtune.models.families import family_of
from glmtune.models.folders import is_lfs_pointer
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY, HUB_IDS, resolve_base
from glmtune.training.beginning import begin_with
from glmtune.training.plan import count_saves, count_steps, make_plan
from glmtune.training.planning.advice import advise, verdict
from glmtune.training.planning.forecast import EqualRows, Forecaster, Lengths, forecast
from glmtune.training.saving.checkpoint_size import last_checkpoint_bytes
from glmtune.training.saving.run_folder import check_disk, resume_point

# What a verb reads, and the other verb's setting that writes it.
_READS = (
    ("convert", "data_path", None),
    ("tokenize", "jsonl_path", ("convert", "save_path")),
    ("train", "adapter", None),
    ("infer", "data_path", None),
    ("infer", "adapter", ("train", "output_dir")),
    ("compare", "data_path", None),
    ("compare", "adapter", ("train", "output_dir")),
    ("merge", "adapter", ("train", "output_dir")),
)
_SHARE_CUT_TO_WARN_OF = 0.05


Plans = dict[str, Settings]
"""Verb to settings, for the verbs whose settings can be read."""


def check_settings(path: str, verbs: list[str], plans: Plans) -> Iterator[CheckLine]:
    """Read what a recipe sets for each verb into `plans`."""
    for verb in verbs:
        try:
            settings = read_config(SETTINGS[verb], path, {})
            if isinstance(settings, TrainSettings):
                base = _base_of(settings)
                check_targets(settings.lora_target, base)
                if settings.adapter and Path(settings.adapter).exists():
                    settings, _ = begin_with(settings, config_of(base))
            plans[verb] = settings
        except UserError as error:
            yield PROBLEM, str(error)
    if plans:
        yield OK, f"{path}: settings of {', '.join(plans)}"


def _base_of(settings: TrainSettings) -> str:
    """The base that a recipe names; the default one where there is none, as another check says."""
    try:
        return resolve_base(settings.base, settings.adapter, needs_weights=False)
    except UserError:
        return HUB_IDS[0]


def check_paths(plans: Mapping[str, Settings]) -> Iterator[CheckLine]:
    """Whether the verbs' inputs exist, or will have been written by then."""
    for verb, name, source in _READS:
        for setting, given in _inputs(plans.get(verb), name):
            writer = plans.get(source[0]) if source else None
            yield _check_path(f"{verb}: {setting} {given}", Path(given), source, writer)


def _inputs(settings: Settings | None, name: str) -> list[tuple[str, str]]:
    """The paths that a setting stands for, with the settings that name them."""
    if isinstance(settings, TokenizeSettings):
        return [(setting, one.file) for setting, one in settings.named_sets]
    given = getattr(settings, name, None)
    return [] if given is None else [(name, given)]


def _check_path(
    text: str, path: Path, source: tuple[str, str] | None, writer: Settings | None
) -> CheckLine:
    if path.is_file() and is_lfs_pointer(path):
        return PROBLEM, f"{text} is a Git-LFS pointer: run `git lfs pull` there"
    if path.exists():
        return OK, text
    if source and writer and Path(getattr(writer, source[1])) == path:
        return OK, f"{text} is what {source[0]} will write"
    return PROBLEM, f"{text} is not there: correct it"


def base_of_rows(dataset_path: str) -> str | None:
    """glm-tiny if the token rows were made for it; other names do not say where a base is."""
    try:
        base = DataCard.read(Path(dataset_path, CARD_FILE)).base_model
    except UserError:  # no rows yet, or `check_data` reports what is wrong with them
        return None
    return base if base == Path(GLM_TINY).name else None


def check_data(
    settings: TrainSettings, plans: Mapping[str, Settings], base: Path | str
) -> Iterator[CheckLine]:
    """Check the token rows: made by this base's tokenizer, not too long, and how many were cut."""
    folder, tokenize = settings.dataset_path, plans.get("tokenize")
    if not Path(folder).exists() and tokenize and getattr(tokenize, "save_path", "") == folder:
        yield OK, f"{folder} is what tokenize will write"
        return
    config = config_of(base)
    rule = family_of(config).row_rule(config)
    table, card = load_dataset(folder, rule)
    yield OK, f"{folder}: {card.num_kept:,} rows, tokens a row: {card.lengths}"
    num_read = card.num_read or card.num_kept
    for fate, rows in (("dropped", card.rows_out), ("cut to max_seq_length", card.rows_cut)):
        count = len({row for listed in rows.values() for row in listed})
        if count > _SHARE_CUT_TO_WARN_OF * num_read:
            text = f"{count:,} of {num_read:,} rows were {fate} ({', '.join(rows)})"
            yield WARNING, f"{text}: tokenize again with a longer max_seq_length, or fix them"
    if isinstance(base, Path):
        check_data_card(card, load_tokenizer(str(base)), folder)
        TokenRows.from_table(table, rule).check(config.vocab_size, folder)
    if card.lengths.max > (limit := family_of(config).shape(config).max_positions):
        yield WARNING, f"the longest row has {card.lengths.max} tokens, the model knows {limit}"


def check_memory(
    settings: TrainSettings, plans: Mapping[str, Settings], base: Path | str
) -> Iterator[CheckLine]:
    """Whether a run with these settings fits into this machine's memory."""
    forecaster = _forecaster(settings, base, _rows(settings, plans, base))
    found = forecaster(settings)
    if found.fits:
        yield OK, verdict(found)
    else:
        status = PROBLEM if found.cannot_fit else WARNING
        yield status, f"{verdict(found)}; {advise(settings, forecaster)}"


def check_run_folder(
    settings: TrainSettings, plans: Mapping[str, Settings], base: Path | str
) -> Iterator[CheckLine]:
    """Whether the run folder can be used, and whether its disk has space for the checkpoints."""
    checkpoint, notes = resume_point(settings)
    yield from ((WARNING, note) for note in notes)
    output_dir = Path(settings.output_dir).absolute()
    place = next(parent for parent in (output_dir, *output_dir.parents) if parent.is_dir())
    if not os.access(place, os.W_OK):
        yield PROBLEM, f"output_dir: {place} cannot be written: name another folder"
        return
    rows = _rows(settings, plans, base)
    found = _forecaster(settings, base, rows)(settings)
    # Without rows the steps of an epoch are unknown: count at least some checkpoints.
    max_steps = settings.save_steps * (settings.save_total_limit or 1)
    plan = make_plan(settings, rows, found.pack_length, 1)
    by_epoch = settings.save_strategy == "epoch"
    if settings.max_steps > 0 or isinstance(rows, TokenRows) or by_epoch:
        max_steps = count_steps(settings, plan)
    check_disk(settings, found.setup, plan, max_steps, checkpoint=checkpoint)
    size = last_checkpoint_bytes(settings, found.setup, max_steps)
    text = (
        f"{output_dir}: a checkpoint takes {size / 1e6:,.1f} MB, "
        f"{free_bytes(output_dir) / 1e9:,.1f} GB are free"
    )
    goes_on = f", resumes from {checkpoint.name}" if checkpoint else ""
    if settings.save_total_limit is None and settings.max_steps <= 0:
        yield WARNING, f"{text}, and all are kept: set save_total_limit{goes_on}"
    else:
        num_saved = count_saves(settings, plan, 0, max_steps)
        yield OK, f"{text}, {min(num_saved, settings.save_total_limit or num_saved)} kept{goes_on}"


def _rows(
    settings: TrainSettings, plans: Mapping[str, Settings], base: Path | str
) -> TokenRows | EqualRows:
    """The rows to train on; if there are none yet, rows as long as `tokenize` may write them."""
    if Path(settings.dataset_path).is_dir():
        config = config_of(base)
        rule = family_of(config).row_rule(config)
        return TokenRows.from_table(load_dataset(settings.dataset_path, rule)[0], rule)
    longest = TokenizeSettings.model_fields["max_seq_length"].default
    return EqualRows.of(settings, getattr(plans.get("tokenize"), "max_seq_length", longest))


def _forecaster(settings: TrainSettings, base: Path | str, rows: Lengths) -> Forecaster:
    device = pick_device(settings.use_cpu)
    return partial(
        forecast,
        config=config_of(base),
        dtype=pick_dtype(device, settings.bf16, settings.fp16)[0],
        card=Card.of(device),
        rows=rows,
    )
