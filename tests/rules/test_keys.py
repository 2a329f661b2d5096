"""Keys: a request runs once under its idempotency key; calls of one charge key are charged once together."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.decisions import Decision, Reason
from asgi_metering.receipts import Basis, EntryKind
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.keys import key_rows
from asgi_metering.rules.operations import IdempotencyAsk, KeyAsk, Sweep, Undo, WalletSource
from tests.rules.world import DAY_S, WALLET, World, days, fixed, imbalances, snapshot

KEY = IdempotencyAsk("key", "print", 600.0)
SESSION = KeyAsk("session", window_s=600.0)


def ask(world: World, call: str, amount: int = 5, **more: Any) -> Decision:
    """Ask for one call of the session's charge key, unless another one is named."""
    decision: Decision = world.run(world.ask(amount, call, **{"charge_key": SESSION, **more}))
    return decision


def today(world: World) -> KeyAsk:
    """A key that counts once per UTC day."""
    return KeyAsk("session", days(world.now))


def rich() -> World:
    """A world where ada has 100."""
    world = World()
    world.grant(100)
    return world


# -- idempotency keys ----------------------------------------------------------------------------------------


def test_refuse_a_request_that_is_in_flight() -> None:
    """While the first request of a key runs, a repeat is refused before anything else, and takes nothing."""
    world = rich()
    world.admit(5, "a", idempotency=KEY)
    refusal = world.refused(500, idempotency=KEY)
    assert (refusal.reason, refusal.transient) == (Reason.IN_FLIGHT, True)
    assert world.refused(5, idempotency=KEY._replace(fingerprint="other")).reason is Reason.IN_FLIGHT


def test_claim_nothing_by_a_refusal() -> None:
    """A refused request claims no key: its repeat is decided anew (DESIGN "Idempotency")."""
    world = rich()
    world.refused(500, idempotency=KEY)
    assert world.admit(5, idempotency=KEY).admitted


def test_replay_what_the_first_request_did() -> None:
    """A repeat of a settled request is answered with its receipt and its reply, and does not run."""
    world = rich()
    world.admit(5, "a", idempotency=KEY)
    receipt = world.end("a", 5, reply={"status": 200})
    before = snapshot(world.state)
    again = world.admit(5, "b", idempotency=KEY)
    assert (again.admitted, again.refusal, again.replay, again.reply) == (False, None, receipt, {"status": 200})
    assert snapshot(world.state) == before


def test_refuse_another_request_under_a_key() -> None:
    """The same key with another fingerprint is a mistake."""
    world = rich()
    world.admit(5, "a", idempotency=KEY)
    world.end("a", 5)
    assert world.refused(5, idempotency=KEY._replace(fingerprint="other")).reason is Reason.FINGERPRINT


@pytest.mark.parametrize(
    ("charge", "failed", "is_free"), [(None, True, True), (0, True, True), (5, True, False), (None, False, False)]
)
def test_free_the_key_of_a_request_that_did_nothing(charge: int | None, failed: bool, is_free: bool) -> None:
    """A request that failed and was charged nothing frees its key; one that was charged, or did its work, keeps it."""
    world = rich()
    world.admit(5, "a", idempotency=KEY)
    world.end("a", charge, failed=failed)
    assert world.admit(5, "b", idempotency=KEY).admitted is is_free


def test_keep_a_key_in_doubt() -> None:
    """A request in doubt keeps its key beyond its time, until its policy ends it (DESIGN "Idempotency": 409)."""
    world = rich()
    world.run(world.ask(5, "a", idempotency=KEY._replace(ttl_s=1.0), ttl_s=10.0, grace_s=60.0))
    world.wait(20)
    refusal = world.admit(5, "b", idempotency=KEY).refusal
    assert refusal is not None
    assert refusal.reason is Reason.IN_FLIGHT
    world.wait(60)
    assert world.admit(5, "c", idempotency=KEY).admitted


