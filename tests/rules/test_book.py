"""The book: burn order, grants by time, units under a hold, debt, and giving back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.receipts import EntryKind, Part, Source
from asgi_metering.rules.book import Book, burn_order
from asgi_metering.rules.operations import PostGrant, Sweep
from asgi_metering.rules.state import NEVER, Grant
from tests.rules.world import World, imbalances, slots, snapshot

GRANT, SETTLE, EXPIRE, DEBT_PAYMENT, LATE, *_ = EntryKind

ADA = ("ada", "credits")


def from_grants(parts: tuple[Part, ...]) -> list[tuple[str, int]]:
    """(grant, amount) of parts that all come from grants."""
    assert all(part.source is Source.GRANT and part.start == 0.0 for part in parts)
    return [(part.name, part.amount) for part in parts]


# -- burn order ----------------------------------------------------------------------------------------------


def test_burn_by_priority_then_expiry_then_age() -> None:
    """The lower priority number burns first, of equals the one that expires sooner, of equals the older one."""
    rows = [
        Grant("ada", "credits", "first", 1, 0, 0.0, NEVER, 9),
        Grant("ada", "credits", "soon", 1, 5, 0.0, 100.0, 8),
        Grant("ada", "credits", "old", 1, 5, 0.0, 200.0, 1),
        Grant("ada", "credits", "young", 1, 5, 0.0, 200.0, 2),
        Grant("ada", "credits", "last", 1, 6, 0.0, 50.0, 0),
    ]
    for mixed in permutations(rows):
        assert sorted(mixed, key=burn_order) == rows


def test_hold_over_several_grants_in_burn_order() -> None:
    """One hold takes from as many grants as it needs, in burn order, and no more from any than is free."""
    world = World()
    world.grant(10, "late", ends_in=500)
    world.grant(10, "soon", ends_in=100)
    world.grant(10, "first", priority=-1)
    world.grant(10, "never")
    world.admit(25, "c")
    assert from_grants(world.hold("c").parts) == [("first", 10), ("soon", 10), ("late", 5)]
    assert world.spent("first", "soon", "late", "never") == ((0, 10, 0), (0, 10, 0), (0, 5, 0), (0, 0, 0))
    world.admit(8, "d")
    assert from_grants(world.hold("d").parts) == [("late", 5), ("never", 3)]


def test_hold_exactly_what_one_grant_has() -> None:
    """A hold that the first grant covers to the last unit takes no part of the next."""
    world = World()
    world.grant(10, "a")
    world.grant(10, "b")
    world.admit(10, "c")
    assert from_grants(world.hold("c").parts) == [("a", 10)]


def test_settle_parts_in_hold_order_and_free_the_last() -> None:
    """Settlement consumes the hold's parts in their order; what is left is freed from the last backwards."""
    world = World()
    world.grant(10, "a")
    world.grant(10, "b")
    world.grant(10, "c")
    world.admit(30, "call")
    receipt = world.end("call", 14)
    assert from_grants(receipt.parts) == [("a", 10), ("b", 4)]
    assert world.spent("a", "b", "c") == ((10, 0, 0), (4, 0, 0), (0, 0, 0))
    assert receipt.available == world.account().available == 16


def test_free_every_part_on_release() -> None:
    """A released hold leaves its grants as they were."""
    world = World()
    world.grant(10, "a")
    world.grant(10, "b")
    world.admit(15, "call")
    world.end("call", None)
    assert world.spent("a", "b") == ((0, 0, 0), (0, 0, 0))
    assert world.sums() == (20, 0, 0, 0, 0)


# -- grants by time ------------------------------------------------------------------------------------------


def test_begin_a_future_grant_at_its_time() -> None:
    """A grant that begins later is listed at once, spendable from its first instant on, and not before."""
    world = World()
    receipt = world.grant(10, starts_in=100)
    assert receipt.available == 0
    assert world.lines() == [(GRANT, 10)]
    assert world.sums() == (0, 0, 0, 0, 0)
    world.wait(99.999)
    assert world.refused(1).available == 0
    world.wait(0.001)
    assert world.admit(10).admitted
    assert world.sums() == (10, 0, 10, 0, 0)
    assert world.lines() == [(GRANT, 10)]


