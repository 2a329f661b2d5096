"""What happens to the Redis store when the server, the connection or the caller goes away, and what it refuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

import pytest

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision
from asgi_metering.errors import AmountError, ConfigurationError, StoreError, StoreUnavailableError
from asgi_metering.receipts import Basis, GrantReceipt, Receipt
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    Claim,
    Correct,
    Emit,
    End,
    LeaseAsk,
    LimitAsk,
    PostGrant,
    Renew,
    WalletSource,
    WindowKind,
)
from asgi_metering.stores.contract import AccountRows, EverythingKept, HoldRow
from asgi_metering.stores.redis import RedisStore, ServerPlace
from asgi_metering.stores.redis.store import meaning
from tests.harness.servers import HOST, free_port
from tests.harness.valkey import ValkeyServer, valkey
from tests.stores.proofs import assert_conserved
from tests.stores.redis.proxy import Proxy

Maker = Callable[..., RedisStore]


def grant(amount: int = 100, name: str = "g") -> PostGrant:
    """Units for the payer."""
    return PostGrant(name, "p", "credits", amount)


def call(call_id: str = "a", amount: int = 10, **more: object) -> Admit:
    """A call of the payer."""
    return Admit(call_id, "p", "credits", amount, amount, (WalletSource(),), **more)  # type: ignore[arg-type]


def test_admit_and_end_cost_one_round_trip_each(server: ValkeyServer, make_store: Maker) -> None:
    """Three limits, two slots, an allowance and the wallet are one round trip, as is a batch of 64 such calls."""
    limits = tuple(LimitAsk(f"l{n}", f"l{n}", WindowKind.FIXED, 1_000, 60.0, meter="tokens") for n in range(3))
    leases = (LeaseAsk("a", "one", 1_000), LeaseAsk("b", "two", 1_000))
    sources = (AllowanceSource("free", 5, window_s=60.0), WalletSource())

    def ask(call_id: str) -> Admit:
        return Admit(call_id, "p", "credits", 10, 10, sources, limits, leases, facts={"caller": "k"})

    async def run() -> list[int]:
        async with Proxy(server.port) as proxy:
            store = make_store(port=proxy.port)
            await store.open()
            await store.run([grant(100_000), ask("first"), End("first", 1)])
            turns = []
            for batch in (
                [ask("a")],
                [Renew("a", 3)],
                [End("a", 4, Basis.USAGE, actual={"tokens": 9}, event={"outcome": "completed"})],
                [ask(f"b{number}") for number in range(64)],
                [End(f"b{number}", 4, Basis.USAGE, event={}) for number in range(64)],
            ):
                before = proxy.turns
                answers = await store.run(batch)
                assert not any(isinstance(answer, Exception) for answer in answers)
                turns.append(proxy.turns - before)
            await store.close()
            return turns

    assert asyncio.run(run()) == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("forget", [("SCRIPT", "FLUSH"), ("FUNCTION", "FLUSH"), ("FLUSHALL",)])
def test_run_after_the_server_forgot_the_scripts(make_store: Maker, forget: tuple[str, ...]) -> None:
    """Scripts and functions that the server lost are loaded again, and what failed for want of them is done once."""
    with valkey() as own:

        async def run() -> None:
            store = make_store(port=own.port)
            await store.run([grant(1), call("z", 1)])
            for command in {forget, ("FUNCTION", "FLUSH")}:
                own.ask(*command)
            await store.run([grant(100, "h")])
            answers = await store.run([call("a"), call("b"), End("a", 3, Basis.USAGE), Emit((("e", {}),)), call("c")])
            assert [type(answer) for answer in answers] == [Decision, Decision, Receipt, int, Decision]
            own.ask(*forget)
            await store.run([grant(5, "i")])
            account = (await store.read(AccountRows("p", "credits"))).state.accounts["p", "credits"]
            kept = (5, 0, 0) if forget == ("FLUSHALL",) else (106, 3, 21)
            assert (account.granted, account.settled, account.held) == kept
            await store.close()

        asyncio.run(run())


@pytest.mark.parametrize("missing", [("fcall", "function"), ("function",), ("fcall",)])
@pytest.mark.parametrize("forbidden", [False, True])
def test_server_without_functions(make_store: Maker, missing: tuple[str, ...], forbidden: bool) -> None:
    """A server that has no functions, or keeps them from us, runs the same text as a script, and in the same order."""
    options = () if forbidden else [word for name in missing for word in ("--rename-command", name, "")]
    with valkey(*options) as own:
        if forbidden:
            own.ask("ACL", "SETUSER", "default", *(f"-{name}" for name in missing))

        async def run() -> None:
            store = make_store(port=own.port)
            await store.open()
            for _ in range(2):
                answers = await store.run([grant(), call("a"), End("a", 3, Basis.USAGE), call("b")])
                assert [type(answer) for answer in answers] == [GrantReceipt, Decision, Receipt, Decision]
            account = (await store.read(AccountRows("p", "credits"))).state.accounts["p", "credits"]
            assert (account.granted, account.settled, account.held) == (100, 3, 10)
            await store.close()
            # The scripts are there now, so that what is no function has nothing to wait for.
            again = make_store(port=own.port)
            told = await again.run(
                [call("c"), End("c", 3, Basis.USAGE, event={"outcome": "completed"}), Claim(9, 60.0)]
            )
            assert [event.id for event in told[2]] == ["c"]  # type: ignore[union-attr]
            await again.close()

        asyncio.run(run())


def test_server_that_cannot_take_the_function_now(make_store: Maker) -> None:
    """While its memory is full nothing is done, which is said; as soon as it is not, calls are functions again."""
    with valkey() as own:

        async def run() -> None:
            store = make_store(port=own.port)
            await store.run([grant(), call("a")])
            own.ask("FUNCTION", "FLUSH")
            own.ask("CONFIG", "SET", "maxmemory", "1")
            answers = await store.run([call("b"), End("a", 3, Basis.USAGE)])
            assert [type(answer) for answer in answers] == [StoreUnavailableError, StoreUnavailableError]
            assert own.ask("FUNCTION", "LIST") == b"*0\r\n"
            own.ask("CONFIG", "SET", "maxmemory", "0")
            answers = await store.run([call("b"), End("a", 3, Basis.USAGE)])
            assert [type(answer) for answer in answers] == [Decision, Receipt]
            assert b"metering_" in own.ask("FUNCTION", "LIST")
            account = (await store.read(AccountRows("p", "credits"))).state.accounts["p", "credits"]
            assert (account.settled, account.held) == (3, 10)
            await store.close()

        asyncio.run(run())


@pytest.mark.parametrize(
    ("code", "kind"),
    [("OOM", "OutOfMemoryError"), ("READONLY", "ReadOnlyError"), ("MISCONF", "ResponseError"), ("", "ResponseError")],
)
def test_refusal_that_a_script_wraps(make_store: Maker, code: str, kind: str) -> None:
    """What Redis 6.2 says within a script's error, why it cannot write now, is told as where it is said plainly."""
    where = "@user_script:700: @user_script: 700: "
    said = f"ERR Error running script (call to f_{40 * 'a'}): {where}{code and '-'}{code} Not now."
    repeat = ("EVAL", f'return redis.error_reply("{said}")', 0)

    async def run() -> None:
        store = make_store()
        link = store._link()
        link._place.may_move = False
        (failure,) = await link.exchange([repeat])
        assert type(failure).__name__ == kind
        assert isinstance(meaning(failure), StoreUnavailableError) == bool(code)
        await store.close()

    asyncio.run(run())


