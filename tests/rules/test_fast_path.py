"""
The fast path beside the general rules: what it takes, what it leaves to them, and that nobody can tell which it was.

It says again what the rules say elsewhere. So every sequence of operations is run twice, with it and without, and must
give equal answers, equal changes in equal order, and equal states down to the order of their rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import MeteringError
from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules import decide, fast_admission, fast_end
from asgi_metering.rules.decide import decided, run
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    AllowanceSource,
    End,
    IdempotencyAsk,
    KeyAsk,
    Operation,
    PostGrant,
    ReverseGrant,
    Sweep,
    WalletSource,
)
from asgi_metering.rules.state import Change, State
from tests.rules.side_by_side import ordered, plain_calls
from tests.rules.world import DAY_S, WALLET, World, calendar, days, fixed, imbalances, sliding, slots
from tests.stores.operations import CLOCK_STEPS_S, comparable, operations

SEQUENCES = 50
"""Of some forty operations each: a few seconds."""


class Both:
    """A state with the fast path and one without."""

    def __init__(self) -> None:
        self.fast, self.general = State(), State()
        self.now = 1_000.0

    def run(self, *batch: Operation) -> list[Any]:
        """Run *batch* on both states, compare everything, and return the answers."""
        answers = []
        for operation in batch:
            outcomes = [self._run(how, state, operation) for how, state in ((run, self.fast), (decided, self.general))]
            assert outcomes[0] == outcomes[1], operation
            answers.append(outcomes[0][0])
        assert ordered(self.fast) == ordered(self.general)
        return answers

    def _run(self, how: Callable[..., Any], state: State, operation: Operation) -> tuple[Any, list[Change]]:
        written: list[Change] = []
        try:
            answer = how(state, operation, self.now, written)
        except MeteringError as mistake:
            answer = mistake
        return comparable([answer])[0], written


# -- any sequence --------------------------------------------------------------------------------------------


@pytest.mark.uncounted
@settings(max_examples=SEQUENCES)
@given(st.data())
def test_decide_any_sequence_as_the_general_rules_do(data: st.DataObject) -> None:
    """Whatever is run, plain or not, the fast path answers, writes and keeps what the general rules do."""
    both = Both()
    both.run(PostGrant("g", "p", "credits", 300), PostGrant("h", "q", "credits", 200, 1))
    for _ in range(data.draw(st.integers(1, 8))):
        both.now += data.draw(st.sampled_from((0.0, 0.25, 1.0, *CLOCK_STEPS_S)))
        kind = data.draw(st.sampled_from((plain_calls, plain_calls, operations)))
        both.run(*data.draw(kind(both.now)))
    assert imbalances(both.fast) == []


TOLD = {"outcome": "completed"}
PAID = Admit("c", "p", "credits", 5, 5, (WALLET,), ttl_s=500.0)
RICH = PostGrant("g", "p", "credits", 300)


def test_end_a_call_whose_lines_are_not_at_hand() -> None:
    """A store that loads rows has no lines of the account, and those of this batch alone are new."""
    both = Both()
    both.run(RICH, PAID, PAID._replace(id="d"))
    for state in (both.fast, both.general):
        state.entries.clear()
        state.refs.clear()
    both.run(End("c", 5, Basis.USAGE), End("d", 4, Basis.USAGE))
    assert [line.ref for line in both.fast.entries["p", "credits"]] == ["c", "d"]


def test_end_a_call_that_is_called_like_a_grant() -> None:
    """Lines about one name stay together, whatever else bears it."""
    both = Both()
    both.run(RICH, PAID._replace(id="g"), End("g", 5, Basis.USAGE))
    assert len(both.fast.lines_of(("p", "credits"), "g")) == 2


def test_end_a_call_again_whose_event_was_delivered() -> None:
    """An event that is told again, by a call that was forgotten, is not delivered twice."""
    both = Both()
    both.run(RICH, PAID, End("c", 5, Basis.USAGE, event=TOLD), Acknowledge(("c",)), Sweep(keep_holds_s=0.0))
    both.run(PAID, End("c", 5, Basis.USAGE, event=TOLD))
    assert not both.fast.events


def test_end_a_call_whose_counter_was_forgotten() -> None:
    """A weighted limit is corrected for as long as its window matters."""
    both = Both()
    both.run(RICH, PAID._replace(limits=(fixed(90, 10.0, meter="tokens", cost=7),)))
    both.now += 60.0
    both.run(Sweep(), End("c", 5, Basis.USAGE, actual={"tokens": 3}))
    assert not both.fast.counters


def test_end_a_call_whose_slots_are_gone() -> None:
    """Slots that a sweep has forgotten with their pool are not given back twice, and the end is as of any call."""
    both = Both()
    both.run(RICH, PAID._replace(leases=(slots(2, "a"), slots(2, "b"))))
    for state in (both.fast, both.general):
        del state.leases["a"]
    both.run(End("c", 5, Basis.USAGE))
    assert not both.fast.leases


# -- what it takes, and what it leaves -----------------------------------------------------------------------


CALL = Admit("new", "ada", "credits", 5, 5, (WALLET,), facts={"a": 1})
"""A plain call, of which each test changes one thing."""


@pytest.fixture
def world() -> World:
    """
    Ada has one grant of 100 and a call for 5 in flight, *old*; *held*, without units, keeps a slot; *used* holds 4 of
    the 9 that are free each day.
    """
    world = World()
    world.grant(100)
    world.admit(5, "old", limits=(sliding(90, key="t", meter="tokens", cost=9),), leases=(slots(3),), facts={"a": 1})
    world.admit(0, "held", leases=(slots(3),))
    world.admit(4, "used", sources=(world.free(9),))
    return world


def is_taken(world: World, ask: Admit | End) -> bool:
    """
    Whether the fast path decides *ask*: then it does as the general rules would.

    Where it does not, it has left everything as it was.
    """
    general, before, written = copy.deepcopy(world.state), ordered(world.state), list[Change]()
    way: Callable[..., Any] = fast_admission.admit if isinstance(ask, Admit) else fast_end.end
    answer = way(world.state, ask, world.now, written)
    if answer is None:
        assert ordered(world.state) == before
        assert written == []
        return False
    told: list[Change] = []
    assert answer == decided(general, ask, world.now, told)
    assert written == told
    assert ordered(world.state) == ordered(general)
    return True


def admissions(now: float) -> dict[str, Admit]:
    """By name, the plain calls."""
    three = (fixed(5), fixed(5, key="k2"), fixed(5, key="k3"))
    windows = (fixed(5), sliding(5, key="s"), calendar(5, now, key="d"), fixed(9, key="w", meter="tokens", cost=9))
    free = CALL._replace(amount=0, minimum=0, sources=())
    day, rolls = AllowanceSource("free", 9, days(now)), AllowanceSource("trial", 9, window_s=50.0)
    return {
        "three limits, a slot and units": CALL._replace(limits=three, leases=(slots(3),)),
        "units": CALL,
        "at least": CALL._replace(minimum=0),
        "nothing yet": CALL._replace(amount=0, minimum=0),
        "all there is": CALL._replace(amount=95, minimum=95),
        "overdraft that is not needed": CALL._replace(sources=(WalletSource(50),)),
        "somebody else's wallet": CALL._replace(payer="bob", sources=(WalletSource(0, "ada", "team"),)),
        "its own wallet by name": CALL._replace(sources=(WalletSource(0, "ada", "team", True),)),
        "an allowance": CALL._replace(sources=(day,)),
        "an allowance of a window that rolls": CALL._replace(sources=(rolls,)),
        "an allowance before the wallet": CALL._replace(sources=(day, WALLET)),
        "an allowance for nothing yet": CALL._replace(sources=(day,), amount=0, minimum=0),
        "a wallet before an allowance": CALL._replace(sources=(WALLET, day)),
        "somebody else's allowance": CALL._replace(payer="bob", sources=(day._replace(payer="ada", group="team"),)),
        "an allowance that could share": CALL._replace(sources=(day._replace(split=True),)),
        "every kind of window": CALL._replace(limits=windows),
        "limits alone": free._replace(limits=three),
        "limits of a stranger": free._replace(payer="eve", limits=three),
        "slots alone": free._replace(leases=(slots(3), slots(1, "other", "global"))),
        "nothing": free,
    }


@pytest.mark.parametrize("name", admissions(0.0))
def test_take_a_plain_call(world: World, name: str) -> None:
    """The fast path decides what is common, so that no common call silently goes the long way (DESIGN 9)."""
    assert is_taken(world, admissions(world.now)[name])


def test_take_a_call_of_the_grant_that_is_spent_first(world: World) -> None:
    """Of several grants, the one that is next in burn order pays, if it has enough."""
    world.grant(4, "spent", priority=-2)
    world.end(world.admit(4).id, 4)
    world.grant(30, "first", priority=-1)
    world.grant(30, "later", priority=-1, starts_in=50)
    assert is_taken(world, CALL._replace(amount=30, minimum=30))
    assert world.spent("gift", "first", "later") == ((0, 5, 0), (0, 30, 0), (0, 0, 0))
    assert not is_taken(world, CALL._replace(id="another", amount=96, minimum=1))


def odd_admissions(now: float) -> dict[str, Admit]:
    """By why they are not plain: calls in the world of `world`."""
    free, share = AllowanceSource("free", 9, days(now)), WalletSource(split=True)
    past = AllowanceSource("free", 9, days(now - 9 * DAY_S))
    stale = calendar(5, now - 9 * DAY_S)
    return {
        "charge key": CALL._replace(charge_key=KeyAsk("k", window_s=9.0)),
        "idempotency key": CALL._replace(idempotency=IdempotencyAsk("i", "f")),
        "repeat": CALL._replace(id="old"),
        "allowance that has too little": CALL._replace(amount=6, minimum=1, sources=(free, WALLET)),
        "allowance that is used up": CALL._replace(amount=0, minimum=0, sources=(free._replace(limit=4),)),
        "allowance of an unknown account": CALL._replace(payer="eve", sources=(free,)),
        "allowance of another time": CALL._replace(sources=(past,)),
        "another payer behind": CALL._replace(sources=(WALLET, WalletSource(0, "bob"))),
        "split": CALL._replace(sources=(share, share)),
        "no source": CALL._replace(sources=()),
        "no source for the least": CALL._replace(sources=(), amount=0, minimum=1),
        "more at least than at most": CALL._replace(minimum=6),
        "less than nothing": CALL._replace(minimum=-1),
        "too much": CALL._replace(amount=MAX_AMOUNT + 1),
        "too little left": CALL._replace(amount=96, minimum=1),
        "overdraft": CALL._replace(amount=96, minimum=96, sources=(WalletSource(50),)),
        "a debt to come that is less than nothing": CALL._replace(sources=(WalletSource(-50),)),
        "no account": CALL._replace(payer="eve"),
        "somebody else without an account": CALL._replace(sources=(WalletSource(0, "eve"),)),
        "two limits of one key": CALL._replace(limits=(fixed(5), fixed(7))),
        "window without room": CALL._replace(limits=(fixed(5, cost=6),)),
        "other window without room": CALL._replace(limits=(sliding(5, key="s", cost=6),)),
        "stale calendar": CALL._replace(limits=(stale,)),
        "pool without room": CALL._replace(leases=(slots(2),)),
        "pool of nobody": CALL._replace(leases=(slots(0, "other"),)),
    }


@pytest.mark.parametrize("why", odd_admissions(0.0))
def test_leave_a_call_that_is_not_plain(world: World, why: str) -> None:
    """What is not plain is left to the general rules, untouched."""
    assert not is_taken(world, odd_admissions(world.now)[why])


# -- the same, by what the account has come to ---------------------------------------------------------------


def _owe(world: World) -> None:
    world.admit(5, "another")
    world.end("another", 120)


def _begin_and_lapse(world: World) -> None:
    world.grant(10, "short", ends_in=20)
    world.wait(20)


ACCOUNTS: dict[str, Callable[[World], object]] = {
    "clock stepped back": lambda world: world.wait(-1),
    "call overdue": lambda world: world.wait(60),
    "grant lapses": _begin_and_lapse,
    "debt": _owe,
}


@pytest.mark.parametrize("why", ACCOUNTS)
def test_leave_a_call_of_an_account_that_is_not_plain(world: World, why: str) -> None:
    """An account that is to be looked at for itself is the general rules', whoever's call it pays for."""
    ACCOUNTS[why](world)
    assert not is_taken(world, CALL)
    if why != "debt":
        assert not is_taken(world, CALL._replace(sources=(world.free(9),)))
    assert not is_taken(world, CALL._replace(payer="bob", sources=(WalletSource(0, "ada"),)))


@pytest.mark.parametrize("seconds", [-1, 60])
def test_leave_a_call_whose_own_account_is_not_plain(seconds: float) -> None:
    """Nor is the call's own account, where another one pays."""
    world = World()
    world.grant(100, payer="bob")
    world.wait(1)
    world.grant(100)
    world.admit(5)
    world.wait(seconds)
    assert not is_taken(world, CALL._replace(sources=(WalletSource(0, "bob"),)))
    assert is_taken(world, CALL._replace(payer="eve", sources=(WalletSource(0, "bob"),)))


