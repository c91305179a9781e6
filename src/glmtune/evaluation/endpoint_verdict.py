"""What an endpoint's replies say: whose answers they are, and what is wrong with it.

Plain texts and numbers, so that each verdict can be tested without a server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from glmtune.evaluation.endpoint_client import Reply
from glmtune.evaluation.endpoint_probes import EndpointProbe
from glmtune.generation import Answer

Side = Literal["tuned", "base", "neither"]
Verdict = Literal["tuned", "base", "neither", "unclear"]

# Two engines round differently, so that an answer may turn off late: what counts is whether it
# follows one side beyond the place where base and tuned part, and for how much of the answer.
_LEAST_SHARE = 0.5
_MOST_OF_PROBES = 0.75
_LEAST_ANSWERS = 1


@dataclass(frozen=True)
class ProbeResult:
    """A probe, the reply to it, and whose answer that is."""

    probe: EndpointProbe
    reply: Reply
    side: Side | None
    """None where the endpoint gave no answer."""
    agrees: float
    """Share of that side's answer that the reply begins with."""


@dataclass(frozen=True)
class LengthResult:
    """A prompt of some length, and whether it was read whole."""

    num_tokens: int
    fault: str | None
    """What went wrong; None where nothing did."""


@dataclass(frozen=True)
class EndpointReport:
    """All that was found out about an endpoint."""

    results: Sequence[ProbeResult]
    drift: str | None = None
    """How it lays out messages differently; None where it does not, or cannot be asked."""
    drift_known_by: str | None = None
    """What its layout was compared by; None where nothing was."""
    lengths: Sequence[LengthResult] = ()
    max_positions: int = 0
    stop_faults: Sequence[str] = field(default_factory=tuple)

    @property
    def counts(self) -> dict[str, int]:
        """Probes by whose answer they got."""
        sides = [result.side for result in self.results]
        return {str(side): sides.count(side) for side in ("tuned", "base", "neither", None)}

    @property
    def verdict(self) -> Verdict:
        """Whose answers these are."""
        counts, asked = self.counts, [r for r in self.results if r.side is not None]
        if len(asked) < _LEAST_ANSWERS:
            return "unclear"
        sides: tuple[Side, ...] = ("tuned", "base", "neither")
        for side in sides:
            if counts[side] >= _MOST_OF_PROBES * len(asked):
                return side
        return "unclear"

    @property
    def faults(self) -> list[str]:
        """What is wrong with it besides whose answers it gives."""
        found = [*self.stop_faults]
        if self.drift:
            found.append(f"template drift: {self.drift}")
        if bad := [length for length in self.lengths if length.fault]:
            good = [one.num_tokens for one in self.lengths if not one.fault]
            below = max((n for n in good if n < bad[0].num_tokens), default=0)
            found.append(
                f"context: a prompt of {bad[0].num_tokens:,} tokens is not read whole, one of "
                f"{below:,} is, and the model has {self.max_positions:,} positions "
                f"({bad[0].fault})"
            )
        return found

    @property
    def is_sound(self) -> bool:
        """Whether it is the tuned model, and nothing is wrong with it."""
        return self.verdict == "tuned" and not self.faults

    @property
    def sentence(self) -> str:
        """The verdict with its reason."""
        counts, num = self.counts, len(self.results)
        answered = num - counts["None"]
        if not answered:
            return f"unclear: none of {num} questions was answered ({self._refusal})"
        said = (
            f"{counts['tuned']} of {answered} answers are the adapter's, {counts['base']} the "
            f"base's, {counts['neither']} neither's"
        )
        ways = {
            "tuned": "tuned: the adapter answers",
            "base": "base: it answers as the base does, without the adapter; load the adapter, and "
            "look whether its keys matched (vLLM serves the base where none does)",
            "neither": "neither: it is another adapter or base, or reads another template",
            "unclear": "unclear: the answers are mixed, as of a router, or drawn",
        }
        return f"{ways[self.verdict]} ({said})"

    @property
    def _refusal(self) -> str:
        return next((r.reply.refusal or "" for r in self.results if r.side is None), "")

    def as_json(self) -> dict[str, Any]:
        """All of it, by name."""
        return {
            "verdict": self.verdict,
            "sound": self.is_sound,
            "sentence": self.sentence,
            "faults": self.faults,
            "probes": [
                {
                    "content": result.probe.content,
                    "base": result.probe.base.text,
                    "tuned": result.probe.tuned.text,
                    "reply": result.reply.text,
                    "finish_reason": result.reply.finish_reason,
                    "refusal": result.reply.refusal,
                    "side": result.side,
                    "agrees": result.agrees,
                }
                for result in self.results
            ],
            "layout_compared_by": self.drift_known_by,
            "prompts": [{"tokens": one.num_tokens, "fault": one.fault} for one in self.lengths],
        }


def judge_reply(probe: EndpointProbe, reply: Reply, shown: Callable[[str], str]) -> ProbeResult:
    """Whose answer a reply is.

    Args:
        probe: what was asked.
        reply: the endpoint's.
        shown: brings answers into one form, see `Asker.shown`.
    """
    if reply.refusal is not None:
        return ProbeResult(probe, reply, None, 0.0)
    text = shown(reply.text)
    shares: dict[Side, float] = {}
    parted = _num_common(shown(probe.base.text), shown(probe.tuned.text))
    sides: tuple[tuple[Side, Answer], ...] = (("tuned", probe.tuned), ("base", probe.base))
    for side, answer in sides:
        wanted = shown(answer.text)
        common = _num_common(text, wanted)
        follows = common > parted or text == wanted
        shares[side] = common / len(wanted) if wanted and follows else float(text == wanted)
    side = max(shares, key=lambda name: shares[name])
    if shares[side] < _LEAST_SHARE or shares["tuned"] == shares["base"]:
        return ProbeResult(probe, reply, "neither", max(shares.values()))
    return ProbeResult(probe, reply, side, shares[side])


def find_stop_faults(
    results: Sequence[ProbeResult], shown: Callable[[str], str], specials: Sequence[str]
) -> list[str]:
    """What is wrong with how answers end, as sentences.

    Args:
        results: judged replies.
        shown: see `judge_reply`.
        specials: names of special tokens, which no answer may show.
    """
    ended = [r for r in results if r.side in ("tuned", "base") and _answer(r).stopped]
    ran_on = [
        r
        for r in ended
        if r.reply.finish_reason == "length"
        or len(shown(r.reply.text)) > len(shown(_answer(r).text)) + 1
    ]
    found = []
    if ran_on:
        found.append(
            f"stop: {len(ran_on)} of {len(ended)} answers that end by themselves run on; give the "
            "server the model's stop ids (generation_config.json has them)"
        )
    answered = [r for r in results if r.side is not None]
    leaked = next((name for r in answered for name in specials if name in r.reply.text), None)
    if leaked:
        found.append(
            f"stop: answers show the special token {leaked}, which should end or be hidden"
        )
    early = [
        r
        for r in results
        if r.side in ("tuned", "base")
        and not _answer(r).stopped
        and r.reply.finish_reason == "stop"
        and len(shown(r.reply.text)) < len(shown(_answer(r).text)) - 1
    ]
    if early:
        found.append(f"stop: {len(early)} of {len(results)} answers end too early")
    return found


def _num_common(a: str, b: str) -> int:
    """Characters with which both texts begin."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _answer(result: ProbeResult) -> Answer:
    return result.probe.tuned if result.side == "tuned" else result.probe.base
