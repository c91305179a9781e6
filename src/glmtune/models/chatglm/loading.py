"""transformers' `from_pretrained`, but strict: what it loads was held against the model before."""

import copy
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from glmtune.errors import UserError
from glmtune.hardware import pick_device, pick_dtype
from glmtune.models import weights
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.folder import check_folder
from glmtune.models.integer_weights import SCALE, Packed
from glmtune.models.quantised import bits_of, check_quantising, finish_loading

# What transformers' loader offers and a strict one does not.
_NOT_OFFERED = {
    "variant": "is not looked for, only model.safetensors, pytorch_model.bin and their indexes; "
    "leave it out, and rename the files",
    "subfolder": "is not looked into; leave it out, and join it to the folder's path",
    "gguf_file": "is of a format that is not read; pass a ChatGLM-6B folder",
}
# Arguments of from_pretrained that are not meant for config.json, though a configuration has them.
_OF_LOADING = {"dtype", "torch_dtype", "quantization_config", "name_or_path"}


class StrictModel(PreTrainedModel):
    """What the bare model and the language model share of loading."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        """Load a published folder, its own `save_pretrained`, or a hub id; no code of it is run.

        As transformers', but strict (every tensor is there, none is extra, all have their shapes)
        and in the compute type of the machine: bfloat16 on a GPU that has it, float32 on a CPU.
        `dtype="auto"` keeps the type of the files. The weights of a published int8 or int4 folder
        stay packed, see `dequantize`. With transformers' `quantization_config` for bitsandbytes a
        float folder is quantised while it loads; one that was saved after that loads as it is.
        With `tie_word_embeddings=False` a head that is the embedding becomes a copy of it.

        Raises:
            UserError: one line that names what does not fit.
        """
        loader: Any = super()
        if pretrained_model_name_or_path is None:  # the weights are given, as a state_dict
            return loader.from_pretrained(None, *args, config=config, **kwargs)
        for name, reason in _NOT_OFFERED.items():
            if kwargs.get(name):
                raise UserError(f"from_pretrained({name}={kwargs[name]!r}): {reason}")
        hub = {key: kwargs[key] for key in weights.HUB_ARGUMENTS if key in kwargs}
        folder = weights.fetch(pretrained_model_name_or_path, **hub)
        wish = kwargs.get("tie_word_embeddings")
        if not isinstance(config, ChatGLMConfig):
            names = vars(ChatGLMConfig()).keys() - _OF_LOADING
            changes = {name: kwargs.pop(name) for name in [*kwargs] if name in names}
            config = ChatGLMConfig.from_pretrained(config or folder, **changes)
        if bits := bits_of(config):
            check_quantising(f"{folder}: its quantization_config", bits, None)
        is_to_copy = not config.tie_word_embeddings
        try:
            check_folder(folder, config, cls, must_tie=bool(wish))
        except UserError as error:
            if not kwargs.get("ignore_mismatched_sizes"):
                raise
            raise UserError(f"{error} (ignore_mismatched_sizes=True is not obeyed here)") from error
        is_to_copy = is_to_copy and config.tie_word_embeddings
        if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
            kwargs["dtype"], caution = pick_dtype(pick_device(), bf16=None, fp16=False)
            if caution:
                warnings.warn(caution, stacklevel=2)
        with weights.indexed(folder) as place:
            loaded = loader.from_pretrained(place, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if hasattr(model, "lm_head") and config.tie_word_embeddings:
            _settle_head(model, is_to_copy)
        if bits_of(model.config):
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            finish_loading(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        return loaded


def _settle_head(model: Any, is_to_copy: bool) -> None:
    """Finish a head that was loaded as the embedding: all of it is, or is a copy."""
    embedding, head = model.transformer.word_embeddings, model.lm_head
    if isinstance(head, Packed):
        # Of a packed head transformers ties the integers, a parameter, but no buffer.
        setattr(head, SCALE, getattr(embedding, SCALE))
    if is_to_copy:
        model.config.tie_word_embeddings = False
        head.weight = copy.deepcopy(embedding.weight)
        if isinstance(head, Packed):
            setattr(head, SCALE, getattr(embedding, SCALE).clone())