@pytest.mark.parametrize("is_over", [False, True])
def test_charge_no_late_call_beside_its_repeat(is_over: bool) -> None:
    """A request that was given up and came again under its key is charged once: what is late is told (S3.15)."""
    world = rich()
    world.admit(5, "a", idempotency=KEY, ttl_s=10.0, grace_s=0.0)
    world.wait(10)
    world.run(Sweep())
    world.admit(5, "b", idempotency=KEY)
    if is_over:
        world.end("b", 5)
    assert world.end("a", 5, event={}).late == 0
    world.end("b", 5)
    assert world.account().settled == 5
    told = world.state.events["a:late"].payload
    assert (told["amount"], told["attributes"]) == (0, {"uncharged_amount": 5})


def given_up(world: World, call: str, key: IdempotencyAsk = KEY) -> None:
    """A request of *key* whose worker died before it had anything to show."""
    world.admit(5, call, idempotency=key, ttl_s=10.0, grace_s=0.0)
    world.wait(10)
    world.run(Sweep())


@pytest.mark.parametrize("charge", [5, 0])
def test_replay_a_request_that_ended_late(charge: int) -> None:
    """A request that was given up, and did its work after all, answers its repeats: nothing runs twice (S3.15)."""
    world = rich()
    given_up(world, "a")
    assert world.end("a", charge, reply={"status": 200}).late == charge
    assert world.refused(5, idempotency=KEY._replace(fingerprint="other")).reason is Reason.FINGERPRINT
    again = world.admit(5, "b", idempotency=KEY)
    assert again.replay is not None
    assert (again.replay.id, again.replay.late, again.reply) == ("a", charge, {"status": 200})
    assert world.account().settled == charge


def test_replay_what_a_late_end_made_of_it() -> None:
    """Where the policy had charged what was observed, the late end's receipt and reply answer from then on."""
    world = rich()
    world.admit(5, "a", idempotency=KEY, ttl_s=10.0, grace_s=0.0)
    world.beat("a", 2)
    world.wait(10)
    world.run(Sweep())
    replayed = world.admit(5, idempotency=KEY).replay
    assert replayed is not None
    assert (replayed.amount, replayed.late) == (2, None)
    world.end("a", 5, reply={"status": 200})
    again = world.admit(5, idempotency=KEY)
    assert again.replay is not None
    assert (again.replay.amount, again.replay.late, again.reply) == (2, 3, {"status": 200})


def test_replay_nothing_after_the_keys_time() -> None:
    """A late end after its key's time is charged, and the key is a new request's."""
    world = rich()
    given_up(world, "a", KEY._replace(ttl_s=5.0))
    assert world.state.idempotency_keys == {}
    assert world.end("a", 5).late == 5
    assert world.admit(5, "b", idempotency=KEY).admitted


def test_keep_a_key_that_a_person_freed() -> None:
    """What a person decided stands: the late end of a request that a person released leaves its key as it is."""
    world = rich()
    world.admit(5, "a", idempotency=KEY)
    world.person_ends("a", None)
    before = world.state.idempotency_keys["key"]
    world.end("a", 5)
    assert world.state.idempotency_keys["key"] == before


def test_remember_a_key_for_its_time() -> None:
    """A key is free again when its time is over, and an end of its former call then touches no other's."""
    world = rich()
    world.admit(5, "a", idempotency=KEY)
    world.end("a", 5)
    world.wait(600)
    assert world.admit(5, "b", idempotency=KEY).admitted
    world.admit(5, "old", idempotency=KEY._replace(key="other"))
    world.state.idempotency_keys["other"] = world.state.idempotency_keys["other"]._replace(call="new")
    world.end("old", 5)
    assert world.state.idempotency_keys["other"].receipt is None
    world.state.idempotency_keys.clear()
    assert world.end("b", 5).applied


def test_claim_a_key_for_free_work() -> None:
    """A request that costs nothing runs once, too: its key is claimed with a row that its end finds."""
    world = World()
    world.admit(0, "a", idempotency=KEY)
    world.end("a", 0)
    assert world.admit(0, "b", idempotency=KEY).replay is not None


