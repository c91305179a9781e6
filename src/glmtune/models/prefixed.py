"""A base with a prefix of keys and values that every token of a row sees, as P-Tuning v2 trains it.

The published code puts them before the keys and values of the tokens in every layer. They are not
rotated, and positions do not count them: a row's first token has position 0 with a prefix and
without one (`get_prompt` and `forward` of modeling_chatglm.py of ChatGLM-6B, ChatGLM2-6B and
ChatGLM3-6B).

Shapes: B rows of a batch, S tokens of a row, P places of a prefix, V vocabulary; and those of
`models.decoding`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from glmtune.models.decoding import KeyValueCache
from glmtune.models.families import family_of

# transformers 5.24 has the first name for what was the second before.
_CACHE_NAMES = ("cache", "past_key_values")


class PrefixedModel(nn.Module):
    """A base and a prefix, used like a base with an adapter: it can be disabled.

    Args:
        base: the model, which is not changed.
        prefix: keys and values of one row, ``(layers, 1, M, P, D)`` each.
    """

    def __init__(self, base: PreTrainedModel, prefix: KeyValueCache):
        super().__init__()
        self.base = base
        self._prefix: KeyValueCache | None = prefix
        names = inspect.signature(base.forward).parameters
        self._cache_name = next(name for name in _CACHE_NAMES if name in names)

    @property
    def prefix(self) -> KeyValueCache | None:
        """The prefix; None while it is disabled."""
        return self._prefix

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.base.config

    @property
    def generation_config(self) -> Any:
        """The base's, which names the ids that end an answer."""
        return self.base.generation_config

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    def get_base_model(self) -> PreTrainedModel:
        """The model without the prefix."""
        return self.base

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Let the base answer alone within."""
        prefix, self._prefix = self._prefix, None
        try:
            yield
        finally:
            self._prefix = prefix

    def forward(self, input_ids: Tensor, **settings: Any) -> Any:
        """What the base gives for whole rows ``(B, S)`` without padding, its logits among it."""
        if self._prefix is None:
            return self.base(input_ids=input_ids, **settings)
        num_rows, num_tokens = input_ids.shape
        num_places = self._prefix.keys.shape[3]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(zip(*self._prefix, strict=True)):
            both = (each.to(self.device).expand(num_rows, -1, -1, -1) for each in (keys, values))
            cache.update(*both, number)
        layout = family_of(self.config).native().decoding.layout(input_ids, self.config)
        mask = torch.ones(num_rows, num_places + num_tokens, dtype=torch.long, device=self.device)
        of_prefix = {
            self._cache_name: cache,
            "position_ids": layout.positions,
            "attention_mask": mask,
        }
        return self.base(input_ids=input_ids, **settings | of_prefix)


def prefix_of(model: Any) -> KeyValueCache | None:
    """The prefix that is in effect on a model; None for one without."""
    return model.prefix if isinstance(model, PrefixedModel) else None