def test_lapse_what_is_free_at_the_expiry() -> None:
    """At a grant's expiry its free units lapse, as a line of the ledger; a second look lapses nothing more."""
    world = World()
    world.grant(10, "short", ends_in=100)
    world.grant(5, "long")
    world.admit(4, "c")
    world.end("c", 4)
    world.wait(99.999)
    assert world.admit(1, "d").available == 10
    world.end("d", None)
    world.wait(0.001)
    assert world.admit(1, "e").available == 4
    assert world.spent("short", "long") == ((4, 0, 6), (0, 1, 0))
    assert world.lines()[-1] == (EXPIRE, 6)
    world.wait(1000)
    world.end("e", 1)
    assert world.lines().count((EXPIRE, 6)) == 1
    assert world.sums() == (15, 5, 0, 6, 0)


def test_lapse_grants_in_burn_order() -> None:
    """Grants that lapse together are written down in burn order, whatever order the store keeps them in."""
    world = World()
    world.grant(1, "b", ends_in=200)
    world.grant(2, "a", ends_in=100)
    world.grant(3, "z", ends_in=300, priority=-1)
    world.wait(300)
    world.grant(9, "new")
    assert [entry.ref for entry in world.entries()[3:]] == ["z", "a", "b", "new"]


def test_begin_and_lapse_a_grant_that_nobody_looked_at() -> None:
    """A grant that began and ended between two looks counts as granted and as expired."""
    world = World()
    world.grant(10, "passing", starts_in=10, ends_in=20)
    world.wait(50)
    world.grant(1, "new")
    assert world.sums() == (11, 0, 0, 10, 0)
    assert world.lines() == [(GRANT, 10), (EXPIRE, 10), (GRANT, 1)]


def test_spend_units_that_expire_under_a_hold() -> None:
    """Units held before a grant's expiry stay spendable by that hold (DESIGN "Allowances, grants")."""
    world = World()
    world.grant(10, ends_in=100)
    world.admit(8, "c", ttl_s=1000)
    world.wait(100)
    receipt = world.end("c", 8)
    assert from_grants(receipt.parts) == [("gift", 8)]
    assert world.spent("gift") == ((8, 0, 2),)
    assert world.account().available == 0


@pytest.mark.parametrize(("charged", "lapsed"), [(None, 10), (3, 7), (10, 0)])
def test_lapse_what_comes_back_after_the_expiry(charged: int | None, lapsed: int) -> None:
    """Units that a hold gives back after their grant's expiry move to expired, and are no longer spendable."""
    world = World()
    world.grant(10, ends_in=100)
    world.admit(10, "c", ttl_s=1000)
    world.wait(100)
    receipt = world.end("c", charged)
    assert receipt.available == 0
    assert world.spent("gift") == ((charged or 0, 0, lapsed),)
    assert [line for line in world.lines() if line[0] is EXPIRE] == ([(EXPIRE, lapsed)] if lapsed else [])
    assert imbalances(world.state) == []


def test_look_at_grants_only_when_their_time_has_come() -> None:
    """The account knows the next instant at which a grant begins or lapses, and it is exact after each change."""
    world = World()
    assert world.account().next_change_at == NEVER
    world.grant(10, "a", ends_in=100)
    world.grant(10, "b", starts_in=50, ends_in=500)
    world.grant(10, "c")
    begun = world.now
    assert world.account().next_change_at == begun + 50
    world.wait(50)
    world.admit(1)
    assert world.account().next_change_at == begun + 100
    world.wait(50)
    world.admit(1)
    assert world.account().next_change_at == begun + 500
    world.wait(400)
    world.admit(1)
    assert world.account().next_change_at == NEVER