@pytest.mark.parametrize("operation", ["admit", "end", "grant"])
def test_repeat_what_lost_its_reply(server: ValkeyServer, make_store: Maker, operation: str) -> None:
    """A connection that is cut between request and reply is said to be lost; the repeat changes nothing twice."""

    async def run() -> None:
        async with Proxy(server.port) as proxy:
            store = make_store(port=proxy.port)
            await store.run([grant(), call("known")])
            asked = {"admit": call("a"), "end": End("known", 4, Basis.USAGE, event={}), "grant": grant(7, "h")}[
                operation
            ]
            proxy.cuts = 1
            with pytest.raises(StoreUnavailableError, match=r"lost|cannot be reached"):
                await store.run([asked])
            (answer,) = await store.run([asked])
            assert not isinstance(answer, Exception)
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            account = state.accounts["p", "credits"]
            assert (account.granted, account.settled, account.held) == {
                "admit": (100, 0, 20),
                "end": (100, 4, 0),
                "grant": (107, 0, 10),
            }[operation]
            assert len(state.events) == (operation == "end")
            await store.close()

    asyncio.run(run())


@pytest.mark.parametrize("kill", [True, False])
def test_server_restarts(kill: bool) -> None:
    """What was acknowledged before a restart, or a kill, is there after it, and the store connects again by itself."""
    with valkey("--appendonly", "yes", "--appendfsync", "always") as own:

        async def run() -> None:
            store = RedisStore(ServerPlace({"host": HOST, "port": own.port}, 5.0), timeout_s=5.0)
            await store.open()
            await store.run([grant(), call("a"), call("b"), End("a", 3, Basis.USAGE)])
            await asyncio.to_thread(own.restart, kill=kill)
            answer = None
            for _ in range(50):
                try:
                    (answer,) = await store.run([End("b", 4, Basis.USAGE)])
                    break
                except StoreUnavailableError:
                    await asyncio.sleep(0.02)
            assert isinstance(answer, Receipt)
            assert (answer.amount, answer.applied) == (4, True)
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            assert state.accounts["p", "credits"].settled == 7
            await store.close()

        asyncio.run(run())


