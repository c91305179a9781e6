"""`glmtune check --url`: is the model that an endpoint serves the tuned one, and is it whole?

Probes are messages to which base and adapter answer most differently; what both answer is computed
here, with the endpoint's replies beside it.
"""

from collections.abc import Sequence
from itertools import cycle
from statistics import median
from typing import Any

from glmtune.config.settings import CheckSettings
from glmtune.data.files import write_json
from glmtune.data.templates import alpaca
from glmtune.errors import note, visible
from glmtune.evaluation.answers import ModelChoice
from glmtune.evaluation.endpoint_client import Endpoint, Reply, endpoint_of
from glmtune.evaluation.endpoint_probes import (
    Asker,
    EndpointProbe,
    as_message,
    candidates,
    choose_probes,
    is_taught_alpaca,
)
from glmtune.evaluation.endpoint_verdict import (
    EndpointReport,
    LengthResult,
    ProbeResult,
    find_stop_faults,
    judge_reply,
)
from glmtune.models.families import family_of, special_names

_SHARES = (0.2, 0.45, 0.6, 0.95)
"""Lengths of long prompts, as shares of the positions: half a context lies between two."""
_LONG_ANSWER = 8
MOST_TOKENS = 16_384
"""Longest prompt that is tried: both sides of it are computed here as well."""


def check_endpoint(settings: CheckSettings) -> EndpointReport:
    """Ask an endpoint, print whose answers it gives and what is wrong with it.

    Raises:
        UserError: the adapter cannot be read, base and adapter are alike, or nobody
            answers at the address.
    """
    assert settings.url is not None, "of another verb"
    assert settings.model is not None, "CheckSettings requires it"
    endpoint = endpoint_of(settings.url, settings.model)
    subject = ModelChoice.of(settings)
    bare = is_taught_alpaca(subject) and endpoint.writes_alpaca()
    contents = candidates(settings, subject, bare)
    model, tokenizer = subject.load(computes=True)
    write = alpaca if bare else as_message
    asker = Asker(model, tokenizer, settings.max_new_tokens, subject.device, write)
    probes = choose_probes(asker, contents)
    print(f"asking {endpoint.url} for {endpoint.model}: {len(probes)} questions")
    replies = [endpoint.ask(probe.content, settings.max_new_tokens) for probe in probes]
    results = [
        judge_reply(probe, reply, asker.shown) for probe, reply in zip(probes, replies, strict=True)
    ]
    drift, known_by = _find_drift(endpoint, asker, probes, replies)
    names = family_of(model.config).special_names or special_names()
    report = EndpointReport(
        results,
        drift,
        known_by,
        _ask_long(endpoint, asker, probes, results),
        asker.max_positions,
        find_stop_faults(results, asker.shown, names),
    )
    _print(report, endpoint)
    if settings.json_path:
        about = {"url": endpoint.url, "model": endpoint.model, "against": subject.adapter_name}
        write_json(about | report.as_json(), settings.json_path)
    return report


def _find_drift(
    endpoint: Endpoint, asker: Asker, probes: Sequence[EndpointProbe], replies: Sequence[Reply]
) -> tuple[str | None, str | None]:
    """How the endpoint lays out messages differently, and by what that is known."""
    probe = probes[0]
    found = endpoint.rendered(probe.content)
    if isinstance(found, list):
        return _first_difference(found, probe.ids, asker.tokenizer), "its own token ids"
    if isinstance(found, str):
        ours = _text(probe.ids, asker.tokenizer)
        same = found.strip() == ours.strip()
        told = f"it writes {found[:120]!r}, rows have {ours[:120]!r}"
        return (None if same else told), "its rendered prompt"
    offsets = [
        reply.num_prompt_tokens - len(probe.ids)
        for probe, reply in zip(probes, replies, strict=True)
        if reply.num_prompt_tokens is not None
    ]
    if not offsets:
        return None, None
    if any(offsets):
        more = f"{median(offsets):+g}" if len(set(offsets)) > 1 else f"{offsets[0]:+d}"
        return (
            f"it counts {more} tokens in a prompt, compared with rows as the adapter's base has "
            "them; give the server the chat template of the base's folder"
        ), "the number of prompt tokens"
    return None, "the number of prompt tokens"


