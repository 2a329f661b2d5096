"""What a store must do with keys: run a request once and answer its repeats, and charge the calls of a key once."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

import asyncio
from typing import Any

from asgi_metering.decisions import Decision, Reason
from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.keys import hold_of_key
from asgi_metering.rules.operations import End, IdempotencyAsk, KeyAsk, Renew, Sweep, Undo, WalletSource, WindowKind
from asgi_metering.rules.roots import rooted
from asgi_metering.testing.conformance.scene import DAY_S, GRACE_S, LIFE_S, PAYER, Scene, Suite, scenario

__all__ = ["Repeating", "Together"]

TTL_S = 600.0
KEY = IdempotencyAsk("key", "print", TTL_S)
OTHER = KEY._replace(fingerprint="another print")

PRICE = 30
SESSION_S = 10.0
SESSION = KeyAsk(rooted("session", PAYER), window_s=SESSION_S)
OTHER_SESSION = SESSION._replace(key=rooted("another session", PAYER))


class Repeating(Suite):
    """Idempotency keys: a request runs once, and its repeats learn what it did (S3.15)."""

    @scenario
    async def test_repeat_of_a_request_in_flight(self, scene: Scene) -> None:
        """While the first request of a key runs its repeat is refused, and takes nothing of anything."""
        await scene.grant(100)
        limits = [scene.limit(WindowKind.FIXED, 9)]
        await scene.admit("a", 10, idempotency=KEY, limits=limits)
        async with scene.nothing_changes():
            refusals = [
                (await scene.admit(call, 10, idempotency=key, limits=limits)).refusal
                for call, key in (("b", KEY), ("c", OTHER))
            ]
        assert [refusal and (refusal.reason, refusal.transient) for refusal in refusals] == [
            (Reason.IN_FLIGHT, True)
        ] * 2

    @scenario
    async def test_repeat_of_a_request_that_is_done(self, scene: Scene) -> None:
        """A repeat is answered with the receipt and the reply of the first request; it does not run, or pay again."""
        await scene.grant(100)
        await scene.admit("a", 10, idempotency=KEY)
        reply = {"status": 201, "body": "aGVsbG8=", "fields": [["content-type", "text/plain"]]}
        receipt = await scene.settle("a", 7, reply=reply)
        async with scene.nothing_changes():
            again = await scene.admit("b", 10, idempotency=KEY)
        assert (again.admitted, again.refusal, again.replay, again.reply) == (False, None, receipt, reply)
        assert (await scene.account()).available == 93

    @scenario
    async def test_another_request_under_the_key(self, scene: Scene) -> None:
        """The key of a request that is done, with another fingerprint, is a mistake that changes nothing."""
        await scene.admit("a", idempotency=KEY)
        await scene.settle("a", 0)
        async with scene.nothing_changes():
            refusal = (await scene.admit("b", idempotency=OTHER)).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.transient) == (Reason.FINGERPRINT, False)

    @scenario
    async def test_failure_that_charged_nothing_frees_its_key(self, scene: Scene) -> None:
        """The key of a call that failed is free if nothing was charged, and kept if something was."""
        await scene.grant(100)
        for call, charge, runs in (("free", None, True), ("zero", 0, True), ("paid", 3, False)):
            key = KEY._replace(key=f"key {call}")
            await scene.admit(call, 10, idempotency=key)
            await scene.one(End(call, charge, Basis.OBSERVED, failed=True))
            assert (await scene.admit(f"{call} again", 10, idempotency=key)).admitted is runs

    @scenario
    async def test_refusal_claims_no_key(self, scene: Scene) -> None:
        """A refused call leaves its key free, and one that is undone gives it back."""
        refused = await scene.admit("a", 10, idempotency=KEY)
        await scene.grant(100)
        ask = scene.ask("b", 10, idempotency=KEY)
        taken = await scene.one(ask)
        await scene.one(Undo(ask, taken.now))
        again = await scene.admit("c", 10, idempotency=KEY)
        assert [decision.admitted for decision in (refused, taken, again)] == [False, True, True]

    @scenario
    async def test_call_in_doubt_keeps_its_key(self, scene: Scene) -> None:
        """A call in doubt keeps its key beyond the key's time; its policy's end is what repeats are answered."""
        await scene.grant(100)
        short = KEY._replace(key="short", ttl_s=1.0)
        await scene.admit("a", 10, idempotency=KEY)
        await scene.admit("b", 10, idempotency=short)
        await scene.one(Renew("a", 4))
        scene.clock.advance(LIFE_S + GRACE_S - 1)
        refusals = [(await scene.admit(f"again {key.key}", 10, idempotency=key)).refusal for key in (KEY, short)]
        assert [refusal and refusal.reason for refusal in refusals] == [Reason.IN_FLIGHT] * 2
        scene.clock.advance(1)
        await scene.one(Sweep())
        replay = (await scene.admit("c", 10, idempotency=KEY)).replay
        assert replay is not None
        assert (replay.id, replay.amount) == ("a", 4)

    @scenario
    async def test_key_is_remembered_for_its_time(self, scene: Scene) -> None:
        """A key is answered from until its time is over; then the same request is a new one."""
        await scene.grant(100)
        await scene.admit("a", 10, idempotency=KEY)
        await scene.settle("a", 10)
        scene.clock.advance(TTL_S - 1)
        before = await scene.admit("b", 10, idempotency=KEY)
        scene.clock.advance(1)
        after = await scene.admit("c", 10, idempotency=KEY)
        assert [before.replay is not None, after.admitted] == [True, True]

    @scenario
    async def test_free_key_is_forgotten_with_its_time(self, scene: Scene) -> None:
        """A key that a failure has freed is remembered for its time, as any other, and not a moment longer."""
        await scene.admit("a", idempotency=KEY)
        await scene.release("a", failed=True)
        scene.clock.advance(TTL_S)
        await scene.one(Sweep())
        assert (await scene.state()).idempotency_keys == {}

    @scenario
    async def test_late_end_beside_the_repeat(self, scene: Scene) -> None:
        """A request that was given up, and came again since, is not charged beside its repeat."""
        await scene.grant(100)
        key = KEY._replace(key=rooted(KEY.key, PAYER))
        await scene.admit("a", 10, idempotency=key)
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        assert (await scene.admit("b", 10, idempotency=key)).admitted
        assert (await scene.settle("a", 10)).late == 0
        await scene.settle("b", 10)
        assert (await scene.account()).settled == 10

    @scenario
    async def test_late_end_before_the_repeat(self, scene: Scene) -> None:
        """A request that was given up, and charged late after all, has run: its repeat learns that, and is free."""
        await scene.grant(100)
        key = KEY._replace(key=rooted(KEY.key, PAYER))
        await scene.admit("a", 10, idempotency=key)
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        assert (await scene.settle("a", 10, reply={"status": 201})).late == 10
        again = await scene.admit("b", 10, idempotency=key)
        assert again.replay is not None
        assert (again.replay.id, again.replay.late, again.reply) == ("a", 10, {"status": 201})
        other = (await scene.admit("c", 10, idempotency=key._replace(fingerprint="another print"))).refusal
        assert other is not None
        assert other.reason is Reason.FINGERPRINT
        assert (await scene.account()).settled == 10

    @scenario
    async def test_late_end_after_a_repeat_that_failed(self, scene: Scene) -> None:
        """A repeat that failed for nothing leaves the key to whoever did the work, late as it may be, and once."""
        await scene.grant(100)
        key = KEY._replace(key=rooted(KEY.key, PAYER))
        for call in ("a", "b"):
            await scene.admit(call, 10, idempotency=key)
            scene.clock.advance(LIFE_S + GRACE_S)
            await scene.one(Sweep())
        await scene.admit("c", 10, idempotency=key)
        await scene.release("c", failed=True)
        assert [(await scene.settle(call, 10)).late for call in ("a", "b")] == [10, 0]
        assert (await scene.admit("d", 10, idempotency=key)).replay is not None
        assert (await scene.account()).settled == 10

    @scenario
    async def test_late_end_that_failed_too(self, scene: Scene) -> None:
        """A late end that failed for nothing leaves its key free, also where the policy had charged before."""
        await scene.grant(100)
        key = KEY._replace(key=rooted(KEY.key, PAYER))
        for call, observed in (("a", 0), ("b", 4)):
            await scene.admit(call, 10, idempotency=key)
            await scene.one(Renew(call, observed))
            scene.clock.advance(LIFE_S + GRACE_S)
            await scene.one(Sweep())
            assert (await scene.release(call, failed=True)).late == -observed
        assert (await scene.admit("c", 10, idempotency=key)).admitted
        assert (await scene.account()).settled == 0

    @scenario
    async def test_race_for_a_key(self, scene: Scene) -> None:
        """Of many equal requests at once exactly one runs, and it alone is charged."""
        await scene.grant(100)
        decisions = await asyncio.gather(*(scene.admit(f"a{call}", 1, idempotency=KEY) for call in range(20)))
        assert sum(decision.admitted for decision in decisions) == 1
        assert (await scene.account()).held == 1


class Together(Suite):
    """Charge keys: all calls of a key and its window are one charge (S0.3)."""

    @scenario
    async def test_first_call_of_a_key_pays_and_others_join(self, scene: Scene) -> None:
        """The first call of a key holds its price; those that follow join it, hold nothing, and need no units."""
        await scene.grant(PRICE)
        first, second = [await _member(scene, call) for call in ("a", "b")]
        assert (first.held, first.joined, second.held, second.joined) == (PRICE, False, 0, True)
        assert second.admitted
        assert (await scene.account()).held == PRICE

    @scenario
    async def test_first_success_settles_for_all(self, scene: Scene) -> None:
        """Whichever call of a key succeeds first is charged the price that is held; all others are charged nothing."""
        await scene.grant(100)
        for call in ("a", "b"):
            await _member(scene, call)
        amounts = [(await scene.settle(call, PRICE)).amount for call in ("b", "a")]
        later = await _member(scene, "c")
        amounts.append((await scene.settle("c", PRICE)).amount)
        assert amounts == [PRICE, 0, 0]
        assert later.joined
        account = await scene.account()
        assert (account.settled, account.held) == (PRICE, 0)
        assert [(line.ref, line.amount) for line in (await scene.entries())[1:]] == [("b", PRICE)]

    @scenario
    async def test_last_failure_releases_for_all(self, scene: Scene) -> None:
        """A call that fails leaves what is held to the others; the last one gives it back, and the key begins anew."""
        await scene.grant(100)
        for call in ("a", "b"):
            await _member(scene, call)
        held = [(await scene.account()).held]
        for call in ("a", "b"):
            await scene.release(call, failed=True)
            held.append((await scene.account()).held)
        assert held == [PRICE, PRICE, 0]
        assert not (await _member(scene, "c")).joined

    @scenario
    async def test_race_for_the_first_call_of_a_key(self, scene: Scene) -> None:
        """Many first calls of one key at once count once: one pays, all run (S0.10)."""
        await scene.grant(PRICE)
        calls = [f"a{call}" for call in range(20)]
        decisions = await asyncio.gather(*(_member(scene, call) for call in calls))
        assert all(decision.admitted for decision in decisions)
        assert sum(not decision.joined for decision in decisions) == 1
        receipts = await asyncio.gather(*(scene.settle(call, PRICE) for call in calls))
        assert sum(receipt.amount for receipt in receipts) == PRICE
        assert (await scene.account()).available == 0

    @scenario
    async def test_next_day_of_a_key_counts_again(self, scene: Scene) -> None:
        """A key counts once in each calendar window; a call of yesterday's ends there (S0.32)."""
        await scene.grant(100)
        await _member(scene, "a", _daily(scene))
        scene.clock.advance(LIFE_S / 2)
        assert (await _member(scene, "b", _daily(scene))).joined
        await scene.settle("a", PRICE)
        scene.clock.advance(DAY_S)
        assert not (await _member(scene, "c", _daily(scene))).joined
        assert (await scene.settle("c", PRICE)).amount == PRICE
        assert (await scene.account()).settled == 2 * PRICE

    @scenario
    async def test_rolling_window_of_a_key_ends_when_its_calls_do(self, scene: Scene) -> None:
        """A key's rolling window is over at its time, but not while a call runs that may still pay for it."""
        await scene.grant(100)
        await _member(scene, "a")
        scene.clock.advance(SESSION_S)
        joined = [(await _member(scene, "b")).joined]
        await scene.settle("a", PRICE)
        scene.clock.advance(1)
        joined.append((await _member(scene, "c")).joined)
        assert joined == [True, False]
        assert [(await scene.settle(call, PRICE)).amount for call in ("b", "c")] == [0, PRICE]

    @scenario
    async def test_key_that_cannot_be_paid(self, scene: Scene) -> None:
        """The first call of a key is refused like any other, and leaves no key for others to join."""
        await scene.grant(PRICE - 1)
        async with scene.nothing_changes():
            refused = await _member(scene, "a")
        await scene.grant(1, "grant_2")
        assert (refused.admitted, (await _member(scene, "b")).joined) == (False, False)

    @scenario
    async def test_limits_count_every_call_of_a_key(self, scene: Scene) -> None:
        """Who joins pays nothing, and counts for limits as everybody."""
        await scene.grant(100)
        limits = [scene.limit(WindowKind.FIXED, 2)]
        admitted = [(await _member(scene, call, limits=limits)).admitted for call in ("a", "b", "c")]
        assert admitted == [True, True, False]

    @scenario
    async def test_call_of_a_key_in_doubt_still_holds(self, scene: Scene) -> None:
        """A lost call keeps what its key holds until its policy ends it, and then the key begins anew."""
        await scene.grant(PRICE)
        await _member(scene, "a")
        scene.clock.advance(LIFE_S)
        assert (await _member(scene, "b")).joined
        await scene.release("b", failed=True)
        assert (await scene.account()).held == PRICE
        scene.clock.advance(GRACE_S)
        await scene.one(Sweep())
        assert (await scene.account()).held == 0
        assert not (await _member(scene, "c")).joined

    @scenario
    async def test_late_calls_of_a_key_are_one_charge(self, scene: Scene) -> None:
        """Of calls that were given up the first late success pays for all, from where the key's hold was (S0.10)."""
        await scene.grant(100)
        sources = (scene.allowance(PRICE), WalletSource())
        for call in ("a", "b"):
            await _member(scene, call, _daily(scene), sources=sources)
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        assert [(await scene.settle(call, PRICE)).late for call in ("b", "a")] == [PRICE, 0]
        assert (await _member(scene, "c", _daily(scene), sources=sources)).joined
        assert (await scene.settle("c", PRICE)).amount == 0
        assert await scene.settled_and_held() == [(PRICE, 0)]
        assert (await scene.account()).settled == 0

    @scenario
    async def test_person_ends_a_call_of_a_key(self, scene: Scene) -> None:
        """A person's end of a call charges what the person says, once for all; nothing leaves it to the others."""
        await scene.grant(100)
        for call in ("a", "b", "c"):
            await _member(scene, call)
        amounts = [(await scene.settle(call, said, by=EndedBy.PERSON)).amount for call, said in (("a", 0), ("b", 7))]
        assert [*amounts, (await scene.settle("c", PRICE)).amount] == [0, 7, 0]
        account = await scene.account()
        assert (account.settled, account.held) == (7, 0)

    @scenario
    async def test_person_ends_the_hold_of_a_key(self, scene: Scene) -> None:
        """The hold that a key owns can be ended by a person as well; its calls end without another charge."""
        await scene.grant(100)
        for key, amount, joined in ((SESSION, 7, True), (OTHER_SESSION, None, False)):
            for call in ("a", "b"):
                await _member(scene, f"{key.key} {call}", key)
            owned = hold_of_key(f"{key.key} a")
            await scene.one(End(owned, amount, Basis.OBSERVED, by=EndedBy.PERSON))
            assert (await scene.settle(f"{key.key} a", PRICE)).amount == 0
            await scene.release(f"{key.key} b", failed=True)
            assert (await _member(scene, f"{key.key} c", key)).joined is joined
        account = await scene.account()
        assert (account.settled, account.held) == (7, PRICE)


def _daily(scene: Scene) -> KeyAsk:
    """A key that counts once per UTC day."""
    return KeyAsk(rooted("session", PAYER), scene.days())


async def _member(scene: Scene, call: str, key: KeyAsk = SESSION, **more: Any) -> Decision:
    """Ask for one call of a charge key."""
    return await scene.admit(call, PRICE, charge_key=key, **more)
