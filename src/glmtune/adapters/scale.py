"""An adapter at another scale: on a loaded model, and as a folder of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

from peft import PeftModel

from glmtune.adapters.find import refuse_existing
from glmtune.adapters.formats import Adapter, write_adapter
from glmtune.adapters.naming import beyond_plain
from glmtune.errors import UserError
from glmtune.models.low_rank import has_lora


def check_scalable(adapter: Adapter) -> None:
    """Make sure that an adapter is an update that is multiplied by lora_alpha, and nothing else.

    Raises:
        UserError: it is another, such as DoRA, or has biases.
    """
    if odd := beyond_plain(adapter):
        raise UserError(
            f"{adapter.path}: has {', '.join(odd[:3])}, and only the update of plain LoRA can be "
            "scaled; compare checkpoints of its run instead"
        )


@contextmanager
def scaled(model: PeftModel, scale: float) -> Iterator[None]:
    """Let a model's adapter add `scale` times its update; nothing is loaded or computed again.

    What is built of the model within, such as its packed layers, has this scale.
    """
    before = [(module, dict(module.scaling)) for module in model.modules() if has_lora(module)]
    try:
        for module, scaling in before:
            module.scaling.update({name: scale * value for name, value in scaling.items()})
        yield
    finally:
        for module, scaling in before:
            module.scaling.update(scaling)


def write_scaled(adapter: Adapter, scale: float, folder: str | Path) -> None:
    """Write a copy of an adapter whose update is `scale` times as large, as PEFT loads it.

    The scale is in its lora_alpha; the tensors are the same.

    Raises:
        UserError: the folder is not empty or cannot be written, or the scale is 0, which is no
            adapter.
    """
    refuse_existing(folder)
    check_scalable(adapter)
    if scale <= 0:
        raise UserError(
            f"scale {scale:g} is the base itself, and there is no adapter to write; keep the base, "
            "or train longer or on more rows"
        )
    config = copy(adapter.config)
    config.lora_alpha = _whole(scale * config.lora_alpha)  # type: ignore[assignment]
    config.alpha_pattern = {
        name: _whole(scale * alpha) for name, alpha in (config.alpha_pattern or {}).items()
    }
    write_adapter(config, adapter.weights, folder, config.base_model_name_or_path)


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
