"""
Answers: the table from the reason of a refusal to status, waiting time, title and numbers.

Knows every `Reason`, RFC 9110's and RFC 6585's statuses, and which numbers a caller may see. Never knows how the
answer is spelled in a body, nor how it is sent; never reads a clock, never touches a balance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from math import ceil
from typing import Literal, NamedTuple, TypeAlias

from asgi_metering.amounts import Unit
from asgi_metering.asgi import sentences
from asgi_metering.asgi.fields import (
    DEFAULT_NAMES,
    Fields,
    HeaderNames,
    field_value,
    limit_fields,
    retry_after_field,
    safe_name,
    whole_seconds,
)
from asgi_metering.asgi.sentences import Facts
from asgi_metering.decisions import MONEY, Decision, Reason, Refusal, WindowState
from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.state import build

__all__ = ["DEFAULT_OPTIONS", "Answer", "AnswerOptions", "Jitter", "answer"]

Jitter: TypeAlias = Callable[[int, int], int]
"""Draws a whole number from the first to the second, both included: ``random.Random().randint``."""

SHORT_WAIT_S = (1, 5)
"""
Seconds after which something that ends by itself (a running call, a live hold) is worth another look. Drawn, so that
those who were refused together do not return together. Never a hold's life: most holds end long before it.
"""

OUTAGE_WAIT_S = (3, 7)
"""Seconds after which a store or an identity service that is down is worth another look; drawn as well."""

_IANA = "https://iana.org/assignments/http-problem-types#"
QUOTA_EXCEEDED = _IANA + "quota-exceeded"
"""Problem type of the RateLimit draft: a policy on the caller refused."""

REDUCED_CAPACITY = _IANA + "temporary-reduced-capacity"
"""Problem type of the RateLimit draft: the service carries less than is asked of it, by whomever."""

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_ALLOWANCE, _CONCURRENCY, _CREDITS = Reason.ALLOWANCE, Reason.CONCURRENCY, Reason.CREDITS

_COUNTED = frozenset((Reason.RATE_LIMIT, Reason.EXCEEDS_LIMIT, Reason.CONCURRENCY))
_QUOTAS = _COUNTED | {Reason.ALLOWANCE}
_OWN_WORDS = _COUNTED | MONEY | {Reason.POLICY, Reason.FINGERPRINT, Reason.KEY_INVALID, Reason.BODY}
"""Reasons whose own detail is shown. The others are about the operator's affairs, which are nobody else's (X.9)."""


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """
    What an application may decide about its answers.

    Args:
        challenge: The ``WWW-Authenticate`` of a 401, which RFC 9110 section 15.5.2 demands; write
            ``'Bearer realm="api"'`` or the scheme that your own authentication uses. None leaves it out.
        caller_status: What a full pool of the caller's own answers.
        global_status: What a full pool of everybody's answers.
        type_base: What stands before our own problem types; a URL of yours, if you document them there. The default
            is a name, not an address.
        names: What the header fields are called.

    Raises:
        ConfigurationError: A status other than 429 and 503, text that cannot stand in a header or a URI, or *names*
            that are no `HeaderNames`.

    Source: S0.42 (status configurable), RFC 9457 section 3.1.1.
    """

    challenge: str | None = "Bearer"
    caller_status: Literal[429, 503] = 429
    global_status: Literal[429, 503] = 503
    type_base: str = "urn:asgi-metering:problem:"
    names: HeaderNames = DEFAULT_NAMES

    def __post_init__(self) -> None:
        for status in (self.caller_status, self.global_status):
            if status not in (429, 503):
                raise ConfigurationError(f"A full pool cannot answer {status!r}. Use 429 or 503.")
        if not isinstance(self.names, HeaderNames):
            raise ConfigurationError(
                f"names={self.names!r} are no HeaderNames. Make them, such as HeaderNames.with_legacy()."
            )
        if self.challenge is not None and not field_value(self.challenge):
            raise ConfigurationError(
                f"The challenge {self.challenge!r} cannot stand in a header. Write a scheme such as 'Bearer'."
            )
        if not field_value(self.type_base) or " " in self.type_base:
            raise ConfigurationError(
                f"The type base {self.type_base!r} is no beginning of a URI. Use ASCII, no spaces."
            )


DEFAULT_OPTIONS = AnswerOptions()


class Answer(NamedTuple):
    """
    One refusal, ready to be spelled. Describes the caller's own account only (X.9).

    Attributes:
        reason: Why; its value is the stable code for programs.
        status: HTTP status.
        type: URI of the problem's type.
        title: The type in words; the same every time.
        detail: This occurrence in words.
        remedy: What to do next, in a sentence.
        facts: The numbers and names as they may be shown, the wait and the reset.
        violated: Names of the policies that refused, as in ``RateLimit-Policy``.
        transient: Of credits: it would pass if the calls in progress ended unused.
        line: The billing line.
        plan: The caller's plan (S0.21).
        headers: All fields but those that describe a body: limits, ``Retry-After``, ``Cache-Control``, the challenge.
            Last: what stands before them is all that a body says.
    """

    reason: Reason
    status: int
    type: str
    title: str
    detail: str
    remedy: str
    facts: Facts
    violated: tuple[str, ...] = ()
    transient: bool | None = None
    line: str | None = None
    plan: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def code(self) -> str:
        """Stable, for programs."""
        return self.reason.value

    @property
    def retry_after_s(self) -> int | None:
        """Whole seconds until a retry may pass; None when waiting is not known to help."""
        return self.facts.wait_s


def answer(
    refusal: Refusal,
    decision: Decision | None,
    *,
    unit: Unit,
    line: str = "",
    plan: str | None = None,
    allowance_status: Literal[402, 429] = 429,
    options: AnswerOptions = DEFAULT_OPTIONS,
    jitter: Jitter = random.randint,
) -> Answer:
    """
    Answer *refusal*.

    Args:
        refusal: Why the call may not run.
        decision: What the store decided, for the limits and its clock; None if it was not asked.
        unit: The unit of the route's amounts.
        line: The route's billing line.
        plan: The caller's plan, where it is known.
        allowance_status: What the allowance that refused answers on this route.
        options: The application's choices.
        jitter: Draws short waits; tests pass their own.

    ``Retry-After`` is a whole number of seconds rounded up, from 1, and never earlier than the ``t`` of the limit
    that refused. Absent, it means that nobody knows a wait that helps. All refusals are ``Cache-Control: no-store``.

    Source: DESIGN "Admission", RFC 9110 sections 10.2.3 and 15.5, RFC 6585 section 4.
    """
    reason = refusal.reason
    row = _TABLE[reason]
    status = _status(refusal, row, allowance_status, options)
    facts = _facts(refusal, decision, unit, row, jitter)
    own_words = refusal.detail if reason in _OWN_WORDS and refusal.level != "global" else None
    transient = refusal.transient if reason is _CREDITS else None
    said = _said(facts, status, options.type_base, own_words, transient, line or None, plan)
    return build(Answer, (*said[:11], (*_headers(refusal, decision, unit, status, facts.wait_s, options),)))


# A flood is refused in the same words again and again: their numbers change once a second, if at all.
@lru_cache(maxsize=512)
def _said(
    facts: Facts,
    status: int,
    type_base: str,
    own_words: str | None,
    transient: bool | None,
    line: str | None,
    plan: str | None,
) -> tuple[object, ...]:
    """All of an `Answer` but its header fields."""
    reason = facts.reason
    problem_type, title = _type(reason, status, type_base)
    detail, remedy = own_words or sentences.detail(facts), sentences.remedy(facts)
    violated = (facts.name,) if reason in _QUOTAS else ()
    return reason, status, problem_type, title, detail, remedy, facts, violated, transient, line, plan


def _status(refusal: Refusal, row: _Row, allowance_status: int, options: AnswerOptions) -> int:
    if refusal.reason is _ALLOWANCE:
        return allowance_status
    if refusal.reason is _CONCURRENCY:
        return options.global_status if refusal.level == "global" else options.caller_status
    return row.status


def _type(reason: Reason, status: int, type_base: str) -> tuple[str, str]:
    """The draft's types where they fit, each with one title; else our own."""
    if reason in _QUOTAS and status == 429:
        return QUOTA_EXCEEDED, "Quota exceeded"
    if reason in (Reason.CONCURRENCY, Reason.UPSTREAM):
        return REDUCED_CAPACITY, "Temporary reduced capacity"
    return type_base + reason.value.replace("_", "-"), _TABLE[reason].title