def test_server_is_stopped_and_goes_on() -> None:
    """A server that says nothing costs the time limit and no more; what it had read is done once when it goes on."""
    with valkey() as own:

        async def run() -> None:
            store = RedisStore(ServerPlace({"host": HOST, "port": own.port}, 1.0), timeout_s=1.0)
            await store.run([grant(), call("a")])
            own.freeze()
            with pytest.raises(StoreUnavailableError, match=r"no answer within 1\.0 s"):
                await store.run([call("b")])
            with pytest.raises(StoreUnavailableError):
                await store.run([call("b")])
            own.thaw()
            answer = None
            for _ in range(100):
                try:
                    (answer,) = await store.run([call("b")])
                    break
                except StoreUnavailableError:
                    await asyncio.sleep(0.02)
            assert isinstance(answer, Decision)
            assert answer.admitted
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            assert state.accounts["p", "credits"].held == 20
            await store.close()

        asyncio.run(run())


def test_caller_is_cancelled_while_it_waits(server: ValkeyServer, make_store: Maker) -> None:
    """Replies that a cancelled caller left behind are nobody's: the next caller gets its own."""

    async def run() -> None:
        store = make_store()
        await store.run([grant(10_000)])
        for number in range(30):
            task = asyncio.ensure_future(store.run([call(f"a{number}.{each}") for each in range(5)]))
            for _ in range(number % 6):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            (decision,) = await store.run([call(f"b{number}")])
            assert isinstance(decision, Decision)
            assert decision.id == f"b{number}"
        assert_conserved((await store.read(EverythingKept())).state)
        await store.close()

    asyncio.run(run())


def test_read_is_cancelled_beside_others(server: ValkeyServer, make_store: Maker) -> None:
    """Whoever stops waiting for a read costs nobody the connection: an admission on its way is answered."""

    async def run() -> None:
        async with Proxy(server.port) as proxy:
            store = make_store(port=proxy.port)
            await store.run([grant(), call("a")])
            before = proxy.turns
            read = asyncio.ensure_future(store.read(AccountRows("p", "credits")))
            asked = asyncio.ensure_future(store.run([call("b")]))
            while proxy.turns == before:
                await asyncio.sleep(0)
            read.cancel()
            (decision,) = await asked
            assert isinstance(decision, Decision)
            assert (decision.id, decision.available) == ("b", 80)
            found = await store.read(AccountRows("p", "credits"))
            assert found.state.accounts["p", "credits"].held == 20
            await store.close()

    asyncio.run(run())


def test_operation_that_cannot_be_written_harms_no_neighbour(make_store: Maker) -> None:
    """An operation with what is not JSON is answered with its mistake; those before and after it are done."""

    async def run() -> None:
        store = make_store()
        await store.run([grant()])
        before, poisoned, mistaken, after = await store.run(
            [call("a"), call("b", facts={"x": object()}), call("c", -1), call("d")]
        )
        assert isinstance(before, Decision)
        assert isinstance(poisoned, TypeError)
        assert isinstance(mistaken, AmountError)
        assert isinstance(after, Decision)
        assert (await store.read(HoldRow("b"))).state.holds == {}
        await store.close()

    asyncio.run(run())


