"""Open a folder with transformers alone, as somebody does who does not have glmtune.

Run as a program of its own: `python plain_reader.py FOLDER QUESTIONS.json ANSWERS.safetensors`. It
writes the logits of some ids, and prints as JSON the ids of some texts and of a conversation, and
the ids that end an answer.
"""

import json
import os
import sys
from typing import Any


def main(folder: str, questions: str, answers: str) -> None:
    """Read the folder and answer the questions about it."""
    sys.modules["glmtune"] = None  # type: ignore[assignment]  # importing it fails from here on
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    with open(questions, encoding="utf-8") as file:
        asked = json.load(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.tensor([asked["ids"]])).logits
    save_file({"logits": logits.contiguous()}, answers)
    told = {
        "class": type(model).__name__,
        "version": transformers.__version__,
        "stops": model.generation_config.eos_token_id,
    }
    if asked["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        told["texts"] = [tokenizer.encode(t, add_special_tokens=False) for t in asked["texts"]]
        chat: Any = tokenizer.apply_chat_template(
            asked["chat"], add_generation_prompt=True, return_dict=True
        )
        told["chat"] = list(chat["input_ids"])
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
