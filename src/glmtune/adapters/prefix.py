"""P-Tuning v2 prefixes, read into the keys and values that every token of a row sees.

The published scripts of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B train a `PrefixEncoder`: a table
with a row for each place of the prefix, which is the prefix itself, or, with `prefix_projection`,
what two linears with a tanh between turn into it. A row of the prefix holds, for each layer in
turn, the keys of all its key heads and then the values. PEFT's PREFIX_TUNING stores the same rows,
projected already. Source: `PrefixEncoder` and `get_prompt` of modeling_chatglm.py, and of PEFT.

Shapes: P places of the prefix, L layers, M heads of keys, D size of a head, E columns of the table,
H inner columns of the projection.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from glmtune.adapters.find import (
    PREFIX_ENCODER,
    PREFIX_OF_PEFT,
    find_adapter,
    find_weights,
    is_prefix,
)
from glmtune.adapters.formats import read_tensors
from glmtune.errors import UserError, note
from glmtune.models.decoding import KeyValueCache
from glmtune.models.families import family_of
from glmtune.models.prefixed import PrefixedModel
from glmtune.models.shape import Shape

_TABLE = "embedding.weight"
_PROJECTION = ("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")


@dataclass(frozen=True)
class Prefix:
    """A prefix in memory, whatever the form of its file."""

    rows_PE: Tensor
    """Keys and values of each place, ``(P, 2 L M D)`` in float32."""
    path: Path
    """The weights file, for messages."""

    def cache(self, shape: Shape, like: Tensor) -> KeyValueCache:
        """Its keys and values as a cache of one row, ``(L, 1, M, P, D)`` each.

        Args:
            shape: of the base.
            like: a tensor of the base's type and on its device.

        Raises:
            UserError: it is of a base of other sizes.
        """
        sizes = shape.num_layers, 2, shape.num_kv_heads, shape.head_dim
        num_wanted = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        if self.rows_PE.shape[1] != num_wanted:
            raise UserError(
                f"{self.path}: the prefix has {self.rows_PE.shape[1]:,} numbers a place, but "
                f"{num_wanted:,} are wanted by this base ({shape.num_layers} layers, "
                f"{shape.num_kv_heads} heads of keys of {shape.head_dim}); pass the base that it "
                "was trained on as --base"
            )
        columns = self.rows_PE.unflatten(1, sizes).permute(2, 1, 3, 0, 4)[:, :, None]
        return KeyValueCache(*columns.to(like.device, like.dtype).contiguous().unbind(0))


def read_prefix(folder: str | Path) -> Prefix:
    """Read the prefix that `find_adapter` finds in a folder.

    Raises:
        UserError: there is none, it is damaged, or its tensors contradict each other.
    """
    folder = find_adapter(folder)
    path = find_weights(folder)
    assert path, "find_adapter found it"
    if not is_prefix(folder):
        raise UserError(
            f"{folder}: holds LoRA, which every verb takes as it is; pass the folder of a P-Tuning "
            "v2 prefix"
        )
    tensors = read_tensors(path)
    if PREFIX_OF_PEFT in tensors:
        return Prefix(_checked(tensors, PREFIX_OF_PEFT, path).float(), path)
    found = {
        name.rpartition(PREFIX_ENCODER)[2]: tensor
        for name, tensor in tensors.items()
        if PREFIX_ENCODER in name
    }
    table_PE = _checked(found, _TABLE if found else PREFIX_OF_PEFT, path).float()
    if others := sorted(found.keys() - {_TABLE, *_PROJECTION}):
        raise UserError(
            f"{path}: has {PREFIX_ENCODER}{others[0]}, which no published script saves; pass a "
            "checkpoint of the P-Tuning v2 scripts of ChatGLM"
        )
    if len(found) == 1:
        return Prefix(table_PE, path)
    inner_HE, inner_bias_H, outer_EH, outer_bias_E = (
        _checked(found, name, path, 1 if name.endswith("bias") else 2).float()
        for name in _PROJECTION
    )
    fits = (
        inner_HE.shape[1] == table_PE.shape[1]
        and inner_bias_H.shape == outer_EH.shape[1:] == inner_HE.shape[:1]
        and outer_bias_E.shape == outer_EH.shape[:1]
    )
    if not fits:
        shapes = [list(found[name].shape) for name in (_TABLE, *_PROJECTION)]
        raise UserError(
            f"{path}: the shapes of its prefix projection, {shapes}, do not follow each other; get "
            "the whole file again"
        )
    inner_PH = torch.tanh(F.linear(table_PE, inner_HE, inner_bias_H))
    return Prefix(F.linear(inner_PH, outer_EH, outer_bias_E), path)


def load_prefix(model: PreTrainedModel, folder: str | Path) -> PrefixedModel:
    """Put the prefix of a folder before every row of a base model, for use.

    Raises:
        UserError: there is no prefix, or it is of another base.
    """
    prefix = read_prefix(folder)
    shape = family_of(model.config).shape(model.config)
    cache = prefix.cache(shape, next(iter(model.get_input_embeddings().parameters())))
    note(
        f"{prefix.path}: a P-Tuning v2 prefix of {cache.keys.shape[3]} places, which every token "
        "sees; it runs in infer, compare and chat, and `adapters distil` makes a LoRA adapter of it"
    )
    return PrefixedModel(model, cache).eval()


def _checked(tensors: dict[str, Tensor], name: str, path: Path, ndim: int = 2) -> Tensor:
    """A tensor of a prefix, of finite floats."""
    tensor = tensors.get(name)
    if tensor is None:
        raise UserError(
            f"{path}: its prefix has no {name}; get the whole checkpoint again, not a part of it"
        )
    if tensor.ndim != ndim or not tensor.is_floating_point() or not tensor.numel():
        raise UserError(
            f"{path}: {name} is {list(tensor.shape)} of {tensor.dtype}, no part of a prefix; get "
            "the file again"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path}: {name} holds values that are not finite; pass another checkpoint")
    return tensor
