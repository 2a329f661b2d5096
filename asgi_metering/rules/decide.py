"""
The one door to the rules: an operation, the state and the time in; an answer and the changes out.

Every store goes through here: memory on its whole state, a database on the rows that it loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from asgi_metering.decisions import Decision
from asgi_metering.receipts import GrantReceipt, Posting, Receipt
from asgi_metering.rules import fast_admission, fast_end, outbox
from asgi_metering.rules.admission import admit, grow
from asgi_metering.rules.corrections import backfill, correct_account, refund, reverse_grant
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    Backfill,
    Claim,
    Correct,
    Declare,
    Emit,
    End,
    Grow,
    Operation,
    PostGrant,
    Preview,
    Refund,
    Renew,
    ReverseGrant,
    Share,
    Sweep,
    Undo,
)
from asgi_metering.rules.posting import post_grant
from asgi_metering.rules.readings import share
from asgi_metering.rules.retention import forgotten
from asgi_metering.rules.settlement import end, end_overdue, renew, undo
from asgi_metering.rules.state import AccountKey, Change, Event, SharedReading, State, Table
from asgi_metering.rules.units import declare

__all__ = ["Answer", "clamped", "decided", "paying", "run"]

Answer: TypeAlias = (
    Decision | Receipt | GrantReceipt | Posting | bool | int | tuple[Event, ...] | tuple[SharedReading, ...]
)
"""
Admit, Preview, Grow: Decision. End: Receipt. PostGrant: GrantReceipt. Refund, Correct, Backfill, ReverseGrant: Posting.
Renew, Undo: bool. Claim: events. Share: what is kept of each. Others: rows touched.
"""

OVERDUE_PER_ADMISSION = 20
"""Overdue holds that one admission ends on its way: bounded, so that a crash's aftermath delays nobody for long."""


def run(state: State, operation: Operation, now: float, written: list[Change]) -> Answer:
    """
    Decide *operation* on *state*, apply what it changes, and append it to *written*.

    Args:
        state: The working copy.
        operation: One atomic step.
        now: The store's time. A clock that stepped back is clamped to the largest time seen by the account.
        written: What the store has to write. If the operation raises, nothing of it is here or in *state*,
            except overdue holds that were ended on the way, which stand by themselves.

    Raises:
        MeteringError: The operation is refused as a mistake (see `posting.post_grant`).
    """
    plainly = PLAINLY.get(type(operation))
    if plainly is not None:
        answer = plainly(state, operation, now, written)
        if answer is not None:
            return answer
    return decided(state, operation, now, written)


def decided(state: State, operation: Operation, now: float, written: list[Change]) -> Answer:
    """As `run`, by the general rules alone: for whoever has tried the fast path."""
    kind = type(operation)
    whole = _WHOLE.get(kind)
    if whole is not None:
        return whole(state, operation, now, written)
    before = _BEFORE.get(kind)
    if before is not None:
        now = before(state, operation, now, written)
    answer, changes = _RULES[kind](state, operation, now)
    state.apply(changes)
    written.extend(changes)
    return answer


def _before_admission(state: State, ask: Admit, now: float, written: list[Change]) -> float:
    for source in ask.sources:
        if source.payer:
            return _before_taking(state, paying(ask), now, written)
    # Nearly every call: nobody but its own payer is asked.
    key = (ask.payer, ask.unit)
    account = state.accounts.get(key)
    if account is None:
        return now
    if account.seen_at > now:
        now = account.seen_at
    if account.next_due_at <= now:
        written.extend(end_overdue(state, key, now, OVERDUE_PER_ADMISSION))
    return now


def _before_preview(state: State, ask: Preview, now: float, written: list[Change]) -> float:
    return _before_admission(state, ask.ask, now, written)


def _before_growth(state: State, ask: Grow, now: float, written: list[Change]) -> float:
    hold = state.holds.get(ask.id)
    return now if hold is None else _before_taking(state, {(hold.payer, hold.unit)}, now, written)


