"""`glmtune chat`: talk to base or tuned weights in a terminal."""

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from glmtune.adapters.find import is_prefix
from glmtune.config.groups import AnswerSettings
from glmtune.config.names import did_you_mean
from glmtune.config.reading import change_setting
from glmtune.config.settings import ChatSettings
from glmtune.data.dataset import CONVERSATION
from glmtune.data.files import new_file
from glmtune.errors import UserError, visible
from glmtune.evaluation.answers import ModelChoice
from glmtune.evaluation.conversation import (
    ALPACA,
    BASE,
    CHAT,
    TUNED,
    Round,
    formats,
    polish,
    polish_beginning,
    write_prompt,
)
from glmtune.evaluation.ctrl_c import CtrlC
from glmtune.evaluation.source_run import find_template, is_of_2023
from glmtune.generation import (
    Decoder,
    EncodedPrompt,
    GenerationSettings,
    Prompt,
    TooLongError,
    encode_prompts,
)
from glmtune.generation.streaming import TextStream, before_stop, check_stop_strings
from glmtune.models.families import family_of
from glmtune.runlog import print_pairs

ASK = "> "
# Words that end or clear other chat programs, such as the published demonstration.
WORDS = dict.fromkeys(("exit", "quit", "stop", "退出"), "/exit") | dict.fromkeys(
    ("clear", "清空"), "/new"
)


def chat(settings: ChatSettings) -> None:
    """Answer each typed line, until /exit or the end of the input.

    Raises:
        UserError: base or adapter cannot be used, or a stop string cannot occur.
    """
    with suppress(ImportError):  # Windows, where the terminal edits lines itself
        import readline  # noqa: F401  (from here on `input` edits lines, wide letters included)
    subject = ModelChoice.of(settings)
    model, tokenizer = subject.load()
    Chat(settings, model, tokenizer, subject).run()