@pytest.mark.uncounted
@given(
    grants=st.lists(
        st.tuples(st.integers(1, 50), st.integers(-1, 1), st.integers(0, 60), st.integers(1, 60)),
        min_size=1,
        max_size=5,
    ),
    overspent=st.integers(0, 80),
    held=st.integers(0, 10),
    looks=st.lists(st.integers(0, 130), max_size=8),
)
def test_hold_the_same_whoever_looks_in_between(
    grants: list[tuple[int, int, int, int]], overspent: int, held: int, looks: list[int]
) -> None:
    """Grants begin, pay debt and lapse at their own times: what an account has does not depend on who looked when."""
    watched, alone = worlds = (World(), World())
    for world in worlds:
        world.grant(10, "seed")
        world.admit(held, "held", ttl_s=10_000)
        world.admit(10 - held, "spent", leases=(slots(1),), ttl_s=10_000)
        world.end("spent", 10 - held + overspent)
        for number, (amount, priority, begins, lasts) in enumerate(grants):
            world.grant(amount, f"g{number}", starts_in=begins, ends_in=begins + lasts, priority=priority)
    begun = alone.now
    for look in sorted(looks):
        watched.now = begun + look
        watched.grant(0, f"look-{len(watched.entries())}")
    for world in worlds:
        world.now = begun + 130
        world.grant(0, "last look")
    assert watched.sums() == alone.sums()
    for number in range(len(grants)):
        assert watched.spent(f"g{number}") == alone.spent(f"g{number}")
    assert imbalances(watched.state) == imbalances(alone.state) == []


# -- more than was held --------------------------------------------------------------------------------------


def test_settle_more_than_held_from_other_grants_in_burn_order() -> None:
    """What exceeds a hold is spent from free grants in burn order, before it becomes debt (S3.7)."""
    world = World()
    world.grant(5, "a")
    world.grant(5, "c", ends_in=500)
    world.admit(5, "call")
    world.grant(4, "b", priority=-1)
    receipt = world.end("call", 12)
    assert from_grants(receipt.parts) == [("c", 5), ("b", 4), ("a", 3)]
    assert receipt.amount == 12
    assert receipt.held == 5
    assert world.sums() == (14, 12, 0, 0, 0)


def test_settle_more_than_held_from_no_more_grants_than_needed() -> None:
    """An overshoot that one grant covers touches no other."""
    world = World()
    world.grant(5, "a")
    world.grant(5, "b")
    world.grant(5, "c")
    world.admit(5, "call")
    receipt = world.end("call", 10)
    assert from_grants(receipt.parts) == [("a", 5), ("b", 5)]
    assert world.spent("c") == ((0, 0, 0),)


def test_settle_more_than_anybody_has_as_debt() -> None:
    """Usage is never lost because a hold was too small: the rest is debt, and available is negative by it (S3.7)."""
    world = World()
    world.grant(10)
    world.admit(10, "c")
    receipt = world.end("c", 25)
    assert receipt.parts == (Part(Source.GRANT, "gift", 0.0, 10), Part(Source.DEBT, "", 0.0, 15))
    assert receipt.available == -15
    assert world.sums() == (10, 25, 0, 0, 15)
    assert world.refused(1).available == 0
    assert imbalances(world.state) == []


def test_settle_exactly_what_is_free_without_debt() -> None:
    """An overshoot that free grants cover to the last unit leaves no debt of zero behind."""
    world = World()
    world.grant(10, "a")
    world.grant(5, "b")
    world.admit(10, "c")
    receipt = world.end("c", 15)
    assert from_grants(receipt.parts) == [("a", 10), ("b", 5)]
    assert world.sums() == (15, 15, 0, 0, 0)


def test_pay_debt_first_with_a_new_grant() -> None:
    """A new grant pays the debt first, as a linked line; the rest of it is free (DESIGN "Allowances, grants")."""
    world = World()
    world.grant(10)
    world.admit(10, "c")
    world.end("c", 25)
    receipt = world.grant(6, "small")
    assert (receipt.paid_debt, receipt.available) == (6, -9)
    receipt = world.grant(20, "large", actor="stripe")
    assert (receipt.paid_debt, receipt.available) == (9, 11)
    assert world.sums() == (36, 25, 0, 0, 0)
    assert world.spent("small", "large") == ((6, 0, 0), (9, 0, 0))
    assert world.lines()[-4:] == [(GRANT, 6), (DEBT_PAYMENT, 6), (GRANT, 20), (DEBT_PAYMENT, 9)]
    assert world.entries()[-1].ref == "large"
    assert imbalances(world.state) == []