def paying(ask: Admit) -> set[AccountKey]:
    """The accounts that *ask* may take from."""
    accounts = {(ask.payer, ask.unit)}
    for source in ask.sources:
        if source.payer:
            accounts.add((source.payer, ask.unit))
    return accounts


def _before_taking(state: State, keys: set[AccountKey], now: float, written: list[Change]) -> float:
    """End what is overdue in the accounts, so that admission sees it; the time, clamped by all of them, is returned."""
    accounts = [account for account in map(state.accounts.get, keys) if account is not None]
    for account in accounts:
        if account.seen_at > now:
            now = account.seen_at
    due = [(account.payer, account.unit) for account in accounts if account.next_due_at <= now]
    for key in sorted(due):
        written.extend(end_overdue(state, key, now, OVERDUE_PER_ADMISSION))
    return now


_Rule: TypeAlias = Callable[[State, Any, float], tuple[Answer, list[Change]]]


def _on_account(rule: Callable[[State, Any, float], tuple[Any, list[Change]]]) -> _Rule:
    """*rule* at a time that its account has not seen a later one than."""

    def at_its_time(state: State, ask: Any, now: float) -> tuple[Answer, list[Change]]:
        return rule(state, ask, clamped(state, (ask.payer, ask.unit), now))

    return at_its_time


def _preview(state: State, ask: Preview, now: float) -> tuple[Answer, list[Change]]:
    decision, _ = admit(state, ask.ask, now)
    return decision, []


def _emit(_: State, ask: Emit, now: float) -> tuple[Answer, list[Change]]:
    return len(ask.events), [(Table.EVENT, key, Event(key, now, told)) for key, told in ask.events]


def clamped(state: State, key: AccountKey, now: float) -> float:
    """*now*, or the latest time that the account has seen: a clock that steps back changes nothing (DESIGN "Time")."""
    account = state.accounts.get(key)
    return now if account is None else max(now, account.seen_at)


_BEFORE: Mapping[type, Callable[[State, Any, float, list[Change]], float]] = {
    Admit: _before_admission,
    Preview: _before_preview,
    Grow: _before_growth,
}

PLAINLY: Mapping[type, Callable[[State, Any, float, list[Change] | None], Answer | None]] = {
    Admit: fast_admission.admit,
    End: fast_end.end,
}
"""What is tried first; None of it is the general rules' to decide."""

# By the operation's class: looking it up is cheaper than asking each in turn, for every call twice.
_RULES: Mapping[type, _Rule] = {
    Admit: admit,
    End: end,
    Renew: renew,
    PostGrant: _on_account(post_grant),
    Preview: _preview,
    Undo: undo,
    Grow: grow,
    ReverseGrant: _on_account(reverse_grant),
    Refund: _on_account(refund),
    Correct: _on_account(correct_account),
    Backfill: _on_account(backfill),
    Declare: declare,
    Share: share,
    Emit: _emit,
}


def _sweep(state: State, ask: Sweep, now: float, written: list[Change]) -> int:
    """End overdue holds account by account, then forget what can no longer matter."""
    before = len(written)
    due = {
        (hold.payer, hold.unit)
        for ids in state.live.values()
        for hold in map(state.holds.__getitem__, ids)
        if hold.expires_at <= now
    }
    left = ask.limit
    for account in sorted(due):
        changes = end_overdue(state, account, clamped(state, account, now), left)
        written.extend(changes)
        left -= sum(1 for table, _, _ in changes if table == Table.HOLD)
        if not left:
            break
    for changes in forgotten(state, ask, now):
        state.apply(changes)
        written.extend(changes)
    return len(written) - before


_WHOLE: Mapping[type, Callable[[State, Any, float, list[Change]], Answer]] = {
    Sweep: _sweep,
    Claim: outbox.claim,
    Acknowledge: outbox.acknowledge,
}
"""Rules of many rows at once: they put them where they belong by themselves."""