def _first_difference(theirs: list[int], ours: list[int], tokenizer: Any) -> str | None:
    if theirs == ours:
        return None
    pairs = zip([*theirs, None], [*ours, None], strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))
    both = [_text(ids[place : place + 6], tokenizer) or "nothing" for ids in (theirs, ours)]
    return f"from token {place + 1} on it reads {both[0]!r} where rows have {both[1]!r}"


def _text(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def _ask_long(
    endpoint: Endpoint,
    asker: Asker,
    probes: Sequence[EndpointProbe],
    results: Sequence[ProbeResult],
) -> list[LengthResult]:
    """Prompts of growing length, and whether each was read whole.

    It is where the endpoint counts as many tokens as the prompt has, but for what its template adds
    to a short one, and where its answer begins as that of the side which it was found to be.
    """
    offsets = {
        result.reply.num_prompt_tokens - len(result.probe.ids)
        for result in results
        if result.reply.num_prompt_tokens is not None
    }
    sides = {result.side for result in results if result.side is not None}
    side = sides.pop() if len(sides) == 1 else None
    longest = min(asker.max_positions, MOST_TOKENS) - _LONG_ANSWER
    found = []
    for share in _SHARES:
        content, ids = _long_message(asker, probes, int(share * longest))
        if content is None or ids is None:
            continue
        reply = endpoint.ask(content, _LONG_ANSWER)
        found.append(LengthResult(len(ids), _fault_of(reply, ids, offsets, side, asker)))
    return found


def _fault_of(
    reply: Reply, ids: list[int], offsets: set[int], side: str | None, asker: Asker
) -> str | None:
    if reply.refusal is not None:
        return f"it is refused: {visible(reply.refusal)}"
    if reply.num_prompt_tokens is not None and len(offsets) == 1:
        (offset,) = offsets
        if reply.num_prompt_tokens < len(ids) + offset:
            return f"it counts {reply.num_prompt_tokens:,} tokens, so the prompt is cut"
    if side in ("tuned", "base") and offsets <= {0}:
        (wanted,) = asker.answers(side, [ids], _LONG_ANSWER)
        ours, theirs = asker.shown(wanted.text), asker.shown(reply.text)
        if ours[:8] != theirs[:8]:
            return f"it is answered with {theirs[:40]!r}, and whole with {ours[:40]!r}"
    return None


def _long_message(
    asker: Asker, probes: Sequence[EndpointProbe], num_tokens: int
) -> tuple[str | None, list[int] | None]:
    """A message of at most `num_tokens`, of the probes' questions in turn; the first stays last.

    Returns:
        The message and how the model reads it; None where not even one question is short enough.
    """
    lines = [probes[0].content]
    used = len(probes[0].ids)
    for probe in cycle(probes[1:] or probes):
        if used + len(probe.ids) > num_tokens:
            break
        lines.append(probe.content)
        used += len(probe.ids)
    while lines:  # a line break takes a token as well
        content = "\n".join(reversed(lines))
        (ids,) = asker.encode([content])
        if ids is not None and len(ids) <= num_tokens:
            return content, ids
        lines.pop()
    return None, None


def _print(report: EndpointReport, endpoint: Endpoint) -> None:
    for result in report.results:
        whose = result.side or "refused"
        reply = result.reply.refusal or result.reply.text
        print(visible(f"  {whose:<8}{reply.strip()[:60]!r}  to {result.probe.content[:40]!r}"))
    print(f"{endpoint.model} at {endpoint.url} is {report.sentence}")
    for fault in report.faults:
        print(visible(f"  {fault}"))
    if report.drift_known_by is None:
        note("it says nothing of how it lays out messages, so the template was not compared")
    if not any(r.probe.tuned.stopped for r in report.results):
        note(
            "no answer of the adapter ends within max_new_tokens, so whether the endpoint stops "
            "was not seen; raise --max_new_tokens"
        )
    if not report.lengths:
        note("no long prompt was asked: the questions are longer than the positions allow")
