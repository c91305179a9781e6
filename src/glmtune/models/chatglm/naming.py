"""What adapters call the linears of ChatGLM-6B: the published names, or thirds of one of them."""

import re

_LINEAR = re.compile(
    r"transformer\.layers\.\d+\.(attention\.(query_key_value|dense)|mlp\.dense_(h_to_4h|4h_to_h))"
)
THIRD = re.compile(
    r"(transformer\.layers\.\d+\.attention\.query_key_value)\.(?:model\.)?linear_([qkv])"
)
"""A third of query_key_value, see `adapters`: the name of the whole, and which third."""


def is_own(module: str) -> bool:
    """Whether a module is a linear of a layer."""
    return _LINEAR.fullmatch(module) is not None


def is_third(module: str) -> bool:
    """Whether it is a third of one."""
    return THIRD.fullmatch(module) is not None
