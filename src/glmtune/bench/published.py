"""`glmtune reproduce`: work whose results the publishers state, and the commands that repeat it.

Only the published weights and data can show these figures, so nothing here claims one: a command
prints what to run and what to compare the result with.
"""

from collections.abc import Iterator
from typing import NamedTuple

from glmtune.config.benchmarks import ReproduceSettings
from glmtune.config.names import did_you_mean
from glmtune.errors import UserError


class Work(NamedTuple):
    """A published result, and how to repeat the work."""

    about: str
    needs: tuple[str, ...]
    """What has to be at hand."""
    commands: tuple[str, ...]
    figures: tuple[str, ...]
    """What the publisher states, with the formula of each number."""
    source: str
    caution: str
    """What such a comparison cannot show."""


_ADGEN_ROWS = "glmtune convert --data_path train.json --save_path rows.jsonl"
_ADGEN = "AdvertiseGen's train.json and dev.json (114,599 and 1,070 lines of content and summary)"
_LEGACY_SCORES = (
    "scores: predictions.json beside dev.json, by compute_metrics of the publisher's "
    "ptuning/main.py: words by jieba; BLEU-4 = 100 x nltk's sentence_bleu with smoothing method 3 "
    "over characters, mean of rows; ROUGE = 100 x F of rouge_chinese, mean of rows"
)

