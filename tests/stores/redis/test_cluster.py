"""The Redis store on a real Cluster of three nodes, and on what a sentinel names."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.receipts import Basis, GrantReceipt, Receipt
from asgi_metering.rules.operations import Acknowledge, Admit, End, PostGrant, WalletSource
from asgi_metering.stores.contract import EverythingKept, PendingEvents, Store
from asgi_metering.stores.redis import ClusterPlace, ClusterStore, RedisStore, SentinelPlace
from asgi_metering.stores.redis.places import driver
from asgi_metering.stores.redis.transaction import Transactions
from asgi_metering.stores.redis.working_copy import WorkingCopy
from asgi_metering.stores.urls import store_from_url
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import StoreConformance
from tests.harness.servers import HOST, free_port
from tests.harness.valkey import ValkeyServer, sentinel, valkey
from tests.harness.waiting import wait_until
from tests.stores.beside import Pair, run_as_a_service
from tests.stores.places import PATIENT_S
from tests.stores.proofs import assert_conserved

_numbers = count()


def url_of(nodes: list[ValkeyServer], namespace: str) -> str:
    """The Cluster's URL."""
    return f"redis+cluster://{','.join(f'{HOST}:{node.port}' for node in nodes)}?namespace={namespace}"


class TestCluster(StoreConformance):
    """Every rule of the suite, on a Cluster, where payers, limits and pools are in different partitions."""

    partitions = 3

    @pytest.fixture(autouse=True)
    def _nodes(self, nodes: list[ValkeyServer]) -> None:
        self.seeds = [(HOST, node.port) for node in nodes]

    async def make_store(self, clock: FakeClock) -> Store:
        """Make a store with a namespace of its own."""
        place = ClusterPlace(self.seeds, {}, 5.0)
        store = ClusterStore(place, namespace=f"suite{next(_numbers)}", partitions=self.partitions, clock=clock)
        await store.open()
        return store

    def test_run_together_as_one_by_one(self) -> None:
        """Where all is in one partition; in several, what is handed over together runs at the same time."""
        self.partitions = 1
        super().test_run_together_as_one_by_one()

    def test_sweep_a_few_at_a_time(self) -> None:
        """As many of a kind as it was asked to, of each partition."""
        self.partitions = 1
        super().test_sweep_a_few_at_a_time()


@pytest.mark.timeout(1_800)  # For more steps than usual.
def test_serve_beside_memory(nodes: list[ValkeyServer]) -> None:
    """Many thousand steps of a service are answered and kept on a Cluster as in memory, where all is in one slot."""

    def pair() -> Pair:
        # Of one event loop, as its connections are.
        place = ClusterPlace([(HOST, node.port) for node in nodes], {}, 5.0)
        namespace = f"serve{next(_numbers)}"
        return Pair(
            lambda clock: ClusterStore(place, namespace=namespace, partitions=1, timeout_s=PATIENT_S, clock=clock)
        )

    run_as_a_service(pair)


def test_first_batch_on_a_server_is_run_in_order() -> None:
    """A server that knows neither our scripts nor our functions runs the first batch in its order."""

    async def play(server: ValkeyServer) -> None:
        store = store_from_url(f"{server.url}?namespace=first")
        await store.open()
        await store.run([PostGrant("g", "p", "credits", 100)])
        server.ask("SCRIPT", "FLUSH")
        server.ask("FUNCTION", "FLUSH")
        ended = End("c", 5, Basis.USAGE, event={"outcome": "completed"})
        answers = await store.run([call("c"), ended, Acknowledge(("c",))])
        assert answers[2] == 1
        assert not (await store.read(PendingEvents())).state.events
        await store.close()

    with valkey() as server:
        asyncio.run(play(server))


def call(call_id: str) -> Admit:
    """A call of 10 units."""
    return Admit(call_id, "p", "credits", 10, 10, (WalletSource(),))