# -- ends ----------------------------------------------------------------------------------------------------

PLAIN_ENDS = {
    "all": End("old", 5, Basis.USAGE, event={"b": 2}, actual={"tokens": 4}),
    "all without an event": End("old", 5, Basis.USAGE),
    "less": End("old", 2, Basis.OBSERVED, True),
    "nothing": End("old", 0, Basis.USAGE, failed=True),
    "release": End("old", None, actual={"other": 4}),
    "a person's": End("old", 5, Basis.HOLD, by=EndedBy.PERSON, event={}),
    "of an allowance": End("used", 4, Basis.USAGE, event={"b": 2}),
    "of an allowance in part": End("used", 1, Basis.USAGE),
    "of an allowance for nothing": End("used", 0, Basis.USAGE),
    "of an allowance, given back": End("used", None),
    "of a slot": End("held", None, event={"b": 2}),
    "of a slot for nothing": End("held", 0, Basis.USAGE),
}


@pytest.mark.parametrize("name", PLAIN_ENDS)
def test_take_a_plain_end(world: World, name: str) -> None:
    """The fast path decides what is common, so that no common end silently goes the long way (DESIGN 9)."""
    assert is_taken(world, PLAIN_ENDS[name])


ODD_ENDS = {
    "unknown": End("nobody", 5),
    "more than held": End("old", 6),
    "more than held of an allowance": End("used", 12, Basis.USAGE),
    "charge for nothing held": End("held", 1),
    "less than nothing": End("old", -1),
    "half a part": End("old", 2.5),  # type: ignore[arg-type]
    "truth": End("old", True),
}


