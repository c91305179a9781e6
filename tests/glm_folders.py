"""Folders of the younger family with real or toy vocabularies, as downloaded."""

import base64
import json
import shutil
from functools import cache
from pathlib import Path

import torch
from toys import randomise_adapter

from glmtune.adapters import attach_lora, save_adapter
from glmtune.models.families import FAMILIES
from glmtune.models.glm.byte_pair_encoder import tokenizer_of_tiktoken
from glmtune.models.glm.encoder import of_folder
from glmtune.models.glm.layouts import LAYOUTS
from glmtune.models.loading import load_base_model

PUBLISHED = {"model_type": "chatglm", "multi_query_attention": True}
CONFIGS = {
    "chatglm2": PUBLISHED | {"padded_vocab_size": 65024, "_name_or_path": "THUDM/chatglm2-6b"},
    "chatglm3": PUBLISHED | {"padded_vocab_size": 65024, "_name_or_path": "THUDM/chatglm3-6b"},
    "glm4": PUBLISHED | {"padded_vocab_size": 151552, "_name_or_path": "THUDM/glm-4-9b-chat"},
    "glm4-0414": {"model_type": "glm4", "vocab_size": 151552},
    "glm-edge": {"model_type": "glm", "vocab_size": 59264, "partial_rotary_factor": 1.0},
}
_TOY_WORDS = [b"\n\n", b" \n", b"an", b"th", b"the", b" the"]
_TOY_WORDS += ["你".encode()[:2], "你".encode()]


def toy_tiktoken() -> bytes:
    """All bytes and a few words, in tiktoken's form."""
    tokens = [bytes([byte]) for byte in range(256)] + _TOY_WORDS
    return b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens))


def write_folder(
    folder: Path,
    variant: str,
    vocabulary: bytes | None,
    *,
    name: str = "tokenizer.model",
    template: str | None = None,
    **config,
) -> Path:
    """A folder with a config.json, a vocabulary file and perhaps a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[variant] | config))
    if vocabulary is not None:
        (folder / name).write_bytes(vocabulary)
    settings = {
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "chat_template": template,
    }
    settings = {key: value for key, value in settings.items() if value}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def real_folder(shared, root, variant):
    """A folder with the real vocabulary; GLM-4-0414's is a tokenizer.json."""
    golden = shared / "golden"
    is_pieces = variant in ("chatglm2", "chatglm3")
    file = golden / ("glm3_tokenizer.model" if is_pieces else "glm/glm4_tokenizer.model")
    data, name = file.read_bytes(), "tokenizer.model"
    if variant == "glm4-0414":
        name = "tokenizer.json"
        data = tokenizer_of_tiktoken(data, file, LAYOUTS[variant]).to_str().encode()
    return write_folder(root / variant, variant, data, name=name)


@cache
def encoder_of(shared, root, variant):
    """An encoder with the real vocabulary, built once."""
    return of_folder(real_folder(shared, root, variant))


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
PUBLISHED_SIZES = {
    "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 4,
    "multi_query_group_num": 2, "kv_channels": 8, "seq_length": 512, "add_qkv_bias": True,
    "eos_token_id": 2, "pad_token_id": 0, "layernorm_epsilon": 1e-5,
}  # fmt: skip


def write_model(folder: Path, family, vocabulary: Path | None, *, published: bool = False) -> Path:
    """A tiny model of random weights with a real vocabulary, in either layout.

    Args:
        folder: is made.
        family: its entry of the list.
        vocabulary: a tokenizer.model; None for a tokenizer.json of bytes and GLM-Edge's special
            tokens, whose ids follow those of the bytes in the published order.
        published: in the publisher's layout, as .bin shards, instead of transformers'.
    """
    native = family.native()
    settings = dict(family.published_settings) | SIZES
    if vocabulary is None:
        words = toy_tiktoken()
        end = words.count(b"\n")
        settings |= {
            "vocab_size": 512,
            "pad_token_id": end,
            "eos_token_id": [end, end + 7, end + 9],
        }
    torch.manual_seed(0)
    model = native.model_class(native.config_class.from_dict(settings))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    folder.mkdir(parents=True)
    if published:
        variant = model.config.published_as or "glm4"
        config = CONFIGS[variant] | PUBLISHED_SIZES
        config["eos_token_id"] = settings["eos_token_id"]
        config["pad_token_id"] = settings["pad_token_id"]
        config["layernorm_epsilon"] = settings["rms_norm_eps"]
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(as_published(model), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder)
    if vocabulary is None:
        tokenizer = tokenizer_of_tiktoken(words, folder, LAYOUTS["glm-edge"])
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        shutil.copyfile(vocabulary, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ChatGLM4Tokenizer", "padding_side": "left"})
    )
    return folder


def as_published(model) -> dict[str, torch.Tensor]:
    """A model's tensors in float16 under the names of the publisher's code."""
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    found = {
        "transformer.embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": weights["model.norm.weight"],
        "transformer.output_layer.weight": weights["lm_head.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"transformer.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [weights[f"{ours}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{theirs}self_attention.query_key_value.{kind}"] = torch.cat(parts)
        for a, b in (
            ("self_attn.o_proj", "self_attention.dense"),
            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
            ("mlp.down_proj", "mlp.dense_4h_to_h"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ):
            found[f"{theirs}{b}.weight"] = weights[f"{ours}{a}.weight"]
    return found


def write_run(base: Path, folder: Path) -> Path:
    """Write a run's folder whose adapter, on all linears of a base, has an effect."""
    torch.manual_seed(1)
    model = attach_lora(load_base_model(str(base), dtype=torch.float32), targets="all", rank=4)
    randomise_adapter(model, std=0.2)
    save_adapter(model, folder, str(base))
    return folder


def bases_and_runs(shared, tmp_path_factory, kinds):
    """A function from a kind to the folders of a base and of a run on it, made when first asked.

    Args:
        shared: the folder of vectors.
        tmp_path_factory: pytest's.
        kinds: by kind, the name of the entry, its vocabulary, and whether its folder is in the
            publisher's layout.
    """

    @cache
    def make(kind):
        name, vocabulary, is_published = kinds[kind]
        family = next(family for family in FAMILIES if family.name == name)
        place = tmp_path_factory.mktemp(kind)
        file = shared / "golden" / vocabulary
        base = write_model(place / "base", family, file, published=is_published)
        return base, write_run(base, place / "run")

    return make
