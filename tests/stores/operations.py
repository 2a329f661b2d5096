"""Operations that meet each other: few accounts, calls, grants, windows and slots, so that everything collides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    AllowanceSource,
    Backfill,
    Claim,
    Correct,
    Declare,
    Emit,
    End,
    Grow,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Preview,
    Refund,
    Renew,
    ReverseGrant,
    Share,
    Sweep,
    Undo,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.readings import PARTS
from asgi_metering.rules.state import NEVER, SharedReading

__all__ = ["CLOCK_STEPS_S", "comparable", "operations"]

ACCOUNTS = (("p", "credits"), ("p", "usd"), ("q", "credits"))
CALLS = tuple(f"c{number}" for number in range(10))
GRANTS = tuple(f"g{number}" for number in range(6))
POSTINGS = ("r0", "r1", "c0", "g0")
"""Ids of refunds, corrections and others; some are those of a call or a grant, whose lines are looked up likewise."""

EVENTS = ("e0", "e1", "c0", "c1:late")

CLOCK_STEPS_S = (0.0, 0.25, 1.0, 7.0, 13.0, 45.0, 130.0, -2.0, -40.0)
"""Some within lives and windows, some beyond, some back. Halves and quarters: their sums are exact."""

DAY_S = 100.0
"""A short calendar: its windows come and go within a run."""


def _days(now: float) -> tuple[float, ...]:
    start = now // DAY_S * DAY_S
    return (start - DAY_S, start, start + DAY_S, start + 2 * DAY_S)


def _sources(now: float) -> tuple[tuple[Any, ...], ...]:
    free, trial = AllowanceSource("free", 30, _days(now)), AllowanceSource("trial", 12, _days(now - DAY_S))
    wallet = WalletSource()
    rolls = AllowanceSource("rolls", 25, window_s=2 * DAY_S)
    ours, theirs = {"payer": "p", "group": "platform"}, {"group": "user"}
    return (
        (wallet,),
        (free,),
        (free, wallet),
        (trial, free, wallet),
        (wallet, trial),
        (rolls, wallet),
        (free._replace(split=True), rolls._replace(split=True), WalletSource(overdraft=7, split=True)),
        (free._replace(**ours), WalletSource(**ours), WalletSource(20, **theirs), rolls._replace(**theirs)),
        (WalletSource(15),),
        (),
    )


def _limits(now: float) -> tuple[LimitAsk, ...]:
    return (
        LimitAsk("calls", "k1", WindowKind.FIXED, 6, 20.0),
        LimitAsk("daily", "k2", WindowKind.CALENDAR, 8, DAY_S, boundaries=_days(now)),
        LimitAsk("smooth", "k3", WindowKind.SLIDING, 9, 16.0, 2),
        LimitAsk("tokens", "k4", WindowKind.FIXED, 100, 50.0, 15, "tokens"),
        LimitAsk("smooth tokens", "k5", WindowKind.SLIDING, 100, 32.0, 15, "tokens"),
        LimitAsk("daily tokens", "k6", WindowKind.CALENDAR, 90, DAY_S, 10, "tokens", _days(now)),
        LimitAsk("log", "k7", WindowKind.MOVING, 4, 20.0),
        LimitAsk("bucket", "k8", WindowKind.BUCKET, 5, 3.0, 2, refill=1),
        LimitAsk("tokens in a bucket", "k9", WindowKind.BUCKET, 100, 10.0, 15, "tokens", refill=7),
    )


def _admit(draw: st.DrawFn, now: float) -> Admit:
    payer, unit = draw(st.sampled_from(ACCOUNTS))
    amount = draw(st.integers(0, 40))
    return Admit(
        draw(st.sampled_from(CALLS)),
        payer,
        unit,
        amount,
        draw(st.sampled_from((amount, amount, 0, amount // 2, amount + 1))),
        draw(st.sampled_from(_sources(now))),
        tuple(draw(st.lists(st.sampled_from(_limits(now)), max_size=3, unique=True))),
        draw(st.sampled_from(((), (LeaseAsk("a", "one", 2),), (LeaseAsk("a", "one", 2), LeaseAsk("b", "two", 3))))),
        draw(st.sampled_from((5.0, 20.0, 60.0))),
        draw(st.sampled_from((0.0, 10.0))),
        draw(st.sampled_from((Basis.OBSERVED, Basis.HOLD, Basis.NONE))),
        "chat",
        draw(st.sampled_from(({}, {"caller": "k", "attributes": {"n": [1, None, "é"]}}))),
        draw(st.sampled_from((None, None, None, KeyAsk("k1", window_s=30.0), KeyAsk("k2", _days(now))))),
        draw(st.sampled_from((None, None, None, IdempotencyAsk("i1", "f", 20.0), IdempotencyAsk("i1", "g", 50.0)))),
    )


def _end(draw: st.DrawFn) -> End:
    return End(
        draw(st.sampled_from(CALLS)),
        draw(st.sampled_from((None, 0, 1, 7, 25, 60))),
        draw(st.sampled_from((Basis.USAGE, Basis.OBSERVED))),
        draw(st.booleans()),
        draw(st.sampled_from((EndedBy.CALL, EndedBy.CALL, EndedBy.PERSON))),
        draw(st.sampled_from(({}, {"tokens": 4}, {"tokens": 40}))),
        draw(st.sampled_from((None, {"outcome": "completed"}))),
        draw(st.booleans()),
        draw(st.sampled_from((None, {"status": 200}))),
    )


def _grow(draw: st.DrawFn, now: float) -> Grow:
    to = draw(st.sampled_from((5, 20, 45, 70)))
    call, sources = draw(st.sampled_from(CALLS)), draw(st.sampled_from(_sources(now)))
    return Grow(call, to, draw(st.sampled_from((to, to, 1, 0))), sources)


def _posting(draw: st.DrawFn) -> Operation:
    payer, unit = draw(st.sampled_from(ACCOUNTS))
    posting, event = draw(st.sampled_from(POSTINGS)), draw(st.sampled_from((None, {"n": 3})))
    amount = draw(st.sampled_from((1, 7, 25)))
    call = draw(st.sampled_from((*CALLS, *POSTINGS)))
    return draw(
        st.sampled_from(
            (
                Refund(posting, call, payer, unit, draw(st.sampled_from((None, amount))), "ann", event),
                Refund(posting, call, payer, unit),
                Correct(posting, payer, unit, draw(st.sampled_from((amount, -amount))), "chat", "ann", event),
                Backfill(posting, payer, unit, amount, "chat", "ann", event),
                ReverseGrant(posting, draw(st.sampled_from(GRANTS)), payer, unit, "ann"),
                Declare(((unit, draw(st.sampled_from((0, 6)))), ("usd", 2))),
            )
        )
    )


def _grant(draw: st.DrawFn, now: float) -> PostGrant:
    payer, unit = draw(st.sampled_from(ACCOUNTS))
    return PostGrant(
        draw(st.sampled_from(GRANTS)),
        payer,
        unit,
        draw(st.sampled_from((5, 40, 90))),
        draw(st.sampled_from((0, 1))),
        draw(st.sampled_from((None, None, now + 8.0))),
        draw(st.sampled_from((NEVER, now + 12.0, now + 60.0))),
    )


def _outbox(draw: st.DrawFn) -> Operation:
    return draw(
        st.sampled_from(
            (
                Emit(((draw(st.sampled_from(EVENTS)), {"n": 1}),)),
                Claim(draw(st.integers(1, 3)), 10.0),
                Acknowledge(tuple(draw(st.lists(st.sampled_from(EVENTS), max_size=2)))),
                Sweep(keep_holds_s=draw(st.sampled_from((0.0, 30.0, 1e6)))),
                Sweep(
                    keep_holds_s=1e6,
                    keep_entries_s=draw(st.sampled_from((0.0, 20.0, 150.0))),
                    keep_windows_s=draw(st.sampled_from((0.0, 90.0))),
                    keep_events_s=draw(st.sampled_from((0.0, 30.0))),
                    keep_readings_s=draw(st.sampled_from((0.0, 30.0))),
                ),
            )
        )
    )


def _share(draw: st.DrawFn, now: float) -> Share:
    readings = st.builds(
        SharedReading,
        st.sampled_from(("openai", "openai/a", "anthropic", "no name")),
        st.sampled_from(PARTS),
        st.sampled_from((now, now - 0.25, now - 7.0, now - 45.0, now + 1.0)),
        st.sampled_from(("{}", '{"n":[1,null,"\\u00e9"]}')),
    )
    return Share(tuple(draw(st.lists(readings, max_size=3))))


@st.composite
def operations(draw: st.DrawFn, now: float, longest: int = 6) -> list[Operation]:
    """A sequence of up to *longest* operations at *now*."""
    made: list[Operation] = []
    for kind in draw(st.lists(st.sampled_from("AAAAEEERGGOPPSWUV"), min_size=1, max_size=longest)):
        match kind:
            case "A":
                made.append(_admit(draw, now))
            case "U":
                made.append(Undo(_admit(draw, now), now - draw(st.sampled_from((0.0, 7.0, 60.0)))))
            case "V":
                made.append(Preview(_admit(draw, now)))
            case "S":
                made.append(_share(draw, now))
            case "W":
                made.append(_grow(draw, now))
            case "P":
                made.append(_posting(draw))
            case "E":
                made.append(_end(draw))
            case "R":
                made.append(Renew(draw(st.sampled_from(CALLS)), draw(st.integers(0, 50))))
            case "G":
                made.append(_grant(draw, now))
            case _:
                made.append(_outbox(draw))
    return made


def comparable(answers: Sequence[Any]) -> list[Any]:
    """Answers as values that compare equal when they say the same: errors by class and text."""
    return [(type(answer), str(answer)) if isinstance(answer, Exception) else answer for answer in answers]