def _headers(
    refusal: Refusal,
    decision: Decision | None,
    unit: Unit,
    status: int,
    wait_s: int | None,
    options: AnswerOptions,
) -> Fields:
    fields: Fields = []
    if decision is not None:
        fields = limit_fields(decision, unit, options.names, failing=refusal.name)
    if wait_s is not None:
        fields += retry_after_field(wait_s, options.names)
    fields.append((b"cache-control", b"no-store"))
    if status == 401 and options.challenge is not None:
        fields.append((b"www-authenticate", options.challenge.strip().encode("ascii")))
    return fields


class _Case(NamedTuple):
    """What waits are made of: the limit that refused, if one did, and the store's time, if it was asked."""

    refusal: Refusal
    window: WindowState | None
    now: float | None
    jitter: Jitter

    @property
    def hopeless(self) -> bool:
        """Whether it asks for more than there can be at once, so that no wait helps."""
        required, limit = self.refusal.required, self.refusal.limit
        return limit is not None and (1 if required is None else required) > limit


def _facts(refusal: Refusal, decision: Decision | None, unit: Unit, row: _Row, jitter: Jitter) -> Facts:
    reason = refusal.reason
    window = now = None
    if decision is not None:
        now = decision.now
        window = _refusing(refusal, decision.windows)
    case: _Case = build(_Case, (refusal, window, now, jitter))
    numbers = _NO_NUMBERS
    # A pool of everybody's shows what the operator can carry and what others use of it: neither is the caller's.
    if reason in MONEY:
        numbers = _money(refusal, unit)
    elif reason in _COUNTED and not (reason is _CONCURRENCY and refusal.level == "global"):
        numbers = _counts(refusal, window)
    # Beginning anew helps nobody where the whole of it is too little.
    hopeless = case.hopeless
    reset = None if hopeless and reason is _ALLOWANCE else _moment(refusal.resets_at)
    name = safe_name(refusal.name)
    return build(Facts, (reason, name, *numbers[:6], refusal.level, row.wait_s(case), reset, hopeless))