WORKS = {
    "adgen-chatglm-6b": Work(
        about="ChatGLM-6B, LoRA on AdvertiseGen, scored by BLEU-4 and ROUGE",
        needs=("zai-org/chatglm-6b", _ADGEN),
        commands=(
            _ADGEN_ROWS,
            "glmtune tokenize --jsonl_path rows.jsonl --save_path rows --base zai-org/chatglm-6b "
            "--max_seq_length 64",
            "glmtune train --dataset_path rows --output_dir adgen --base zai-org/chatglm-6b "
            "--learning_rate 5e-4 --per_device_train_batch_size 16 --layout exact "
            "--max_steps 3000 --fp16 true",
            "glmtune infer --data_path dev.json --adapter adgen --output_path predictions.json "
            "--max_new_tokens 64",
        ),
        figures=(
            "LoRA: BLEU-4 7.62, ROUGE-1 30.60, ROUGE-2 6.96, ROUGE-L 24.80, training loss 3.32",
            "P-Tuning v2: 8.10, 31.12, 7.11, 24.97, 3.74; all weights: 8.01, 31.23, 7.36, 25.08, "
            "3.00",
            _LEGACY_SCORES,
        ),
        source="ptuning/README.md of the ChatGLM-6B repository",
        caution="the publisher's prompt is the bare content, convert puts alpaca's words around "
        "it. Scores of this formula saturate early: they cannot tell a good tune from a better one",
    ),
    "adgen-chatglm3-6b": Work(
        about="ChatGLM3-6B, LoRA on AdvertiseGen: loss and speed of the publisher's notebook",
        needs=("zai-org/chatglm3-6b", _ADGEN),
        commands=(
            _ADGEN_ROWS,
            "glmtune tokenize --jsonl_path rows.jsonl --save_path rows --base zai-org/chatglm3-6b "
            "--max_seq_length 512",
            "glmtune train --dataset_path rows --output_dir adgen3 --base zai-org/chatglm3-6b "
            "--lora_target q_proj,k_proj,v_proj --lora_rank 8 --lora_alpha 32 --lora_dropout 0.1 "
            "--learning_rate 5e-5 --per_device_train_batch_size 4 --layout exact --max_steps 4000 "
            "--logging_steps 10",
            "glmtune infer --data_path dev.json --adapter adgen3 --limit 50 "
            "--output_path predictions.json --max_new_tokens 512",
        ),
        figures=(
            "loss 4.832 at step 10, 3.875 at 60, 3.69 at 410, 3.29 at 810, about 3.38 at the end; "
            "mean of the run 3.419 (cross entropy a supervised token, as metrics.jsonl has it)",
            "1.62 steps a second of 4 rows, 2,469 s, 15.5 GB of 16 (the card is not named)",
            "50 rows of dev.json: ROUGE-1 31.6, ROUGE-2 6.8, ROUGE-L 25.1 (100 x F, mean of rows); "
            "BLEU-4 0.034, which is a fraction, not a percentage",
        ),
        source="finetune_demo/lora_finetune.ipynb of the ChatGLM3 repository",
        caution="rows come in another order and other random numbers drop the adapter's inputs, so "
        "single steps differ; ROUGE stood still from step 500 on",
    ),
    "ceval-chatglm2-6b": Work(
        about="ChatGLM2-6B's base on C-Eval's validation questions",
        needs=("zai-org/chatglm2-6b", "a hub, for the questions; pip install 'glmtune[eval]'"),
        commands=(
            "python -m glmtune.integrations.lm_eval --model glmtune "
            "--model_args pretrained=zai-org/chatglm2-6b --tasks ceval-valid --num_fewshot 5",
        ),
        figures=(
            "dev: 53.57 in bfloat16, 50.30 in int4; test: 51.7 base, 50.1 chat (accuracy in "
            "percent, mean of subjects)",
        ),
        source="README.md of the ChatGLM2-6B repository",
        caution="the publisher's script has a prompt of its own and reads the letter off a chat's "
        "answer, lm-eval compares probabilities of the four letters: a point or two apart says "
        "nothing",
    ),
    "ceval-chatglm3-6b-base": Work(
        about="ChatGLM3-6B-Base on C-Eval's validation questions",
        needs=("zai-org/chatglm3-6b-base", "a hub, for the questions; pip install 'glmtune[eval]'"),
        commands=(
            "python -m glmtune.integrations.lm_eval --model glmtune "
            "--model_args pretrained=zai-org/chatglm3-6b-base --tasks ceval-valid --num_fewshot 5",
        ),
        figures=("69.0 (accuracy in percent; split and prompt are not stated)",),
        source="README.md of the ChatGLM3 repository",
        caution="without their prompt, only a figure far off says that something is wrong",
    ),
    "memory-glm-4-9b": Work(
        about="GLM-4-9B-Chat, LoRA on q, k, v: memory of the publisher's script",
        needs=("zai-org/glm-4-9b-chat-hf", _ADGEN),
        commands=(
            _ADGEN_ROWS,
            "glmtune tokenize --jsonl_path rows.jsonl --save_path rows "
            "--base zai-org/glm-4-9b-chat-hf --max_seq_length 512",
            "glmtune train --dataset_path rows --output_dir adgen4 --base zai-org/glm-4-9b-chat-hf "
            "--lora_target q_proj,k_proj,v_proj --learning_rate 5e-4 "
            "--per_device_train_batch_size 1 --layout exact --max_steps 3000",
        ),
        figures=("22 GB on an H100, rank 8, one row of at most 512 + 512 tokens a step",),
        source="finetune/README.md of the GLM-4 repository",
        caution="what a card reports in use counts CUDA and what the allocator reserves as well; "
        "glmtune prints what it allocates",
    ),
}


def reproduce(settings: ReproduceSettings) -> None:
    """Print the commands that repeat a published result, and what to compare theirs with.

    Raises:
        UserError: there is no such work.
    """
    if settings.name is None:
        width = max(map(len, WORKS)) + 2
        print("Published results that can be repeated with the published weights:")
        print(*(f"  {name:{width}}{work.about}" for name, work in WORKS.items()), sep="\n")
        print("`glmtune reproduce NAME` prints the commands and the figures.")
        return
    if settings.name not in WORKS:
        hint = did_you_mean(settings.name, WORKS) or f"; there are {', '.join(WORKS)}"
        raise UserError(f"reproduce {settings.name}: no such work{hint}")
    print(*_lines(WORKS[settings.name]), sep="\n")


def _lines(work: Work) -> Iterator[str]:
    yield work.about
    yield "needs"
    yield from (f"  {need}" for need in work.needs)
    yield "run"
    yield from (f"  {command}" for command in work.commands)
    yield "published, to compare with"
    yield from (f"  {figure}" for figure in work.figures)
    yield f"  source: {work.source}"
    yield "mind"
    yield f"  {work.caution}"
    yield "  none of these figures was measured by glmtune, and none is claimed"