@pytest.mark.parametrize("why", ODD_ENDS)
def test_leave_an_end_that_is_not_plain(world: World, why: str) -> None:
    """What is not plain is left to the general rules, untouched."""
    assert not is_taken(world, ODD_ENDS[why])


def _reverse(world: World) -> None:
    world.run(ReverseGrant("back", "gift", "ada", "credits"))


def _hold_again(world: World, amount: int, **more: Any) -> None:
    world.end("old", None)
    world.run(Sweep(keep_holds_s=0))
    world.admit(amount, "old", **more)


def _lapse_before(world: World) -> None:
    world.grant(10, "short", ends_in=20, priority=-1)
    _hold_again(world, 7)
    world.wait(20)
    world.admit(1)


HOLDS: dict[str, Callable[[World], object]] = {
    **{why: step for why, step in ACCOUNTS.items() if why != "call overdue"},
    "ended": lambda world: world.end("old", 5),
    "in doubt": lambda world: (world.wait(60), world.admit(1)),
    "charge key": lambda world: _hold_again(world, 5, charge_key=KeyAsk("k", window_s=9.0)),
    "idempotency key": lambda world: _hold_again(world, 5, idempotency=IdempotencyAsk("i", "f")),
    "two parts": lambda world: (world.grant(2, "first", priority=-1), _hold_again(world, 5)),
    "grant is spent": lambda world: (world.grant(5, "first", priority=-1), _hold_again(world, 5)),
    "grant has lapsed": _lapse_before,
    "grant was taken back": _reverse,
}


