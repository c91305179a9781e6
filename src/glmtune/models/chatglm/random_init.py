"""Write a randomly initialised checkpoint in the published layout: for tests and benchmarks."""

import shutil
from pathlib import Path

import torch

from glmtune.data.files import write_json
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import EMBEDDING, HEAD, ChatGLMForConditionalGeneration
from glmtune.models.chatglm.vocabulary import VOCAB_FILE

PUBLISHED_SHARDS = 8
TOKENIZER_CONFIG = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
PUBLISHED_CONFIG = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "model_type": "chatglm",
    "torch_dtype": "float16",
    "position_encoding_2d": True,
    "use_cache": True,
}
SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "max_sequence_length",
    "layernorm_epsilon",
    "bos_token_id",
    "eos_token_id",
    "mask_token_id",
    "gmask_token_id",
    "pad_token_id",
)


def write_random_model(
    folder: Path,
    config: ChatGLMConfig,
    vocab_file: Path | None = None,
    *,
    seed: int = 0,
    num_shards: int = PUBLISHED_SHARDS,
    device: torch.device | str = "cpu",
) -> None:
    """Write a folder like a download of this shape, with random weights.

    float16 `.bin` shards and their index, which names the tied head too; `config.json` with the
    published `auto_map`; and, with a vocabulary, the tokenizer's files. The weights are normal with
    standard deviation `config.initializer_range`, biases 0, LayerNorms 1.

    Args:
        folder: created if missing; files of the same names in it are replaced.
        config: the shape.
        vocab_file: an `ice_text.model` to copy beside the weights.
        seed: of the weights.
        num_shards: files to spread the tensors over.
        device: where the weights are drawn; a GPU is much faster for 6B.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    with torch.device(device):
        model = ChatGLMForConditionalGeneration._from_config(config, dtype=torch.float16)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}

    names = sorted(tensors, key=_layer_order)
    size = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(num_shards):
        shard = {name: tensors[name].cpu().clone() for name in names[i * size : (i + 1) * size]}
        if EMBEDDING in shard:
            shard[HEAD] = shard[EMBEDDING]
        file = f"pytorch_model-{i + 1:05d}-of-{num_shards:05d}.bin"
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(index, folder / "pytorch_model.bin.index.json")

    shape = {key: getattr(config, key) for key in SHAPE_KEYS}
    write_json(PUBLISHED_CONFIG | shape, folder / "config.json")
    if vocab_file is not None:
        shutil.copyfile(vocab_file, folder / VOCAB_FILE)
        write_json(TOKENIZER_CONFIG, folder / "tokenizer_config.json")


def _layer_order(name: str) -> tuple[int, str]:
    parts = name.split(".")
    return (int(parts[2]) if parts[1] == "layers" else -1, name)
