"""`glmtune replay-rows`: a base's own answers to general questions, to be mixed into a training.

Rows of what the base would have said anyway hold it to that while it learns a task (self-distilled
replay). They are answered once; the file is then the setting `replay` of any number of recipes.
Where that setting is a share, the file is kept with the user's other caches.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from glmtune.config.settings import InferSettings, ReplayRowsSettings
from glmtune.data.conversations import ASSISTANT
from glmtune.data.files import new_file
from glmtune.data.questions import question_in
from glmtune.errors import UserError
from glmtune.evaluation.infer import infer
from glmtune.general.items import find_prompts
from glmtune.models.resolve import base_name, resolve_base

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


def own_rows(base: str) -> Path:
    """The file of a base's own answers to general questions, made where it is not there yet.

    It lies in `$XDG_CACHE_HOME/glmtune/replay`, by default below `~/.cache`, under a name that
    depends on the base's files and the questions.

    Args:
        base: a folder, see `resolve_base`.

    Raises:
        UserError: the base cannot be loaded, or no answer is a row.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(find_prompts(base).read_bytes())
    for path in sorted(Path(base).iterdir()):
        if path.is_file():
            found = path.stat()
            digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    path = cache / "glmtune" / "replay" / f"{Path(base).name}-{digest.hexdigest()[:16]}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"replay: {base_name(base)} answers general questions, once", flush=True)
        write_replay_rows(ReplayRowsSettings(base=base, save_path=str(path)))
    return path


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
