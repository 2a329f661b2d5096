"""Common calls for the fast path and the general rules side by side, and states as values that show any difference."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    End,
    LimitAsk,
    Operation,
    PostGrant,
    SourceAsk,
    WalletSource,
)
from asgi_metering.rules.state import State
from tests.rules.world import WALLET, bucket, calendar, days, fixed, moving, sliding, slots

__all__ = ["ordered", "plain_calls"]


def ordered(state: State) -> dict[str, Any]:
    """Every row of *state*, in the order in which it is kept."""
    return {table: [(key, _ordered(row)) for key, row in getattr(state, table).items()] for table in State.__slots__}


def _ordered(row: Any) -> Any:
    return list(row.items()) if type(row) is dict else list(row) if type(row) is list else row


def _limits(now: float) -> tuple[LimitAsk, ...]:
    tokens = {"name": "tokens", "meter": "tokens", "cost": 7}
    return (
        fixed(40, 20.0),
        fixed(30, 13.0, name="also", key="k2"),
        # Two limits that count under one key.
        fixed(35, 20.0, name="same", key="k"),
        fixed(200, 50.0, key="t", **tokens),
        sliding(60, 16.0, name="smooth", key="s"),
        sliding(300, 32.0, key="st", **tokens),
        calendar(50, now, name="daily", key="d"),
        moving(20, 18.0, name="log", key="m"),
        bucket(9, 25, 5.0, name="bucket", key="b", cost=2),
        bucket(40, 200, 9.0, key="bt", **tokens),
    )


def _sources(now: float) -> tuple[tuple[SourceAsk, ...], ...]:
    free, rolls = AllowanceSource("free", 40, days(now)), AllowanceSource("rolls", 60, window_s=45.0)
    alone = (WALLET,)
    return (alone, alone, alone, (WalletSource(9, "q", "team"),), (free, WALLET), (rolls,), (WALLET, free), ())


@st.composite
def plain_calls(draw: st.DrawFn, now: float) -> list[Operation]:
    """Mostly what the fast path takes: new calls with room and their ends, and grants that keep the account going."""
    made: list[Operation] = []
    for kind in draw(st.lists(st.sampled_from("AAAAEEEEG"), min_size=1, max_size=8)):
        call, payer = f"n{draw(st.integers(0, 60))}", draw(st.sampled_from(("p", "q")))
        if kind == "G":
            ends = draw(st.sampled_from((float("inf"), now + 60.0)))
            grant = PostGrant(call, payer, "credits", draw(st.sampled_from((20, 500))), draw(st.integers(0, 1)))
            made.append(grant._replace(expires_at=ends))
        elif kind == "A":
            amount = draw(st.sampled_from((0, 5, 5, 18)))
            sources = draw(st.sampled_from(_sources(now)))
            limits = draw(st.lists(st.sampled_from(_limits(now)), max_size=3))
            leases = draw(st.sampled_from(((), (slots(30),), (slots(30), slots(30), slots(20, "other", "global")))))
            amount = amount if sources else 0
            facts = draw(st.sampled_from(({}, {"caller": "k"})))
            made.append(
                Admit(call, payer, "credits", amount, amount, sources, tuple(limits), leases, 60.0, line="l")._replace(
                    facts=facts
                )
            )
        else:
            amount = draw(st.sampled_from((None, 0, 3, 5, 5, 18)))
            actual = draw(st.sampled_from(({}, {"tokens": 4}, {"tokens": 11, "other": 3})))
            event = draw(st.sampled_from((None, {"outcome": "completed"})))
            by = draw(st.sampled_from((EndedBy.CALL, EndedBy.PERSON)))
            made.append(End(call, amount, Basis.USAGE, draw(st.booleans()), by, actual, event))
    return made
