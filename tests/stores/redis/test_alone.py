"""A lone caller of the Redis store: sent in its own turn, on a connection that is in use, and never otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.errors import StoreUnavailableError, UnwritableError
from asgi_metering.receipts import Basis, Receipt
from asgi_metering.rules.operations import Admit, End, Operation, PostGrant, Renew, WalletSource
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.redis import RedisStore, ServerPlace
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer, valkey
from tests.stores.proofs import assert_conserved
from tests.stores.redis.proxy import Proxy

Maker = Callable[..., RedisStore]


def call(call_id: str = "a", **more: Any) -> Admit:
    """A call of the payer."""
    return Admit(call_id, "p", "credits", 10, 10, (WalletSource(),), **more)


def play(store: RedisStore, scene: Callable[[Pump, list[str]], Awaitable[None]]) -> None:
    """Play *scene* on the pump of a store whose payer has 100 units; the list says how each operation went."""

    async def opened() -> None:
        went: list[str] = []
        start, run = store.start, store.run

        def started(operation: Operation, told: Callable[..., None]) -> bool:
            is_sent = start(operation, told)
            if is_sent:
                went.append("alone")
            return is_sent

        async def ran(operations: Sequence[Operation]) -> list[Any]:
            went.append("run")
            return await run(operations)

        await store.open()
        # The heartbeat finds nobody, and the function is loaded for it.
        await store.run([PostGrant("g", "p", "credits", 100), Renew("nobody")])
        store.start, store.run = started, ran  # type: ignore[method-assign]
        pump = Pump(store)
        await scene(pump, went)
        await pump.close()
        assert_conserved((await store.read(EverythingKept())).state)
        await store.close()

    asyncio.run(opened())


def test_call_of_a_lone_caller(make_store: Maker) -> None:
    """Admission, heartbeat and end of a lone caller go alone; what no script of the calls runs does not."""

    async def scene(pump: Pump, went: list[str]) -> None:
        first, beat = await pump.submit(call()), await pump.submit(Renew("a", 1))
        receipt = await pump.submit(End("a", 3, Basis.USAGE))
        posted = await pump.submit(PostGrant("h", "p", "credits", 1))
        assert isinstance(first, Decision)
        assert isinstance(receipt, Receipt)
        assert (first.admitted, beat, receipt.amount, posted.applied) == (True, True, 3, True)  # type: ignore[union-attr]
        assert went == ["alone", "alone", "alone", "run"]

    play(make_store(), scene)


def test_lone_call_that_the_script_does_not_run(server: ValkeyServer, make_store: Maker) -> None:
    """An id that comes again needs the rules, and a gate has to open first: both are run, and answered once."""

    async def scene(pump: Pump, went: list[str]) -> None:
        first, again = [await pump.submit(call()) for _ in range(2)]
        assert isinstance(first, Decision)
        assert isinstance(again, Decision)
        assert again._replace(now=first.now) == first
        server.ask("SET", "{alone}:gate", "somebody", "PX", "50")
        second = await pump.submit(call("b"))
        assert isinstance(second, Decision)
        assert second.available == 80
        assert went == ["alone", "alone", "run", "alone", "run"]

    play(make_store(namespace="alone"), scene)


def test_lone_call_after_the_server_forgot_the_scripts() -> None:
    """It fails for want of the function, and is run when that is loaded."""
    with valkey() as own:

        async def scene(pump: Pump, went: list[str]) -> None:
            await pump.submit(call())
            own.ask("FUNCTION", "FLUSH")
            second = await pump.submit(call("b"))
            assert isinstance(second, Decision)
            assert second.available == 80
            assert went == ["alone", "alone", "run"]

        play(RedisStore(ServerPlace({"host": HOST, "port": own.port}, 5.0)), scene)


def test_lone_call_that_cannot_be_packed(make_store: Maker) -> None:
    """What is not JSON is its caller's mistake, as in a batch."""

    async def scene(pump: Pump, went: list[str]) -> None:
        await pump.submit(call())
        with pytest.raises(UnwritableError):
            await pump.submit(call("b", facts={"odd": object()}))
        assert went == ["alone", "run"]

    play(make_store(), scene)


def test_lone_call_whose_id_cannot_be_sent(make_store: Maker) -> None:
    """An id of the application's own that is no UTF-8 is its caller's mistake, as in a batch, and stops nobody."""

    async def scene(pump: Pump, went: list[str]) -> None:
        with pytest.raises(UnwritableError):
            await pump.submit(call("\ud800"))
        second = await pump.submit(call("b"))
        assert isinstance(second, Decision)
        assert second.available == 90
        assert went[0] == "run"

    play(make_store(), scene)


def test_lone_call_loses_its_connection(server: ValkeyServer, make_store: Maker) -> None:
    """Its caller hears that nobody knows; asked again under its id it is done once, on a new connection."""

    async def run() -> None:
        async with Proxy(server.port) as proxy:
            store = make_store(port=proxy.port)
            await store.open()
            await store.run([PostGrant("g", "p", "credits", 100)])
            unknown: list[Admit] = []
            pump = Pump(store, unknown.append)
            await pump.submit(call())
            proxy.cuts = 1
            with pytest.raises(StoreUnavailableError, match="is lost"):
                await pump.submit(call("b"))
            assert unknown == [call("b")]
            again = await pump.submit(call("b"))
            assert isinstance(again, Decision)
            assert again.available == 80
            await pump.close()
            await store.close()

    asyncio.run(run())


def test_lone_call_to_a_server_that_says_nothing() -> None:
    """It costs the time limit and no more."""
    with valkey() as own:

        async def run() -> None:
            store = RedisStore(ServerPlace({"host": HOST, "port": own.port}, 0.5), timeout_s=0.5)
            await store.run([PostGrant("g", "p", "credits", 100)])
            pump = Pump(store)
            own.freeze()
            with pytest.raises(StoreUnavailableError, match=r"no answer within 0\.5 s"):
                await pump.submit(call())
            own.thaw()
            await pump.close()
            await store.close()

        asyncio.run(run())