def test_payers_are_spread_over_the_nodes(nodes: list[ValkeyServer]) -> None:
    """One namespace's payers live on all nodes."""

    async def run() -> None:
        store = store_from_url(url_of(nodes, "spread"))
        await store.run([PostGrant(f"g{number}", f"p{number}", "credits", 100) for number in range(12)])
        await store.close()

    asyncio.run(run())
    sizes = [int(node.ask("EVAL", "return #redis.call('KEYS', '{spread*')", "0")[1:]) for node in nodes]
    assert all(sizes)


def test_what_cannot_be_sent_is_its_own_mistake(nodes: list[ValkeyServer]) -> None:
    """A text that is no UTF-8 is not the mistake of what waits for the same node beside it."""

    async def run() -> None:
        store = store_from_url(url_of(nodes, "unsendable"))
        await store.run([PostGrant("g", "p", "credits", 100)])
        mistake, granted = await asyncio.gather(
            store.run([call("\ud800")]), store.run([PostGrant("h", "p", "credits", 50)]), return_exceptions=True
        )
        assert isinstance(mistake, UnicodeEncodeError)
        assert isinstance(granted, list)
        assert isinstance(granted[0], GrantReceipt)
        assert granted[0].available == 150
        await store.close()

    asyncio.run(run())


class MovingSlot:
    """A slot that is moved from its node to another one, step by step."""

    def __init__(self, nodes: list[ValkeyServer], tag: str) -> None:
        self._slot = str(driver().slot(tag.encode()))
        self._nodes = nodes
        self._owner = next(node for node in nodes if not node.ask("GET", tag).startswith(b"-MOVED"))
        self._other = next(node for node in nodes if node is not self._owner)
        self._ids = {node.port: node.ask("CLUSTER", "MYID").split(b"\r\n")[1].decode() for node in nodes}

    def begin(self) -> None:
        """Both nodes know."""
        self._other.ask("CLUSTER", "SETSLOT", self._slot, "IMPORTING", self._ids[self._owner.port])
        self._owner.ask("CLUSTER", "SETSLOT", self._slot, "MIGRATING", self._ids[self._other.port])

    def keys(self) -> list[str]:
        """What has not moved yet."""
        return self._owner.ask("CLUSTER", "GETKEYSINSLOT", self._slot, "100").decode().split("\r\n")[2::2]

    def move(self, keys: list[str]) -> None:
        """Move some."""
        moved = self._owner.ask("MIGRATE", HOST, str(self._other.port), "", "0", "5000", "KEYS", *keys)
        assert moved == b"+OK\r\n"

    def end(self) -> None:
        """All nodes know."""
        for node in (self._other, self._owner, *self._nodes):
            node.ask("CLUSTER", "SETSLOT", self._slot, "NODE", self._ids[self._other.port])


def test_slot_moves_to_another_node(nodes: list[ValkeyServer]) -> None:
    """While a slot moves, its calls wait; when it has, they come through: nothing is lost and nothing done twice."""
    moving = MovingSlot(nodes, "{moving:0}")

    async def run() -> None:
        store = store_from_url(url_of(nodes, "moving") + "&partitions=1")
        await store.run([PostGrant("g", "p", "credits", 100), call("a"), call("b")])
        moving.begin()
        half = moving.keys()[::2]
        assert len(half) > 3
        moving.move(half)
        failures = await store.run([End("a", 9, Basis.USAGE), PostGrant("h", "p", "credits", 1)])
        assert [type(failure) for failure in failures] == [StoreUnavailableError] * 2
        waiting = asyncio.ensure_future(store.run([End("a", 3, Basis.USAGE), call("c")]))
        await asyncio.sleep(0)
        moving.move(moving.keys())
        moving.end()
        first, second = await waiting
        assert isinstance(first, Receipt)
        assert isinstance(second, Decision)
        assert (first.amount, second.admitted) == (3, True)
        state = (await store.read(EverythingKept())).state
        assert_conserved(state)
        account = state.accounts["p", "credits"]
        assert (account.settled, account.held, account.granted) == (3, 20, 100)
        await store.close()

    asyncio.run(run())


