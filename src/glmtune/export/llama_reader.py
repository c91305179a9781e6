"""Open a GGUF file with llama.cpp, by the package xllamacpp, and ask it.

Run as a program of its own, as llama.cpp ends a process that it finds fault with:
`python llama_reader.py QUESTIONS.json`. It prints as JSON the tokens that it answers some rows of
ids with, the ids of some texts, and a conversation by the chat template in the file.
"""

import json
import sys
import urllib.request
from importlib.metadata import version
from typing import Any


def main(questions: str) -> None:
    """Open the file and answer the questions about it."""
    import xllamacpp

    with open(questions, encoding="utf-8") as file:
        asked = json.load(file)
    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    params.n_ctx = asked["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    # By default it rounds: what it keeps of earlier tokens, and within its flash attention.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if asked["adapter"]:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = asked["adapter"], 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)

    def post(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            server.listening_address + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
            return json.load(reply)

    told: dict[str, Any] = {"version": version("xllamacpp")}
    told["answers"] = [
        post(
            "/completion", prompt=row, n_predict=asked["tokens"], temperature=0.0, top_k=1,
            cache_prompt=False, return_tokens=True,
        )["tokens"]
        for row in asked["rows"]
    ]  # fmt: skip
    told["texts"] = [
        post("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]
        for text in asked["texts"]
    ]
    if asked["chat"]:
        rendered = post("/apply-template", messages=asked["chat"])["prompt"]
        told["chat"] = post("/tokenize", content=rendered, add_special=True, parse_special=True)[
            "tokens"
        ]
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
