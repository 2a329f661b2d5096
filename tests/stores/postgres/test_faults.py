"""What may happen to a connection, a server or a caller, and what the store makes of it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from asgi_metering import Metering
from asgi_metering.decisions import Decision
from asgi_metering.errors import StoreContendedError, StoreError, StoreUnavailableError
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, LeaseAsk, LimitAsk, PostGrant, WalletSource, WindowKind
from asgi_metering.rules.state import NEVER
from asgi_metering.stores.contract import EverythingKept, HoldRow
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.postgres.link import Statement
from asgi_metering.stores.pump import Pump
from tests.harness.cutting import cutting_proxy
from tests.harness.postgres import PostgresServer
from tests.stores.proofs import assert_conserved

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def opened(server: PostgresServer, schema: str, *, port: int = 0, **more: Any) -> AsyncIterator[PostgresStore]:
    """A store with one account of 1,000 units."""
    store = PostgresStore(server.url(port=port), namespace=schema, migrate=True, **more)
    await store.open()
    try:
        await store.post([PostGrant("g", "p", "credits", 1_000)])
        yield store
    finally:
        await store.close()


def call(call_id: str, amount: int = 10, **more: Any) -> Admit:
    """An admission that holds *amount*."""
    return Admit(call_id, "p", "credits", amount, amount, (WalletSource(),), **more)


# -- connections and servers -------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [b"COMMIT", b"hashtextextended"])
def test_lose_the_connection_between_request_and_reply(postgres: PostgresServer, schema: str, lost: bytes) -> None:
    """A reply that was lost is an error, and the same operation again changes nothing twice (S3.15).

    Lost is the reply to the locks, where nothing was done, or to the commit, where everything was.
    """

    async def run() -> None:
        with cutting_proxy(postgres.port) as proxy:
            # What is prepared goes out once, and by its name from then on: the proxy looks for the text.
            async with opened(postgres, schema, port=proxy.port, prepare=False) as store:
                for operation in (call("a"), End("a", 4, Basis.USAGE, event={"n": 1})):
                    proxy.cut_reply_to = lost
                    with pytest.raises(StoreUnavailableError, match=r"could not be used: .+\. Look at its log first"):
                        await store.run([operation])
                    await store.run([operation])
                state = (await store.read(EverythingKept())).state
                assert proxy.cuts == 2
                assert_conserved(state)
                assert (state.accounts["p", "credits"].settled, list(state.events)) == (4, ["a"])

    asyncio.run(run())


def test_restart_the_server_in_the_middle_of_work(postgres: PostgresServer, schema: str) -> None:
    """A restart costs the calls that were under way an error; the store finds the server again by itself.

    What was acknowledged before is there afterwards.
    """

    async def run() -> None:
        async with opened(postgres, schema) as store:
            pump = Pump(store)
            admitted: set[str] = set()
            failed = 0
            back = asyncio.Event()

            async def caller(number: int) -> None:
                nonlocal failed
                turn = 0
                while turn < 5 or not back.is_set():
                    turn += 1
                    call_id = f"{number}.{turn}"
                    try:
                        decision = await pump.submit(call(call_id, 1 if turn < 5 else 0))
                    except StoreUnavailableError:
                        failed += 1
                        await asyncio.sleep(0.01)
                        continue
                    assert isinstance(decision, Decision)
                    admitted.add(call_id)
                assert (await pump.submit(call(f"{number} after", 0))) is not None

            callers = [asyncio.create_task(caller(number)) for number in range(8)]
            await asyncio.sleep(0)
            await asyncio.to_thread(postgres.restart)
            back.set()
            await asyncio.gather(*callers)
            await pump.close()
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            assert failed > 0
            assert admitted <= state.holds.keys()

    asyncio.run(run())


def test_deadline_for_a_server_that_is_stopped(postgres: PostgresServer, schema: str) -> None:
    """A server that stopped answering costs its deadline; the event loop is free, and the next one connects anew."""

    async def run() -> None:
        async with opened(postgres, schema, answer_within_s=0.4) as store:
            await store.read(HoldRow("nobody"))
            beats = 0

            async def beat() -> None:
                nonlocal beats
                while True:
                    beats += 1
                    await asyncio.sleep(0.01)

            task = asyncio.create_task(beat())
            with postgres.frozen():
                for asked in (store.run([call("a")]), store.read(HoldRow("a"))):
                    with pytest.raises(StoreUnavailableError, match=r"gave no answer within 0\.4 s"):
                        await asked
            task.cancel()
            assert beats > 10
            (decision,) = await store.admit([call("a")])
            assert decision.held == 10

    asyncio.run(run())


def test_connect_to_a_server_that_is_stopped(
    postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes connections and says nothing is not waited for without end."""
    monkeypatch.setattr("asgi_metering.stores.postgres.database.CONNECT_TIMEOUT_S", 0.3)

    async def run() -> None:
        store = PostgresStore(postgres.url(), namespace=schema)
        with postgres.frozen(), pytest.raises(StoreUnavailableError, match=r"did not answer within 0\.3 s"):
            await store.open()
        await store.close()

    asyncio.run(run())