_Number: TypeAlias = str | int | None

_Numbers: TypeAlias = tuple[str | None, _Number, _Number, _Number, _Number, str | None]
"""Those of `Facts`, in its order: unit, required, available, held, limit, used."""

_NO_NUMBERS: _Numbers = (None, None, None, None, None, None)


def _refusing(refusal: Refusal, windows: Sequence[WindowState]) -> WindowState | None:
    """The window that refused; of several of its name, such as a caller's and an address's, one with as little left."""
    name = refusal.name
    named = [window for window in windows if window.name == name]
    if len(named) > 1:
        named.sort(key=lambda window: (window.remaining != refusal.available, window.reset_after_s))
    return named[0] if named else None


def _counts(refusal: Refusal, window: WindowState | None) -> _Numbers:
    if refusal.reason is _CONCURRENCY:
        unit, held = "concurrent-requests", refusal.held
    else:
        unit, held = window.meter if window is not None else "requests", None
    return unit, refusal.required, refusal.available, held, refusal.limit, None


def _money(refusal: Refusal, unit: Unit) -> _Numbers:
    available, used = refusal.available, None
    if refusal.limit is not None and available is not None:
        # What is left of an allowance is never negative; what was used may exceed a limit that was cut (S4.3, S4.4).
        used = unit.text(refusal.limit - available - (refusal.held or 0))
        available = max(0, available)
    required, left, held, limit = (
        None if parts is None else unit.text(parts)
        for parts in (refusal.required, available, refusal.held, refusal.limit)
    )
    return unit.name, required, left, held, limit, used


