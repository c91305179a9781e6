"""`glmtune replay BUNDLE`: compute again the step that stopped a run, and say whether it agrees."""

import math
from pathlib import Path
from typing import Any

import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from glmtune.adapters.formats import Adapter
from glmtune.adapters.settings import lora_config, read_settings
from glmtune.config.reading import read_config
from glmtune.config.settings import ReplaySettings, TrainSettings
from glmtune.models.families import family_of
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import resolve_base
from glmtune.run_files import RECIPE_FILE, WEIGHTS_FILE
from glmtune.training.faults.crash import Bundle, read_bundle, surroundings
from glmtune.training.faults.first_nonfinite import Outcome, compute_again
from glmtune.training.launch import start_accelerator
from glmtune.training.passes import PaddedPass
from glmtune.training.run import adapt


def replay(settings: ReplaySettings) -> bool:
    """Compute the step of a crash bundle again by the reference path.

    Returns:
        Whether the first number that is not finite appears at the recorded place.

    Raises:
        UserError: there is no bundle, it is damaged, or its base model is missing.
    """
    bundle = read_bundle(Path(settings.bundle))
    recipe = read_config(TrainSettings, str(bundle.folder / RECIPE_FILE), {})
    then = bundle.told["surroundings"]
    on_gpu = not settings.use_cpu and torch.cuda.is_available()
    on_this_device: dict[str, Any] = {
        "use_cpu": not on_gpu,
        "bf16": then["dtype"] == "bfloat16",
        "fp16": on_gpu and then["dtype"] == "float16",
    }
    recipe = recipe.model_copy(update=on_this_device)
    accelerator, dtype = start_accelerator(recipe)
    if accelerator.scaler is not None and bundle.told["scale"]:
        scale = float(bundle.told["scale"])
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, init_scale=scale)
    base = resolve_base(settings.base or recipe.base)
    step = bundle.told["step"]
    num_rows = sum(len(step_pass.row_ids) for step_pass in bundle.passes)
    print(f"step {step} of {bundle.told['base']} on {num_rows} rows", flush=True)
    base_model = load_base_model(
        base,
        dtype=dtype,
        device=accelerator.device,
        bits=recipe.bits,
        quantize_head=recipe.quantize_head,
    )
    model = adapt(base_model, recipe, _beginning(bundle.folder) if recipe.adapter else None)
    rule = family_of(model.config).row_rule(model.config)
    set_peft_model_state_dict(model, load_file(bundle.folder / WEIGHTS_FILE))
    outcome = compute_again(
        PaddedPass(accelerator, model, bundle.rows_by(rule)),
        [weight for weight in model.parameters() if weight.requires_grad],
        bundle.passes,
        bundle.told["num_labels"],
        bundle.random_states,
        whole_passes=bundle.told["layout"] == "padded",
    )
    agrees = _is_like(outcome, bundle.outcome)
    print(f"  then  {_describe(bundle.outcome)}\n  now   {_describe(outcome)}")
    print("reproduced" if agrees else "not reproduced")
    _print_differences(bundle, surroundings(accelerator.device, dtype))
    return agrees


def _beginning(folder: Path) -> Adapter:
    """The adapter of a run that continued another, which may be no longer there."""
    settings, _ = read_settings(folder)
    assert settings is not None, "a bundle has the adapter's settings"
    path = folder / WEIGHTS_FILE
    return Adapter(lora_config(settings, path), load_file(path), path)


def _is_like(now: Outcome, then: Outcome) -> bool:
    if then.culprit is None or now.culprit is None:
        return now.culprit is then.culprit
    same_loss = math.isfinite(now.loss) == math.isfinite(then.loss)
    return same_loss and now.culprit.is_like(then.culprit)


def _describe(outcome: Outcome) -> str:
    place = f"first {outcome.culprit}" if outcome.culprit else "all is finite"
    return f"loss {outcome.loss:.6g}, gradient's norm {outcome.grad_norm:.6g}, {place}"


def _print_differences(bundle: Bundle, now: dict[str, str]) -> None:
    then = bundle.told["surroundings"]
    names = [name for name in now if then.get(name) != now[name]]
    for name in names:
        print(f"  {name} then {then.get(name)}, now {now[name]}")
    if not names:
        print("  device, number format and versions are those of the run")
