"""Open an adapter's folder with vLLM's own loader, without a model and a GPU.

Run as a program of its own: `python vllm_reader.py FOLDER LINEARS.json TENSORS.safetensors`. It
writes A and B of each module as vLLM has read them, with their scale in a tensor of one number.
"""

import json
import sys


def main(folder: str, linears: str, tensors: str) -> None:
    """Read the folder as vLLM's worker does."""
    import torch
    import vllm
    from safetensors.torch import save_file
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    with open(linears, encoding="utf-8") as file:
        expected = set(json.load(file)["linears"])
    helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
    model = LoRAModel.from_local_checkpoint(
        folder, expected, peft_helper=helper, lora_model_id=1, device="cpu"
    )
    found = {}
    for name, part in model.loras.items():
        found[f"{name}.a"] = part.lora_a.contiguous()
        found[f"{name}.b"] = part.lora_b.contiguous()
        found[f"{name}.scale"] = torch.tensor([float(part.scaling)])
    save_file(found, tensors)
    print(json.dumps({"version": vllm.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
