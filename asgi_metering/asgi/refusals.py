"""
Refusals of calls: what a call that was refused is answered, whole or inside a stream that has begun.

Puts together what a call knows and what its route chose. Never sends anything, never decides whether to answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from asgi_metering.asgi.answers import Answer, AnswerOptions, answer
from asgi_metering.asgi.discretion import discreet, own_accounts
from asgi_metering.asgi.dressing import with_windows
from asgi_metering.asgi.problems import Customise, Rendered, ndjson_error, render, sse_error
from asgi_metering.asgi.replay import replay_response
from asgi_metering.asgi.types import Message
from asgi_metering.call import Call
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.errors import MeteringError
from asgi_metering.policies import ChargePolicy, EndpointPolicy, ErrorShape
from asgi_metering.sources import Allowance
from asgi_metering.usage.inflate import codings_of

__all__ = [
    "answer_within",
    "in_band_error",
    "message_error",
    "refusal_answer",
    "refusal_response",
    "refusal_within",
]

LINES = frozenset({b"application/jsonl", b"application/jsonlines", b"application/ndjson", b"application/x-ndjson"})
"""Media types of a JSON value per line; none is registered, so all of these are met."""

EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
"""What a server-sent event ends with: a blank line, by any of the three line ends."""


def refusal_answer(
    call: Call, options: AnswerOptions, refusal: Refusal | None = None, decision: Decision | None = None
) -> Answer:
    """
    What is answered to a call that was refused, or cut. Raises `MeteringError` for one that was neither.

    Args:
        call: Whose.
        options: The application's choices.
        refusal: Of a message in it instead, with the *decision* on that.
        decision: By which the limits are told; the call's own by default.
    """
    refusal = refusal or call.lack
    if refusal is None:
        raise MeteringError(f"Call {call.id!r} was not refused, so there is no refusal to answer.")
    decision = call.decision if decision is None else decision
    before = call.opening.before
    return answer(
        discreet(call, refusal),
        decision if decision is None or before is None else with_windows(decision, before),
        unit=call.unit,
        line=call.line,
        plan=call.caller.plan if call.caller is not None else None,
        allowance_status=_allowance_status(call.charge, refusal.name) if refusal.reason is Reason.ALLOWANCE else 429,
        options=options,
    )


def _allowance_status(charge: ChargePolicy | None, name: str) -> Literal[402, 429]:
    """What the allowance *name* answers where it is spent."""
    sources = charge.sources if charge is not None else ()
    by_name = {source.name: source.status for source in sources if isinstance(source, Allowance)}
    return 402 if by_name.get(name) == 402 else 429


def refusal_response(call: Call, options: AnswerOptions) -> Rendered:
    """
    The whole response of a refused call, in the shape that its route chose; raises as `refusal_answer`.

    To a repeat of a request that ran before it is what that one was answered.
    """
    if call.decision is not None and call.decision.replay is not None:
        return replay_response(call, call.decision.replay)
    return render(refusal_answer(call, options), *_spelling(call))


def refusal_within(inner: Call, outer: Call | None, options: AnswerOptions) -> Rendered:
    """As `answer_within`, the whole response, in the shape of the request's route."""
    return render(answer_within(inner, outer, options), *_spelling(outer or inner))


def answer_within(inner: Call, outer: Call | None, options: AnswerOptions) -> Answer:
    """
    What is answered to a connection inside of which the charge *inner* was refused.

    Args:
        inner: The refused call.
        outer: That of the connection, if it has one.
        options: The application's choices.

    Its numbers are told where they are of the account of whoever asks: any other payer is the handler's choice, and
    what that has, or has done within its limits, is nobody else's (DESIGN 10). How long to wait is told.
    """
    told = refusal_answer(inner, options)
    words = _OTHERS.get(told.reason)
    if words is None or (outer is not None and inner.payer in own_accounts(outer)):
        return told
    facts = told.facts._replace(available=None, held=None, limit=None, used=None)
    kept = (options.names.retry_after or "").lower()
    hidden = {name.encode("ascii") for name in options.names.exposed if name != kept}
    headers = tuple([field for field in told.headers if field[0] not in hidden])
    return told._replace(detail=words, facts=facts, plan=None, headers=headers)


_OTHERS: Mapping[Reason, str] = {
    Reason.CREDITS: "What this would cost is more than there is for it.",
    Reason.ALLOWANCE: "What this would cost is more than there is for it.",
    Reason.RATE_LIMIT: "As much of this has been done as may be for now.",
    Reason.EXCEEDS_LIMIT: "This is more than may be done at all.",
    Reason.CONCURRENCY: "As much of this is going on as may be at once.",
}
"""What is said of somebody else's account, for the reasons whose numbers are of one."""


def in_band_error(call: Call, options: AnswerOptions, start: Message | None, latest: Message | None) -> bytes | None:
    """
    The refusal as the last event or line of a stream that has begun; None where its body has no place for one.

    Of a compressed, sized or trailed body, and of any other type, nothing but a broken connection says that it is not
    whole.

    Args:
        call: The refused call, or one that is cut.
        options: The application's choices.
        start: How the stream began.
        latest: What it sent last; None for nothing yet.
    """
    if start is None or start.get("trailers"):
        return None
    given = {bytes(name).lower(): bytes(value).lower() for name, value in start.get("headers", ())}
    if b"content-length" in given or codings_of(given.get(b"content-encoding", b"").decode("latin-1")):
        return None
    media_type = given.get(b"content-type", b"").partition(b";")[0].strip()
    sent = None if latest is None else bytes(latest.get("body", b""))
    if media_type == b"text/event-stream":
        mid_event = sent is not None and not sent.endswith(EVENT_ENDS)
        return sse_error(refusal_answer(call, options), *_spelling(call), mid_event=mid_event)
    if media_type in LINES:
        mid_line = sent is not None and not sent.endswith(b"\n")
        return ndjson_error(refusal_answer(call, options), *_spelling(call), mid_line=mid_line)
    return None


def message_error(call: Call, options: AnswerOptions, refusal: Refusal, decision: Decision | None) -> str:
    """The refusal of one message of a session as a text frame, in the shape that the route chose."""
    return render(refusal_answer(call, options, refusal, decision), *_spelling(call)).body.decode("ascii")


def _spelling(call: Call) -> tuple[ErrorShape, Customise | None]:
    """The shape of the route's errors, and its hook."""
    policy = call.policy or EndpointPolicy("")
    # The policy's charge and not the call's: who is not even known is refused before a price is pinned.
    return policy.errors, policy.charge.customise if policy.charge is not None else None
