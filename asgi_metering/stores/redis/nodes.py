"""
Nodes: the ways of one event loop to the nodes of a Cluster, and which of them owns a slot.

What waits for a node while it is being asked goes to it together, whatever slots it is for. A node that is not the
owner says so and has done nothing: the owner is looked up, and asked. While a slot is on its way from one node to
another, some of its rows are here and others there, and no script may see only some: what names a row that is not there
is refused by both nodes, every script of ours names one that never is, and nobody is ever asked out of turn
(``ASKING``). Whoever needs the slot waits until it has arrived. Does not know what is said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from asgi_metering.errors import StoreUnavailableError
from asgi_metering.stores.redis.link import Command, Link, Reply, moves
from asgi_metering.stores.redis.places import Address, ClusterPlace
from asgi_metering.stores.redis.scripts import Scripts

__all__ = ["Nodes", "SlotLink"]

MAX_MOVES = 10
"""Times that a slot's owner is looked up for one exchange."""

FIRST_PAUSE_S = 0.005
MAX_PAUSE_S = 0.2
"""Between looking at a slot that is on its way: about a second altogether."""


class Nodes:
    """
    All nodes of one Cluster, for one event loop.

    Args:
        place: Where they are.
        scripts: What is loaded into each.
        timeout_s: Seconds that one exchange with one node may take.
    """

    def __init__(self, place: ClusterPlace, scripts: Scripts, timeout_s: float) -> None:
        self._place = place
        self._scripts = scripts
        self._timeout_s = timeout_s
        self._nodes: dict[Address, _Node] = {}
        self._owners: dict[tuple[int, int], Address] = {}
        self._lookups = 0
        self._turn = asyncio.Lock()

    async def exchange(self, slot: int, commands: Sequence[Command]) -> list[Reply]:
        """
        Send *commands* to the owner of *slot*; as `Link.exchange`.

        Raises:
            StoreUnavailableError: The node was lost, or no answer came in time. Any of them may have happened.
            ConfigurationError: The node refuses us: credentials, or what they may do.
        """
        replies: list[Reply] = [None] * len(commands)
        waiting, pause_s = list(range(len(commands))), FIRST_PAUSE_S
        for move in range(MAX_MOVES):
            node = self._node(await self._owner(slot))
            lookups = self._lookups
            try:
                found = await node.exchange([commands[at] for at in waiting])
            except StoreUnavailableError:
                # Another one may own the slot by now, for whoever asks next.
                await self._forget(lookups)
                raise
            for at, reply in zip(waiting, found, strict=True):
                replies[at] = reply
            waiting = [at for at in waiting if isinstance(replies[at], moves())]
            if not waiting:
                break
            await self._forget(lookups)
            if move:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        return replies

    def _node(self, address: Address) -> _Node:
        node = self._nodes.get(address)
        if node is None:
            link = Link(self._place.node(address), self._scripts, self._timeout_s)
            node = self._nodes[address] = _Node(link)
        return node

    async def _owner(self, slot: int) -> Address:
        if not self._owners:
            async with self._turn:
                if not self._owners:
                    self._owners = await self._place.owners()
                    self._lookups += 1
        for (first, last), owner in self._owners.items():
            if first <= slot <= last:
                return owner
        self._owners = {}
        raise StoreUnavailableError(f"No node of {self._place} owns slot {slot} now.")

    async def _forget(self, lookups: int) -> None:
        """Look the owners up again, unless somebody has since."""
        async with self._turn:
            if lookups == self._lookups:
                self._owners = {}

    async def looked_up(self) -> Mapping[tuple[int, int], Address]:
        """Who owns which slots, as the nodes say now. Raises `StoreUnavailableError`."""
        await self._forget(self._lookups)
        await self._owner(0)
        return dict(self._owners)

    async def every(self) -> list[Link]:
        """The links to all nodes that own something, in the order of their slots."""
        await self._owner(0)
        owners = dict.fromkeys(owner for _, owner in sorted(self._owners.items()))
        return [self._node(owner).link for owner in owners]

    async def close(self) -> None:
        """Close all connections, after whoever uses them. Again changes nothing."""
        for node in self._nodes.values():
            await node.link.close()


class _Node:
    """One node: what comes while it is being asked waits, and goes together."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._waiting: list[tuple[Sequence[Command], asyncio.Future[list[Reply]]]] = []
        self._task: asyncio.Task[None] | None = None

    async def exchange(self, commands: Sequence[Command]) -> list[Reply]:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[list[Reply]] = loop.create_future()
        self._waiting.append((commands, answered))
        if self._task is None:
            self._task = loop.create_task(self._work())
        return await answered

    async def _work(self) -> None:
        try:
            while self._waiting:
                together, self._waiting = self._waiting, []
                try:
                    await self._ask(together)
                except BaseException as failure:
                    for _, answered in together:
                        _fail(answered, failure)
                    if not isinstance(failure, Exception):
                        raise
        finally:
            self._task = None

    async def _ask(self, together: list[tuple[Sequence[Command], asyncio.Future[list[Reply]]]]) -> None:
        try:
            replies = await self.link.exchange([command for commands, _ in together for command in commands])
        except UnicodeError:
            if len(together) == 1:
                raise
            # Nothing was sent, and only one of them cannot be.
            for one in together:
                try:
                    await self._ask([one])
                except UnicodeError as failure:
                    _fail(one[1], failure)
            return
        at = 0
        for commands, answered in together:
            if not answered.done():
                answered.set_result(replies[at : at + len(commands)])
            at += len(commands)


def _fail(answered: asyncio.Future[list[Reply]], failure: BaseException) -> None:
    if answered.done():
        return
    if isinstance(failure, StoreUnavailableError):
        # One of its own for each: what is raised keeps the way that it took.
        own = StoreUnavailableError(str(failure))
        own.__cause__ = failure.__cause__
        answered.set_exception(own)
    elif isinstance(failure, Exception):
        answered.set_exception(failure)
    else:
        answered.cancel()


class SlotLink(Link):
    """
    The way to whoever owns one slot.

    Args:
        nodes: All of them.
        slot: Which one.
    """

    def __init__(self, nodes: Nodes, slot: int) -> None:
        self._nodes = nodes
        self._slot = slot

    async def exchange(self, commands: Sequence[Command]) -> list[Reply]:
        """See `Nodes.exchange`."""
        return await self._nodes.exchange(self._slot, commands)

    async def close(self) -> None:
        """Nothing of its own is open."""