# -- charge keys ---------------------------------------------------------------------------------------------


def test_charge_once_for_all_calls_of_a_key() -> None:
    """The first call holds for all, later ones join free, the first success settles, the rest costs nothing (S0.3)."""
    world = rich()
    first, second = ask(world, "a"), ask(world, "b")
    assert (first.held, first.joined, first.source) == (5, False, "wallet")
    assert (second.held, second.joined, second.payer) == (0, True, "ada")
    assert world.end("b", 5).amount == 5
    assert world.end("a", 5).amount == 0
    assert ask(world, "c").joined
    assert world.end("c", 5).amount == 0
    assert world.sums() == (100, 5, 0, 0, 0)
    assert [(line.kind, line.ref) for line in world.entries()] == [(EntryKind.GRANT, "gift"), (EntryKind.SETTLE, "b")]
    assert imbalances(world.state) == []


def test_charge_the_price_of_the_key() -> None:
    """Whatever the call says that succeeds, the key costs what was held for it: prices are fixed."""
    world = rich()
    ask(world, "a")
    assert world.end("a", 1).amount == 5


def test_release_a_key_that_nobody_used() -> None:
    """A failing call leaves; the last one that leaves without success gives everything back, and the key is new."""
    world = rich()
    ask(world, "a")
    ask(world, "b")
    world.end("a", None)
    assert world.account().held == 5
    world.end("b", None)
    assert (world.account().held, world.state.charge_keys["session"].is_given_back) == (0, True)
    assert world.hold("a:key").state is HoldState.RELEASED
    assert not ask(world, "c").joined


def test_repeat_an_admission_of_a_key() -> None:
    """A repeat answers what its first admission said: who pays, or that another call does (S3.15)."""
    world = rich()
    asks = [world.ask(5, call, charge_key=SESSION) for call in ("a", "b")]
    first = [world.run(each) for each in asks]
    before = snapshot(world.state)
    assert [world.run(each) for each in asks] == first
    assert snapshot(world.state) == before


def test_refuse_a_key_that_cannot_be_paid() -> None:
    """The first call of a key is refused as any other, and leaves no key."""
    world = rich()
    before = snapshot(world.state)
    refusal = ask(world, "a", 101).refusal
    assert refusal is not None
    assert refusal.reason is Reason.CREDITS
    assert snapshot(world.state) == before


def test_ask_again_where_a_keys_calendar_is_stale() -> None:
    """A key's calendar, and an allowance's behind it, must cover the store's time."""
    world = rich()
    stale = KeyAsk("session", days(world.now - 9 * DAY_S))
    assert ask(world, "a", charge_key=stale).stale_calendar
    old = world.free(9)._replace(boundaries=stale.boundaries)
    assert ask(world, "a", sources=(old,)).stale_calendar


def test_charge_a_key_again_in_the_next_day() -> None:
    """A key counts once per calendar window; a call of yesterday's ends there (S0.32)."""
    world = rich()
    ask(world, "a", charge_key=today(world), ttl_s=9 * DAY_S)
    world.wait(DAY_S)
    assert not ask(world, "b", charge_key=today(world)).joined
    world.end("b", 5)
    assert world.end("a", 5).amount == 5
    assert world.account().settled == 10


def test_roll_a_key_from_its_first_call_on() -> None:
    """A rolling key's window is over at its end, unless calls of it run that may still pay."""
    world = rich()
    ask(world, "a", ttl_s=9 * DAY_S)
    world.wait(700)
    assert ask(world, "b").joined
    world.end("a", 5)
    world.wait(1)
    assert not ask(world, "c").joined
    assert world.end("b", 5).amount == 0
    world.end("c", 5)
    assert world.account().settled == 10
    assert imbalances(world.state) == []


def test_join_a_key_whose_hold_is_forgotten() -> None:
    """A settled key outlives the hold that it owned; calls join it free all the same."""
    world = rich()
    ask(world, "a")
    world.end("a", 5)
    world.run(Sweep(keep_holds_s=0.0))
    assert ask(world, "b").joined
    assert world.end("b", 5).amount == 0


