"""From a request to prompts, and from tokens to its answers' texts; lives in the event loop."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

from glmtune.config.serving import ServeSettings
from glmtune.data.conversations import Asked, Example, PlainText
from glmtune.data.flaws import Flaw
from glmtune.data.formats import FORMATS, read_example
from glmtune.data.templates import alpaca
from glmtune.errors import UserError
from glmtune.evaluation.conversation import ALPACA
from glmtune.generation import EncodedPrompt
from glmtune.generation.prompts import prompt_ids
from glmtune.generation.sampling import ChoiceSettings
from glmtune.generation.streaming import check_stop_strings
from glmtune.models.families import family_of
from glmtune.serving.answers import Choice, Piece, TokenTexts
from glmtune.serving.errors import RequestError, no_model, unavailable
from glmtune.serving.load import Loaded, Model, Side
from glmtune.serving.metrics import Metrics
from glmtune.serving.scheduler import Scheduler, Update, Work
from glmtune.serving.schema import AnswerRequest, ChatRequest, CompletionRequest

COMPLETION_TOKENS = 16
"""The longest continuation of a request that does not say, as OpenAI has it."""
MOST_PROMPTS = 64
DEFAULT_SLOTS = {"cuda": 64, "cpu": 32}


class Open:
    """A request whose answers are being given: choices, and the news about them.

    Args:
        engine: that answers.
        request: what was asked.
        choices: its answers, in the order of their indices.
        num_prompt_tokens: tokens of its prompts.
    """

    def __init__(
        self,
        engine: "Engine",
        request: AnswerRequest,
        choices: Sequence[Choice],
        num_prompt_tokens: int,
    ):
        self.engine, self.request, self.choices = engine, request, choices
        self.num_prompt_tokens = num_prompt_tokens
        self.created = int(time.time())
        self.news: asyncio.Queue[tuple[Choice, Update]] = asyncio.Queue()
        self._started, self._has_begun = time.monotonic(), False

    @property
    def usage(self) -> dict[str, int]:
        """The tokens so far."""
        made = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.num_prompt_tokens + made,
        }

    @property
    def has_ended(self) -> bool:
        """Whether all answers have ended."""
        return all(choice.finish is not None for choice in self.choices)

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """Each new piece of an answer with its choice, until all have ended.

        Raises:
            RequestError: an answer could not be ended.
        """
        left = len(self.choices)
        while left:
            choice, update = await self.news.get()
            if choice.finish is not None:
                continue
            if update.error is not None:
                raise update.error
            if not self._has_begun:
                self._has_begun = True
                self.engine.metrics.first_token.observe(time.monotonic() - self._started)
            while not self.news.empty() and not update.is_last:  # a slow reader gets larger pieces
                other, more = self.news._queue[0]  # type: ignore[attr-defined]
                if other is not choice or more.error is not None:
                    break
                self.news.get_nowait()
                update = Update(
                    update.ids + more.ids, update.scores + more.scores, more.finish, None
                )
            piece = choice.push(update)
            if choice.finish is not None:
                left -= 1
                if not update.is_last:
                    self.engine.scheduler.cancel(choice.work)
            yield choice, piece

    def close(self) -> None:
        """Give up the answers that nobody reads any more."""
        if self in self.engine.open:
            self.engine.metrics.whole.observe(time.monotonic() - self._started)
        for choice in self.choices:
            if choice.finish is None:
                self.engine.scheduler.cancel(choice.work)
        self.engine.open.discard(self)


class Engine:
    """Models that are loaded, and the scheduler that runs them.

    Args:
        loaded: the models.
        settings: of the server.
    """

    def __init__(self, loaded: Loaded, settings: ServeSettings):
        self.loaded, self.settings = loaded, settings
        self.models, self.tokenizer = loaded.models, loaded.tokenizer
        self.family = family_of(loaded.decoder.config)
        self.num_positions = loaded.decoder.shape.max_positions
        self.created = int(time.time())
        self.is_ending = False
        self.open: set[Open] = set()
        num_slots = settings.slots or DEFAULT_SLOTS.get(loaded.decoder.device.type, 32)
        self.scheduler = Scheduler(
            loaded.decoder, num_slots, settings.max_waiting, self._deliver_from_thread
        )
        self.metrics = Metrics(self.scheduler)
        self._loop: asyncio.AbstractEventLoop | None = None

    @cached_property
    def texts(self) -> TokenTexts:
        """The texts of single tokens."""
        return TokenTexts(self.tokenizer)

    @cached_property
    def _ends(self) -> list[int]:
        """The ids with which a prompt ends."""
        rule = self.family.row_rule(self.loaded.decoder.config)
        return [special.id for special in rule.after_prompt]

    def start(self) -> None:
        """Begin to answer; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()

    def close(self) -> None:
        """Stop; answers that are still open end with an error."""
        self.scheduler.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self.scheduler.is_alive and not self.is_ending

    def _deliver_from_thread(self, news: Sequence[tuple[Work, Update]]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has been closed: nobody waits
            self._loop.call_soon_threadsafe(_deliver, news)

    def model(self, name: str) -> Model:
        """The model of a name.

        Raises:
            RequestError: there is none.
        """
        if name not in self.models:
            raise no_model(name, list(self.models))
        return self.models[name]

    def chat(self, request: ChatRequest, client: str) -> Open:
        """Begin to answer a conversation.

        Raises:
            RequestError: it cannot be asked, or no answer may wait any more.
        """
        request.refuse_unsupported()
        model = self.model(request.model)
        count = self._num_choices(request, model)
        example = _conversation(request)
        asked = [(side, self._as_taught(side, example)) for side in model.sides]
        prompts = [(side, self._encode(one, "messages")) for side, one in asked]
        tools = [_name_of_tool(tool) for tool in example.tools]
        return self._begin(request, prompts, count, client, is_chat=True, tools=tools)

    def complete(self, request: CompletionRequest, client: str) -> Open:
        """Begin to continue texts.

        Raises:
            RequestError: one cannot be continued, or no answer may wait any more.
        """
        request.refuse_unsupported()
        model = self.model(request.model)
        count = self._num_choices(request, model)
        prompts = [(side, ids) for ids in self._completion_prompts(request) for side in model.sides]
        return self._begin(request, prompts, count, client, is_chat=False)

    def _num_choices(self, request: AnswerRequest, model: Model) -> int:
        count = request.n or 1
        if count > 1 and len(model.sides) > 1:
            message = f"n {count} with the model {model.name}: each side answers once; leave n out"
            raise RequestError(400, message, param="n")
        return count

    def _as_taught(self, side: Side, example: Example) -> Asked:
        """A conversation as a side was taught to read one."""
        if side.format != ALPACA:
            return example
        if len(example.turns) > 1 or example.tools:
            raise RequestError(
                400,
                f"{side.name} was taught single questions in alpaca's template, so it reads one "
                "message of the user and nothing else; send the last question alone",
                param="messages",
                code="single_question",
            )
        return alpaca(example.turns[0].text)

    def _encode(self, asked: Asked, param: str) -> list[int]:
        (ids,) = prompt_ids(self.tokenizer, [asked])
        if isinstance(ids, Flaw):
            raise RequestError(400, str(ids), param=param)
        return ids

    def _completion_prompts(self, request: CompletionRequest) -> list[list[int]]:
        prompt: Any = request.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not 0 < len(prompt) <= MOST_PROMPTS:
            message = f"prompt holds {len(prompt)} texts; send 1 to {MOST_PROMPTS}"
            raise RequestError(400, message, param="prompt")
        encoded = []
        for each in prompt:
            if isinstance(each, str):
                encoded.append(self._encode(PlainText(_characters(each, "prompt")), "prompt"))
                continue
            self._check_ids(each)
            encoded.append(list(each))
        return encoded

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Refuse a prompt of ids that the model's layout of rows does not know."""
        decoder = self.loaded.decoder
        limit = decoder.shape.vocab_size
        if not ids or not all(0 <= id_ < limit for id_ in ids):
            message = f"prompt: ids have to be 0 to {limit - 1}, at least one of them"
            raise RequestError(400, message, param="prompt")
        # Each function of torch lets go of the interpreter and waits for it again, so in the event
        # loop it is not asked of a prompt that ends as those of the family do.
        ends = self._ends
        if ends and list(ids[-len(ends) :]) == ends and all(ids.count(end) == 1 for end in ends):
            return
        try:
            decoder.block.layout(torch.tensor([ids]), decoder.config)
        except ValueError as error:
            message = f"prompt: {str(error).partition(': ')[2]}"
            raise RequestError(400, message, param="prompt") from None

    def _begin(
        self,
        request: AnswerRequest,
        prompts: Sequence[tuple[Side, list[int]]],
        count: int,
        client: str,
        *,
        is_chat: bool,
        tools: Sequence[str] = (),
    ) -> Open:
        if self.is_ending:
            raise unavailable("the server is ending; ask another one")
        for stop in request.stops:
            _characters(stop, "stop")
        try:
            check_stop_strings(request.stops, self.tokenizer)
        except UserError as error:
            raise RequestError(400, str(error), param="stop") from None
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        deadline = time.monotonic() + self.settings.max_seconds
        stop_ids = () if request.ignore_eos else tuple(self.loaded.decoder.stop_ids)
        stop_ids += tuple(request.stop_token_ids or ())
        choices: list[Choice] = []
        for side, ids in prompts:
            settings = self._settings(request, len(ids), seed, is_chat)
            for number in range(count):
                work = Work(
                    EncodedPrompt(ids, number), settings, stop_ids, side.adapter, client, deadline
                )
                choices.append(
                    Choice(
                        len(choices),
                        side,
                        work,
                        self.tokenizer,
                        request.stops,
                        self.family if is_chat else None,
                        tools,
                        self._echo(request, ids),
                    )
                )
        found = Open(self, request, choices, sum(len(ids) for _, ids in prompts))
        for choice in choices:
            choice.work.news = found, choice
        # Requests that have arrived together are read together: those whose turn in the event loop
        # comes before that of `no_more_come`.
        self.scheduler.submit([choice.work for choice in choices], more_may_come=True)
        asyncio.get_running_loop().call_soon(self.scheduler.no_more_come)
        self.open.add(found)
        return found

    def _echo(self, request: AnswerRequest, ids: list[int]) -> str:
        wanted = isinstance(request, CompletionRequest) and request.echo
        return self.tokenizer.decode(ids, skip_special_tokens=True) if wanted else ""

    def _settings(
        self, request: AnswerRequest, num_prompt_tokens: int, seed: int, is_chat: bool
    ) -> ChoiceSettings:
        longest = self.settings.max_prompt_tokens or self.num_positions
        if num_prompt_tokens > longest:
            raise _too_long(f"the prompt has {num_prompt_tokens} tokens, {longest} may be sent")
        room = self.num_positions - num_prompt_tokens
        wanted = request.longest
        if room < (wanted or 1):
            raise _too_long(
                f"the prompt has {num_prompt_tokens} tokens, which with {wanted or 1} of the "
                f"answer is more than the model's {self.num_positions} positions"
            )
        if wanted is None:
            default = self.settings.max_new_tokens if is_chat else COMPLETION_TOKENS
            wanted = min(default, room)
        temperature = self.settings.temperature
        if request.temperature is not None:
            temperature = request.temperature
        top_p = self.settings.top_p if request.top_p is None else request.top_p
        return ChoiceSettings(
            max_new_tokens=wanted,
            do_sample=temperature != 0,
            temperature=temperature,
            top_p=max(top_p, 1e-6),  # 0 leaves the likeliest token, as does this
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
            seed=seed,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            num_listed=request.num_listed,
        )


def _deliver(news: Sequence[tuple[Work, Update]]) -> None:
    for work, update in news:
        found, choice = work.news
        found.news.put_nowait((choice, update))


def _conversation(request: ChatRequest) -> Example:
    """The conversation of a request, read as rows of messages are."""
    fields: dict[str, Any] = {"messages": request.messages}
    if request.tools and request.tool_choice != "none":
        fields["tools"] = request.tools
    for place, message in enumerate(request.messages, start=1):
        if message.get("name") and message.get("role") not in ("tool", "function"):
            text = f'message {place} has a "name", which the model would not see; leave it out'
            raise RequestError(400, text, param="messages", code="unsupported_parameter")
    try:
        example, _ = read_example(FORMATS["messages"], fields, needs_answer=False)
    except Flaw as flaw:
        raise RequestError(400, str(flaw), param=flaw.field or "messages") from None
    if example.turns[-1].is_answer:
        text = "the last message is the assistant's; end with one of the user or of a tool"
        raise RequestError(400, text, param="messages")
    return example


def _name_of_tool(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _characters(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{param} holds half a character (a lone surrogate)"
        raise RequestError(400, message, param=param) from None
    return text


def _too_long(message: str) -> RequestError:
    return RequestError(
        400,
        f"{message}; shorten the messages or the answer",
        param="messages",
        code="context_length_exceeded",
    )
