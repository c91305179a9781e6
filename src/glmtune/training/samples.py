"""Answers to a few held-out questions at each evaluation, so that one can read what a run teaches.

They are the likeliest tokens alone, so that what changes from one evaluation to the next is the
model. `samples.jsonl` has a line for each evaluation; no number of the run depends on it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glmtune.config.groups import GenerationSettings
from glmtune.data.templates import parts
from glmtune.data.token_rows import TokenRows
from glmtune.drafts import replacing_file, write_errors
from glmtune.errors import UserError, note, reason_of
from glmtune.generation import Decoder, EncodedPrompt, answer_batch, find_stop_ids
from glmtune.generation.streaming import before_stop
from glmtune.run_files import SAMPLES_FILE
from glmtune.training.run import Run
from glmtune.training.state import TrainingState

MOST_TOKENS = 96
"""Tokens of an answer."""


@dataclass
class Samples:
    """The questions of a run, and where their answers go."""

    folder: Path
    tokenizer: Any
    questions: list[EncodedPrompt]
    texts: list[tuple[str, str]]
    """Each question and its expected answer."""

    @classmethod
    def of(cls, run: Run, tokenizer: Any, model: Any) -> "Samples | None":
        """Choose questions, spread over the rows held out; None where there are none to ask.

        A note says why a run whose settings ask for them makes none.
        """
        num = run.settings.eval_answers
        if not num or not len(run.eval_rows):
            return None
        if run.settings.base_dtype == "fp8":
            _say(run, "eval_answers: none are made, as frozen linears in float8 do not answer")
            return None
        if run.is_sharded:
            _say(run, "eval_answers: none are made, as one process alone cannot gather the base")
            return None
        limit = model.config.max_position_embeddings - MOST_TOKENS
        asked = [row for row in run.eval_rows if _is_question(run.rows, row, limit)]
        if not asked:
            _say(run, "eval_answers: none are made, as no row held out is a question that fits")
            return None
        places = np.unique(np.linspace(0, len(asked) - 1, min(num, len(asked))).astype(int))
        questions, texts = [], []
        for row in (asked[place] for place in places):
            ids, length = run.rows[row].tolist(), int(run.rows.prompt_lengths_R[row])
            questions.append(EncodedPrompt(ids[:length], int(row)))
            expected = before_stop(ids[length:], find_stop_ids(model))
            texts.append((_question(_text(tokenizer, ids[:length])), _text(tokenizer, expected)))
        return cls(Path(run.settings.output_dir), tokenizer, questions, texts)

    def begin(self, step: int) -> None:
        """Keep the lines up to a step, from which the run goes on, and drop others.

        Raises:
            UserError: the file cannot be written.
        """
        path, kept = self.folder / SAMPLES_FILE, []
        if step and path.is_file():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        with write_errors(path), replacing_file(path) as draft:
            draft.write_text("".join(kept), encoding="utf-8")

    def answer(self, state: TrainingState) -> None:
        """Answer them with the model as it is now, and write the line; a note says why it cannot.

        Raises:
            UserError: the file cannot be written.
        """
        settings = GenerationSettings(max_new_tokens=MOST_TOKENS, do_sample=False)
        try:
            decoder = Decoder.of(state.model, settings)
            decoder.captures = False  # launching a hundred steps costs less than capturing one
            answers = answer_batch(state.model, self.tokenizer, self.questions, settings, decoder)
        except (UserError, RuntimeError) as error:  # memory, or a kernel that is not there
            note(f"step {state.global_step:,}: no sample answers ({reason_of(error)})")
            return
        lines = [
            {"question": question, "expected": expected, "answer": answer.text}
            for (question, expected), answer in zip(self.texts, answers, strict=True)
        ]
        path = self.folder / SAMPLES_FILE
        with write_errors(path), path.open("a", encoding="utf-8") as file:
            line = {"step": state.global_step, "answers": lines}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _is_question(rows: TokenRows, row: int, limit: int) -> bool:
    """Whether a row has a prompt, of no more tokens than that; a text alone has none."""
    rule, length = rows.rule, int(rows.prompt_lengths_R[row])
    ends = [special.id for special in rule.after_prompt]
    has_end = not ends or rows[row][:length][-len(ends) :].tolist() == ends
    return max(rule.num_prompt_specials, rule.text_start) < length <= limit and has_end


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _question(context: str) -> str:
    """What is asked, without the words around it of a template that we know."""
    return "\n".join(filter(None, parts(f"{context} "))).strip()


def _say(run: Run, line: str) -> None:
    if run.accelerator.is_main_process:
        note(line)


def _whole_lines(path: Path) -> Sequence[str]:
    """The lines of a file that are whole; a killed process may have left half of one."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            found.append(line if line.endswith("\n") else line + "\n")
    return found