def test_operation_that_cannot_be_sent_costs_nobody_the_connection(make_store: Maker) -> None:
    """A text that is no UTF-8 is the mistake of its batch, which was never sent; others on their way are answered."""

    async def run() -> None:
        store = make_store()
        await store.run([grant()])
        beside, mistake, behind = await asyncio.gather(
            store.run([call("a")]),
            store.run([call("b"), call("\ud800")]),
            store.run([call("c")]),
            return_exceptions=True,
        )
        assert isinstance(mistake, UnicodeEncodeError)
        for answers in (beside, behind):
            assert isinstance(answers, list)
            assert isinstance(answers[0], Decision)
        account = (await store.read(AccountRows("p", "credits"))).state.accounts["p", "credits"]
        assert account.held == 20
        await store.close()

    asyncio.run(run())


def test_amounts_at_the_bound_are_exact(make_store: Maker) -> None:
    """The largest amount is granted, held, spent and given back to the unit; what goes beyond it is refused (X.7)."""

    async def run() -> None:
        store = make_store()
        most = MAX_AMOUNT
        granted, held, one, spent, _, free = await store.run(
            [
                grant(most),
                call("a", most - 1),
                call("b", 1),
                End("a", most - 2, Basis.USAGE),
                End("b", None),
                AdmitAll("c", most),
            ]
        )
        assert granted.available == most  # type: ignore[union-attr]
        assert (held.held, held.available) == (most - 1, 1)  # type: ignore[union-attr]
        assert one.admitted  # type: ignore[union-attr]
        assert (spent.amount, spent.available) == (most - 2, 1)  # type: ignore[union-attr]
        assert free.held == 2  # type: ignore[union-attr]
        beyond, over = await store.run([grant(1, "h"), End("c", 10, Basis.USAGE)])
        assert isinstance(beyond, AmountError)
        assert isinstance(over, AmountError)
        state = (await store.read(EverythingKept())).state
        assert_conserved(state)
        account = state.accounts["p", "credits"]
        assert (account.settled, account.held, account.granted) == (most - 2, 2, most)
        (fixed,) = await store.run([Correct("x", "p", "credits", -(most - 2))])
        assert fixed.available == most - 2  # type: ignore[union-attr]
        await store.close()

    asyncio.run(run())


def AdmitAll(call_id: str, most: int) -> Admit:  # noqa: N802 -- reads like the operation it makes
    """Hold what is there, up to *most*."""
    return Admit(call_id, "p", "credits", most, 0, (WalletSource(),))


def test_gate_of_a_dead_process_opens_by_itself(server: ValkeyServer, make_store: Maker) -> None:
    """Who died while working alone keeps nobody out for longer than the gate lives."""

    async def run() -> None:
        store = make_store(namespace="gated")
        await store.run([grant()])
        server.ask("SET", "{gated}:gate", "somebody", "PX", "150")
        decision, receipt, posted = await store.run([call("a"), End("a", 3, Basis.USAGE), grant(5, "h")])
        assert isinstance(decision, Decision)
        assert isinstance(receipt, Receipt)
        assert (receipt.known, receipt.amount, posted.available) == (True, 3, 102)  # type: ignore[union-attr]
        await store.close()

    asyncio.run(run())


def test_store_is_used_from_several_loops(make_store: Maker) -> None:
    """Loops in several threads use one store at once, each on a connection of its own; a new one needs no new store."""
    store = make_store()

    async def run(number: int) -> None:
        for each in range(20):
            await store.run([grant(1, f"g{number}.{each}")])

    async def together() -> int:
        await store.open()
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, _closing(store, run(number))) for number in range(3)))
        account = (await store.read(AccountRows("p", "credits"))).state.accounts["p", "credits"]
        await store.close()
        return account.granted

    assert asyncio.run(together()) == 60