def _moment(epoch_s: float | None) -> str | None:
    """RFC 3339, rounded up to a whole second; None where there is none, or none that a calendar has."""
    if epoch_s is None:
        return None
    try:
        return f"{datetime.fromtimestamp(ceil(epoch_s), UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (OverflowError, ValueError, OSError):
        return None


def _never(_: _Case) -> int | None:
    return None


def _short(case: _Case) -> int | None:
    return case.jitter(*SHORT_WAIT_S)


def _outage(case: _Case) -> int | None:
    return case.jitter(*OUTAGE_WAIT_S)


def _pool(case: _Case) -> int | None:
    return None if case.hopeless else _short(case)


def _credits(case: _Case) -> int | None:
    return _short(case) if case.refusal.transient else None


def _exact(case: _Case) -> int | None:
    """The wait that the refusal names, or until its reset; at least a second."""
    refusal = case.refusal
    seconds = refusal.retry_after_s
    if seconds is None and refusal.resets_at is not None and case.now is not None:
        seconds = refusal.resets_at - case.now
    wait_s = None if seconds is None else whole_seconds(seconds)
    return None if wait_s is None else max(1, wait_s)


def _window(case: _Case) -> int | None:
    """As `_exact`, and never before the moment at which the limit's own field promises more."""
    wait_s = _exact(case)
    more_s = None if case.window is None else whole_seconds(case.window.reset_after_s)
    if wait_s is None:
        return None
    return wait_s if more_s is None else max(wait_s, more_s)


def _allowance(case: _Case) -> int | None:
    return None if case.hopeless else _exact(case)


class _Row(NamedTuple):
    """One reason: its status, the title of our own type, and the wait."""

    status: int
    title: str
    wait_s: Callable[[_Case], int | None]


_TABLE: Mapping[Reason, _Row] = {
    Reason.UNAUTHENTICATED: _Row(401, "Not authenticated", _never),
    Reason.IDENTITY_DOWN: _Row(503, "Identity unavailable", _outage),
    Reason.PAYER: _Row(503, "Payer unresolved", _never),
    Reason.KEY_MISSING: _Row(400, "Idempotency key missing", _never),
    Reason.KEY_INVALID: _Row(400, "Idempotency key malformed", _never),
    Reason.BODY: _Row(413, "Body too large to be fingerprinted", _never),
    Reason.REPLAYED: _Row(409, "Call made before", _never),
    Reason.IN_FLIGHT: _Row(409, "Call in progress", _short),
    Reason.FINGERPRINT: _Row(422, "Idempotency key reused", _never),
    Reason.POLICY: _Row(403, "Not permitted", _never),
    Reason.UPSTREAM: _Row(503, "Temporary reduced capacity", _exact),
    Reason.CONCURRENCY: _Row(429, "Too many calls at once", _pool),
    Reason.EXCEEDS_LIMIT: _Row(429, "Quota exceeded", _never),
    Reason.RATE_LIMIT: _Row(429, "Quota exceeded", _window),
    Reason.ALLOWANCE: _Row(429, "Allowance spent", _allowance),
    Reason.CREDITS: _Row(402, "Insufficient credits", _credits),
    Reason.STORE_DOWN: _Row(503, "Metering unavailable", _outage),
    Reason.ENDED: _Row(409, "Call ended", _never),
}
