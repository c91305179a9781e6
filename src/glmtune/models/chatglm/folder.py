"""Check that a folder's weights, configuration and vocabulary fit together."""

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from glmtune.data.files import read_json_object
from glmtune.errors import UserError
from glmtune.models import folders, weights
from glmtune.models.chatglm.configuration import (
    VOCAB_SIZE_V1_0,
    VOCAB_SIZE_V1_1,
    ChatGLMConfig,
)
from glmtune.models.chatglm.vocabulary import NUM_PIECES_V1_0, VOCAB_FILE, check_revision
from glmtune.models.integer_weights import SCALE, IntegerModule
from glmtune.models.quantised import as_floats
from glmtune.models.shape import bits_of
from glmtune.models.strict_loading import refuse_prefix
from glmtune.run_files import ADAPTER_CONFIG_FILE

BODY = "transformer."  # which is not in the names of the bare model's own files
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
EMBEDDING_SCALE, HEAD_SCALE = f"transformer.word_embeddings.{SCALE}", f"lm_head.{SCALE}"
LAYER = re.compile(r"transformer\.layers\.(\d+)\.")
# The published files carry these buffers, whose values the model computes.
ROTARY_BUFFER = r"rotary_emb\.inv_freq$"


def check_folder(
    folder: Path,
    config: ChatGLMConfig,
    model_class: type[PreTrainedModel],
    *,
    must_tie: bool = False,
) -> None:
    """Check that weights, configuration and vocabulary of a folder agree; set the head's tie.

    Args:
        folder: a checkpoint's.
        config: of that folder; `tie_word_embeddings` is set to what the weights say.
        model_class: the class to load: the language model, or the bare model without a head.
        must_tie: refuse weights whose head differs from the embedding.

    Raises:
        UserError: one line that names what does not fit.
    """
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        # transformers would load the base that this file names, wherever that lies.
        raise UserError(
            f"{folder / ADAPTER_CONFIG_FILE}: an adapter's file in a base model's folder; name the "
            "base with --base and the adapter with --adapter, or remove this file"
        )
    files = folders.weight_files(folder)
    found = weights.read_outline(files)
    refuse_prefix(folder, found)
    if EMBEDDING.removeprefix(BODY) in found:  # of the bare model, saved by itself
        found = {name if name in (HEAD, HEAD_SCALE) else BODY + name: found[name] for name in found}
    num_layers = len({name[1] for name in map(LAYER.match, found) if name})
    if config.num_layers != num_layers:  # before any layers are built
        raise UserError(
            f"{folder}: config.json says {config.num_layers} layers (num_layers), the weights have "
            f"{num_layers}; take config.json and all weight files from the same download"
        )
    num_rows = found[EMBEDDING].shape[0] if EMBEDDING in found else 0
    revisions = (VOCAB_SIZE_V1_0, VOCAB_SIZE_V1_1)
    if num_rows != config.vocab_size and {num_rows, config.vocab_size} == set(revisions):
        raise UserError(
            f"{folder}: config.json (vocab_size {config.vocab_size}) and the weights ({num_rows} "
            "rows) are of different revisions of ChatGLM-6B; take both from the same download"
        )
    pairs = ((EMBEDDING, HEAD), (EMBEDDING_SCALE, HEAD_SCALE))
    is_tied = not any(weights.tensors_differ(files, *pair) for pair in pairs)
    says_tied = read_json_object(folder / CONFIG_NAME).get("tie_word_embeddings", True)
    if not is_tied and (must_tie or (config.tie_word_embeddings and not says_tied)):
        raise UserError(
            f"{folder}: tie_word_embeddings=True, but its lm_head is another tensor than its "
            "word_embeddings, and would be lost; leave tie_word_embeddings out"
        )
    config.tie_word_embeddings = is_tied
    with torch.device("meta"):
        model = model_class(config)
    prefix = "" if hasattr(model, "lm_head") else BODY
    if prefix:
        found = {name: found[name] for name in found if name not in (HEAD, HEAD_SCALE)}
    if bits_of(config):
        found = as_floats(found, model)
    weights.check_outline(
        {name: tensor for name, tensor in found.items() if not re.search(ROTARY_BUFFER, name)},
        {prefix + name: tensor for name, tensor in model.state_dict().items()},
        folder,
        optional=[HEAD, HEAD_SCALE] if is_tied and says_tied else [],
        exact=[
            f"{prefix}{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, IntegerModule)
            for key in ("weight", SCALE)
        ],
    )
    if (folder / VOCAB_FILE).is_file():
        num_pieces = check_revision(folder / VOCAB_FILE, config.vocab_size)
        if num_pieces == NUM_PIECES_V1_0 and not _names_gmask(folder):
            # Image tokens removed (silver/chatglm-6b-slim); positions are still those of v1.0.
            config.sop_in_prefix = True


def _names_gmask(folder: Path) -> bool:
    """Whether config.json has the id of [gMASK], as it does since mid-2023."""
    return "gmask_token_id" in read_json_object(folder / "config.json")
