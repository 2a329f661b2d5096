"""
A shelf: one partition of a Cluster's namespace, which is a store of its own on one slot.

Knows what the partitions ask of one another beside operations: which calls they have, whether something is due, and the
end of a part that waits for the receipt of its call.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Callable, Sequence

from asgi_metering.receipts import Receipt
from asgi_metering.rules.operations import End, Sweep
from asgi_metering.rules.state import Change, Hold
from asgi_metering.stores.contract import AccountsAfter, Snapshot
from asgi_metering.stores.redis.books import Access
from asgi_metering.stores.redis.link import Command, Link, Reply
from asgi_metering.stores.redis.loading import load
from asgi_metering.stores.redis.names import GLUE, Names, escaped
from asgi_metering.stores.redis.nodes import Nodes, SlotLink
from asgi_metering.stores.redis.parts import NOBODY, answered, part_of, told_to_parts
from asgi_metering.stores.redis.places import NodePlace
from asgi_metering.stores.redis.store import RedisStore, meaning
from asgi_metering.stores.redis.transaction import Transactions
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = ["Shelf"]

SLOTS = 16_384

SOME = 500
"""Parts that one sweep looks at: those that wait for a receipt are few."""


class Shelf(RedisStore):
    """
    One partition.

    Args:
        nodes: The nodes, for the loop that runs.
        place: Any of them.
        namespace: Of the partition alone: its hash tag.
        clock: As of `RedisStore`.
    """

    def __init__(
        self, nodes: Callable[[], Nodes], place: NodePlace, namespace: str, clock: Callable[[], float] | None
    ) -> None:
        super().__init__(place, namespace=namespace, clock=clock)
        self._nodes = nodes
        self.slot = crc_hqx(namespace.encode(), 0) % SLOTS

    @property
    def names(self) -> Names:
        """Its keys."""
        return self._names

    def _link(self) -> Link:
        return SlotLink(self._nodes(), self.slot)

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        """
        Exchange *commands* with whoever owns the slot.

        Raises:
            StoreUnavailableError: No answer came, or the server cannot answer now.
            StoreError: It did not run one of them.
        """
        replies = await self._link().exchange(commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise meaning(reply)
        return replies

    def access(self) -> Access:
        """How its books are reached."""
        return self._access()

    def _copy(self) -> WorkingCopy:
        return WorkingCopy(self._link(), self._names, self._packing, self._clock)

    async def calls(self, ids: Sequence[str]) -> list[tuple[Hold | None, Hold | None]]:
        """Of each call: its hold if that is here, and its part if that is. One round trip."""
        names = self._names
        commands: list[Command] = []
        for call in ids:
            commands += [("GET", names.hold(call)), ("GET", names.hold(part_of(call)))]
        replies = await self.ask(commands)
        names_of = [name for call in ids for name in (call, part_of(call))]
        rows = [
            None if raw is None else self._packing.hold_of(name, raw)
            for name, raw in zip(names_of, replies, strict=True)
        ]
        return list(zip(rows[::2], rows[1::2], strict=True))

    async def accounts_after(self, query: AccountsAfter) -> list[bytes]:
        """The keys of its next accounts, in their order. One round trip."""
        after = (query.payer, query.unit)
        above = f"({GLUE.join(map(escaped, after))}" if any(after) else "-"
        (found,) = await self.ask([("ZRANGEBYLEX", self._names.accounts, above, "+", "LIMIT", "0", str(query.limit))])
        return list(found)

    async def accounts(self, keys: Sequence[bytes]) -> Snapshot:
        """These accounts. One round trip."""
        copy = self._copy()
        await copy.read()
        await copy.rows([f"{self._names.prefix}a:{key.decode()}" for key in keys])
        copy.state.grants.clear()
        return Snapshot(copy.now, copy.state)

    async def pending(self) -> int:
        """How many events wait. One round trip."""
        (size,) = await self.ask([("LLEN", self._names.event_order)])
        return int(size)

    async def is_due(self, ask: Sweep) -> bool:
        """Whether there may be something to sweep. One round trip."""
        names = self._names
        keep = {
            names.due: 0.0,
            names.ended: ask.keep_holds_s,
            names.past_counters: 0.0,
            names.pools: 0.0,
            names.past_windows: ask.keep_windows_s,
            names.past_charge_keys: ask.keep_holds_s,
            names.past_idempotency: 0.0,
            names.oldest_lines: ask.keep_entries_s,
            names.delivered: ask.keep_events_s,
            names.past_readings: ask.keep_readings_s,
        }
        copy = self._copy()
        firsts = await copy.read(*[("ZRANGE", index, "0", "0", "WITHSCORES") for index in keep])
        # A little more than what is old enough: the rules compare with their own rounding.
        return any(
            first and float(first[1]) + kept_s <= copy.now + 1.0
            for first, kept_s in zip(firsts, keep.values(), strict=True)
        )

    async def waiting_parts(self) -> list[Hold]:
        """Parts that nobody renewed and that wait for their call's receipt, oldest first."""
        copy, names = self._copy(), self._names
        await copy.read()
        live = names.of_account("l", names.account(*NOBODY))
        (members,) = await copy.read(("ZRANGEBYSCORE", live, "-inf", repr(copy.now), "LIMIT", "0", str(SOME)))
        await copy.rows([f"{names.prefix}h:{member.decode()}" for member in members])
        return [hold for hold in copy.state.holds.values() if hold.observed and hold.idempotency_key]

    async def answer(self, ask: End, receipt: Receipt) -> None:
        """End the part that has the idempotency key of a call, which got *receipt*. Two or three round trips."""
        part = part_of(ask.id)

        async def work(copy: WorkingCopy) -> tuple[None, list[Change]]:
            await load(copy, End(part, None, actual=told_to_parts(ask.actual)))
            return None, answered(copy.state, part, ask, receipt, copy.now)

        await Transactions(self._link(), self._names, self._packing, self._scripts, self._clock).run(work)
