"""What adapters call the younger family's linears, in any of three namings.

- transformers' own: ``model.layers.N.self_attn.q_proj``, ..., ``mlp.gate_up_proj``;
- with ``mlp.gate_proj`` and ``mlp.up_proj`` apart, as vLLM and others have them;
- the publisher's: ``transformer.encoder.layers.N.self_attention.query_key_value``, ....
"""

import re

from glmtune.models.glm import mapping

_OWN = {*mapping.QKV, *mapping.MODULES.values()}
_PUBLISHED = {mapping.FUSED, *mapping.MODULES}


def layer_and_linear(module: str, begin: str) -> tuple[int, str] | None:
    """A layer's number and the name of a linear in it; None where the module begins otherwise."""
    found = re.fullmatch(rf"{re.escape(begin)}(\d+)\.(.+)", module)
    return (int(found[1]), found[2]) if found else None


def is_own(module: str) -> bool:
    """Whether a module is a linear of a layer in transformers' classes."""
    return _is_in(_OWN, module, mapping.OWN_LAYER)


def is_half(module: str) -> bool:
    """Whether it is half of one there."""
    return _is_in(set(mapping.HALVES), module, mapping.OWN_LAYER)


def is_foreign(module: str) -> bool:
    """Whether it is half of one there, or a linear of the publisher's code."""
    return is_half(module) or _is_in(_PUBLISHED, module, mapping.PUBLISHED_LAYER)


def _is_in(linears: set[str], module: str, begin: str) -> bool:
    place = layer_and_linear(module, begin)
    return place is not None and place[1] in linears