class Chat:
    """One session: who answers, how, and what was said.

    `server_chat` has one whose answers come from a server.

    Args:
        settings: settings of the session; `/set` changes them.
        model: in evaluation mode, with its adapter if there is one.
        tokenizer: the model's tokenizer.
        subject: what the model is, for files and messages.

    Raises:
        UserError: a stop string that cannot occur.
    """

    no_adapter = "no adapter is loaded; start the chat with --adapter FOLDER"
    """What /tuned says without one."""

    def __init__(self, settings: ChatSettings, model: Any, tokenizer: Any, subject: ModelChoice):
        self._begin(settings)
        self.model = model
        self.tokenizer = tokenizer
        self.subject = subject
        self.chat = family_of(model.config).chat
        check_stop_strings(settings.stop_strings or (), tokenizer)
        how = GenerationSettings.of(settings)
        self.decoders: dict[str, Decoder] = {}
        if subject.adapter is None:
            self.decoders[BASE] = Decoder.of(model, how, subject.device)
        else:
            self.decoders[TUNED] = Decoder.of(model, how, subject.device)
            with model.disable_adapter():
                self.decoders[BASE] = Decoder.of(
                    model, how, subject.device, beside=self.decoders[TUNED]
                )
        self.sides: tuple[str, ...] = (next(iter(self.decoders)),)
        self.formats = dict.fromkeys(self.decoders, CHAT)
        self.greeting = "/help lists the commands, /exit ends"
        if subject.adapter is not None:
            self.formats[TUNED], why = taught_format(subject.adapter)
            self.greeting += f"; {self._tell_format()}, {why} (/format changes it)"
        self.commands |= {
            "/format": (
                self._format,
                f"{' or '.join(formats(self.chat))}: how {self._formatted} is asked; alone, lists "
                "them",
            ),
        }

    def _begin(self, settings: ChatSettings) -> None:
        """Set up what does not depend on who answers."""
        self.settings = settings
        self.rounds: list[Round] = []
        self.num_forgotten = 0
        """Number of earliest rounds that no longer fit into a prompt."""
        self.num_asked = 0
        self.ctrl_c = CtrlC()
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/new": (self._new, "forgets what was said"),
            "/undo": (self._undo, "forgets the last question and its answers"),
            "/base": (lambda _: self._turn_to(BASE), "the base answers"),
            "/tuned": (lambda _: self._turn_to(TUNED), "base and adapter answer"),
            "/both": (lambda _: self._turn_to(BASE, TUNED), "both answer, one under the other"),
            "/set": (self._set, "KEY VALUE changes a setting of the answers; alone, lists them"),
            "/save": (self._save, "[FILE] writes the conversation as JSON"),
            "/help": (self._help, "lists the commands"),
            "/exit": (self._exit, "ends, as Ctrl+D does; Ctrl+C stops an answer"),
        }

    def run(self) -> None:
        """Read and answer lines until the end."""
        print(self.greeting)
        with self.ctrl_c.heard():
            while self._read_and_take():
                pass

    def _read_and_take(self) -> bool:
        """Handle one line of input; return whether to continue."""
        try:
            with self.ctrl_c.awaited():
                line = input(ASK).strip()
        except EOFError:
            print()
            return False
        except KeyboardInterrupt:
            print("\n/exit ends")
            return True
        try:
            with self.ctrl_c.awaited():
                # The tokenizer cannot encode broken bytes from the terminal.
                self.take(line.encode("utf-8", "replace").decode("utf-8"))
        except UserError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:  # before an answer's first token, or in a command
            print(" [stopped]", flush=True)
        except SystemExit:
            return False
        return True

    def take(self, line: str) -> None:
        """Run a command, or answer a question.

        Raises:
            UserError: the command or its value is wrong, or the question cannot be answered.
            SystemExit: after /exit.
        """
        word, _, rest = WORDS.get(line.lower(), line).partition(" ")
        if word in self.commands:
            self.commands[word][0](rest.strip())
        elif word.startswith("/") and word[1:].isalpha():
            hint = did_you_mean(word, self.commands) or "; /help lists the commands"
            raise UserError(f"there is no command {word}{hint}")
        elif line:
            self._answer(line)

    def _answer(self, question: str) -> None:
        round = Round(question)
        for side in self.sides:
            if len(self.sides) > 1:
                print(f"[{side}]")
            answer, whole = self._stream(side, question)
            if answer:
                round.answers[side] = answer
            if not whole:
                break
        self.num_asked += 1
        if round.answers:
            self.rounds.append(round)

    def _stream(self, side: str, question: str) -> tuple[str, bool]:
        """Print an answer as it is generated; return it, and whether it was completed."""
        settings = GenerationSettings.of(self.settings)
        encoded = [self._encode(side, question, settings.max_new_tokens)]
        stream = TextStream(self.tokenizer, settings.stop_strings or ())
        stop_ids = self.decoders[side].stop_ids
        said, shown, whole = "", "", True
        try:
            for (ids,) in self.decoders[side].stream(encoded, settings):
                self.ctrl_c.raise_if_lost()
                said += stream.push(before_stop(ids, stop_ids))
                shown = self._show(shown, polish_beginning(self.chat, said))
                if stream.stopped:
                    break
        except KeyboardInterrupt:
            whole = False
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"no memory for a conversation of {len(encoded[0].ids)} tokens and "
                f"{settings.max_new_tokens} new ones; /set max_new_tokens lower, or begin /new"
            ) from error
        said += stream.end()
        shown = self._show(shown, polish(self.chat, said))
        print("" if whole else " [stopped]", flush=True)
        return shown, whole

    def _encode(self, side: str, question: str, max_new_tokens: int) -> EncodedPrompt:
        """The question, with as many earlier rounds as leave room for an answer.

        Raises:
            UserError: the question alone leaves no room.
        """
        for first in range(self.num_forgotten, len(self.rounds) + 1):
            text = write_prompt(self.chat, self.rounds[first:], question, side, self.formats[side])
            # A new random stream each time, so that the same question may get another answer.
            prompt = Prompt(text, "the conversation", self.num_asked)
            try:
                (encoded,) = encode_prompts(self.model, self.tokenizer, [prompt], max_new_tokens)
            except TooLongError:
                if first == len(self.rounds) or self.formats[side] == ALPACA:
                    raise
                continue
            self._forget(first, self.model.config.max_position_embeddings)
            return encoded
        raise AssertionError("a loop over one round at least")

    def _forget(self, first: int, limit: int) -> None:
        """Leave the rounds before one out from now on, and say so."""
        if first > self.num_forgotten:
            self.num_forgotten = first
            rounds = "the oldest round is" if first == 1 else f"the oldest {first} rounds are"
            print(f"[{rounds} forgotten: the model holds {limit:,} tokens]")

    @staticmethod
    def _show(shown: str, text: str) -> str:
        print(visible(text[len(shown) :]), end="", flush=True)
        return text

    def _new(self, _: str) -> None:
        self.rounds.clear()
        self.num_forgotten = 0
        print("a new conversation")

    def _undo(self, _: str) -> None:
        if not self.rounds:
            raise UserError("/undo: nothing was said yet")
        print(f"forgotten: {visible(self.rounds.pop().question)}")
        self.num_forgotten = min(self.num_forgotten, len(self.rounds))

    def _turn_to(self, *sides: str) -> None:
        if TUNED in sides and TUNED not in self.formats:
            raise UserError(self.no_adapter)
        self.sides = sides
        print(f"{' and '.join(sides)} will answer")

    @property
    def _formatted(self) -> str:
        """The side whose format can be chosen: the tuned model, or a base without an adapter."""
        return TUNED if TUNED in self.formats else BASE

    def _tell_format(self) -> str:
        format = self.formats[self._formatted]
        alone = ", each question alone" if format == ALPACA else ""
        return f"{self._formatted} is asked in the format {format}{alone}"

    def _format(self, name: str) -> None:
        if not name:
            print_pairs("formats", formats(self.chat))
        elif name not in (names := formats(self.chat)):
            hint = did_you_mean(name, names) or f"; choose {' or '.join(names)}"
            raise UserError(f"/format: there is no format {name}{hint}")
        else:
            self.formats[self._formatted] = name
        print(self._tell_format())

    def _set(self, words: str) -> None:
        if not words:
            values = {name: getattr(self.settings, name) for name in AnswerSettings.model_fields}
            print_pairs("settings", {name: _show_value(value) for name, value in values.items()})
            return
        name, _, value = words.partition(" ")
        name = name.removeprefix("--").replace("-", "_")
        changed = change_setting(self.settings, name, value.strip())
        if name not in AnswerSettings.model_fields:
            raise UserError(f"/set: {name} is fixed; start another chat with --{name} {value}")
        self._check(changed)
        self.settings = changed
        print(f"{name} {_show_value(getattr(changed, name))}")

    def _check(self, settings: ChatSettings) -> None:
        check_stop_strings(settings.stop_strings or (), self.tokenizer)

    def _identity(self) -> dict[str, Any]:
        """Who answers, for a file."""
        return self.subject.identity()

    def _save(self, path: str) -> None:
        if not self.rounds:
            raise UserError("/save: nothing was said yet")
        path = path or f"chat-{datetime.now():%Y-%m-%d-%H%M%S}.json"
        if Path(path).exists():
            raise UserError(f"/save: {path} exists; name another file")
        settings = GenerationSettings.of(self.settings)
        content = {
            **self._identity(),
            "settings": settings.in_effect(),
            "formats": self.formats,
            "rounds": [{"question": round.question, **round.answers} for round in self.rounds],
        }
        with new_file(path) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        print(f"written: {path}, {len(self.rounds)} rounds")

    def _help(self, _: str) -> None:
        pairs = {name: text for name, (_, text) in self.commands.items()}
        for command in dict.fromkeys(WORDS.values()):
            words = [word for word, meant in WORDS.items() if meant == command]
            pairs[command] += f"; so does {' or '.join(words)} on a line of its own"
        print_pairs("commands", pairs)

    def _exit(self, _: str) -> None:
        print("the chat has ended")
        raise SystemExit


def taught_format(adapter: Path) -> tuple[str, str]:
    """The format in which to ask an adapter, and why this one."""
    template = find_template(adapter)
    if template == ALPACA:
        return ALPACA, "as its run taught it"
    if template == CONVERSATION:
        return CHAT, "as its run taught it"
    if template is not None:
        return CHAT, "since its rows had a template of their own, which no record names"
    if is_prefix(adapter):
        return CHAT, "as the published scripts ask one with a prefix"
    if is_of_2023(adapter):
        return ALPACA, "as the scripts of 2023 taught, since nothing beside it says how"
    return CHAT, "the model's own, since nothing beside the adapter says how it was taught"


def _show_value(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(text.replace("\n", "\\n") for text in value)
    return "none" if value is None else str(value).lower()