def test_end_a_call_whose_key_is_gone() -> None:
    """A call of a key that nobody keeps any more costs nothing."""
    world = rich()
    ask(world, "a")
    ask(world, "b")
    world.end("a", 5)
    world.state.charge_keys.clear()
    assert world.end("b", 5).amount == 0
    assert world.account().settled == 5


@pytest.mark.parametrize("basis", [Basis.HOLD, Basis.OBSERVED, Basis.NONE])
def test_end_a_lost_call_of_a_key_by_its_policy(basis: Basis) -> None:
    """A lost call is ended by its policy; where that charges what was held, the key is charged."""
    world = rich()
    ask(world, "a", in_doubt=basis, ttl_s=10.0, grace_s=0.0)
    world.wait(10)
    world.run(Sweep())
    assert world.account().settled == (5 if basis is Basis.HOLD else 0)
    assert world.account().held == 0


def test_charge_no_late_call_beside_the_one_that_paid() -> None:
    """A late end of a call whose key others pay for is told, not charged (S0.10)."""
    world = rich()
    ask(world, "a", ttl_s=900.0)
    ask(world, "lost", ttl_s=10.0, grace_s=0.0)
    world.wait(10)
    world.run(Sweep())
    assert world.end("lost", 5).late == 0
    world.end("a", 5)
    assert world.account().settled == 5


def test_charge_a_late_call_whose_key_was_given_back() -> None:
    """Where nobody paid, and the key is gone, a late success is charged what it cost."""
    world = rich()
    ask(world, "lost", ttl_s=10.0, grace_s=0.0)
    world.wait(10)
    world.run(Sweep())
    assert world.end("lost", 5).late == 5
    assert world.account().settled == 5


def lost(world: World, *calls: str, **more: Any) -> None:
    """Calls of the session's key whose worker is gone, and which their policy has ended without a charge."""
    for call in calls:
        ask(world, call, ttl_s=10.0, grace_s=0.0, **more)
    world.wait(10)
    world.run(Sweep())


@pytest.mark.parametrize("key", [SESSION, None])
def test_charge_one_of_the_late_calls_of_a_key(key: KeyAsk | None) -> None:
    """Of several calls that were given up the first late success pays for the window, and others join it (S0.10)."""
    world = rich()
    key = key or today(world)
    lost(world, "a", "b", charge_key=key)
    assert [world.end(call, 5).late for call in ("b", "a")] == [5, 0]
    assert ask(world, "c", charge_key=key).joined
    assert world.end("c", 5).amount == 0
    assert world.account().settled == 5
    assert imbalances(world.state) == []


def test_charge_a_late_call_once_beside_one_that_failed() -> None:
    """Also where the last call of the key failed by itself after the others were given up."""
    world = rich()
    ask(world, "failed", ttl_s=900.0)
    lost(world, "a", "b")
    world.end("failed", None)
    assert [world.end(call, 5).late for call in ("a", "b")] == [5, 0]


def test_leave_a_late_failure_of_a_key_unpaid() -> None:
    """A late end that charges nothing pays for no window: the next late success does."""
    world = rich()
    lost(world, "a", "b")
    assert [world.end("a", None).late, world.end("b", 5).late] == [0, 5]


def test_charge_a_late_call_of_a_key_to_its_allowance() -> None:
    """A late success is paid from where the hold of its key was: from the allowance, not from the wallet (S0.3)."""
    world = rich()
    lost(world, "a", "b", sources=(world.free(5), WALLET))
    assert [world.end(call, 5).late for call in ("a", "b")] == [5, 0]
    assert (world.today(), world.account().settled) == ((5, 0), 0)
    assert imbalances(world.state) == []


