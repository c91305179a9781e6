"""A small OpenAI-shaped server of one model with an adapter, which can be broken in known ways."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from glmtune.data.conversations import USER, Example, Turn
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings, answer_batch
from glmtune.generation.prompts import prompt_ids


class OpenAIServer:
    """Serves `model` under the name "served".

    Args:
        model: with an adapter or without, in evaluation mode.
        tokenizer: of the base.
        stops: whether answers end at the stop ids.
        template: what a message is written as; the family's own where it is "{}".
        context: tokens that a prompt may have; None for the model's.
        cuts: whether longer prompts lose their beginning, else they are refused.
        counts: whether usage is given.
        renders: "tokenize", "apply-template" or None: how messages are shown.
    """

    def __init__(
        self, model, tokenizer, *, stops=True, template="{}", context=None, cuts=False,
        counts=True, renders=None, answers=None,
    ):  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.decoder = Decoder.of(model, GenerationSettings())
        if not stops:
            self.decoder.stop_ids = [-1]
        self.template, self.context, self.cuts = template, context, cuts
        self.counts, self.renders, self.answers = counts, renders, answers
        self.asked, self.keys = [], set()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def ids(self, messages):
        content = self.template.format(messages[0]["content"])
        (row,) = prompt_ids(self.tokenizer, [Example((Turn(USER, content),))])
        return row

    def answer(self, path, request):
        if path == "/v1/chat/completions":
            return self.complete(request)
        if path == f"/{self.renders}":
            ids = self.ids(request["messages"])
            found = {"tokens": ids, "count": len(ids)}
            if self.renders == "apply-template":
                found = {"prompt": self.tokenizer.decode(ids, skip_special_tokens=False)}
            return 200, found
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "served"}]}
        return 404, {"error": {"message": f"no {path} here"}}

    def complete(self, request):
        if request["model"] != "served":
            return 404, {"error": {"message": f"there is no model {request['model']}"}}
        self.asked.append(request)
        ids = self.ids(request["messages"])
        if self.context and len(ids) > self.context:
            if not self.cuts:
                return 400, {"error": {"message": f"{len(ids)} tokens, at most {self.context}"}}
            ids = ids[-self.context :]
        how = GenerationSettings(max_new_tokens=request["max_tokens"])
        with self.lock:
            prompts = [EncodedPrompt(ids, 0)]
            (found,) = answer_batch(self.model, self.tokenizer, prompts, how, self.decoder)
        text = found.text if self.answers is None else self.answers(len(self.asked), found.text)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop" if found.stopped else "length",
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": found.num_tokens}
        return 200, {"choices": [choice]} | ({"usage": usage} if self.counts else {})


class _Handler(BaseHTTPRequestHandler):
    owner: OpenAIServer

    def _take(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.owner.keys.add(self.headers.get("Authorization"))
        status, content = self.owner.answer(self.path, json.loads(body) if body else {})
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _take

    def log_message(self, *_):
        pass