def test_pay_debt_with_units_that_come_free() -> None:
    """Units that a hold gives back pay the debt before anybody can hold them again, in burn order."""
    world = World()
    world.grant(10, "a")
    world.grant(10, "b", priority=-1)
    world.admit(12, "big")
    world.admit(8, "other")
    world.end("other", 14)
    assert world.sums() == (20, 14, 12, 0, 6)
    receipt = world.end("big", 1)
    assert receipt.available == 5
    assert world.sums() == (20, 15, 0, 0, 0)
    assert world.lines()[-2:] == [(DEBT_PAYMENT, 6), (SETTLE, 1)]
    assert world.entries()[-2].ref == "b"
    assert world.spent("b", "a") == ((7, 0, 0), (8, 0, 0))
    assert imbalances(world.state) == []


def test_pay_part_of_the_debt_with_what_comes_free() -> None:
    """Where less comes free than is owed, the rest stays debt."""
    world = World()
    world.grant(10, "a")
    world.admit(4, "one")
    world.admit(6, "two")
    world.end("two", 16)
    assert world.end("one", 1).available == -7
    assert world.sums() == (10, 17, 0, 0, 7)


def test_pay_debt_when_a_future_grant_begins() -> None:
    """A future grant pays debt from its first instant on, also if it has lapsed before anybody looked."""
    world = World()
    world.grant(10)
    world.admit(10, "c")
    world.end("c", 25)
    assert world.grant(20, "later", starts_in=10, ends_in=20).paid_debt == 0
    assert world.account().debt == 15
    world.wait(100)
    world.grant(1, "new")
    assert world.sums() == (31, 25, 0, 5, 0)
    assert world.lines()[-3:] == [(DEBT_PAYMENT, 15), (EXPIRE, 5), (GRANT, 1)]


def test_pay_debt_in_the_order_in_which_grants_begin() -> None:
    """Of grants that begin between two looks, the first to begin pays, whatever their priorities."""
    world = World()
    world.grant(1)
    world.admit(1, "d")
    world.end("d", 9)
    world.grant(10, "second", starts_in=20, priority=-5)
    world.grant(10, "first", starts_in=10, priority=5)
    world.wait(60)
    world.grant(1, "new")
    assert world.spent("first", "second") == ((8, 0, 0), (0, 0, 0))


def test_owe_without_ever_having_had_a_grant() -> None:
    """A call that held nothing and used something is charged in full; its account begins with debt (S4.15)."""
    world = World()
    world.admit(0, "c", leases=(slots(1),))
    receipt = world.end("c", 3)
    assert receipt.available == -3
    assert world.sums() == (0, 3, 0, 0, 3)
    assert imbalances(world.state) == []


# -- giving back ---------------------------------------------------------------------------------------------


def overcharged(build: Callable[[World], None], charged: int, then: Callable[[World], None] | None = None) -> World:
    """A world in which the policy ended a call for *charged*, so that its own, lower end gives back."""
    world = World()
    build(world)
    world.admit(10, "c", ttl_s=10, grace_s=0)
    assert world.beat("c", charged)
    world.wait(10)
    world.run(Sweep())
    receipt = world.hold("c").receipt
    assert receipt is not None
    assert receipt.amount == charged
    if then is not None:
        then(world)
    return world


def gives(amount: int = 10, id: str = "gift", **more: Any) -> Callable[[World], None]:  # noqa: A002 -- as in the operation
    """A step that gives units."""

    def step(world: World) -> None:
        world.grant(amount, id, **more)

    return step