def test_connection_that_the_server_closed_while_it_was_idle(postgres: PostgresServer, schema: str) -> None:
    """A connection that an operator, a pooler or a firewall closed is noticed, and made again without an error."""

    async def run() -> None:
        async with opened(postgres, schema) as store:
            await store.read(HoldRow("a"))
            postgres.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'asgi_metering'"
            )
            # The farewell is on its way: the loop sees it before it has anything else to do.
            await asyncio.sleep(0.05)
            (decision,) = await store.admit([call("a")])
            assert decision.held == 10
            assert (await store.read(HoldRow("a"))).state.holds["a"].amount == 10

    asyncio.run(run())


# -- others ------------------------------------------------------------------------------------------------


def test_others_keep_the_tables_locked(postgres: PostgresServer, schema: str) -> None:
    """Whoever waits too long for others is told so, and nothing was done."""

    async def run() -> None:
        async with opened(postgres, schema, busy_timeout_s=0.2) as store:
            with psycopg.connect(postgres.url()) as other:
                other.execute(f'LOCK TABLE "{schema}".account IN ACCESS EXCLUSIVE MODE')
                with pytest.raises(StoreContendedError, match=r"locked for 0\.2 s, so nothing was done"):
                    await store.run([call("a")])
            (decision,) = await store.admit([call("a")])
            assert decision.held == 10

    asyncio.run(run())


def _fail_admissions(server: PostgresServer, schema: str, code: str, times: int) -> None:
    """Let the next *times* new holds fail with *code*, as if others had been first."""
    server.execute(f'CREATE SEQUENCE "{schema}".failures')
    server.execute(
        f'CREATE FUNCTION "{schema}".fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN '
        f"IF nextval('{schema}.failures') <= {times} THEN RAISE 'not now' USING ERRCODE = '{code}'; END IF; "
        "RETURN NEW; END $$"
    )
    server.execute(
        f'CREATE TRIGGER fail BEFORE INSERT ON "{schema}".hold FOR EACH ROW EXECUTE FUNCTION "{schema}".fail()'
    )


@pytest.mark.parametrize("code", ["40001", "40P01", "23505"])
def test_begin_again_when_others_were_first(postgres: PostgresServer, schema: str, code: str) -> None:
    """A serialisation failure, a deadlock or a row that another process made first costs another attempt."""

    async def run() -> None:
        async with opened(postgres, schema) as store:
            _fail_admissions(postgres, schema, code, times=3)
            admitted, _ = await store.run([call("a"), End("a", 4, Basis.USAGE)])
            assert isinstance(admitted, Decision)
            assert admitted.held == 10
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            assert state.accounts["p", "credits"].settled == 4

    asyncio.run(run())


