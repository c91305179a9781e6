"""What has become of a run, as a sentence in both languages."""

from typing import Literal, NamedTuple

from glmtune.evaluation.labels import Text
from glmtune.run_files import checkpoint_name
from glmtune.runlog import format_seconds

State = Literal["waiting", "preparing", "training", "done", "stopped", "failed", "killed"]


class Condition(NamedTuple):
    """What has become of a run."""

    state: State
    step: int = 0
    max_steps: int | None = None
    saved: int | None = None
    """The step of its newest checkpoint."""
    seconds_left: float | None = None
    reason: str = ""
    """Why it failed, or ended before its last step."""


def sentence(condition: Condition) -> Text:
    """Say it."""
    return _SENTENCES[condition.state](condition)


def _waiting(_: Condition) -> Text:
    return Text(
        "还没有开始：这里还没有训练记录。训练一开始，本页自动跟上。",
        "Not begun yet: nothing is logged here. This page follows as soon as training begins.",
    )


def _preparing(_: Condition) -> Text:
    return Text("正在准备：读取数据和模型。", "Preparing: data and model are being read.")


def _training(condition: Condition) -> Text:
    zh, en = _progress(condition)
    if condition.seconds_left is None:
        return Text(f"正在训练：{zh}。", f"Training: {en}.")
    left = format_seconds(condition.seconds_left)
    return Text(f"正在训练：{zh}，约剩 {left}。", f"Training: {en}, about {left} left.")


def _done(condition: Condition) -> Text:
    if condition.reason:
        zh, en = _progress(condition)
        return Text(
            f"已完成，提前结束于{zh}：留出数据上不再变好。",
            f"Done, ended early at {en}: {condition.reason}.",
        )
    step = f"{condition.step:,}"
    return Text(f"已完成：全部 {step} 步。", f"Done: all {step} steps.")


def _stopped(condition: Condition) -> Text:
    zh, en = _progress(condition)
    kept = _kept(condition)
    return Text(f"已停在{zh}；{kept.zh}。", f"Stopped at {en}; {kept.en}.")


def _failed(condition: Condition) -> Text:
    zh, en = _progress(condition)
    return Text(f"出错，停在{zh}：{condition.reason}", f"Failed at {en}: {condition.reason}")


def _killed(condition: Condition) -> Text:
    zh, en = _progress(condition)
    kept = _kept(condition)
    return Text(
        f"进程已不在：最后的记录在{zh}，之后没有任何消息；{kept.zh}。",
        f"Killed: its process is gone, and the last record is of {en}; {kept.en}.",
    )


def _progress(condition: Condition) -> Text:
    step = f"{condition.step:,}"
    if condition.max_steps is None:
        return Text(f"第 {step} 步", f"step {step}")
    most = f"{condition.max_steps:,}"
    return Text(f"第 {step} 步（共 {most} 步）", f"step {step} of {most}")


def _kept(condition: Condition) -> Text:
    if condition.saved is None:
        return Text("没有检查点", "no checkpoint was saved")
    name = checkpoint_name(condition.saved)
    return Text(f"可从 {name} 继续", f"{name} can be resumed")


_SENTENCES = {
    "waiting": _waiting,
    "preparing": _preparing,
    "training": _training,
    "done": _done,
    "stopped": _stopped,
    "failed": _failed,
    "killed": _killed,
}