def test_give_back_from_the_last_part_backwards() -> None:
    """What was charged too much returns to its sources in reverse of the order in which it was taken."""

    def build(world: World) -> None:
        world.grant(4, "a")
        world.grant(6, "b")

    world = overcharged(build, 9)
    assert world.spent("a", "b") == ((4, 0, 0), (5, 0, 0))
    receipt = world.end("c", 2)
    assert receipt.late == -7
    assert world.spent("a", "b") == ((2, 0, 0), (0, 0, 0))
    assert world.account().available == 8
    assert imbalances(world.state) == []


def test_give_back_to_a_grant_that_was_used_up() -> None:
    """A closed grant that gets units back is open again, and lapses again at its expiry."""
    world = overcharged(gives(ends_in=500), 10)
    assert "gift" in world.state.closed_grants[ADA]
    assert world.account().next_change_at > world.now
    world.end("c", 4)
    assert "gift" in world.state.grants[ADA]
    assert "gift" not in world.state.closed_grants[ADA]
    assert world.admit(6, "d").admitted
    world.end("d", None)
    world.wait(500)
    world.grant(0, "look")
    assert world.sums() == (10, 4, 0, 6, 0)


def test_await_the_expiry_of_a_grant_that_opened_again() -> None:
    """Units that come back to a closed grant lapse in time, also if nothing else was awaited."""

    def forget(world: World) -> None:
        world.grant(5, "other", ends_in=20)
        world.wait(20)
        world.grant(0, "look")
        assert world.account().next_change_at == NEVER

    world = overcharged(gives(ends_in=500), 10, forget)
    world.end("c", 4)
    assert world.account().next_change_at == world.a_grant().expires_at
    world.wait(500)
    assert world.refused(1).available == 0


def test_give_back_to_a_grant_that_expired() -> None:
    """What returns to an expired grant lowers settled and raises expired: it lapses at once."""
    world = overcharged(gives(ends_in=100), 10, lambda world: world.wait(100))
    world.end("c", 4)
    assert world.sums() == (10, 4, 0, 6, 0)
    assert world.lines()[-2:] == [(EXPIRE, 6), (LATE, -6)]
    assert world.account().available == 0
    assert imbalances(world.state) == []


def test_give_back_debt_that_is_still_owed() -> None:
    """What was charged as debt and is given back is owed no longer."""
    world = overcharged(gives(), 25)
    assert world.account().debt == 15
    receipt = world.end("c", 12)
    assert receipt.late == -13
    assert world.sums() == (10, 12, 0, 0, 2)


def test_give_back_debt_that_was_paid_to_whoever_paid_it() -> None:
    """Debt that later grants paid goes back to those, the last in burn order first."""

    def pay(world: World) -> None:
        world.grant(8, "early", priority=1)
        world.grant(20, "later", priority=2)

    world = overcharged(gives(), 25, pay)
    assert world.spent("early", "later") == ((8, 0, 0), (7, 0, 0))
    world.end("c", 14)
    assert world.sums() == (38, 14, 0, 0, 0)
    assert world.spent("gift", "early", "later") == ((10, 0, 0), (4, 0, 0), (0, 0, 0))
    assert imbalances(world.state) == []


def test_give_back_debt_that_was_paid_in_part() -> None:
    """Of debt that was paid in part, first what is still owed is forgiven, then the payer of the rest gets it back."""
    world = overcharged(gives(), 25, gives(6, "paid"))
    assert world.sums() == (16, 25, 0, 0, 9)
    world.end("c", 12)
    assert world.sums() == (16, 12, 0, 0, 0)
    assert world.spent("gift", "paid") == ((10, 0, 0), (2, 0, 0))


def test_give_back_to_an_expired_grant_that_paid_the_debt() -> None:
    """What a grant paid of a debt and gets back after its expiry lapses."""

    def pay(world: World) -> None:
        world.grant(15, "paid", ends_in=50, priority=1)
        world.wait(50)

    world = overcharged(gives(), 25, pay)
    world.end("c", 10)
    assert world.sums() == (25, 10, 0, 15, 0)
    assert world.spent("paid") == ((0, 0, 15),)


