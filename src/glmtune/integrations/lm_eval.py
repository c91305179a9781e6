"""The model type `glmtune` of lm-evaluation-harness: base and adapter on any of its tasks.

``python -m glmtune.integrations.lm_eval`` is its command with that model type beside its own; from
Python, importing this module is enough.

Where prompts are seen in both directions, contexts end with the special ids of a prompt, and what
is scored or generated is the answer, as in training. Other families read a context as lm-eval's own
model type does, as text behind the tokenizer's prefix; a chat template makes it a question as in
training.
"""

import sys
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from glmtune.adapters.lora import load_adapter
from glmtune.errors import UserError, note
from glmtune.hardware import pick_device
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import resolve_base

# Settings of `HFLM` that have an effect on a model that is already loaded.
PASSED_ON = ("chat_template_args", "logits_cache", "max_batch_size", "max_length", "softmax_dtype")


@register_model("glmtune")
class GlmtuneLM(HFLM):
    """A base model with or without an adapter, as `--model_args` name them.

    Args:
        pretrained: base model, a folder or a hub id; by default that of the adapter's recipe.
        peft: folder of an adapter or of a run, in any form that glmtune reads.
        dtype: "float32", "float16" or "bfloat16"; by default, or with "auto", as the device has it.
        device: "cpu", "cuda" or "cuda:1"; by default a GPU if there is one.
        bits: 8 or 4 for a base that bitsandbytes quantises while it loads.
        batch_size: rows of a pass.
        trust_remote_code: lm-eval's flag of that name; it has no effect, which a note says.
        settings: settings of `HFLM` that PASSED_ON names.

    Raises:
        UserError: base or adapter cannot be loaded, or a setting would have no effect.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        peft: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        bits: int | None = None,
        batch_size: int | str = 1,
        trust_remote_code: bool = False,
        **settings: Any,
    ):
        if trust_remote_code:
            note("trust_remote_code: not needed, no code of the folder is run")
        if unknown := sorted(settings.keys() - set(PASSED_ON)):
            raise UserError(
                f"model_args {unknown[0]}: not a setting of --model glmtune; there are pretrained, "
                f"peft, dtype, device, bits, batch_size, {', '.join(PASSED_ON)}"
            )
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise UserError(f"batch_size {batch_size}: give a number of rows, such as 8")
        if dtype not in (None, "auto", "float32", "float16", "bfloat16"):
            raise UserError(f"model_args dtype {dtype}: float32, float16, bfloat16 or auto")
        base = resolve_base(pretrained, peft)
        tokenizer = load_tokenizer(base)
        model: Any = load_base_model(
            base,
            dtype=None if dtype in (None, "auto") else getattr(torch, dtype),
            device=pick_device() if device is None else device,
            bits=bits,
        )
        if peft is not None:
            model = load_adapter(model, peft)
        super().__init__(
            pretrained=model.eval(),
            tokenizer=tokenizer,
            batch_size=int(batch_size),
            backend="causal",
            **settings,
        )
        self.pretrained, self.peft = base, peft

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """A context's ids, with the tokenizer's special ids unless they are turned off.

        Behind a chat that a template rendered comes what every answer of training begins with.
        """
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)
        rule, start = self.tokenizer.row_rule, self._start
        if not rule.prompt_sees_all:
            if start and ids[: 2 * len(start)] == 2 * start:  # the template wrote it as well
                ids = ids[len(start) :]
            asked = [special.id for special in rule.after_prompt]
            if asked and ids[-len(asked) :] == asked:
                ids += [special.id for special in rule.before_answer]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    @property
    def _start(self) -> list[int]:
        """What the tokenizer puts before, or behind, an empty text."""
        return self.tokenizer.encode("")

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts as ids and mask, each ``(B, S)``; long ones lose their beginning."""
        rows = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        batch = self.tokenizer.pad(
            {"input_ids": rows}, padding_side=padding_side, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and answer, without the blank that other models need between the two.

        A text that goes on, with no question and answer, is split as lm-eval's own model type does.
        """
        ids, rule = self.tok_encode(context), self.tokenizer.row_rule
        asked = [special.id for special in (*rule.after_prompt, *rule.before_answer)]
        if asked and ids[-len(asked) :] == asked:
            answer = continuation.lstrip(" ") or continuation
            return ids, self.tok_encode(answer, add_special_tokens=False)
        if not rule.prompt_sees_all and context:
            return super()._encode_pair(context, continuation)
        if not rule.prompt_sees_all:
            start = ids or [self.prefix_token_id]
            return start, self.tok_encode(continuation, add_special_tokens=False)
        # The chat template has already begun the answer.
        whole = self.tok_encode(context + continuation)
        return whole[: len(ids)], whole[len(ids) :]

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """Log-probability of each answer after its context, maybe empty, and if it is greedy."""
        pairs = [request.args for request in requests]
        return self._loglikelihood_tokens(
            [(pair, *self._encode_pair(*pair)) for pair in pairs], disable_tqdm=disable_tqdm
        )

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text behind an empty prompt, every token scored once.

        A text longer than `max_length` is read in windows: each later window begins its answer with
        the token before it, and the last one with as many tokens as fit.
        """
        start = self._start or [self.prefix_token_id]
        windows, counts = [], []
        for request in requests:
            of_text = list(
                utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=start[-1],
                    max_seq_len=self.max_length - len(start),
                    context_len=1,
                )
            )
            for i, window in enumerate(of_text):
                before, scored = utils.make_disjoint_window(window)
                windows.append((None, start + (before if i else before[1:]), scored))
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


def main() -> int:
    """Run lm-evaluation-harness's own command; returns 2 for a user's mistake."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