@pytest.mark.parametrize("why", HOLDS)
def test_leave_an_end_of_what_is_not_plain(world: World, why: str) -> None:
    """Whatever has become of the call, its account or its grant meanwhile is the general rules'."""
    HOLDS[why](world)
    assert not is_taken(world, End("old", 5, Basis.USAGE))


@pytest.mark.parametrize("call", ["old", "used", "held"])
def test_leave_an_end_of_any_call_where_the_clock_stepped_back(world: World, call: str) -> None:
    """Whatever was held, at a time before the account's last the general rules say when it ends (DESIGN "Time")."""
    world.wait(-1)
    assert not is_taken(world, End(call, 0, Basis.USAGE))


@pytest.mark.parametrize("wrong", [{"event": 3}, {"actual": 3}, {"event": {}, "basis": "usage"}], ids=str)
def test_write_nothing_of_an_end_that_fails(world: World, wrong: dict[str, Any]) -> None:
    """An end that is a mistake of whoever asks leaves everything as it was: one step, all or nothing."""
    before = ordered(world.state)
    with pytest.raises((TypeError, AttributeError)):
        fast_end.end(world.state, End("old", 5, Basis.USAGE)._replace(**wrong), world.now)
    assert ordered(world.state) == before


def test_leave_an_end_of_a_window_that_is_gone(world: World) -> None:
    """Where the window is not at hand, the general rules say what that means."""
    world.state.allowances.clear()
    assert not is_taken(world, End("used", 4, Basis.USAGE))


def test_leave_an_end_of_a_window_beside_a_grant_that_lapses(world: World) -> None:
    """Whoever writes to the account lets lapse what is over, whatever paid."""
    _begin_and_lapse(world)
    assert not is_taken(world, End("used", 4, Basis.USAGE))


def test_leave_an_end_of_what_is_held_as_debt_to_come(world: World) -> None:
    """A hold beyond what was there has nothing to settle from."""
    world.admit(8, "dry", payer="bob", sources=(WalletSource(9),))
    assert not is_taken(world, End("dry", 8, Basis.USAGE))


def test_run_tries_the_fast_path_first(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """What every store calls goes the short way where there is one."""

    def astray(*_: Any) -> None:
        raise AssertionError("the general rules were asked")

    monkeypatch.setattr(decide, "decided", astray)
    assert world.run(CALL).admitted
    assert world.run(End("new", 5, Basis.USAGE)).applied
    with pytest.raises(AssertionError):
        world.run(End("new", 5, Basis.USAGE))
