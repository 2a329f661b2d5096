"""
Whatever is done to accounts, in whatever order and at whatever times: the books balance after every step.

A Hypothesis machine runs every operation, with repeats, opposites, late ends, expiries and clocks that step back,
and after each step proves what must always hold (S3.4, S3.12, S3.13, X.7).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asgi_metering.decisions import Decision, Reason
from asgi_metering.errors import AmountError, ConfigurationError, IdempotencyConflictError
from asgi_metering.receipts import Basis, EndedBy, Part, Posting, Receipt
from asgi_metering.rules.calendars import Period, boundaries
from asgi_metering.rules.corrections import charged
from asgi_metering.rules.hold import is_live
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
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Preview,
    Refund,
    Renew,
    ReverseGrant,
    Share,
    SourceAsk,
    Sweep,
    Undo,
    WalletSource,
)
from asgi_metering.rules.readings import PARTS
from asgi_metering.rules.settlement import end_overdue
from asgi_metering.rules.state import NEVER, Account, Hold, SharedReading, State
from tests.rules.world import (
    DAY_S,
    WALLET,
    World,
    bucket,
    calendar,
    days,
    fixed,
    imbalances,
    moving,
    sliding,
    slots,
    snapshot,
)

PAYERS = ("ada", "bob")
CALLS = tuple(f"c{number}" for number in range(12))
COUNTED = ("q0", "q1", "q2")
"""Calls that limits count, and that may take tokens."""
GRANTS = tuple(f"g{number}" for number in range(8))
PERIODS = {"n": Period.MINUTE, "h": Period.HOUR, "d": Period.DAY, "w": Period.WEEK, "o": Period.MONTH, "y": Period.YEAR}
"""Of calendar limits, by their keys: in a zone whose clock changes."""
LIMITS = {"k": 5, "s": 6, "m": 4, **{key: 4 + number for number, key in enumerate(PERIODS)}}
"""The limit of each counter that counts requests: it is never exceeded."""
WINDOW_S, REFILL, BURST = 60.0, 3, 4
"""Of the log, "m", and of the bucket, "b"."""
KINDS = ("k", "s", "m", "b", "t", "u", *PERIODS)

payers = st.sampled_from(PAYERS)
calls = st.sampled_from(CALLS)
anybody = st.sampled_from((*CALLS, *COUNTED))
amounts = st.integers(0, 30)
charges = st.one_of(st.none(), st.integers(0, 40))
postings = st.sampled_from(["r0", "r1", "c0", "g0"])
WANTED = [
    "wallet",
    "overdraft",
    "free",
    "free, wallet",
    "wallet, trial",
    "rolls, wallet",
    "stale, wallet",
    "split free, split rolls, split wallet",
    "split free, split free, split wallet",
    "theirs free, theirs wallet, overdraft",
    "none",
]
wanted = st.sampled_from(WANTED)


class Books(RuleBasedStateMachine):
    """Two payers, a dozen calls that come again and again, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.receipts: dict[str, Receipt] = {}
        self.admitted: dict[str, tuple[Admit, float]] = {}
        # When the log and the bucket let calls in that count, by the store's time.
        self.passed: dict[str, list[tuple[float, str, float]]] = {"m": [], "b": []}

    # -- time ------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.25, 1.0, 10.0, 31.0, 65.0, 400.0, DAY_S, 33 * DAY_S]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.world.wait(seconds)

    @rule(seconds=st.sampled_from([1.0, 45.0]))
    def step_back(self, seconds: float) -> None:
        """The store's clock is set back."""
        self.world.wait(-seconds)

    # -- grants ----------------------------------------------------------------------------------------------

    @rule(
        grant=st.sampled_from(GRANTS),
        payer=payers,
        amount=st.integers(0, 50),
        priority=st.integers(-1, 1),
        starts_in=st.sampled_from([None, -5.0, 0.0, 40.0]),
        lasts=st.sampled_from([30.0, 100.0, NEVER]),
    )
    def give(self, grant: str, payer: str, amount: int, priority: int, starts_in: float | None, lasts: float) -> None:
        """Units are given, once per id; the same id with another body changes nothing."""
        world = self.world
        before = snapshot(world.state)
        known = world.state.grant((payer, "credits"), grant)
        begins = None if starts_in is None else world.now + starts_in
        ask = PostGrant(grant, payer, "credits", amount, priority, begins, world.now + (starts_in or 0.0) + lasts)
        try:
            receipt = world.run(ask)
        except (IdempotencyConflictError, ConfigurationError):
            assert snapshot(world.state) == before
            return
        assert receipt.applied is (known is None)
        assert 0 <= receipt.paid_debt <= amount

    @rule(grant=st.sampled_from(GRANTS), payer=payers)
    def give_again(self, grant: str, payer: str) -> None:
        """The same grant again changes nothing."""
        known = self.world.state.grant((payer, "credits"), grant)
        if known is None:
            return
        before = snapshot(self.world.state)
        again = PostGrant(
            grant, payer, "credits", known.amount, known.priority, known.effective_at, known.expires_at, known.kind
        )
        assert self.world.run(again).applied is False
        assert snapshot(self.world.state) == before

    # -- admission -------------------------------------------------------------------------------------------

    @rule(
        call=calls,
        payer=payers,
        amount=amounts,
        least=amounts,
        sources=wanted,
        limits=st.lists(st.sampled_from(KINDS), max_size=4, unique=True),
        pools=st.lists(st.sampled_from(["one", "two"]), max_size=2, unique=True),
        grace_s=st.sampled_from([0.0, 20.0]),
        in_doubt=st.sampled_from([Basis.OBSERVED, Basis.HOLD, Basis.NONE]),
    )
    def admit(
        self,
        call: str,
        payer: str,
        amount: int,
        least: int,
        sources: str,
        limits: list[str],
        pools: list[str],
        grace_s: float,
        in_doubt: Basis,
    ) -> None:
        """A call asks for admission: it gets everything or nothing, and never what is not there."""
        world = self.world
        ask = Admit(
            call,
            payer,
            "credits",
            amount,
            min(amount, least),
            tuple(self._sources(sources)),
            tuple(self._limits(limits)),
            tuple(self._pools(pools)),
            30.0,
            grace_s,
            in_doubt,
            facts={"n": 1},
        )
        known = call in world.state.holds
        now = self._prepared({payer, *(source.payer for source in ask.sources if source.payer)})
        before = snapshot(world.state)
        foreseen = world.run(Preview(ask))
        assert snapshot(world.state) == before
        decision = world.run(ask)
        assert decision == foreseen
        assert isinstance(decision, Decision)
        if known or not decision.admitted:
            assert snapshot(world.state) == before
            self._explains(ask, decision)
            return
        assert decision.now == now
        self.admitted[call] = ask, now
        self._note(ask, now)
        assert not amount or ask.minimum <= decision.held <= amount
        if decision.source == "wallet" and decision.held:
            assert decision.available == self._account(decision.payer).available >= (-9 if "over" in sources else 0)
        for lease in ask.leases:
            live = [row for row in world.state.leases[lease.pool].values() if row.expires_at > now]
            assert len(live) <= lease.limit

    @rule(
        call=st.sampled_from(COUNTED),
        limits=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3, unique=True),
        times=st.integers(1, 6),
        apart_s=st.sampled_from([0.0, 0.25, 5.0, 15.0]),
    )
    def count(self, call: str, limits: list[str], times: int, apart_s: float) -> None:
        """Calls that cost nothing come one after the other, and each limit counts all of them, or none does."""
        world = self.world
        for _ in range(times):
            ask = Admit(call, "ada", "credits", 0, 0, limits=tuple(self._limits(limits)), ttl_s=30.0, grace_s=10.0)
            self._prepared({"ada"})
            known, before = call in world.state.holds, snapshot(world.state)
            decision = world.run(ask)
            assert isinstance(decision, Decision)
            if not decision.admitted or known:
                assert snapshot(world.state) == before
            else:
                self.admitted[call] = ask, decision.now
                self._note(ask, decision.now)
            world.wait(apart_s)

    def _prepared(self, accounts: set[str]) -> float:
        """Do before what an admission into *accounts* ends on its way; answers its time."""
        now = max(self.world.now, *(self._account(each).seen_at for each in accounts))
        for each in sorted(accounts):
            end_overdue(self.world.state, (each, "credits"), now, 100)
        for key, passed in self.passed.items():
            if key not in self.world.state.counters:
                # What is forgotten counts no more, also where the clock steps back behind it.
                passed.clear()
        return now

    def _note(self, ask: Admit, now: float) -> None:
        """Note what was let in at *now*; to the log and the bucket no time is before what they have seen."""
        for limit in ask.limits:
            passed = self.passed.get(limit.key)
            if passed is not None:
                passed.append((max([now, *(at for at, _, _ in passed[-1:])]), ask.id, now))

    def _explains(self, ask: Admit, decision: Decision) -> None:
        refusal = decision.refusal
        if refusal is None:
            return
        assert refusal.available is not None
        assert refusal.available >= 0
        if refusal.retry_after_s is not None:
            assert refusal.retry_after_s > 0
        if refusal.reason in (Reason.CREDITS, Reason.ALLOWANCE):
            assert refusal.required == ask.minimum > refusal.available or not ask.sources or not ask.minimum

    def _sources(self, wanted: str) -> Iterator[SourceAsk]:
        now = self.world.now
        free = AllowanceSource("free", 40, days(now))
        rolls = AllowanceSource("rolls", 20, window_s=300.0)
        offered: dict[str, SourceAsk] = {
            "wallet": WALLET,
            "overdraft": WalletSource(9),
            "free": free,
            "rolls": rolls,
            "trial": AllowanceSource("trial", 10, days(now)),
            "stale": AllowanceSource("free", 40, days(now - 9 * DAY_S)),
            "split free": free._replace(split=True),
            "split rolls": rolls._replace(split=True),
            "split wallet": WalletSource(split=True),
            "theirs free": free._replace(payer="bob", group="platform"),
            "theirs wallet": WalletSource(payer="bob", group="platform"),
        }
        return (offered[name] for name in wanted.split(", ") if name != "none")

    def _limits(self, keys: list[str]) -> Iterator[LimitAsk]:
        offered = {
            "k": fixed(LIMITS["k"], 60.0, key="k"),
            "s": sliding(LIMITS["s"], 60.0, key="s", cost=2),
            "m": moving(LIMITS["m"], WINDOW_S, key="m"),
            "b": bucket(REFILL, BURST, WINDOW_S, key="b"),
            "t": sliding(100, 50.0, key="t", meter="tokens", cost=20),
            "u": bucket(40, 100, 50.0, key="u", meter="tokens", cost=20),
        }
        for key in keys:
            if key in PERIODS:
                edges = boundaries(PERIODS[key], "Europe/Berlin", self.world.now)
                offered[key] = calendar(LIMITS[key], self.world.now, key=key, boundaries=edges)
        return (offered[key] for key in keys)

    def _pools(self, pools: list[str]) -> Iterator[LeaseAsk]:
        return (slots({"one": 1, "two": 2}[pool], pool) for pool in pools)

    # -- growth, and second thoughts --------------------------------------------------------------------------

    @rule(call=calls, to=st.integers(0, 60), least=st.integers(0, 60), sources=wanted)
    def grow(self, call: str, to: int, least: int, sources: str) -> None:
        """A live hold grows to what is asked, or as far as will do; a refusal changes nothing of it."""
        world = self.world
        ask = Grow(call, to, min(to, least), tuple(self._sources(sources)))
        was = world.state.holds.get(call)
        decision = world.run(ask)
        hold = world.state.holds.get(call)
        if was is None or hold is None or hold.receipt is not None:
            assert decision.refusal is not None
            assert decision.refusal.reason is Reason.ENDED
            return
        assert hold.amount >= was.amount
        if decision.admitted:
            assert max(was.amount, ask.minimum) <= decision.held == hold.amount <= max(was.amount, to)
        else:
            assert (hold.amount, hold.parts) == (was.amount, was.parts)

    @rule(call=anybody)
    def undo(self, call: str) -> None:
        """An admission is taken back whole, unless its call has ended."""
        if call not in self.admitted:
            return
        world = self.world
        ask, at = self.admitted.pop(call)
        was = world.state.holds.get(call)
        before = snapshot(world.state)
        done = world.run(Undo(ask, at))
        assert done is (was is None or was.receipt is None)
        for key, passed in self.passed.items():
            self.passed[key] = [each for each in passed if not done or each[1:] != (call, at)]
        if not done:
            assert snapshot(world.state) == before
        for key, counter in world.state.counters.items():
            assert counter.used <= before["counters"][key].used

    # -- corrections -----------------------------------------------------------------------------------------

    def _post(self, ask: Operation) -> Posting | None:
        """A posting applies once; refused, it changes nothing, and repeated neither."""
        world = self.world
        before = snapshot(world.state)
        try:
            posting: Posting = world.run(ask)
        except (AmountError, ConfigurationError, IdempotencyConflictError):
            assert snapshot(world.state) == before
            return None
        if not posting.applied:
            assert snapshot(world.state) == before
            return None
        assert posting.available == self._account(posting.payer).available
        after = snapshot(world.state)
        assert world.run(ask)._replace(applied=True, returned=posting.returned, lapsed=posting.lapsed) == posting
        assert snapshot(world.state) == after
        return posting

    @rule(posting=postings, call=calls, payer=payers, amount=st.one_of(st.none(), st.integers(1, 30)))
    def refund(self, posting: str, call: str, payer: str, amount: int | None) -> None:
        """A refund gives back no more than what is left of its charge, and says what of it can be spent again."""
        left, _ = charged(self.world.state.lines_of((payer, "credits"), call))
        done = self._post(Refund(posting, call, payer, "credits", amount))
        if done is not None:
            assert 0 < -done.amount <= left
            assert min(done.returned, done.lapsed) >= 0
            assert done.returned + done.lapsed == -done.amount

    @rule(posting=postings, payer=payers, amount=st.integers(-30, 30))
    def correct(self, posting: str, payer: str, amount: int) -> None:
        """A correction changes what was spent by its amount, and by nothing below zero."""
        was = self._account(payer).settled
        done = self._post(Correct(posting, payer, "credits", amount))
        if done is not None:
            assert self._account(payer).settled == was + amount >= 0

    @rule(posting=postings, payer=payers, amount=st.integers(0, 30))
    def backfill(self, posting: str, payer: str, amount: int) -> None:
        """Work done earlier is charged in full."""
        was = self._account(payer).settled
        done = self._post(Backfill(posting, payer, "credits", amount))
        if done is not None:
            assert self._account(payer).settled == was + amount

    @rule(posting=postings, grant=st.sampled_from(GRANTS), payer=payers)
    def take_back(self, posting: str, grant: str, payer: str) -> None:
        """A grant that is taken back has nothing to spend any more; what was spent of it is owed."""
        was = self._account(payer).settled
        done = self._post(ReverseGrant(posting, grant, payer, "credits"))
        if done is not None:
            row = self.world.state.grant((payer, "credits"), grant)
            assert row is not None
            assert row.free == row.settled == 0
            assert self._account(payer).settled == was
            assert done.amount == -row.reversed

    @rule(scale=st.sampled_from([0, 6]))
    def declare(self, scale: int) -> None:
        """A unit keeps the scale of its first use."""
        known = self.world.state.units.get("credits")
        try:
            assert self.world.run(Declare((("credits", scale),))) == (known is None)
        except ConfigurationError:
            assert known is not None
            assert known.scale != scale

    # -- readings --------------------------------------------------------------------------------------------

    @rule(
        series=st.sampled_from(["openai", "openai/batch", "no name"]),
        part=st.sampled_from(PARTS),
        ago=st.sampled_from([0.0, 0.5, 11.0, 100.0, -5.0]),
    )
    def share(self, series: str, part: str, ago: float) -> None:
        """What is kept of a provider is never older than before, unless that lay ahead of the time (S1.45)."""
        world = self.world
        before = snapshot(world.state)
        known = world.state.readings.get((series, part))
        told = SharedReading(series, part, world.now - ago, "{}")
        try:
            (kept,) = world.run(Share((told,)))
        except ConfigurationError:
            assert series == "no name"
            assert snapshot(world.state) == before
            return
        assert kept == world.state.readings[series, part]
        assert kept.observed_at <= world.now
        assert kept.observed_at >= min(told.observed_at, world.now)
        if known is not None and known.observed_at <= world.now:
            assert kept.observed_at >= known.observed_at

    # -- ends ------------------------------------------------------------------------------------------------

    @rule(call=anybody, observed=st.integers(0, 40))
    def beat(self, call: str, observed: int) -> None:
        """A heartbeat keeps a live hold alive, and nothing else."""
        hold = self.world.state.holds.get(call)
        lives = self.world.run(Renew(call, observed))
        assert lives is (hold is not None and is_live(hold.state))

    @rule(call=anybody, amount=charges, by=st.sampled_from(EndedBy), tokens=st.one_of(st.none(), st.integers(0, 90)))
    def end(self, call: str, amount: int | None, by: EndedBy, tokens: int | None) -> None:
        """Whoever ends a hold first wins; who comes later gets that receipt, and charges at most the difference."""
        world = self.world
        hold = world.state.holds.get(call)
        before = snapshot(world.state)
        actual = {} if tokens is None else {"tokens": tokens}
        receipt = world.run(End(call, amount, Basis.USAGE, by=by, actual=actual, event={"n": 2}))
        assert receipt.known is (hold is not None)
        if hold is None:
            assert snapshot(world.state) == before
            return
        assert receipt.applied is (hold.receipt is None)
        if receipt.applied:
            assert receipt.amount == sum(part.amount for part in receipt.parts) == (amount or 0)
            return
        assert hold.receipt is not None
        assert receipt._replace(applied=True, late=None) == hold.receipt._replace(late=None)
        if hold.receipt.late is not None or by is not EndedBy.CALL or hold.receipt.ended_by is EndedBy.CALL:
            assert snapshot(world.state) == before
        elif hold.receipt.ended_by is EndedBy.POLICY:
            # What a refund has given back is not given back again.
            difference = (amount or 0) - hold.receipt.amount
            assert receipt.late is not None
            assert receipt.late == difference or difference < receipt.late <= 0

    @rule(
        limit=st.sampled_from([1, 3, 500]),
        keep_s=st.sampled_from([120.0, 7 * DAY_S]),
        lines_s=st.sampled_from([0.0, 50.0, 7 * DAY_S]),
        windows_s=st.sampled_from([1.0, 7 * DAY_S]),
    )
    def sweep(self, limit: int, keep_s: float, lines_s: float, windows_s: float) -> None:
        """A sweep ends what is overdue, forgets what is old, and folds old lines."""
        self.world.run(Sweep(limit, keep_s, lines_s, windows_s))
        self.receipts = {call: receipt for call, receipt in self.receipts.items() if call in self.world.state.holds}

    # -- the outbox ------------------------------------------------------------------------------------------

    @rule(event=st.sampled_from(["e0", "e1"]))
    def emit(self, event: str) -> None:
        """Free work appends its event."""
        waits = event not in self.world.state.delivered
        assert self.world.run(Emit(((event, {}),))) == 1
        assert (event in self.world.state.events) is waits

    @precondition(lambda self: self.world.state.events)
    @rule(limit=st.integers(1, 3), acknowledge=st.booleans())
    def deliver(self, limit: int, acknowledge: bool) -> None:
        """A deliverer claims events and perhaps acknowledges them; claimed ones are nobody else's meanwhile."""
        claimed = self.world.run(Claim(limit, 20.0))
        assert len(claimed) <= limit
        ids = {event.id for event in claimed}
        assert not ids & {event.id for event in self.world.run(Claim(100, 20.0))}
        if acknowledge:
            assert self.world.run(Acknowledge(tuple(ids))) == len(ids)

    # -- what must always hold -------------------------------------------------------------------------------

    def _account(self, payer: str) -> Account:
        return self.world.account(payer)

    @invariant()
    def books_balance(self) -> None:
        """Every sum is proven by its rows and by the ledger."""
        assert imbalances(self.world.state) == []

    @invariant()
    def a_hold_ends_once(self) -> None:
        """The first receipt of a hold stays as it was for ever; only what came late is added to it, once."""
        for hold in self.world.state.holds.values():
            assert is_live(hold.state) is (hold.receipt is None)
            if hold.receipt is None:
                assert hold.id not in self.receipts
                continue
            first = self.receipts.setdefault(hold.id, hold.receipt)
            assert hold.receipt._replace(late=None) == first._replace(late=None)
            if first.late is not None:
                assert hold.receipt.late == first.late
            self.receipts[hold.id] = hold.receipt

    @invariant()
    def what_is_held_is_in_its_parts(self) -> None:
        """A hold's amount is that of its parts, whatever became of it."""
        for hold in self.world.state.holds.values():
            assert hold.amount == _total(hold.parts)

    @invariant()
    def no_call_costs_less_than_nothing(self) -> None:
        """What refunds and late ends give back is no more than what was charged, place by place."""
        state = self.world.state
        for place in state.refs:
            if place[:2] not in state.checkpoints:
                amount, parts = charged(state.refs[place])
                assert amount == _total(parts) >= 0

    @invariant()
    def last_windows_are_known(self) -> None:
        """Where an allowance rolls, its last window is found."""
        state = self.world.state
        for series, start in state.latest.items():
            assert (*series, start) in state.allowances

    @invariant()
    def limits_are_never_exceeded(self) -> None:
        """A counter of requests stays within its limit, whatever clocks and corrections do."""
        for key, limit in LIMITS.items():
            counter = self.world.state.counters.get(key)
            assert counter is None or counter.used <= limit

    @invariant()
    def no_window_sees_more_than_its_limit(self) -> None:
        """A log lets so many in within any window, and a bucket what it holds and what has flowed in meanwhile."""
        times = [at for at, _, _ in self.passed["m"]]
        for first, beyond in zip(times, times[LIMITS["m"] :], strict=False):
            assert beyond - first > WINDOW_S
        times = [at for at, _, _ in self.passed["b"]]
        for number, first in enumerate(times):
            for count, last in enumerate(times[number:], 1):
                assert count <= BURST + (last - first) * REFILL / WINDOW_S

    @invariant()
    def slots_belong_to_live_holds(self) -> None:
        """A slot in use names a call that has not ended."""
        state = self.world.state
        for pool, leases in state.leases.items():
            for call, lease in leases.items():
                assert (lease.pool, lease.id) == (pool, call)
                assert call in _live(state)

    @invariant()
    def bounds_are_never_late(self) -> None:
        """No grant begins or lapses, and no hold falls due, before the account says that it should be looked at."""
        for key, account in self.world.state.accounts.items():
            for grant in self.world.state.grants.get(key, {}).values():
                turn = grant.expires_at if grant.begun else grant.effective_at
                assert account.next_change_at <= turn or (grant.begun and turn <= account.seen_at)
            for hold in self.world.state.live_holds(key):
                if _total(hold.parts):
                    assert account.next_due_at <= hold.due_at


def _total(parts: tuple[Part, ...]) -> int:
    return sum(part.amount for part in parts)


def _live(state: State) -> dict[str, Hold]:
    return {hold.id: hold for hold in state.holds.values() if hold.receipt is None}


TestBooks = pytest.mark.uncounted(Books.TestCase)
TestBooks.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
