"""The models to measure: shapes by name, filled with random weights."""

from copy import copy
from typing import Any

import torch
from transformers import PreTrainedConfig

from glmtune.errors import UserError
from glmtune.hardware import GIB, device_name, total_memory_gib
from glmtune.models.families import FAMILIES, family_of
from glmtune.models.precision import quantise_head as round_tables
from glmtune.models.precision import quantise_layers
from glmtune.models.quantised import check_quantising
from glmtune.models.shape import Shape

CONFIGS: dict[str, PreTrainedConfig] = {
    name: config for family in FAMILIES for name, config in family.native().bench_configs.items()
}


def shape_of(name: str) -> Shape:
    """The sizes of a model that is measured."""
    return family_of(CONFIGS[name]).shape(CONFIGS[name])


def check_room(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Make sure that a device has room for the weights of a shape.

    Raises:
        UserError: the weights do not fit.
    """
    needed, total = (
        shape_of(name).matmul_parameters() * dtype.itemsize / GIB,
        total_memory_gib(device),
    )
    if total and needed > 0.9 * total:
        raise UserError(
            f"shape {name}: the weights alone take {needed:,.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and {device_name(device)} has {total:,.1f} GiB; "
            "pass --shape small"
        )


def random_model(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    bits: int | None = None,
    quantize_head: bool = False,
) -> Any:
    """Make a model of a shape on its device, with the same weights each time; quantised or not.

    Raises:
        UserError: bits that the device or the installation does not have.
    """
    if bits:
        check_quantising(f"quantization_bit {bits}", bits, device)
    torch.manual_seed(0)
    with torch.device(device):
        model = family_of(config).native().model_class._from_config(copy(config), dtype=dtype)
    if bits:
        quantise_layers(model, bits)
    if quantize_head:
        round_tables(model)
    return model
