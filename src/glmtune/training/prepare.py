"""Everything decided before the first step of a run: data, base model, plan, forecast, adapter."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from glmtune.config.settings import TrainSettings
from glmtune.data.dataset import DataCard, check_data_card, load_dataset
from glmtune.data.eval_sets import load_eval_sets, tell_overlap, with_eval_sets
from glmtune.data.row_rule import RowRule
from glmtune.data.split import GROUPS
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError, note
from glmtune.models.families import family_of
from glmtune.models.fingerprint import fingerprint
from glmtune.models.loading import check_pair, load_base_model, load_config, load_tokenizer
from glmtune.models.resolve import base_name, resolve_base
from glmtune.models.shape import bits_of
from glmtune.models.sharded import begin_gathering, shard_base
from glmtune.training.beginning import begin_with, check_kind
from glmtune.training.best import check_patience
from glmtune.training.general import general_rows
from glmtune.training.launch import shards_base
from glmtune.training.planning.advice import check_fit, print_forecast
from glmtune.training.planning.forecast import make_forecaster
from glmtune.training.processes import in_shares, on_main, one_at_a_time
from glmtune.training.run import Run, adapt, check_fp8, layout_as_run
from glmtune.training.samples import Samples
from glmtune.training.saving import checkpoints, run_folder
from glmtune.training.saving.manifest import read_identity


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its first step; nothing has been written to disk yet."""

    run: Run
    model: PeftModel
    """The base with its adapter, on the run's device."""
    tokenizer: Any
    resume: Path | None
    """The checkpoint that the run resumes from."""
    recipe: TrainSettings
    """The settings as resolved on this card: the run can be resumed with them on another."""


def prepare(settings: TrainSettings, accelerator: Accelerator, dtype: torch.dtype) -> Prepared:
    """Load what a run needs, and check all that can be checked; nothing is written.

    Called by all processes.

    Args:
        settings: the run's settings.
        accelerator: knows the device and the other processes.
        dtype: compute type of the base model.

    Raises:
        UserError: run folder, data, base model or checkpoint do not fit the settings, or the
            device's memory or the disk is too small.
    """
    if settings.base_dtype == "fp8":
        check_fp8(accelerator.device)
    resume, notes = on_main(accelerator, lambda: run_folder.resume_point(settings))
    if resume:
        settings = run_folder.same_step(settings, accelerator.num_processes, resume)
    base = resolve_base(settings.base, str(resume) if resume else settings.adapter)
    tokenizer = load_tokenizer(base)
    config = load_config(base)
    shares = shards_base(settings, accelerator)
    if shares and bits_of(config) == 8:
        raise UserError(
            f"shard_base: {base_name(base)} is in 8 bits, which cannot be shared out; pass it in "
            "float16 or bfloat16, or leave shard_base out"
        )
    settings, beginning = begin_with(settings, config, resume)
    family = family_of(config)
    rule = family.row_rule(config)
    rows, card = _load_rows(settings, accelerator, tokenizer, rule, config.vocab_size, resume)

    forecaster = make_forecaster(accelerator, config, dtype, rows)
    forecast = forecaster(settings)
    if accelerator.is_main_process:
        print_forecast(forecast, settings, base_name(base))
    check_fit(forecast, settings, forecaster)

    # Until it has been shared out, a base is whole in the memory of its process.
    with one_at_a_time(accelerator, shares):
        model = load_base_model(
            base,
            dtype=dtype,
            # A layer at a time then comes to the device; but bitsandbytes has to round it there.
            device="cpu"
            if shares and not (settings.bits or bits_of(config))
            else accelerator.device,
            bits=settings.bits,
            quantize_head=settings.quantize_head,
        )
        check_pair(model, tokenizer)
        rows = replace(rows, rule=family.row_rule(model.config))  # the weights may say more
        rows.check(model.config.vocab_size, settings.dataset_path)
        sources = {
            "base weights": fingerprint(model)[:16],
            "tokenizer sha256": tokenizer.vocab_hash[:16],
            "template": card.template,
        }
        torch.manual_seed(settings.seed)
        adapted = adapt(model, settings, beginning.adapter if beginning else None)
        if beginning:
            check_kind(adapted, forecast.layout, str(settings.adapter))
            sources |= beginning.identity()
        if shares:
            shard_base(adapted, model, accelerator.device)
    run = Run.of(settings, accelerator, rows, adapted, base_name(base), sources, forecaster)
    limit = model.config.max_position_embeddings
    run = replace(
        run,
        general=general_rows(settings, run, base, tokenizer, limit),
        samples=Samples.of(run, tokenizer, model),
    )
    notes += run.cautions()
    if resume:
        notes += checkpoints.check_same_run(resume, run.identity, settings.resume_anyway)
        notes += run_folder.check_unfinished(run, resume)
    note(*notes)
    check_patience(settings.early_stopping, len(run.eval_rows))
    sizes = forecast.setup, run.plan, run.max_steps, accelerator.num_processes
    on_main(accelerator, lambda: run_folder.check_disk(settings, *sizes, resume))
    if shares:
        begin_gathering(adapted, model, accelerator.device)
    as_run = {
        "base": base,
        "resume_from_checkpoint": None,
        "resume_anyway": False,
        "overwrite_output_dir": False,
        "lora_target": run.forecast.setup.targets,
        "lora_rank": run.forecast.setup.rank,
        **layout_as_run(run.forecast),
    }
    return Prepared(run, adapted, tokenizer, resume, settings.model_copy(update=as_run))


def _load_rows(
    settings: TrainSettings,
    accelerator: Accelerator,
    tokenizer: Any,
    rule: RowRule,
    vocab_size: int,
    resume: Path | None,
) -> tuple[TokenRows, DataCard]:
    """Rows made by this tokenizer, and their data card; a note says what was cut or dropped.

    Near-equal rows are grouped where rows are held out, unless the run that is resumed began
    without that.

    Raises:
        UserError: there are none, of another tokenizer, or they would teach hardly anything.
    """
    path = settings.dataset_path
    table, card = load_dataset(path, rule)
    check_data_card(card, tokenizer, path)
    for lost in filter(None, (card.describe_loss(), card.describe_dropped())):
        note(f"{path}: {lost}")
    rows = TokenRows.from_table(table, rule, card.num_kept_of_sets)
    # By the tokenizer's ends: a base whose files disagree about them is refused as it is loaded.
    replace(rows, rule=tokenizer.row_rule).check_taught(path)
    folders = settings.eval_dataset_path or ()
    rows = with_eval_sets(rows, load_eval_sets(folders, rule, tokenizer, vocab_size))
    if (settings.eval_ratio or folders) and not (resume and GROUPS not in read_identity(resume)):
        share_out = partial(in_shares, accelerator)
        rows = rows.grouped(tokenizer.decode_batch, card.source_rows(), share_out)
        if folders:
            note(*tell_overlap(rows, folders))
    return rows, card
