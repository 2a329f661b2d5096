"""
Sentences: what a refusal says to a person, as one sentence of fact and one of what to do next.

Knows every `Reason` and the numbers as they may be shown. Never knows statuses or bodies; nobody should parse what
stands here (RFC 9457 section 3.1.4), programs have the code and the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from asgi_metering.decisions import Reason

__all__ = ["Facts", "detail", "remedy"]


class Facts(NamedTuple):
    """
    What may be told of one refusal.

    Attributes:
        reason: Why.
        name: Of the limit, pool or allowance, safe to show.
        unit: What the numbers count; None where there are none to show.
        required, available, held, limit, used: Strings in whole units for money, ints for counts, None where unknown
            or nobody's business.
        level: Of a full pool.
        wait_s: Whole seconds until a retry may pass; None when waiting is not known to help.
        reset: RFC 3339, when an allowance begins anew, if that helps.
        hopeless: More is asked for than there can be at any time.
    """

    reason: Reason
    name: str
    unit: str | None = None
    required: str | int | None = None
    available: str | int | None = None
    held: str | int | None = None
    limit: str | int | None = None
    used: str | None = None
    level: str | None = None
    wait_s: int | None = None
    reset: str | None = None
    hopeless: bool = False


def detail(facts: Facts) -> str:
    """Say what happened."""
    words = _DETAILS[facts.reason]
    return words if isinstance(words, str) else words(facts)


def remedy(facts: Facts) -> str:
    """Say what to do next."""
    words = _REMEDIES[facts.reason]
    return words if isinstance(words, str) else words(facts)


def _seconds(count: int) -> str:
    return "1 second" if count == 1 else f"{count} seconds"


def _known(number: str | int | None) -> str:
    return "an unknown number" if number is None else str(number)


def _retry(facts: Facts) -> str:
    return "Retry later." if facts.wait_s is None else f"Retry in {_seconds(facts.wait_s)}."


def _limit(facts: Facts) -> str:
    return f"The limit '{facts.name}' allows {_known(facts.limit)} {facts.unit} per window"


def _rate(facts: Facts) -> str:
    return f"{_limit(facts)}; this call takes {_known(facts.required)} and {_known(facts.available)} are left."


def _exceeds(facts: Facts) -> str:
    return f"{_limit(facts)}; this call alone takes {_known(facts.required)}."


def _pool(facts: Facts) -> str:
    if facts.level == "global":
        return "The service runs as many calls as it can."
    return f"{_known(facts.held)} calls are running; {_known(facts.limit)} may run at once."


def _after_pool(facts: Facts) -> str:
    if facts.wait_s is None:
        return "Ask the operator: no call is admitted here at present."
    if facts.level == "global":
        return _retry(facts)
    return f"Let a running call end, then retry, in {_seconds(facts.wait_s)} or so."


def _credits(facts: Facts) -> str:
    return f"This call needs {_known(facts.required)} {facts.unit}; {_known(facts.available)} available{_held(facts)}."


def _held(facts: Facts) -> str:
    return "" if facts.held in (None, "0") else f", and {facts.held} held by calls in progress"


def _after_credits(facts: Facts) -> str:
    if facts.wait_s is not None:
        return f"Retry in {_seconds(facts.wait_s)}, when calls in progress may have ended, or add {facts.unit}."
    if facts.reset is not None:
        return f"Add {facts.unit}, or retry after {facts.reset}, when an allowance begins anew."
    return f"Add {facts.unit}, then retry."


def _allowance(facts: Facts) -> str:
    return (
        f"This call needs {_known(facts.required)} {facts.unit}; {_known(facts.available)} left of the allowance "
        f"'{facts.name}' of {_known(facts.limit)}{_held(facts)}."
    )


def _after_allowance(facts: Facts) -> str:
    if facts.hopeless:
        return "Ask for a larger allowance or a smaller call: this allowance cannot pay for it at any time."
    return f"Retry after {facts.reset}, when an allowance begins anew." if facts.reset else _retry(facts)


_DETAILS: Mapping[Reason, str | Callable[[Facts], str]] = {
    Reason.UNAUTHENTICATED: "The request names nobody who may call this.",
    Reason.IDENTITY_DOWN: "Who is calling cannot be determined at present. Nothing was charged.",
    Reason.PAYER: "Who pays for this call could not be determined. Nothing was charged.",
    Reason.KEY_MISSING: "This request has no Idempotency-Key, and needs one.",
    Reason.KEY_INVALID: "The Idempotency-Key cannot be read.",
    Reason.BODY: "The body of this request cannot be fingerprinted for its Idempotency-Key.",
    Reason.REPLAYED: "A call with this idempotency key was made before, and is not made again.",
    Reason.IN_FLIGHT: "A call with this idempotency key is still running.",
    Reason.FINGERPRINT: "This idempotency key came before with another request.",
    Reason.POLICY: "A policy of this service does not permit the call.",
    Reason.UPSTREAM: "A provider that this service depends on takes no more calls at present.",
    Reason.CONCURRENCY: _pool,
    Reason.EXCEEDS_LIMIT: _exceeds,
    Reason.RATE_LIMIT: _rate,
    Reason.ALLOWANCE: _allowance,
    Reason.CREDITS: _credits,
    Reason.STORE_DOWN: "Calls cannot be metered at present, so this one was not started. Nothing was charged.",
    Reason.ENDED: "This call has ended, so it can take no more.",
}

_REMEDIES: Mapping[Reason, str | Callable[[Facts], str]] = {
    Reason.UNAUTHENTICATED: "Send valid credentials.",
    Reason.IDENTITY_DOWN: _retry,
    Reason.PAYER: "Retry later; if it stays so, tell the operator.",
    Reason.KEY_MISSING: "Send an Idempotency-Key of your own making, a new one for each new request.",
    Reason.KEY_INVALID: "Send one key of 1 to 255 printable ASCII characters, in double quotes.",
    Reason.BODY: "Send a smaller body, or send it without the key. The operator can set fingerprint= on the route.",
    Reason.REPLAYED: "Use a new key for a new request.",
    Reason.IN_FLIGHT: _retry,
    Reason.FINGERPRINT: "Use a new key for a new request, or repeat the first request unchanged.",
    Reason.POLICY: "Change the request, or ask the operator for access.",
    Reason.UPSTREAM: _retry,
    Reason.CONCURRENCY: _after_pool,
    Reason.EXCEEDS_LIMIT: "Send a smaller request: this one never fits, however long you wait.",
    Reason.RATE_LIMIT: _retry,
    Reason.ALLOWANCE: _after_allowance,
    Reason.CREDITS: _after_credits,
    Reason.STORE_DOWN: _retry,
    Reason.ENDED: "Make a new call.",
}
