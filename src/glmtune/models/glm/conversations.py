"""Encode conversations in a layout, whatever vocabulary turns texts into ids."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from glmtune.data.conversations import (
    ASSISTANT,
    IGNORED,
    OBSERVATION,
    SYSTEM,
    USER,
    EncodedExample,
    Example,
    Turn,
    encode_rounds,
    rounds_of,
)
from glmtune.data.dataset import CONVERSATION
from glmtune.data.files import read_json_object
from glmtune.data.flaws import Flaw
from glmtune.data.row_rule import RowRule
from glmtune.data.templates import conversation_of
from glmtune.data.thoughts import CLOSE, OPEN
from glmtune.errors import UserError
from glmtune.models.glm import layouts
from glmtune.models.glm.layouts import LAYOUTS, ROLES, Layout
from glmtune.models.glm.settings import variant_of
from glmtune.models.glm.template import (
    generation_ids,
    opens_thought,
    read_template,
    tools_of_template,
)
from glmtune.models.special_names import MARK, beginning_of, encode_around, pattern_of

CONFIG_FILE = "config.json"
# Rows of a published embedding that no token has: fewer than these.
SPARE_ROWS = 400
# What a chat template is asked with, whether it knows tools.
_ANY_TOOL = ({"name": "tool"},)


class ConversationEncoder:
    """Encode texts and conversations; each kind of vocabulary adds how it encodes a text."""

    layout: Layout
    layout_names: tuple[str, ...]
    """The layouts that such a vocabulary may have; the first where nothing says which."""
    ids: Mapping[str, int]
    """Special ids by name."""
    model_bytes: bytes
    """The vocabulary file."""
    joins_newline = False
    """Whether a role's newline and the text after it are encoded together."""
    has_blank = False
    """Whether chat templates write the blank that the vocabulary puts before each text."""
    folder: Path
    template = CONVERSATION
    folder_template: str | None = None
    """The chat template of the folder."""
    allow_special = False

    def encode_plain(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]:
        """The ids of texts, in which special names are ordinary text."""
        raise NotImplementedError

    def encode_texts(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]:
        """The ids of texts; special names are ordinary text unless `allow_special`."""
        if self.allow_special:
            return encode_around(
                texts, self.special_names, partial(self.encode_plain, num_threads=num_threads)
            )
        return self.encode_plain(texts, num_threads)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of ids; special ids have none."""
        raise NotImplementedError

    def piece_of(self, id_: int) -> str:
        """How messages show an id."""
        raise NotImplementedError

    @property
    def vocab_hash(self) -> str:
        """The sha256 of the vocabulary file, in hex."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        raise NotImplementedError

    @property
    def revision(self) -> str:
        """Whose vocabulary it is: one of `settings.VARIANTS`."""
        return self.layout.name

    @cached_property
    def newline_ids(self) -> tuple[int, ...]:
        """The ids of the newline after a role; none in a layout without roles."""
        return tuple(self.encode_texts(["\n"])[0]) if self.layout.has_roles else ()

    @property
    def opens_thoughts(self) -> bool:
        """Whether answers begin with a thought."""
        return self.layout.opens_thoughts

    @property
    def row_rule(self) -> RowRule:
        """How rows are laid out with these ids."""
        return self.layout.row_rule(self.ids, self.newline_ids)

    @cached_property
    def generation_ids(self) -> tuple[int, ...]:
        """The ids that follow a prompt where the folder's template begins the answer itself."""
        return generation_ids(self)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which an answer ends."""
        return tuple(self.ids[name] for name in self.layout.stops)

    @cached_property
    def special_names(self) -> dict[str, list[int]]:
        """Names that a text may spell: all but `sop` and `eop`, which are words like any others."""
        return {name: [self.ids[name]] for name in self.layout.special_names if name in self.ids}

    @cached_property
    def written(self) -> dict[str, list[int]]:
        """The names that a chat template may write, with the ids that each becomes."""
        prefix = self.layout.prefix
        written = self.special_names
        return written | ({"".join(prefix): [self.ids[name] for name in prefix]} if prefix else {})

    @cached_property
    def written_names(self) -> re.Pattern:
        """What finds such a name in a rendered chat."""
        return pattern_of(self.written)

    @cached_property
    def beginnings(self) -> re.Pattern:
        """What finds the beginning of such a name in a message."""
        return beginning_of(self.written)

    def encode_batch(
        self,
        texts: list[str],
        *,
        add_special_tokens: bool = False,
        max_length: int | None = None,
        num_threads: int | None = None,
    ) -> list[list[int]]:
        """Encode many texts at once; see `encode_texts`.

        Args:
            texts: any number of texts.
            add_special_tokens: make each the prompt of a question.
            max_length: most ids of each; a prompt keeps its special ids.
            num_threads: all cores by default.
        """
        if not add_special_tokens:
            return [ids[:max_length] for ids in self.encode_texts(texts, num_threads)]
        rule = self.row_rule
        contexts = self.encode_contexts(texts, num_threads=num_threads)
        return [rule.prompt(ids, max_length) for ids in contexts]

    def encode_contexts(
        self, contexts: list[str], *, num_threads: int | None = None
    ) -> list[list[int]]:
        """Encode contexts as conversations; see `data.dataset.RowTokenizer`."""
        conversations = [conversation_of(context) for context in contexts]
        if not self.layout.has_roles:
            texts = [layouts.numbered_rounds(*conversation) for conversation in conversations]
            return self.encode_texts(texts, num_threads)
        encoded = self._encode_turns(
            [
                [
                    turn
                    for asked, answered in history
                    for turn in (Turn(USER, asked), Turn(ASSISTANT, answered))
                ]
                + [Turn(USER, question)]
                for history, question in conversations
            ],
            num_threads,
        )
        return [ids[1:] for ids in encoded]  # the first role stands in `before_prompt`

    def conversation_ids(self, turns: Sequence[Turn], *, begin_answer: bool = True) -> list[int]:
        """A conversation as the model reads it, from its prefix on.

        Args:
            turns: its messages, of any role.
            begin_answer: let the role of the next answer follow.

        Raises:
            UserError: a layout without roles, and turns that are no rounds of question and answer.
        """
        prefix = [self.ids[name] for name in self.layout.prefix]
        if not self.layout.has_roles:
            return prefix + self.encode_texts([_as_rounds(turns)])[0]
        if self.layout.hoists_system:
            turns = sorted(turns, key=lambda turn: turn.role != SYSTEM)
        answer = [self.ids[ROLES[ASSISTANT]]] if begin_answer else []
        return prefix + self._encode_turns([turns])[0] + answer

    def _encode_turns(
        self, conversations: Sequence[Sequence[Turn]], num_threads: int | None = None
    ) -> list[list[int]]:
        """The ids of each conversation's turns: role, newline, text."""
        texts = []
        for turn in (turn for turns in conversations for turn in turns):
            head = self._head(turn)
            texts += [head + turn.text] if self.joins_newline else [head, turn.text]
        encoded = self._encode_once(texts, num_threads)
        rows = []
        for turns in conversations:
            row: list[int] = []
            for turn in turns:
                row += [self.ids[ROLES[turn.role]], *next(encoded)]
                row += [] if self.joins_newline else next(encoded)
            rows.append(row)
        return rows

    def _encode_once(self, texts: list[str], num_threads: int | None) -> Iterator[list[int]]:
        """The ids of each text, not to be changed: one that comes again is not encoded again."""
        different = list(dict.fromkeys(texts))
        ids_of = dict(zip(different, self.encode_texts(different, num_threads), strict=True))
        return map(ids_of.__getitem__, texts)

    def _head(self, turn: Turn) -> str:
        """What stands between a role and its text."""
        named = f"{turn.metadata}{self.layout.before_newline}" if turn.metadata else ""
        return f"{named}\n"

    def encode_examples(
        self, examples: Sequence[Example], *, num_threads: int | None = None
    ) -> list[EncodedExample | Flaw]:
        """Encode whole conversations with their labels; see `data.dataset.RowTokenizer`.

        What an answer ends with is supervised with it: the next turn's role, at last the end of the
        row, which behind a call is the role of its result. In a layout without roles the text of
        the next round follows an earlier answer, so its end cannot be taught; nor can its first
        token, since the model begins an answer with a blank, which the text does not have there.
        """
        if not self.layout.has_roles:
            rows = encode_rounds(self, examples, layouts.numbered_rounds, num_threads)
            return [
                row if isinstance(row, Flaw) else self._with_earlier_answers(row, example)
                for row, example in zip(rows, examples, strict=True)
            ]
        written: list[list[tuple[Turn, list[str]]] | Flaw] = []
        for example in examples:
            try:
                written.append([(turn, self._texts_of(turn)) for turn in self._written(example)])
            except Flaw as flaw:
                written.append(flaw)
        texts = [
            text
            for turns in written
            if not isinstance(turns, Flaw)
            for _, of_turn in turns
            for text in of_turn
        ]
        encoded = self._encode_once(texts, num_threads)
        prefix = [self.ids[name] for name in self.layout.prefix]
        return [
            turns if isinstance(turns, Flaw) else self._encode_example(turns, encoded, prefix)
            for turns in written
        ]

    def _with_earlier_answers(self, row: EncodedExample, example: Example) -> EncodedExample:
        """A row of rounds in which earlier answers are supervised as well, if they should be."""
        wanted = [bool(turn.supervised) for turn in example.turns if turn.is_answer][:-1]
        num_before = len(self.layout.prefix)
        ends = self.ends_in_text(row.input_ids[num_before : row.prompt_length])
        if not any(wanted) or ends is None:
            return row
        history, question, _ = rounds_of(example)
        text = layouts.numbered_rounds(history, question)
        if ends[-1] != len(text.encode()):  # its tokens do not tell where they stand
            return row
        labels = list(row.labels)
        spans = layouts.answers_in_rounds(history)
        for start, end in (
            span for span, is_wanted in zip(spans, wanted, strict=True) if is_wanted
        ):
            first = int(np.searchsorted(ends, start, side="right")) + 1
            last = int(np.searchsorted(ends, end, side="right"))
            labels[num_before + first : num_before + last] = row.input_ids[
                num_before + first : num_before + last
            ]
        return row._replace(labels=labels, num_answers=row.num_answers + sum(wanted))

    def ends_in_text(self, ids: Sequence[int]) -> np.ndarray | None:
        """Where each token of an encoded text ends in it, in bytes; None where nothing says so."""
        return None

    def _written(self, example: Example) -> Sequence[Turn]:
        """The turns of a conversation in the layout's order and words, its tools the first of them.

        Raises:
            Flaw: the layout knows no tools, and there are some or a call of one; or a role has no
                token.
        """
        layout, turns = self.layout, list(example.turns)
        for turn in turns:
            if ROLES[turn.role] not in self.ids:
                what = f"a turn of the role {turn.role}, which the vocabulary has no token for"
                raise Flaw("roles", what, "leave such rows out, or name another base")
        if any(turn.metadata and turn.is_answer for turn in turns):
            turns = [
                turn._replace(text=layout.write_call(turn.text))
                if turn.metadata and turn.is_answer
                else turn
                for turn in turns
            ]
        if layout.hoists_system:
            turns.sort(key=lambda turn: turn.role != SYSTEM)
        # A layout that describes no tools has no place for a call either, unless the template has.
        if not (example.tools or (example.calls_tools and layout.write_tools is None)):
            return turns
        described = tools_of_template(self, example.tools or _ANY_TOOL)
        if described is None and layout.write_tools is not None:
            described = layout.write_tools(example.tools)
        if described is None:
            what = "tools" if example.tools else "a call of a tool"
            what += f", which neither {layout.name} nor the folder's chat template knows"
            fix = "leave such rows out, or name a base that calls tools"
            raise Flaw("tools", what, fix, "tools")
        return [Turn(SYSTEM, described), *turns] if example.tools else turns

    def _texts_of(self, turn: Turn) -> list[str]:
        """What is encoded of a turn, piece by piece; a newline alone has ids that are known.

        A thought is opened by itself, as a prompt by the folder's chat template ends with that.
        """
        head = self._head(turn)
        texts = [head + turn.text] if self.joins_newline else [head, turn.text]
        if self.opens_thoughts and turn.thought is not None:
            rest = f"\n{turn.thought}\n{CLOSE}\n\n"
            texts = [head + OPEN] if self.joins_newline else [head, OPEN]
            texts += [rest + turn.text] if turn.thought else [rest, turn.text]
        return texts[1:] if head == "\n" and not self.joins_newline else texts

    def _encode_example(
        self,
        turns: Sequence[tuple[Turn, list[str]]],
        encoded: Iterator[list[int]],
        prefix: list[int],
    ) -> EncodedExample:
        """Lay out the ids of turns, the texts of which are the next of `encoded`."""
        ids, labels = list(prefix), []  # labels grow where something is supervised
        prompt_length, num_answers, follows_answer = 0, 0, False
        for turn, texts in turns:
            role = self.ids[ROLES[turn.role]]
            ids.append(role)
            if follows_answer:
                labels.append(role)
            start = len(ids)
            if turn.role == ASSISTANT:
                prompt_length = start
            if not (self.joins_newline or turn.metadata):
                ids += self.newline_ids
            for _ in texts[:-1]:
                ids += next(encoded)
            if turn.thought == "" and self.opens_thoughts:
                start = len(ids)  # an empty thought is what a prompt without one ends with
            ids += next(encoded)
            follows_answer = bool(turn.supervised)
            if follows_answer:
                num_answers += 1
                labels += [IGNORED] * (start - len(labels))
                labels += ids[start:]
        labels += [IGNORED] * (len(ids) - len(labels))
        last = turns[-1][0] if turns else None
        calls = last is not None and last.is_answer and bool(last.metadata)
        end = self.ids[ROLES[OBSERVATION] if calls else self.layout.end]
        ids.append(end)
        labels.append(end if follows_answer else IGNORED)
        return EncodedExample(ids, labels, prompt_length or len(ids), num_answers)

    def written_ids(self, marked: str) -> list[int]:
        """The ids of a rendered chat whose special names are marked, see `models.special_names`.

        A role's newline is encoded as in rows, and so is the text behind it.
        """
        parts = re.split(f"{MARK}({self.written_names.pattern})", marked)
        ids: list[int] = self.encode_texts(parts[:1])[0] if parts[0] else []
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            ids += self.written[name]
            texts = [text]
            if name in ROLES.values() and not self.joins_newline:
                head, newline, rest = text.partition("\n")
                if newline:
                    head = head.strip(" ") if self.has_blank else head
                    texts = [f"{head}\n", rest.removeprefix(" ") if self.has_blank else rest]
            for part in self.encode_texts([text for text in texts if text]):
                ids += part
        return ids

    def open_folder(self, vocab_file: Path, layout: str | None = None) -> None:
        """Take the layout from the config.json beside a vocabulary, and the chat template.

        Args:
            vocab_file: in a folder with or without a config.json.
            layout: the name that a saved tokenizer remembers, for a folder without.

        Raises:
            UserError: the config.json is of a model with another kind of vocabulary.
        """
        self.layout = self.layout_of(vocab_file, layout)
        self.folder = vocab_file.parent
        self.folder_template = read_template(self.folder)
        if opens_thought(self.folder_template):
            self.layout = self.layout.thinking()

    @classmethod
    def layout_of(cls, vocab_file: Path, layout: str | None = None) -> Layout:
        """The layout of a vocabulary's folder; see `open_folder`."""
        name = variant_of(_settings_beside(vocab_file)) or layout
        if name is not None and name not in cls.layout_names:
            raise UserError(
                f"{vocab_file}: is a vocabulary of {' or '.join(cls.layout_names)}, but the "
                f"config.json beside it is of {name}; take both from the same download"
            )
        return LAYOUTS[name or cls.layout_names[0]]

    def check_size(self, vocab_file: Path) -> None:
        """Make sure that the vocabulary and the config.json beside it are of one model.

        Raises:
            UserError: there are more ids than rows, or the rows are another model's.
        """
        settings = _settings_beside(vocab_file)
        rows = settings.get("padded_vocab_size", settings.get("vocab_size"))
        if not isinstance(rows, int):
            return
        is_whole = rows in {layout.num_rows for layout in LAYOUTS.values()}
        if rows < self.vocab_size or (is_whole and rows - self.vocab_size > SPARE_ROWS):
            raise UserError(
                f"{vocab_file}: the tokenizer has {self.vocab_size} ids, but config.json says "
                f"{rows} rows, so they are of different models; take both from the same download"
            )


def _settings_beside(vocab_file: Path) -> dict[str, Any]:
    file = vocab_file.with_name(CONFIG_FILE)
    return read_json_object(file) if file.is_file() else {}


def _as_rounds(turns: Sequence[Turn]) -> str:
    """Questions and answers by turns as ChatGLM2-6B reads them; an answer at the end stands there.

    Raises:
        UserError: they are not by turns.
    """
    for place, turn in enumerate(turns):
        wanted = (USER, ASSISTANT)[place % 2]
        if turn.role != wanted:
            raise UserError(
                f"message {place + 1} ({turn.role}): ChatGLM2-6B reads questions and answers by "
                f"turns, so it has to be of role {wanted}"
            )
    if not turns:
        raise UserError("no question: begin with a message of the user")
    asked = [turn.text for turn in turns[::2]]
    answered = [turn.text for turn in turns[1::2]]
    rounds = list(zip(asked[:-1], answered, strict=False))
    last = answered[-1] if len(answered) == len(asked) else ""
    return layouts.numbered_rounds(rounds, asked[-1]) + last
