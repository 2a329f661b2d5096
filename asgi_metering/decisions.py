"""
Decisions: what a store answers when it is asked to admit a call.

A refusal is an answer here, with everything a caller may be told about it; the edge turns it into a status.
Knows nothing of HTTP and nothing of how a decision was reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from asgi_metering.receipts import Receipt

__all__ = ["MONEY", "Decision", "Reason", "Refusal", "WindowState"]


class Reason(StrEnum):
    """
    Why a call was refused, in the order in which reasons are looked for; the first one found is reported.

    Source: DESIGN "Admission".
    """

    # That of its text, as its equality is: an enum's own is a function of Python, and refusals are looked up by it.
    __hash__ = str.__hash__

    UNAUTHENTICATED = "unauthenticated"
    IDENTITY_DOWN = "identity_unavailable"
    PAYER = "payer_unresolved"
    KEY_MISSING = "idempotency_key_missing"
    KEY_INVALID = "idempotency_key_invalid"
    BODY = "body_not_fingerprinted"
    REPLAYED = "replayed"
    IN_FLIGHT = "in_flight"
    FINGERPRINT = "fingerprint_mismatch"
    POLICY = "policy"
    UPSTREAM = "upstream_headroom"
    CONCURRENCY = "concurrency"
    EXCEEDS_LIMIT = "exceeds_limit"
    RATE_LIMIT = "rate_limit"
    ALLOWANCE = "allowance"
    CREDITS = "insufficient_credits"
    STORE_DOWN = "store_unavailable"
    ENDED = "call_ended"


class WindowState(NamedTuple):
    """
    One rate limit after the decision: what the RateLimit fields say of it.

    Attributes:
        name: The limit's name, unique on its route.
        limit: What the window allows, in units of *meter*; what a bucket holds.
        remaining: What is left of it now, never negative.
        reset_after_s: Seconds until more becomes available.
        window_s: The window's length in seconds; of a bucket, how long an empty one takes to fill: at that pace nobody
            takes more than flows back.
        meter: What is counted: ``"requests"``, ``"tokens"``...
    """

    name: str
    limit: int
    remaining: int
    reset_after_s: float
    window_s: float
    meter: str


MONEY = frozenset((Reason.ALLOWANCE, Reason.CREDITS))
"""Reasons whose numbers are of somebody's account."""


class Refusal(NamedTuple):
    """
    Why a call was not admitted. Nothing was consumed anywhere.

    Attributes:
        reason: The first reason in `Reason`'s order.
        name: Which limit, pool, allowance or unit refused.
        required: What was asked of it, in its own smallest parts or counts; None where that has no meaning.
        available: What it had, in the same measure.
        held: What live holds keep of it, in the same measure.
        limit: Its size: the limit, the pool's slots, the allowance's amount; None for a wallet.
        retry_after_s: Exact seconds until the same request can pass; None when no time can be told.
        resets_at: Epoch seconds of the next allowance window, where one would help.
        transient: True when it would pass if the holds that live now ended unused.
        level: For concurrency: ``"caller"`` or ``"global"``, the level that is full (S0.42).
        detail: A sentence for a person where the rule has more to say.
    """

    reason: Reason
    name: str
    required: int | None = None
    available: int | None = None
    held: int | None = None
    limit: int | None = None
    retry_after_s: float | None = None
    resets_at: float | None = None
    transient: bool = False
    level: str | None = None
    detail: str | None = None


class Decision(NamedTuple):
    """
    The store's answer to one admission.

    Attributes:
        id: The call's id; also the id of its hold.
        now: The store's time of the decision, epoch seconds.
        refusal: None when admitted.
        held: Smallest parts set aside for the call.
        available: What the paying source has left after this hold, in smallest parts; None when nothing was held.
        source: Which source pays: ``"wallet"`` or the allowance's name; None when nothing was held.
        windows: Every rate limit that was looked at, in policy order.
        stale_calendar: True when the boundaries sent did not cover the store's time: ask again once, around `now`.
        payer: Whose account pays; empty when nothing was held.
        group: Name of the payer object whose account that is; empty for the call's own.
        joined: Another call of its charge key pays, or has paid.
        replay: What the first request of its idempotency key did: this one must not run.
        reply: What that one answered, if it was kept.
        fallback: How it was decided without the store, layer by layer: ``"credits:queue"``, ``"rates:local"``; empty
            where the store decided.
    """

    id: str
    now: float
    refusal: Refusal | None = None
    held: int = 0
    available: int | None = None
    source: str | None = None
    windows: tuple[WindowState, ...] = ()
    stale_calendar: bool = False
    payer: str = ""
    group: str = ""
    joined: bool = False
    replay: Receipt | None = None
    reply: Mapping[str, Any] | None = None
    fallback: tuple[str, ...] = ()

    @property
    def admitted(self) -> bool:
        """Whether the call may run."""
        return self.refusal is None and not self.stale_calendar and self.replay is None
