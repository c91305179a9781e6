"""transformers' `GlmForCausalLM` and `Glm4ForCausalLM`, loaded strictly and from either layout."""

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from glmtune.data.files import read_json_object
from glmtune.errors import UserError
from glmtune.models import folders, weights
from glmtune.models.glm.configuration import MappedGlm4Config, MappedGlmConfig
from glmtune.models.glm.encoder import check_kind
from glmtune.models.glm.layouts import LAYOUTS
from glmtune.models.glm.mapping import INV_FREQ, to_glm
from glmtune.models.glm.settings import ROPE_BASE, is_published
from glmtune.models.integer_weights import use_integer_modules
from glmtune.models.strict_loading import check_plain_folder, read_strictly

_BODY, _HEAD = "model.", "lm_head.weight"  # of which the model without a head has neither
_SAME = 0.1  # of a base that was rounded to float16


class _Strict:
    """What the classes below add to transformers'."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a folder of either layout, or a hub id: see `read_strictly`."""
        return read_strictly(
            cls, check_folder, pretrained_model_name_or_path, *args, read=read_tensors, **kwargs
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: what is registered so leaves a copy of its source in each saved folder."""


class GlmModel(_Strict, transformers.GlmModel):
    """transformers' model without the head."""

    config_class = MappedGlmConfig

    def __init__(self, config: Any):
        super().__init__(config)
        if bits := getattr(config, "quantization_bit", 0):
            use_integer_modules(self.layers, bits)


class GlmForCausalLM(_Strict, transformers.GlmForCausalLM):
    """transformers' model; from a published int4 or int8 folder its layers hold packed integers."""

    config_class = MappedGlmConfig

    def __init__(self, config: Any):
        super().__init__(config)
        if bits := getattr(config, "quantization_bit", 0):
            use_integer_modules(self.model.layers, bits)
        layout = LAYOUTS.get(config.published_as or "")
        if layout and config.eos_token_id == layout.stop_ids[0]:
            # ChatGLM3-6B's config.json has one id; the published chat stops at roles as well.
            stops = [id_ for id_ in layout.stop_ids if id_ < config.vocab_size]
            self.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]


class Glm4Model(_Strict, transformers.Glm4Model):
    """transformers' model without the head, whose layers have two norms more."""

    config_class = MappedGlm4Config


class Glm4ForCausalLM(_Strict, transformers.Glm4ForCausalLM):
    """transformers' model, whose layers have two norms more."""

    config_class = MappedGlm4Config


def read_tensors(folder: Path, config: Any) -> dict[str, Tensor] | None:
    """The tensors of a folder in the publisher's layout; None for one that transformers reads.

    They lie in the files still: a tensor is read when it is used.
    """
    if not is_published(read_json_object(folder / CONFIG_NAME)):
        return None
    tensors: dict[str, Tensor] = {}
    for path in folders.weight_files(folder):
        tensors |= weights.load_mapped(path)
    return to_glm(tensors, config)


def check_folder(
    folder: Path,
    config: Any,
    model_class: type[PreTrainedModel],
    *,
    must_tie: bool = False,
) -> None:
    """Check a folder's tensors against its config.json.

    Args:
        folder: of a checkpoint, in either layout.
        config: configuration of that folder.
        model_class: class of the model that the weights are for.
        must_tie: embedding and head must be one.

    Raises:
        UserError: one line that names what does not fit.
    """
    check_kind(folder)
    published = is_published(read_json_object(folder / CONFIG_NAME))
    is_bare = issubclass(model_class, GlmModel | Glm4Model)

    def rename(found: weights.Outline) -> weights.Outline:
        renamed = to_glm(found, config) if published else dict(found)
        if not is_bare:
            return renamed
        return {
            name.removeprefix(_BODY): tensor for name, tensor in renamed.items() if name != _HEAD
        }

    check_plain_folder(folder, config, model_class, must_tie=must_tie, rename=rename)
    if published:
        _check_rotary(folder, config)


def _check_rotary(folder: Path, config: Any) -> None:
    """Make sure that the frequencies in the files are those of config.json's rope_ratio.

    The publisher's code writes those of ratio 1 whatever the ratio is, so these say nothing.

    Raises:
        UserError: they are of another; the folder was put together from two models.
    """
    found = weights.read_named(folders.weight_files(folder), {INV_FREQ}).get(INV_FREQ)
    if found is None or len(found) < 2:
        return
    # The last of n is base ** -(1 - 1 / n): it says which base the file was made for.
    base = float(found[-1].double()) ** (-len(found) / (len(found) - 1))
    wanted = config.rope_parameters["rope_theta"]
    if all(abs(base / of_config - 1) > _SAME for of_config in (wanted, ROPE_BASE)):
        raise UserError(
            f"{folder}: config.json has rope_ratio {wanted / ROPE_BASE:g}, the weights were made "
            f"for about {base / ROPE_BASE:.0f} ({INV_FREQ}); take config.json and all weight files "
            "from the same download"
        )