def test_give_up_when_others_are_always_first(
    postgres: PostgresServer, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts are bounded; then nothing was done, and the error says so."""
    monkeypatch.setattr("asgi_metering.stores.postgres.store.ATTEMPTS", 3)

    async def run() -> None:
        async with opened(postgres, schema) as store:
            _fail_admissions(postgres, schema, "40001", times=1_000)
            with pytest.raises(StoreContendedError, match="let others go first 3 times, so nothing was done"):
                await store.run([call("a")])
            assert (await store.read(EverythingKept())).state.holds == {}

    asyncio.run(run())


# -- callers and values ------------------------------------------------------------------------------------


def test_cancel_a_caller_in_the_middle_of_its_batch(postgres: PostgresServer, schema: str) -> None:
    """A caller that leaves does not tear its batch: the operation is done, and the connection goes on."""

    async def run() -> None:
        cancelled = 0
        async with opened(postgres, schema) as store:
            for turn in range(20):
                task = asyncio.create_task(store.run([call(f"a{turn}", 1)]))
                for _ in range(turn):
                    await asyncio.sleep(0)
                # Where the server is the faster one, it is through after so many turns.
                if task.cancel():
                    cancelled += 1
                    with pytest.raises(asyncio.CancelledError):
                        await task
            assert cancelled > 5
            (decision,) = await store.admit([call("b")])
            assert decision.held == 10
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            # The first one left before its task began.
            assert len(state.holds) >= 20

    asyncio.run(run())


@pytest.mark.parametrize(
    "poison",
    [
        call("nul \0"),
        call("a", line="\0"),
        call("surrogate \ud800"),
        call("a", facts={"a": object()}),
        Admit("a", "p", "credits", 0, 0, (), (LimitAsk("l", "k", WindowKind.FIXED, 2**70, 60.0, 2**65),)),
    ],
)
def test_poisoned_operation_harms_no_neighbour(postgres: PostgresServer, schema: str, poison: Admit) -> None:
    """What PostgreSQL cannot keep is the error of the operation that brought it; the others of its batch are done."""

    async def run() -> None:
        async with opened(postgres, schema) as store:
            pump = Pump(store)
            before, guilty, after = await asyncio.gather(
                pump.submit(call("before")), pump.submit(poison), pump.submit(call("after")), return_exceptions=True
            )
            await pump.close()
            assert isinstance(guilty, StoreError)
            assert isinstance(before, Decision)
            assert isinstance(after, Decision)
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            assert set(state.holds) == {"before", "after"}

    asyncio.run(run())


def test_keep_what_json_can_say(postgres: PostgresServer, schema: str) -> None:
    """Facts and events come back as they were, NUL characters and lone surrogates included: no charge is lost."""
    told = {"nul": "a\0b", "surrogate": "\ud800", "quotes": "'\"\\{},", "deep": [{"n": [1, 2.5, None, True]}]}

    async def run() -> None:
        async with opened(postgres, schema) as store:
            await store.run([call("a", facts=told), End("a", 4, Basis.USAGE, event=told)])
            state = (await store.read(EverythingKept())).state
            assert state.holds["a"].facts == told
            assert told.items() <= state.events["a"].payload.items()

    asyncio.run(run())


def test_keep_keys_of_every_kind(postgres: PostgresServer, schema: str) -> None:
    """The longest keys, and those with odd characters, are kept and found; a time that does not come is infinite."""
    odd = ("\N{GRINNING FACE}" * 255, "{a,b}", '"', "\\", "NULL", "'; --", "%s $1", " ")

    async def run() -> None:
        async with opened(postgres, schema) as store:
            for key in odd:
                limit, lease = LimitAsk("l", key, WindowKind.FIXED, 9, 60.0, 2, "tokens"), LeaseAsk("l", key, 9)
                _, decision, _ = await store.run(
                    [
                        PostGrant(key, key, "credits", 10),
                        Admit(key, key, "credits", 3, 3, (WalletSource(),), (limit,), (lease,)),
                        End(key, 2, Basis.USAGE, actual={"tokens": 1}, event={"n": 1}),
                    ]
                )
                assert isinstance(decision, Decision)
                assert decision.held == 3
            state = (await store.read(EverythingKept())).state
            assert_conserved(state)
            assert [state.holds[key].receipt is not None for key in odd] == [True] * len(odd)
            assert [state.counters[key].used for key in odd] == [1] * len(odd)
            assert state.grants["NULL", "credits"]["NULL"].expires_at == NEVER

    asyncio.run(run())


def test_texts_are_as_they_were_whatever_the_url_says(postgres: PostgresServer, schema: str) -> None:
    """An encoding in the URL does not come between keys and their rows: an account that is there is found."""

    async def run() -> None:
        store = PostgresStore(f"{postgres.url()}?client_encoding=latin1", namespace=schema, migrate=True)
        await store.open()
        try:
            await store.post([PostGrant("é1", "é", "credits", 10)])
            await store.post([PostGrant("é2", "é", "credits", 10)])
            assert (await store.read(EverythingKept())).state.accounts["é", "credits"].granted == 20
        finally:
            await store.close()

    asyncio.run(run())


def test_tell_the_last_words_of_the_server(postgres: PostgresServer, schema: str) -> None:
    """Why the server ended a connection in the middle of a batch is what the operator reads."""

    async def run() -> None:
        async with opened(postgres, schema) as store:
            link = await store._database.connect()
            last = Statement("SELECT pg_terminate_backend(pg_backend_pid())"), Statement("SELECT pg_sleep(10)")
            with pytest.raises(psycopg.Error) as raised:
                await link.trip(last, 10.0)
            assert not link.is_open
            assert "terminating connection due to administrator command" in str(store._database.meaning(raised.value))

    asyncio.run(run())


def test_write_again_when_a_standby_takes_over(
    postgres: PostgresServer, schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A standby is told as what it is, at each batch on a new connection; promoted, it serves as the one before."""

    async def run() -> None:
        async with opened(postgres, schema) as store:
            await store.run([call("a"), End("a", 4, Basis.USAGE)])
            await asyncio.to_thread(postgres.restart, as_standby=True)
            try:
                with pytest.raises(StoreUnavailableError):
                    await store.run([call("b")])
                for _ in range(2):
                    with pytest.raises(
                        StoreUnavailableError, match=r"is read-only: .* target_session_attrs=read-write"
                    ):
                        await store.run([call("b")])
                    link = store._lines[asyncio.get_running_loop()].writer._link
                    assert link is not None
                    assert not link.is_open
                # What it has, it tells.
                assert (await store.read(HoldRow("a"))).state.holds["a"].receipt is not None
            finally:
                postgres.execute("SELECT pg_promote()")
            (decision,) = await store.run([call("b")])
            assert isinstance(decision, Decision)
            assert decision.admitted
            assert_conserved((await store.read(EverythingKept())).state)

    asyncio.run(run())
    # Nothing was wrong with prepared statements.
    assert not [record for record in caplog.records if record.name == "asgi_metering.stores"]


def test_time_is_the_servers(postgres: PostgresServer, schema: str) -> None:
    """Without a clock of its own the store reads the server's, so that several machines agree."""

    async def run() -> None:
        async with opened(postgres, schema) as store:
            times = [postgres.execute("SELECT extract(epoch FROM clock_timestamp())::float8")[0][0]]
            (decision,) = await store.admit([call("a")])
            times.append(decision.now)
            times.append((await store.read(HoldRow("a"))).now)
            times.append(postgres.execute("SELECT extract(epoch FROM clock_timestamp())::float8")[0][0])
            assert times == sorted(times)

    asyncio.run(run())


# -- loops, processes and poolers --------------------------------------------------------------------------


def test_use_from_several_event_loops(postgres: PostgresServer, schema: str) -> None:
    """One store serves the loops of several threads at once, each over connections of its own (S3.31)."""
    store = PostgresStore(postgres.url(), namespace=schema, migrate=True)
    admitted: list[bool] = []

    async def prepare() -> None:
        await store.open()
        await store.post([PostGrant("g", "p", "credits", 30)])

    async def work(name: str) -> None:
        await store.open()
        for number in range(20):
            (decision,) = await store.admit([call(f"{name}.{number}", 1)])
            admitted.append(decision.admitted)

    asyncio.run(prepare())
    threads = [threading.Thread(target=lambda name=name: asyncio.run(work(name))) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(store.close())
    assert (len(admitted), sum(admitted)) == (60, 30)


def test_leave_the_transaction_of_the_application_alone(postgres: PostgresServer, schema: str) -> None:
    """S3.29: an application's own transaction is neither committed nor rolled back by a charge, nor the other way."""

    async def run() -> None:
        async with Metering(PostgresStore(postgres.url(), namespace=schema, migrate=True), sinks=()) as metering:
            await metering.grant("ann", 10, id="g")
            async with await psycopg.AsyncConnection.connect(postgres.url()) as own:
                await own.execute("CREATE TEMPORARY TABLE drafts (id int)")
                await own.commit()
                await own.execute("INSERT INTO drafts VALUES (1)")
                async with metering.charge(payer="ann", line="draft", price=2):
                    assert own.info.transaction_status is psycopg.pq.TransactionStatus.INTRANS
                await own.rollback()
                assert await (await own.execute("SELECT * FROM drafts")).fetchall() == []
            assert metering.unit.text((await metering.balance("ann")).settled) == "2"

    asyncio.run(run())


FORKED = """
import asyncio, os, sys
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.rules.operations import PostGrant
from asgi_metering.stores.postgres import PostgresStore

store = PostgresStore(sys.argv[1], namespace=sys.argv[2], migrate=True)
runner = asyncio.Runner()
runner.run(store.open())

async def in_the_child():
    try:
        await store.run([PostGrant("child", "p", "credits", 1)])
    except StoreUnavailableError as refused:
        assert "Open it after the fork" in str(refused)
    else:
        raise AssertionError("it used its parent's connection")
    await store.open()
    await store.run([PostGrant("child", "p", "credits", 1)])
    await store.close()

if os.fork() == 0:
    asyncio.run(in_the_child())
    os._exit(0)
_, status = os.wait()
assert status == 0, status
runner.run(store.run([PostGrant("parent", "p", "credits", 1)]))
runner.run(store.close())
"""


def test_fork_after_opening(postgres: PostgresServer, schema: str) -> None:
    """A forked child is told to open the store itself; then both work, and neither disturbs the other."""
    finished = subprocess.run(
        [sys.executable, "-c", FORKED, postgres.url(), schema], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert finished.returncode == 0, finished.stderr
    assert postgres.execute(f'SELECT count(*) FROM "{schema}"."grant"') == [(2,)]


@pytest.mark.parametrize("prepare", [True, False])
def test_nothing_outlives_a_transaction(postgres: PostgresServer, schema: str, prepare: bool) -> None:
    """No setting, lock or transaction is left on the server's side, for PgBouncer's sake; no statement, if so said."""

    async def run() -> None:
        async with opened(postgres, schema, prepare=prepare) as store:
            await store.run([call("b"), End("b", 3)])
            await store.run([call("a"), End("a", 3)])
            await store.read(EverythingKept())
            lines = store._lines[asyncio.get_running_loop()]
            for line in (lines.writer, lines.reader):
                link = line._link
                assert link is not None
                asked = [
                    Statement(
                        "SELECT count(*) FROM pg_prepared_statements WHERE name !~ '^asgi_metering_' OR NOT $1::bool",
                        (str(prepare),),
                    ),
                    Statement("SELECT current_setting('enable_seqscan'), current_setting('lock_timeout')"),
                    Statement("SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'"),
                ]
                assert await link.trip(asked, 10.0) == [[(0,)], [("on", "0")], [(0,)]]
            assert postgres.execute("SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'") == [(0,)]

    asyncio.run(run())
