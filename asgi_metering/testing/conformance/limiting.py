"""What a store must do about rate limits and concurrency."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from asgi_metering.decisions import Reason
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import End, LeaseAsk, Sweep, Undo, WindowKind
from asgi_metering.testing.conformance.scene import GRACE_S, LIFE_S, PAYER, UNIT, Scene, Suite, scenario, tables

__all__ = ["Limiting"]

FIXED, CALENDAR, SLIDING = WindowKind.FIXED, WindowKind.CALENDAR, WindowKind.SLIDING
MOVING, BUCKET = WindowKind.MOVING, WindowKind.BUCKET


class Limiting(Suite):
    """Rate limits and slots."""

    @scenario
    async def test_fixed_window_begins_at_the_first_hit(self, scene: Scene) -> None:
        """A fixed window begins with the first call, admits its limit, and says exactly when the next one fits."""
        limits = [scene.limit(FIXED, 2)]
        scene.clock.advance(7)
        assert (await scene.admit("a", limits=limits)).windows[0].remaining == 1
        scene.clock.advance(20)
        assert (await scene.admit("b", limits=limits)).windows[0].remaining == 0
        async with scene.nothing_changes():
            refusal = (await scene.admit("c", limits=limits)).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.name, refusal.retry_after_s) == (Reason.RATE_LIMIT, "calls", 40.0)
        scene.clock.advance(39.5)
        assert not (await scene.admit("d", limits=limits)).admitted
        scene.clock.advance(0.5)
        assert (await scene.admit("e", limits=limits)).windows[0].remaining == 1

    @scenario
    async def test_calendar_window_ends_at_its_boundary(self, scene: Scene) -> None:
        """A calendar window ends where its calendar says, whenever it was first used."""
        assert (await scene.admit("a", limits=[scene.limit(CALENDAR, 1)])).admitted
        midnight = scene.days()[2]
        refusal = (await scene.admit("b", limits=[scene.limit(CALENDAR, 1)])).refusal
        assert refusal is not None
        assert refusal.retry_after_s == midnight - scene.clock()
        scene.clock.advance(midnight - scene.clock())
        assert (await scene.admit("c", limits=[scene.limit(CALENDAR, 1)])).admitted

    @scenario
    async def test_sliding_window_weighs_the_past(self, scene: Scene) -> None:
        """A sliding window counts the one before it by the share that the last minute still covers."""
        limits = [scene.limit(SLIDING, 10)]
        for call in range(8):
            assert (await scene.admit(f"a{call}", limits=limits)).admitted
        scene.clock.advance(90)
        # Half of the past minute's eight still counts.
        admitted = [(await scene.admit(f"b{call}", limits=limits)).admitted for call in range(8)]
        assert admitted == [True] * 6 + [False] * 2

    @scenario
    async def test_sliding_window_tells_when_to_come_back(self, scene: Scene) -> None:
        """After the time that a refusal by a sliding window tells, the same call passes."""
        limits = [scene.limit(SLIDING, 3)]
        for call in range(3):
            await scene.admit(f"a{call}", limits=limits)
        scene.clock.advance(61)
        refusal = (await scene.admit("b", limits=[scene.limit(SLIDING, 3, cost=2)])).refusal
        assert refusal is not None
        assert refusal.retry_after_s is not None
        scene.clock.advance(refusal.retry_after_s)
        assert (await scene.admit("c", limits=[scene.limit(SLIDING, 3, cost=2)])).admitted

    @scenario
    async def test_moving_log_counts_each_call_for_its_own_window(self, scene: Scene) -> None:
        """A moving log admits no more than its limit in any window, and says exactly when the next one fits."""
        limits = [scene.limit(MOVING, 2)]
        assert (await scene.admit("a", limits=limits)).windows[0].remaining == 1
        scene.clock.advance(40)
        assert (await scene.admit("b", limits=limits)).windows[0].remaining == 0
        async with scene.nothing_changes():
            refusal = (await scene.admit("c", limits=limits)).refusal
        assert refusal is not None
        assert refusal.retry_after_s is not None
        assert (refusal.reason, round(refusal.retry_after_s, 6)) == (Reason.RATE_LIMIT, 20.0)
        scene.clock.advance(20)
        # Exactly as old as the window it still counts.
        assert not (await scene.admit("d", limits=limits)).admitted
        scene.clock.advance(refusal.retry_after_s - 20)
        admitted = await scene.admit("e", limits=limits)
        assert (admitted.admitted, admitted.windows[0].remaining) == (True, 0)
        assert round(admitted.windows[0].reset_after_s, 5) == 40.0
        scene.clock.advance(200)
        assert (await scene.admit("f", limits=limits)).windows[0].remaining == 1

    @scenario
    async def test_moving_log_counts_a_call_as_often_as_it_costs(self, scene: Scene) -> None:
        """A call that costs several takes so many places of a log, is told when they are free, and gives all back."""
        two, three = (scene.limit(MOVING, 5, cost=cost) for cost in (2, 3))
        assert (await scene.admit("a", limits=[two])).windows[0].remaining == 3
        scene.clock.advance(10)
        ask = scene.ask("b", 0, limits=[two])
        assert (await scene.one(ask)).windows[0].remaining == 1
        async with scene.nothing_changes():
            refusal = (await scene.admit("c", limits=[three])).refusal
        assert refusal is not None
        assert refusal.retry_after_s is not None
        assert (refusal.reason, round(refusal.retry_after_s, 6)) == (Reason.RATE_LIMIT, 50.0)
        await scene.one(Undo(ask, scene.clock()))
        assert (await scene.admit("d", limits=[three])).windows[0].remaining == 0

    @scenario
    async def test_bucket_gives_its_burst_and_what_flows_back(self, scene: Scene) -> None:
        """A token bucket begins full, gets its share back by and by, and says exactly when the next one fits."""
        two, one = (scene.limit(BUCKET, 5, refill=2, cost=cost) for cost in (2, 1))
        left = [(await scene.admit(f"a{call}", limits=[two])).windows[0].remaining for call in range(2)]
        assert left == [3, 1]
        async with scene.nothing_changes():
            refusal = (await scene.admit("b", limits=[two])).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.retry_after_s) == (Reason.RATE_LIMIT, 30.0)
        scene.clock.advance(30)
        window = (await scene.admit("c", limits=[two])).windows[0]
        assert (window.limit, window.remaining, window.reset_after_s, window.window_s) == (5, 0, 30.0, 150.0)
        scene.clock.advance(45)
        assert [(await scene.admit(f"d{call}", limits=[one])).admitted for call in range(2)] == [True, False]
        scene.clock.advance(1_000)
        assert (await scene.admit("e", limits=[one])).windows[0].remaining == 4

    @scenario
    async def test_bucket_owes_what_was_used_beyond_the_estimate(self, scene: Scene) -> None:
        """A weighted bucket may owe by correction, is never above its burst, and gets nothing that flowed over."""
        tokens = scene.limit(BUCKET, 100, refill=60, cost=20, meter="tokens")
        look = tokens._replace(cost=0)
        await scene.admit("a", limits=[tokens])
        await scene.admit("b", limits=[tokens])
        await scene.release("a", actual={"tokens": 150})
        refusal = (await scene.admit("c", limits=[tokens])).refusal
        assert refusal is not None
        assert (refusal.available, refusal.retry_after_s) == (0, 90.0)
        await scene.release("b", actual={"tokens": 5})
        assert (await scene.admit("look", limits=[look])).windows[0].remaining == 0
        scene.clock.advance(56)
        assert (await scene.admit("look again", limits=[look])).windows[0].remaining == 1
        scene.clock.advance(99)
        for call in ("d", "e", "f"):
            assert (await scene.admit(call, limits=[tokens])).windows[0].remaining >= 40
        await scene.release("d", actual={"tokens": 0})
        assert (await scene.admit("look at more", limits=[look])).windows[0].remaining == 60
        scene.clock.advance(40)
        assert (await scene.admit("g", limits=[tokens])).windows[0].remaining == 80
        await scene.release("e", actual={"tokens": 0})
        await scene.release("f", actual={"tokens": 50})
        assert (await scene.admit("look at the last", limits=[look])).windows[0].remaining == 50

    @scenario
    async def test_look_at_a_log_and_a_bucket_without_taking(self, scene: Scene) -> None:
        """A cost of 0 tells what is left of either and takes nothing."""
        limits = [scene.limit(MOVING, 5, name="log"), scene.limit(BUCKET, 5, name="bucket", refill=5)]
        await scene.admit("a", limits=limits)
        scene.clock.advance(3)
        async with scene.nothing_changes():
            looked = await scene.admit("b", limits=[limit._replace(cost=0) for limit in limits])
        assert [window.remaining for window in looked.windows] == [4, 4]

    @scenario
    async def test_refuse_a_call_above_the_limit_itself(self, scene: Scene) -> None:
        """A call that costs more than a whole window is told so, and no time to come back."""
        async with scene.nothing_changes():
            for limit in (scene.limit(FIXED, 5, cost=6), scene.limit(BUCKET, 5, cost=6, refill=60)):
                refusal = (await scene.admit("a", limits=[limit])).refusal
                assert refusal is not None
                assert (refusal.reason, refusal.required, refusal.retry_after_s) == (Reason.EXCEEDS_LIMIT, 6, None)

    @scenario
    async def test_refuse_by_one_of_several_limits(self, scene: Scene) -> None:
        """A call that one limit refuses counts in none, and the longest of the failing waits is told."""
        roomy, tight, tighter = (
            scene.limit(FIXED, 100, name="roomy"),
            scene.limit(FIXED, 1, name="tight"),
            scene.limit(CALENDAR, 1, name="tighter"),
        )
        await scene.admit("a", limits=[roomy, tight, tighter])
        async with scene.nothing_changes():
            decision = await scene.admit("b", limits=[roomy, tight, tighter])
        assert decision.refusal is not None
        assert (decision.refusal.name, decision.refusal.retry_after_s) == ("tighter", scene.days()[2] - scene.clock())
        assert [window.remaining for window in decision.windows] == [99, 0, 0]

    @scenario
    async def test_look_at_a_limit_without_taking(self, scene: Scene) -> None:
        """A cost of 0 tells what is left and takes nothing."""
        await scene.admit("a", limits=[scene.limit(FIXED, 5)])
        async with scene.nothing_changes():
            looked = await scene.admit("b", limits=[scene.limit(FIXED, 5, cost=0)])
        assert (looked.admitted, looked.windows[0].remaining) == (True, 4)

    @scenario
    async def test_end_corrects_what_a_weighted_limit_counted(self, scene: Scene) -> None:
        """A weighted limit is held by estimate and corrected to what was used, up or down."""
        tokens = scene.limit(FIXED, 1_000, cost=400, meter="tokens")
        for call_id, used, left in (("a", 100, 900), ("b", 550, 350)):
            await scene.admit(call_id, limits=[tokens])
            await scene.release(call_id, actual={"tokens": used})
            looked = await scene.admit(f"look after {call_id}", limits=[tokens._replace(cost=0)])
            assert looked.windows[0].remaining == left

    @scenario
    async def test_end_corrects_only_the_window_of_its_admission(self, scene: Scene) -> None:
        """A correction that comes when its window is over is dropped: the next window is not its business."""
        tokens = scene.limit(FIXED, 1_000, cost=400, meter="tokens")
        await scene.admit("a", limits=[tokens])
        scene.clock.advance(LIFE_S)
        await scene.admit("b", limits=[tokens])
        await scene.release("a", actual={"tokens": 0})
        assert [counter.used for counter in (await scene.state()).counters.values()] == [400]

    @scenario
    async def test_release_gives_no_request_count_back(self, scene: Scene) -> None:
        """A request that failed was a request: its count stays."""
        await scene.grant(100)
        await scene.admit("a", 10, limits=[scene.limit(FIXED, 5)])
        await scene.release("a", actual={"requests": 0})
        assert [counter.used for counter in (await scene.state()).counters.values()] == [1]

    @scenario
    async def test_pool_admits_as_many_as_it_has_slots(self, scene: Scene) -> None:
        """A pool of two admits two; whoever is third learns which level is full (S0.42, S0.43)."""
        leases = [LeaseAsk("everybody", "pool", 2, "global")]
        assert [(await scene.admit(call, leases=leases)).admitted for call in ("a", "b")] == [True, True]
        async with scene.nothing_changes():
            refusal = (await scene.admit("c", leases=leases)).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.name, refusal.level) == (Reason.CONCURRENCY, "everybody", "global")
        assert (refusal.held, refusal.limit, refusal.transient) == (2, 2, True)

    @scenario
    async def test_end_frees_the_slot_at_once(self, scene: Scene) -> None:
        """A slot is usable as soon as its call has ended, however it ended (S0.46)."""
        leases = [LeaseAsk("at once", "pool", 1)]
        await scene.grant(10)
        for call_id, amount in (("a", None), ("b", 5), ("c", 0)):
            assert (await scene.admit(call_id, 5, leases=leases)).admitted
            await scene.one(End(call_id, amount))
        assert tables(await scene.state())["lease"] == {}

    @scenario
    async def test_pool_frees_a_slot_by_time(self, scene: Scene) -> None:
        """The slot of a call whose heartbeats stopped is free when its life is over, without a sweep (S0.47)."""
        leases = [LeaseAsk("at once", "pool", 1)]
        await scene.admit("a", leases=leases)
        scene.clock.advance(LIFE_S - 1)
        assert not (await scene.admit("b", leases=leases)).admitted
        scene.clock.advance(1)
        assert (await scene.admit("c", leases=leases)).admitted

    @scenario
    async def test_late_end_frees_nobody_elses_slot(self, scene: Scene) -> None:
        """A call that lost its slot by time and ends later does not free the slot of its successor (S0.53)."""
        leases = [LeaseAsk("at once", "pool", 1)]
        await scene.admit("a", leases=leases)
        scene.clock.advance(LIFE_S)
        await scene.admit("b", leases=leases)
        await scene.release("a")
        assert not (await scene.admit("c", leases=leases)).admitted

    @scenario
    async def test_pool_without_slots_admits_nobody(self, scene: Scene) -> None:
        """A pool of 0 refuses, and not for the moment only."""
        refusal = (await scene.admit("a", leases=[LeaseAsk("at once", "pool", 0)])).refusal
        assert refusal is not None
        assert not refusal.transient

    @scenario
    async def test_slot_alone_needs_no_account(self, scene: Scene) -> None:
        """A call that is limited but not charged begins and ends without an account."""
        await scene.admit("a", leases=[LeaseAsk("at once", "pool", 1)])
        receipt = await scene.release("a")
        assert (receipt.applied, receipt.amount, receipt.entry) == (True, 0, None)
        assert (await scene.state()).accounts == {}

    @scenario
    async def test_repeat_of_a_slot_alone_takes_no_second_one(self, scene: Scene) -> None:
        """A repeated admission of a call that holds only a slot answers the first, although no account is there."""
        leases = [LeaseAsk("at once", "pool", 1)]
        await scene.admit("a", leases=leases)
        async with scene.nothing_changes():
            assert (await scene.admit("a", leases=leases)).admitted

    @scenario
    async def test_overdue_call_without_an_account_is_swept(self, scene: Scene) -> None:
        """A call that holds only a slot and is never ended is forgotten by a sweep like any other."""
        await scene.admit("a", leases=[LeaseAsk("at once", "pool", 1)])
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        hold = await scene.hold("a")
        assert (hold.payer, hold.unit, hold.state) == (PAYER, UNIT, HoldState.RELEASED)