def test_charge_a_late_call_whose_keys_hold_is_forgotten() -> None:
    """Where nobody knows any more what the key's hold was, the wallet pays, as for every late end."""
    world = rich()
    lost(world, "a", sources=(world.free(5), WALLET))
    del world.state.holds["a:key"]
    assert world.end("a", 5).late == 5
    assert (world.today(), world.account().settled) == ((0, 0), 5)


def test_begin_a_key_anew_that_was_given_back() -> None:
    """The next call of a key that was given back pays itself; what comes late joins it."""
    world = rich()
    lost(world, "a")
    assert not ask(world, "b").joined
    assert world.end("a", 5).late == 0
    assert world.end("b", 5).amount == 5


@pytest.mark.parametrize(("amount", "charged"), [(3, 3), (7, 7), (0, 0), (None, 0)])
def test_charge_what_a_person_says_for_a_key(amount: int | None, charged: int) -> None:
    """A person's end of a call charges what the person says and no price; nothing leaves the key to the others."""
    world = rich()
    ask(world, "a")
    ask(world, "b")
    assert world.person_ends("a", amount).amount == charged
    assert world.end("b", 5).amount == (0 if charged else 5)
    assert world.account().settled == (charged or 5)
    assert imbalances(world.state) == []


@pytest.mark.parametrize("amount", [3, 0, None])
def test_end_a_key_whose_hold_a_person_has_ended(amount: int | None) -> None:
    """A person may end the hold that a key owns: then that is what the key costs, however its calls end."""
    world = rich()
    lost(world, "late", charge_key=SESSION, sources=(WALLET,))
    for call in ("a", "b"):
        ask(world, call)
    world.person_ends("a:key", amount)
    assert [world.end("a", 5).amount, world.end("b", None).amount, world.end("late", 5).late] == [0, 0, 0]
    assert (world.account().settled, world.account().held) == (amount or 0, 0)
    assert ask(world, "c").joined is (amount is not None)
    assert imbalances(world.state) == []


def test_end_a_call_whose_keys_hold_is_gone() -> None:
    """A call of a key whose own hold nobody keeps any more costs nothing, and leaves the key to the next."""
    world = rich()
    ask(world, "a")
    world.person_ends("a:key", None)
    del world.state.holds["a:key"]
    assert world.end("a", 5).amount == 0
    assert not ask(world, "b").joined


def test_join_the_unit_and_the_payer_of_the_first_call() -> None:
    """Who joins is booked with the account that pays, and at the latest time that it has seen."""
    world = rich()
    world.grant(50, payer="platform")
    ask(world, "a", sources=(WalletSource(payer="platform", group="platform"),))
    decision = ask(world, "b", payer="bob")
    assert (decision.payer, decision.group) == ("platform", "platform")
    world.wait(-50)
    assert world.end("b", 5).payer == "platform"
    assert imbalances(world.state) == []


def test_limit_every_call_of_a_key() -> None:
    """Joining is free of charge, and of nothing else: limits count each call."""
    world = rich()
    for call in ("a", "b"):
        assert ask(world, call, limits=[fixed(2)], sources=(WALLET,)).admitted
    refusal = ask(world, "c", limits=[fixed(2)]).refusal
    assert refusal is not None
    assert refusal.reason is Reason.RATE_LIMIT


def test_undo_a_call_of_a_key() -> None:
    """A joined call that is taken back leaves; the last one gives the key's hold back."""
    world = rich()
    first = world.ask(5, "a", charge_key=SESSION)
    decision = world.run(first)
    second = world.ask(5, "b", charge_key=SESSION)
    world.run(second)
    world.run(Undo(second, decision.now))
    assert world.account().held == 5
    world.run(Undo(first, decision.now))
    assert (world.account().held, world.state.charge_keys) == (0, {})


def test_name_the_rows_of_a_key() -> None:
    """A rolling key has one row; a calendar's has one for each window that its caller may mean."""
    assert key_rows(SESSION) == ["session"]
    assert key_rows(KeyAsk("k", (10.0, 20.0, 30.0, 40.0))) == ["k@10", "k@20", "k@30"]
