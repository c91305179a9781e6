"""What a request may hold and what an answer holds, in OpenAI's names.

A field of OpenAI's that nothing here can act on is refused by its name unless it has the value that
changes nothing; so is a name that OpenAI does not have.
"""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from glmtune.errors import value_words, visible
from glmtune.generation.buffers import MOST_LISTED
from glmtune.serving.errors import RequestError

MOST_CHOICES = 16
MOST_STOPS = 16


class Body(BaseModel):
    """What all requests share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {}
    """Fields that nothing acts on: the values that ask for nothing, and why others are refused."""

    def refuse_unsupported(self) -> None:
        """Refuse what would be silently ignored.

        Raises:
            RequestError: a field asks for what this server cannot do.
        """
        for name, (values, why) in self.neutral.items():
            value = getattr(self, name)
            if value is not None and not any(_equal(value, each) for each in values):
                said = visible(value_words(value))
                raise RequestError(
                    400,
                    f"{name} {said if len(said) < 60 else said[:57] + '...'} is not supported: "
                    f"{why}; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )


def _equal(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    include_usage: bool | None = Field(None, description="end with a chunk that counts the tokens")
    include_obfuscation: Any = Field(None, description="only false")
    neutral = {"include_obfuscation": ((False,), "chunks are not padded")}


class AnswerRequest(Body):
    """How an answer is generated, whatever was asked."""

    model: str = Field(description="base, the name of an adapter, both or both:NAME")
    max_tokens: int | None = Field(None, ge=1, description="longest answer, in tokens")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest tokens")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=1, description="not of OpenAI: draw from this many tokens")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="not of OpenAI: of prompt and answer, as in transformers"
    )
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="answers; 1 of both")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(None, description="texts before which an answer ends")
    stop_token_ids: list[int] | None = Field(
        None, max_length=64, description="not of OpenAI: ids at which an answer ends as well"
    )
    ignore_eos: bool | None = Field(
        None, description="not of OpenAI: go on behind the model's own end, to max_tokens"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="whose share of the slots is taken")
    logit_bias: Any = Field(None, description="only {}")
    metadata: Any = Field(None, description="only {}")
    store: Any = Field(None, description="only false")
    service_tier: Any = Field(None, description="only auto or default")
    neutral = {
        "logit_bias": (({},), "scores cannot be shifted token by token"),
        "metadata": (({},), "nothing is stored"),
        "store": ((False,), "nothing is stored"),
        "service_tier": (("auto", "default"), "there is one tier"),
    }

    @field_validator("stop")
    @classmethod
    def check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        """Accept a few texts, none of them empty."""
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MOST_STOPS:
            raise ValueError(f"at most {MOST_STOPS} texts")
        if not all(stops):
            raise ValueError("an empty text would end every answer")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def longest(self) -> int | None:
        """Tokens of the longest answer; None where nothing says it."""
        return self.max_tokens

    @property
    def num_listed(self) -> int | None:
        """Likeliest tokens to list with each token's probability; None for no probabilities."""
        return None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(AnswerRequest):
    """A conversation that is to be answered."""

    messages: list[dict[str, Any]] = Field(
        min_length=1, description="of the roles system, developer, user, assistant and tool"
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="longest answer, in tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LISTED)
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Any = Field(None, description="auto or none")
    parallel_tool_calls: bool | None = None
    response_format: Any = Field(None, description='only {"type": "text"}')
    functions: Any = Field(None, description="tools in their place")
    function_call: Any = Field(None, description="tool_choice in its place")
    modalities: Any = Field(None, description='only ["text"]')
    audio: Any = Field(None, description="not supported")
    prediction: Any = Field(None, description="not supported")
    reasoning_effort: Any = Field(None, description="not supported")
    verbosity: Any = Field(None, description="not supported")
    web_search_options: Any = Field(None, description="not supported")
    prompt_cache_key: Any = Field(None, description="not supported")
    prompt_cache_options: Any = Field(None, description="not supported")
    prompt_cache_retention: Any = Field(None, description="not supported")
    moderation: Any = Field(None, description="not supported")
    safety_identifier: str | None = Field(None, max_length=512, description="see user")
    neutral = AnswerRequest.neutral | {
        "response_format": (
            ({"type": "text"},),
            "the model cannot be held to JSON (json_object) or to a schema (json_schema)",
        ),
        "functions": (([],), "it is the former name of tools, which are"),
        "function_call": (("none",), "it is the former name of tool_choice"),
        "modalities": ((["text"],), "answers are text"),
        "audio": ((), "answers are text"),
        "prediction": ((), "answers are not predicted"),
        "reasoning_effort": ((), "the model has no such setting"),
        "verbosity": ((), "the model has no such setting"),
        "web_search_options": ((), "nothing is searched"),
        "prompt_cache_key": ((), "prompts are not cached"),
        "prompt_cache_options": ((), "prompts are not cached"),
        "moderation": ((), "nothing is moderated"),
        "prompt_cache_retention": ((), "prompts are not cached"),
        "tool_choice": (("auto", "none"), "the model cannot be forced to call a tool"),
    }

    @property
    def longest(self) -> int | None:
        """Tokens of the longest answer; None where nothing says it."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_listed(self) -> int | None:
        """Likeliest tokens to list with each token's probability; None for no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_unsupported(self) -> None:
        """See `Body`."""
        super().refuse_unsupported()
        if self.top_logprobs is not None and not self.logprobs:
            message = "top_logprobs needs logprobs true; set it, or leave top_logprobs out"
            raise RequestError(400, message, param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            message = "max_tokens is the former name of max_completion_tokens; give one of them"
            raise RequestError(400, message, param="max_tokens")


class CompletionRequest(AnswerRequest):
    """A text that is to be continued."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text or its ids, or several; 0 to 64 of them"
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LISTED)
    echo: bool | None = Field(None, description="begin the text with the prompt")
    best_of: Any = Field(None, description="only n")
    suffix: Any = Field(None, description="only an empty one")
    neutral = AnswerRequest.neutral | {
        "suffix": (("",), "a text is continued at its end only"),
    }

    @property
    def num_listed(self) -> int | None:
        """Likeliest tokens to list with each token's probability; None for no probabilities."""
        return self.logprobs

    def refuse_unsupported(self) -> None:
        """See `Body`."""
        super().refuse_unsupported()
        if self.best_of not in (None, self.n or 1):
            message = "best_of other than n is not supported: all answers are returned"
            raise RequestError(400, message, param="best_of", code="unsupported_parameter")
        if self.echo and self.logprobs is not None:
            message = "echo with logprobs is not supported: prompts are not scored"
            raise RequestError(400, message, param="echo", code="unsupported_parameter")


class Usage(BaseModel):
    """Tokens of a request; the stop token is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ListedToken(BaseModel):
    """A token that might have stood in a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class ScoredToken(ListedToken):
    """A token of an answer."""

    top_logprobs: list[ListedToken]


class Logprobs(BaseModel):
    """Probabilities of an answer's tokens, by the model alone."""

    content: list[ScoredToken] | None
    refusal: None = None


class Function(BaseModel):
    """What a call calls."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer of a request."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class CompletionLogprobs(BaseModel):
    """Probabilities of a continuation's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """The continuations of a text."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class ServedModel(BaseModel):
    """A name that requests may have as their model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["glmtune"] = "glmtune"
    kind: Literal["base", "adapter", "both"]
    sides: list[str] = Field(description="who answers, in the order of the choices")
    base: str = Field(description="the base model's name")
    adapter: str | None = Field(description="the last name of the adapter's folder")
    format: Literal["chat", "alpaca"] = Field(
        description="alpaca: the adapter was taught questions alone, so earlier rounds are refused"
    )
    max_model_len: int = Field(description="positions of prompt and answer together")


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What a request gets instead of an answer."""

    error: ErrorDetail