async def _closing(store: RedisStore, work: Coroutine[None, None, None]) -> None:
    try:
        await work
    finally:
        await store._links.pop(asyncio.get_running_loop()).close()


# -- servers that are refused ------------------------------------------------------------------------------


def test_server_without_memory_left() -> None:
    """A server whose memory is full says so for each operation, and has changed nothing."""
    with valkey() as own:

        async def run() -> None:
            store = RedisStore(ServerPlace({"host": HOST, "port": own.port}, 5.0))
            await store.run([grant()])
            own.ask("CONFIG", "SET", "maxmemory", "1000")
            decision, posted = await store.run([call("a"), grant(5, "h")])
            assert isinstance(decision, StoreUnavailableError)
            assert isinstance(posted, StoreError)
            own.ask("CONFIG", "SET", "maxmemory", "0")
            account = (await store.read(AccountRows("p", "credits"))).state.accounts["p", "credits"]
            assert (account.granted, account.held) == (100, 0)
            await store.close()

        asyncio.run(run())


def test_open_a_server_that_evicts() -> None:
    """A server that would throw balances away when its memory is full is refused at startup."""
    with valkey("--maxmemory-policy", "allkeys-lru") as own:
        store = RedisStore(ServerPlace({"host": HOST, "port": own.port}, 5.0))
        with pytest.raises(ConfigurationError, match="allkeys-lru"):
            asyncio.run(_opened(store))


async def _opened(store: RedisStore) -> None:
    try:
        await store.open()
    finally:
        await store.close()


def test_open_a_server_that_keeps_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A server that persists nothing is used, and a warning says what is lost when it ends."""
    with valkey() as own, caplog.at_level(logging.WARNING):
        asyncio.run(_opened(RedisStore(ServerPlace({"host": HOST, "port": own.port}, 5.0))))
    assert [record.message for record in caplog.records] == [
        "The Redis server persists nothing: what was acknowledged last is lost when it ends. Set appendonly yes."
    ]


def test_open_a_server_that_tells_no_settings(caplog: pytest.LogCaptureFixture) -> None:
    """A managed server that forbids CONFIG is used, with a warning."""
    with valkey("--rename-command", "CONFIG", "") as own, caplog.at_level(logging.WARNING):
        asyncio.run(_opened(RedisStore(ServerPlace({"host": HOST, "port": own.port}, 5.0))))
    assert "does not tell its settings" in caplog.text


def test_open_with_a_wrong_password() -> None:
    """A server that does not accept our credentials is a mistake of the set-up, not an outage."""
    with valkey("--requirepass", "secret") as own:
        for options in ({}, {"password": "wrong"}):
            store = RedisStore(ServerPlace({"host": HOST, "port": own.port, **options}, 5.0))
            with pytest.raises(ConfigurationError, match="credentials"):
                asyncio.run(_opened(store))
        asyncio.run(_opened(RedisStore(ServerPlace({"host": HOST, "port": own.port, "password": "secret"}, 5.0))))


def test_open_where_no_server_is() -> None:
    """A server that cannot be reached is said to be so, at once, and again without trying each time."""
    port = free_port()
    store = RedisStore(ServerPlace({"host": HOST, "port": port}, 5.0))

    async def run() -> None:
        with pytest.raises(StoreUnavailableError, match=f"{HOST}:{port} cannot be reached.*Check its address"):
            await store.open()
        with pytest.raises(StoreUnavailableError, match=r"[^.]\. It is tried again soon"):
            await store.run([grant()])
        await store.close()

    asyncio.run(run())


def test_option_that_no_connection_knows() -> None:
    """An option that the driver does not know is a mistake of the set-up."""
    store = RedisStore(ServerPlace({"host": HOST, "bananas": 1}, 5.0))
    with pytest.raises(
        ConfigurationError, match=r"has the option 'bananas', which redis-py does not know\. Look at its"
    ):
        asyncio.run(_opened(store))


@pytest.mark.parametrize("namespace", ["", "a b", "{a}", "ä", "x" * 65])
def test_namespace_that_keys_cannot_have(namespace: str) -> None:
    """A namespace that would break the hash tag of its keys is refused."""
    with pytest.raises(ConfigurationError, match="namespace"):
        RedisStore(ServerPlace({}, 5.0), namespace=namespace)
