"""How the younger models write conversations: special tokens, roles, and what ends an answer.

A turn is its role's token, a newline and the text; the answer's newline is written by the model,
so it is supervised. ChatGLM2-6B alone has no role tokens: its rounds are text.

Sources of the ids and strings: the published tokenizers and fine-tuning code, run for the recorded
rows that tests/unit/test_glm_layouts.py compares with.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from glmtune.data import templates
from glmtune.data.conversations import ASSISTANT, OBSERVATION, SYSTEM, USER
from glmtune.data.flaws import Flaw, show
from glmtune.data.row_rule import RowRule, Special
from glmtune.models.chatglm import conversation
from glmtune.models.family import ChatFormat
from glmtune.models.glm import calls, settings

ROLES = {role: f"<|{role}|>" for role in (SYSTEM, USER, ASSISTANT, OBSERVATION)}

# What data cards call the special tokens of a row.
_LABELS = {"[gMASK]": "gmask", "sop": "bos", "<sop>": "bos"}
_LABELS |= {name: role for role, name in ROLES.items()}


class Layout(NamedTuple):
    """A published layout of conversations."""

    name: str
    """Whose layout it is, one of `settings.VARIANTS`; what data cards call the revision."""
    describe: str
    """The layout in a few words, for the list of formats in a chat."""
    specials: Mapping[str, int]
    """Special tokens by name, with their published ids."""
    prefix: tuple[str, ...]
    """What a conversation begins with."""
    end: str
    """What an answer is taught to end with."""
    stops: tuple[str, ...]
    """All that ends an answer; the first is the tokenizer's own end of text."""
    pad: str
    newline: tuple[int, ...]
    """The ids of the newline after a role; empty where only the folder's tokenizer knows them."""
    num_rows: int
    """Rows of the published embedding: the ids, and some that no token has."""
    hoists_system: bool = False
    """Whether system messages come first, wherever they stand."""
    before_newline: str = ""
    """What stands between the name of a tool that is called and the newline."""
    write_tools: Callable[[Sequence[Mapping[str, Any]]], str] | None = None
    """Descriptions of tools to the text of a first system message, where the folder's chat template
    does not say how; raises Flaw where one cannot be written. None where the model knows none."""
    write_call: Callable[[str], str] = str
    """The arguments of a call, as JSON, to the text behind the name of its tool."""
    read_calls: Callable[[str, Collection[str]], list[tuple[str, str]] | None] = (
        lambda text, names: None
    )
    """The calls of an answer, see `ChatFormat.read_calls`."""
    polish: Callable[[str], str] = str.strip
    """An answer as the published chat shows it."""
    marks: tuple[str, ...] = ()
    """What `polish` replaces."""
    opens_thoughts: bool = False
    """Whether answers begin with a thought."""

    def thinking(self) -> "Layout":
        """The same of a model whose chat template opens a thought, as GLM-Z1's does.

        Source: its published template, which writes calls like GLM-4-9B's.
        """
        return self._replace(opens_thoughts=True, before_newline="")

    @property
    def has_roles(self) -> bool:
        """Whether turns begin with role tokens."""
        return ROLES[USER] in self.specials

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The published ids at which an answer ends."""
        return tuple(self.specials[name] for name in self.stops)

    @property
    def special_names(self) -> tuple[str, ...]:
        """Names of special tokens that somebody may have typed: all but those that are words."""
        return tuple(name for name in self.specials if not name.isalpha())

    def missing(self, ids: Mapping[str, int]) -> list[str]:
        """The special tokens that rows need and a vocabulary lacks."""
        needed = {*self.prefix, *self.stops, self.pad, self.end}
        needed |= {ROLES[USER], ROLES[ASSISTANT]} if self.has_roles else set()
        return sorted(needed - set(ids))

    def row_rule(
        self, ids: Mapping[str, int] | None = None, newline: Iterable[int] | None = None
    ) -> RowRule:
        """How rows are laid out.

        Args:
            ids: the special ids by name; None for the published ones.
            newline: ids of the newline after a role; None for the published ones.
        """
        ids = self.specials if ids is None else ids
        newline = self.newline if newline is None else tuple(newline)

        def special(name: str) -> Special:
            return Special(_LABELS[name], name, ids[name])

        opening = [*self.prefix, ROLES[USER]] if self.has_roles else self.prefix
        answering = [ROLES[ASSISTANT]] if self.has_roles else []
        return RowRule(
            before_prompt=tuple(map(special, opening)),
            after_prompt=tuple(map(special, answering)),
            before_answer=tuple(
                Special(f"newline {place}" if len(newline) > 1 else "newline", "newline", id_)
                for place, id_ in enumerate(newline, start=1)
            ),
            end=(Special("eos", self.end, ids[self.end]),),
            before_text=tuple(map(special, self.prefix)),
            after_text=(Special("end of text", self.stops[0], ids[self.stops[0]]),),
            stops=tuple(ids[name] for name in self.stops if name != self.end),
            pad_id=ids[self.pad],
        )

    @property
    def chat(self) -> ChatFormat:
        """The words around a conversation; the encoder turns them into the layout's tokens."""
        return ChatFormat(
            describe=f"the model's own, {self.describe}; a question continues the conversation",
            write=templates.after_rounds,
            polish=self.polish,
            marks=self.marks,
            unsettled="",
            read_calls=self.read_calls,
        )