def test_nobody_works_alone_on_half_a_slot(nodes: list[ValkeyServer]) -> None:
    """Not even a transaction that keeps all others out writes while some of its rows may be elsewhere."""
    moving = MovingSlot(nodes, "{alone:0}")

    async def run() -> None:
        store = store_from_url(url_of(nodes, "alone") + "&partitions=1")
        assert isinstance(store, ClusterStore)
        (shelf,) = store.shelves
        link, packing, scripts = shelf._link(), shelf._packing, shelf._scripts
        await shelf.ask([("SET", shelf.names.gate, "ours"), *[("SCRIPT", "LOAD", text) for text in scripts.texts()]])
        moving.begin()
        copy = WorkingCopy(link, shelf.names, packing, None)
        alone = Transactions(link, shelf.names, packing, scripts, None)
        with pytest.raises(driver().exceptions.TryAgainError):
            await alone._commit(copy, [], "ours")
        moving.move(moving.keys())
        moving.end()
        assert await alone._commit(copy, [], "ours") == 1
        await store.close()

    asyncio.run(run())


def test_no_node_of_a_cluster_answers() -> None:
    """A Cluster of which no node can be reached is an outage."""
    store = store_from_url(f"redis+cluster://{HOST}:{free_port()}")

    async def run() -> None:
        with pytest.raises(StoreUnavailableError, match="No node of the Cluster"):
            await store.open()
        await store.close()

    asyncio.run(run())


def test_master_dies_and_a_sentinel_fails_over() -> None:
    """Calls that run while the master is killed go on at the replica that the sentinel makes the master, each once."""
    with valkey() as first, valkey("--replicaof", HOST, str(first.port)) as second:
        wait_until(lambda: b"state=online" in first.ask("INFO", "replication"), what="the replica is online")
        with sentinel("main", first, down_after_ms=300) as watcher:
            told = ("SENTINEL", "REPLICAS", "main")
            wait_until(lambda: str(second.port).encode() in watcher.ask(*told), what="the sentinel knows the replica")
            asyncio.run(_fail_over(first, second, watcher))


async def _fail_over(first: ValkeyServer, second: ValkeyServer, watcher: ValkeyServer) -> None:
    store = store_from_url(f"redis+sentinel://{HOST}:{watcher.port}/main/0?timeout=1")
    await store.open()
    await store.run([PostGrant("g", "p", "credits", 100), *(call(f"c{number}") for number in range(5))])
    what = "the replica has the calls"
    await asyncio.to_thread(wait_until, lambda: b"{metering}" in second.ask("KEYS", "*h:c4"), what=what)
    first.stop(kill=True)
    for number in range(5):
        receipt = await _until_answered(store, End(f"c{number}", 3, Basis.USAGE))
        assert (receipt.amount, receipt.known) == (3, True)
    state = (await store.read(EverythingKept())).state
    assert_conserved(state)
    account = state.accounts["p", "credits"]
    assert (account.granted, account.settled, account.held) == (100, 15, 0)
    assert second.ask("ROLE").startswith(b"*3\r\n$6\r\nmaster")
    await store.close()


async def _until_answered(store: Store, end: End) -> Receipt:
    for _ in range(400):
        try:
            (answer,) = await store.run([end])
        except StoreUnavailableError as failure:
            answer = failure
        if isinstance(answer, Receipt):
            return answer
        await asyncio.sleep(0.05)
    raise AssertionError(f"{end!r} was never answered: {answer!r}")


def test_no_sentinel_knows_the_master() -> None:
    """A master that no sentinel names is an outage."""
    store = RedisStore(SentinelPlace([(HOST, free_port())], "main", {}, 0.5))

    async def run() -> None:
        with pytest.raises(
            StoreUnavailableError, match=r"No sentinel names a master 'main' now: [^<>]*\. Check the addresses"
        ):
            await store.open()
        await store.close()

    asyncio.run(run())
