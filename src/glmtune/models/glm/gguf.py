"""The younger family as llama.cpp has it: architectures ``chatglm`` and ``glm4``.

Source: llama.cpp's models/chatglm.cpp, models/glm4.cpp and llama-vocab.cpp. Its converter reads
``rope_ratio``, ``seq_length`` and ``layernorm_epsilon`` alone, so that of transformers' layout it
takes wrong positions, context and norms; here they are those of the configuration.
"""

import json
import re
from typing import Any

from glmtune.errors import UserError
from glmtune.models.gguf_form import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GgufForm,
    GgufVocabulary,
)
from glmtune.models.glm.byte_pair_encoder import _SPLIT, BytePairEncoder
from glmtune.models.glm.layouts import ROLES
from glmtune.models.glm.mapping import OWN_LAYER
from glmtune.models.glm.piece_encoder import PieceEncoder
from glmtune.models.glm.template import render

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
# llama.cpp's names for one and the same way to split; the first is older.
_PRE = {"glm": "chatglm-bpe", "glm4": "glm4"}
_ARCH = {"glm": "chatglm", "glm4": "glm4"}
_SCALINGS = ("default", "linear", "yarn")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_ASKED = "?"


def gguf_form(config: Any, tokenizer: Any) -> GgufForm:
    """What a GGUF file says of a model of this configuration and tokenizer.

    Raises:
        UserError: llama.cpp has no such scaling of positions or no such vocabulary.
    """
    rope = config.rope_parameters
    if rope["rope_type"] not in _SCALINGS:
        raise UserError(
            f"--to gguf: rope_type {rope['rope_type']!r} is not written here; there are "
            f"{', '.join(_SCALINGS)}: use --to hf"
        )
    is_pieces = isinstance(tokenizer, PieceEncoder)
    vocabulary = (
        _pieces(tokenizer, config.vocab_size)
        if isinstance(tokenizer, PieceEncoder)
        else _byte_pairs(tokenizer, config)
    )
    layout, ids = tokenizer.layout, tokenizer.ids
    special = {"eos": ids[layout.stops[0]], "pad": ids[layout.pad]}
    # Where llama.cpp stops: at eos, at the end of a turn, and at the end of a message.
    special |= dict(zip(("eot", "eom"), (ids[name] for name in layout.stops[1:]), strict=False))
    if is_pieces:
        special["unk"] = ids["<unk>"]
    factor = rope.get("partial_rotary_factor", 0.5)
    return GgufForm(
        arch=_ARCH[config.model_type],
        name_of=_name_of,
        rotary_dims=int(config.head_dim * factor),
        rope_base=rope["rope_theta"],
        rope_scaling=_scaling(config),
        vocabulary=vocabulary,
        special=special,
        chat_template=_as_tokens(_GENERATION.sub("", tokenizer.chat_template), tokenizer),
        ollama_template=_ollama_template(tokenizer),
        stops=[vocabulary.tokens[ids[name]] for name in layout.stops],
    )


def _name_of(module: str) -> str:
    if not module.startswith(OWN_LAYER):
        return _TOP[module]
    number, _, rest = module.removeprefix(OWN_LAYER).partition(".")
    return f"blk.{number}.{_IN_LAYER[rest]}"


def _scaling(config: Any) -> dict[str, str | float | int]:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        return {}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return {"type": rope["rope_type"], "factor": float(rope["factor"]), "original": int(original)}


def _shown(name: str) -> str:
    """A special token's name in the file: one that is a word gets brackets.

    llama.cpp looks for these names in every text, and finds "eop" in "people".
    """
    return f"<{name}>" if name.isalpha() else name


def _pieces(encoder: PieceEncoder, num_rows: int) -> GgufVocabulary:
    sp = encoder.sp
    tokens, kinds, scores = [], [], []
    for id_ in range(sp.get_piece_size()):
        tokens.append(sp.id_to_piece(id_))
        scores.append(sp.get_score(id_))
        kinds.append(
            UNKNOWN if sp.is_unknown(id_)
            else CONTROL if sp.is_control(id_)
            else BYTE if sp.is_byte(id_)
            else UNUSED if sp.is_unused(id_)
            else NORMAL
        )  # fmt: skip
    for id_ in range(len(tokens), num_rows):
        name = encoder.names.get(id_)
        tokens.append(_shown(name) if name else f"[PAD{id_}]")
        kinds.append(CONTROL if name else UNUSED)
        scores.append(0.0)
    return GgufVocabulary("llama", "default", tokens, kinds, scores=scores, adds_blank=True)


def _byte_pairs(encoder: BytePairEncoder, config: Any) -> GgufVocabulary:
    """The vocabulary and its merges, of a tokenizer that splits texts as llama.cpp's does.

    Raises:
        UserError: it splits otherwise, or normalises texts before.
    """
    found = json.loads(encoder.byte_pairs.to_str())
    splits = json.dumps(found["pre_tokenizer"] or {})
    if json.dumps(_SPLIT)[1:-1] not in splits or found["normalizer"]:
        raise UserError(
            f"--to gguf: {encoder.folder}: its tokenizer splits texts in a way that llama.cpp has "
            "no name for here; use --to hf"
        )
    by_id = {id_: token for token, id_ in found["model"]["vocab"].items()}
    added = {token["id"]: token for token in found["added_tokens"]}
    tokens, kinds = [], []
    for id_ in range(config.vocab_size):
        if id_ in added:
            tokens.append(added[id_]["content"])
            kinds.append(CONTROL if added[id_]["special"] else USER_DEFINED)
        else:
            tokens.append(by_id.get(id_, f"[PAD{id_}]"))
            kinds.append(NORMAL if id_ in by_id else UNUSED)
    merges = [m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]]
    return GgufVocabulary("gpt2", _PRE[config.model_type], tokens, kinds, merges=merges)


def _as_tokens(text: str, tokenizer: Any) -> str:
    """A template that writes special tokens by their names in the file."""
    prefix = tokenizer.layout.prefix
    return text.replace("".join(prefix), "".join(map(_shown, prefix))) if prefix else text


def _ollama_template(tokenizer: Any) -> str:
    """The layout as a template of Go, which Ollama reads; it begins an answer as jinja's does."""
    layout = tokenizer.layout
    prefix = "".join(map(_shown, layout.prefix))
    if not layout.has_roles:  # Go's templates cannot count rounds
        return f"{prefix}[Round 1]\n\n问：{{{{ .Prompt }}}}\n\n答："
    blank = " " if tokenizer.has_blank else ""
    role = '{{ if eq .Role "tool" }}observation{{ else }}{{ .Role }}{{ end }}'
    messages = f"{{{{ range .Messages }}}}<|{role}|>\n{blank}{{{{ .Content }}}}{{{{ end }}}}"
    return f"{prefix}{messages}{_beginning(tokenizer)}"


def _beginning(tokenizer: Any) -> str:
    """What the chat template begins an answer with."""
    asked = [{"role": "user", "content": _ASKED}]
    text = render(_GENERATION.sub("", tokenizer.chat_template), asked, add_generation_prompt=True)
    role = ROLES["assistant"]
    return role + text.rpartition(role)[2] if role in text else role