def test_give_back_more_than_the_debt_that_was_paid() -> None:
    """A charge of grants and of debt that was paid since returns to all of them, and no grant falls below zero."""
    world = overcharged(gives(), 25, gives(15, "paid", ends_in=500))
    world.end("c", 5)
    assert world.sums() == (25, 5, 0, 0, 0)
    assert sum(settled for settled, _, _ in world.spent("gift", "paid")) == 5
    assert imbalances(world.state) == []


def test_give_back_two_charges_whose_debt_was_paid() -> None:
    """A grant whose units went to another charge's refund has less to give back; the others give the rest."""
    world = World()
    world.grant(10)
    for call in ("a", "b"):
        world.admit(5, call, ttl_s=10, grace_s=0)
    world.beat("a", 10)
    world.beat("b", 15)
    world.wait(10)
    world.run(Sweep())
    world.grant(15, "paid", ends_in=500)
    assert world.sums() == (25, 25, 0, 0, 0)
    world.end("b", 0)
    assert imbalances(world.state) == []
    world.end("a", 0)
    assert imbalances(world.state) == []
    assert world.sums() == (25, 0, 0, 0, 0)
    assert world.spent("gift", "paid") == ((0, 0, 0), (0, 0, 0))


def test_pay_other_debt_with_what_is_given_back() -> None:
    """Units that come back while the account owes for another call pay that debt first."""

    def owe(world: World) -> None:
        world.admit(2, "other")
        world.end("other", 9)

    world = overcharged(gives(12), 10, owe)
    assert world.sums() == (12, 19, 0, 0, 7)
    world.end("c", 1)
    assert world.sums() == (12, 10, 0, 0, 0)
    assert world.lines()[-2:] == [(DEBT_PAYMENT, 7), (LATE, -9)]


# -- the ledger ----------------------------------------------------------------------------------------------


def test_write_what_is_left_on_every_line() -> None:
    """Each ledger line tells what the account had after it, and lines are numbered without gaps."""
    world = World()
    world.grant(10, actor="ops")
    world.admit(4, "c", line="chat")
    world.end("c", 3, estimated=True)
    first, second = world.entries()
    assert (first.number, first.available, first.actor, first.ref) == (1, 10, "ops", "gift")
    assert (second.number, second.available, second.line, second.ref) == (2, 7, "chat", "c")
    assert (first.estimated, second.estimated) == (False, True)
    assert (first.basis, first.parts, first.line) == (None, (), "")
    assert second.at == world.now


def test_read_an_account_without_writing_it() -> None:
    """A book shows what an account has now, lapses included, and leaves the state untouched (S0.49)."""
    world = World()
    world.grant(10, ends_in=100)
    before = snapshot(world.state)
    book = Book(world.state, ADA, world.now + 100)
    assert (book.granted, book.expired, book.available, book.open_grants) == (10, 10, 0, 0)
    assert snapshot(world.state) == before


def test_know_what_would_come_back() -> None:
    """Of the units under holds only those come back whose grant has not expired."""
    world = World()
    world.grant(10, "short", ends_in=100)
    world.grant(10, "long")
    world.admit(15, "c", ttl_s=1000)
    assert Book(world.state, ADA, world.now).returnable == 15
    assert Book(world.state, ADA, world.now + 100).returnable == 5


def test_count_later_grants_as_promised() -> None:
    """What an account was given so far includes grants that begin later, once."""
    world = World()
    world.grant(10, "now")
    world.grant(7, "later", starts_in=10)
    assert Book(world.state, ADA, world.now).promised == 17
    assert Book(world.state, ADA, world.now + 10).promised == 17


def test_keep_accounts_apart() -> None:
    """Payers, and units of one payer, share nothing (S0.9)."""
    world = World()
    world.grant(10)
    world.grant(5, payer="bob")
    world.run(PostGrant("gift", "ada", "usd", 7))
    world.admit(10, "c")
    world.end("c", 12)
    assert world.sums("bob") == (5, 0, 0, 0, 0)
    assert world.state.accounts["ada", "usd"].available == 7