def numbered_rounds(history: Iterable[tuple[str, str]], question: str) -> str:
    """Earlier rounds and a question as ChatGLM2-6B reads them, numbered from 1."""
    pairs = list(history)
    earlier = "".join(
        f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(pairs, start=1)
    )
    return f"{earlier}[Round {len(pairs) + 1}]\n\n问：{question}\n\n答："


def answers_in_rounds(history: Iterable[tuple[str, str]]) -> list[tuple[int, int]]:
    """Where the answers of earlier rounds stand in what `numbered_rounds` writes, in bytes."""
    spans, written = [], 0
    for place, (question, answer) in enumerate(history, start=1):
        start = written + len(f"[Round {place}]\n\n问：{question}\n\n答：".encode())
        spans.append((start, start + len(answer.encode())))
        written = spans[-1][1] + len("\n\n")
    return spans


def _polish(text: str) -> str:
    """An answer as the published chats of ChatGLM2-6B and ChatGLM3-6B show it."""
    return conversation.with_date(text.strip())


def _numbered(first: int, *names: str) -> dict[str, int]:
    return {name: first + place for place, name in enumerate(names)}


_PIECES = {"<unk>": 0, "</s>": 2}
# In this order behind the pieces of the sentencepiece file.
_SPECIALS_2 = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_SPECIALS_3 = (*_SPECIALS_2, *ROLES.values())
_SPECIALS_4 = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES.values())
_VISUAL = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
# What GLM-4-9B's tokenizer, as first published, begins the message with its tools with.
_INTRODUCTION = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
_TURNS = "<|user|>, <|assistant|>, a newline after each"


def _listed_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Tools as ChatGLM3-6B reads them. Source: the published fine-tuning code."""
    listed = json.dumps(tools, indent=4, ensure_ascii=False)
    question = "Answer the following questions as best as you can."
    return f"{question} You have access to the following tools:\n{listed}"


def _described_tools(head: str, between: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """Tools as GLM-4-9B and GLM-4-0414 read them. Source: published renderings."""
    text = head
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            what = f"the tool {show(tool)} has no name of a function"
            raise Flaw("tools", what, "describe it as a function, or leave it out", "tools")
        described = json.dumps(function, indent=4, ensure_ascii=False)
        text += f"{between}## {function['name']}\n\n{described}\n"
        text += "在调用上述函数时，请使用 Json 格式表示调用的参数。"
    return text


def _python_call(arguments: str) -> str:
    """A call as ChatGLM3-6B writes it. Source: the published fine-tuning code."""
    try:
        values = json.loads(arguments)
    except ValueError:
        values = None
    if not isinstance(values, dict):  # what the row has in their place
        return arguments
    listed = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"```python\ntool_call({listed})\n```"


_CHATGLM3 = Layout(
    name=settings.CHATGLM3,
    describe=_TURNS,
    specials=_PIECES | _numbered(64789, *_SPECIALS_3),
    prefix=("[gMASK]", "sop"),
    end="</s>",
    stops=("</s>", ROLES[USER], ROLES[OBSERVATION]),
    pad="<unk>",
    newline=(30910, 13),
    num_rows=65024,
    write_tools=_listed_tools,
    write_call=_python_call,
    read_calls=calls.read_python_calls,
    polish=_polish,
    marks=(conversation.MARK,),
)
_CHATGLM2 = _CHATGLM3._replace(
    name=settings.CHATGLM2,
    describe="[Round N], 问：, 答：",
    specials=_PIECES | _numbered(64789, *_SPECIALS_2),
    stops=("</s>",),
    newline=(),
    write_tools=None,
)
_GLM4 = Layout(
    name=settings.GLM4,
    describe=_TURNS,
    specials=_numbered(151329, *_SPECIALS_4, *_VISUAL),
    prefix=("[gMASK]", "<sop>"),
    end=ROLES[USER],
    stops=("<|endoftext|>", ROLES[USER], ROLES[OBSERVATION]),
    pad="<|endoftext|>",
    newline=(198,),
    num_rows=151552,
    write_tools=partial(_described_tools, _INTRODUCTION, "\n\n"),
    read_calls=calls.read_json_calls,
)
_GLM4_0414 = _GLM4._replace(
    name=settings.GLM4_0414,
    hoists_system=True,
    before_newline=" ",
    write_tools=partial(_described_tools, "# 可用工具\n", "\n"),
)
# Its stop ids are published; the ids between them are read as those of GLM-4's order.
_EDGE = _GLM4._replace(
    name=settings.EDGE,
    specials=_numbered(59246, *_SPECIALS_4),
    prefix=(),
    newline=(),
    num_rows=59264,
    write_tools=None,
)
LAYOUTS = {layout.name: layout for layout in (_CHATGLM2, _CHATGLM3, _GLM4, _GLM4_0414, _EDGE)}
"""The layouts by the name of their variant, see `settings.variant_of`."""
