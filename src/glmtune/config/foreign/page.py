"""docs/flags.md: `python -m glmtune.config.foreign.page > docs/flags.md`."""

from collections.abc import Iterator, Mapping
from itertools import groupby

from glmtune.config.foreign import TABLE
from glmtune.config.foreign.fates import Becomes, Fate, Idle

_HEAD = """\
# Coming from another trainer · 从其他训练工具迁移

What becomes of the flags and recipe keys of other projects: each is read as a setting of ours,
accepted with a word where its value changes nothing here, or refused with what to do instead. Verbs
in brackets are those that it concerns. The second column names projects whose users know it.

其他项目的参数和配置项在这里会怎样：当作本项目的设置读取；取值不改变任何结果时接受并说明；否则拒绝，并告诉
正确的做法。方括号中是所涉及的命令。

| names | known from | here |
|---|---|---|
"""


def names_page() -> str:
    """The whole table as Markdown, names with the same fates in one line."""
    lines = []
    for (source, fates), rows in groupby(TABLE, key=lambda row: row[1:]):
        names = " ".join(f"`{row.name}`" for row in rows)
        lines.append(f"| {names} | {source} | {'; '.join(map(_tell, fates))} |\n")
    return _HEAD + "".join(lines)


def _tell(fate: Fate) -> str:
    return "".join(_words(fate)) + (f" [{', '.join(fate.verbs)}]" if fate.verbs else "")


def _words(fate: Fate) -> Iterator[str]:
    match fate:
        case Becomes():
            yield " or ".join(f"`{setting}`" for setting in fate.settings)
            if isinstance(fate.values, Mapping):
                pairs = (f"{text} → {value or 'default'}" for text, value in fate.values.items())
                yield f" ({', '.join(pairs)})"
            yield from (f" beside `{name}` {value}" for name, value in fate.beside.items())
            yield f": {fate.word}"
        case Idle():
            values = "any value" if fate.values is None else ", ".join(fate.values)
            yield f"without effect ({values}): {fate.word}"
        case _:
            yield f"refused: {fate.way}"


if __name__ == "__main__":
    print(names_page(), end="")
