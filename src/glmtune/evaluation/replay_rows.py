"""`glmtune replay-rows`: a base's own answers to general questions, to be mixed into a training.

Rows of what the base would have said anyway hold it to that while it learns a task (self-distilled
replay). They are answered once; the file is then the setting `replay` of any number of recipes.
"""

import json
from pathlib import Path
from typing import Any

from glmtune.config.settings import InferSettings, ReplayRowsSettings
from glmtune.data.conversations import ASSISTANT
from glmtune.data.files import new_file
from glmtune.data.questions import question_in
from glmtune.errors import UserError
from glmtune.evaluation.infer import infer
from glmtune.general.items import find_prompts
from glmtune.models.resolve import resolve_base

ANSWERS_SUFFIX = ".answers.jsonl"


def write_replay_rows(settings: ReplayRowsSettings) -> int:
    """Answer questions with the base alone, and write those answers that ended as rows.

    The answers are kept beside the rows and resumed, as those of `infer`.

    Returns:
        How many rows were written.

    Raises:
        UserError: questions, base or files cannot be used, see `infer`; or no answer is a row.
    """
    base = resolve_base(settings.base)
    save_path = Path(settings.save_path)
    names = InferSettings.model_fields.keys() & settings.model_fields_set
    given = settings.model_dump(include=set(names))
    answers = save_path.with_name(save_path.stem + ANSWERS_SUFFIX)
    own = {
        "base": base,
        "data_path": settings.data_path or str(find_prompts(base)),
        "output_path": str(answers),
        "print_limit": 0,
    }
    infer(InferSettings(**given | own))
    lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    lines = lines[: settings.limit]
    rows = [as_row(line) for line in lines if line["stopped"] and line["answer"].strip()]
    if not rows:
        raise UserError(
            f"{answers}: none of {len(lines):,} answers is a row: they are empty, or cut at "
            f"max_new_tokens {settings.max_new_tokens}; raise it"
        )
    with new_file(str(save_path)) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    left = len(lines) - len(rows)
    cut = f", {left:,} left out (empty, or cut at max_new_tokens)" if left else ""
    print(f"{save_path}: {len(rows):,} rows{cut}; mix them in with tokenize --replay {save_path}")
    return len(rows)


def as_row(line: dict[str, Any]) -> dict[str, Any]:
    """A line of answers as a row to train on.

    A text and what continues it are one text; decoding drops the blank before a Latin word, which
    is put back.
    """
    asked, answer = question_in(line), line["answer"]
    if "text" in asked:
        starts_word = answer[:1].isascii() and answer[:1].isalnum()
        blank = " " * (starts_word and not asked["text"][-1:].isspace())
        return {"text": asked["text"] + blank + answer}
    if "messages" in asked:
        messages = [*asked["messages"], {"role": ASSISTANT, "content": answer}]
        return {name: asked[name] for name in ("tools",) if name in asked} | {"messages": messages}
    return {name: value for name, value in asked.items() if name != "row"} | {"output": answer}
