"""Books on their way from store to store: what the file promises, and what is refused before anything is written."""

from __future__ import annotations

import asyncio
import hashlib
import json
import stat
import tempfile
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_metering.errors import (
    ConfigurationError,
    StoreContendedError,
    StoreError,
    StoreUnavailableError,
    UnwritableError,
)
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, Emit, End, LimitAsk, PostGrant, WalletSource, WindowKind
from asgi_metering.rules.state import Account, Event, Grant, Table
from asgi_metering.stores.contract import TABLES, Books, EverythingKept, Filling, Store
from asgi_metering.stores.forgetting import Bounds
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.moving import export_books, import_books
from asgi_metering.stores.moving.lines import header_of, lines_of
from asgi_metering.stores.moving.moves import Moved
from asgi_metering.stores.moving.walk import MAX_SENTENCES, Page, Proof
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import StoreConformance, tables
from tests.stores.operations import CLOCK_STEPS_S, operations

WALLET = (WalletSource(),)

EXAMPLES = 8
"""Of any state: each some 150 ms, most of them to draw it."""


async def whole(store: Store) -> dict[str, Any]:
    """Everything that a store keeps, comparable."""
    return tables((await store.read(EverythingKept())).state)


async def lived(clock: FakeClock | None = None) -> MemoryStore:
    """A store with a few rows of most kinds."""
    store = MemoryStore(clock or FakeClock())
    limit = LimitAsk("calls", "k", WindowKind.FIXED, 9, 60.0)
    await store.run(
        [
            PostGrant("g1", "ann", "credits", 100),
            PostGrant("g2", "bob \U0001f600", "credits", 7),
            Admit("c1", "ann", "credits", 10, 10, WALLET, (limit,)),
            Admit("c2", "ann", "credits", 5, 5, WALLET),
            End("c2", 5, Basis.USAGE, event={"outcome": "completed"}),
            Emit((("e1", {"n": 1}),)),
        ]
    )
    return store


def exported(path: Path, store: Store | None = None) -> Path:
    """A file of books."""

    async def export() -> None:
        await export_books(store or await lived(), path)

    asyncio.run(export())
    return path


def imported(path: Path, store: Store | None = None, **more: Any) -> dict[str, Any]:
    """What a store keeps after an import."""

    async def move() -> dict[str, Any]:
        target = store or MemoryStore(FakeClock())
        await import_books(target, path, **more)
        return await whole(target)

    return asyncio.run(move())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where books are exported to."""
    return tmp_path / "books.jsonl"


# -- any state ---------------------------------------------------------------------------------------------


async def _move_over_file(store: Store, to: Store, folder: Path) -> Moved:
    await export_books(store, folder / "books.jsonl")
    return await import_books(to, folder / "books.jsonl")


@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_move_any_state(data: st.DataObject) -> None:
    """Whatever was run, memory moved to SQLite and back is the same whole state, and its books balance."""

    async def story(folder: Path) -> None:
        clock = FakeClock()
        store = MemoryStore(clock)
        for _ in range(data.draw(st.integers(2, 6))):
            clock.advance(data.draw(st.sampled_from(CLOCK_STEPS_S)))
            await store.run(data.draw(operations(clock(), 12)))
        sqlite, memory = SQLiteStore(folder / "books.db", synchronous="OFF", clock=clock), MemoryStore(clock)
        try:
            assert (await _move_over_file(store, sqlite, folder)).discrepancies == []
            assert await whole(sqlite) == await whole(store)
            await _move_over_file(sqlite, memory, folder)
        finally:
            await sqlite.close()
        assert await whole(memory) == await whole(store)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder)))


# -- the file ----------------------------------------------------------------------------------------------


def test_export_says_what_is_in_it(file: Path) -> None:
    """The first line says format, versions, store, time and counts; each row is a line with its kind."""
    head, *rows, end = map(json.loads, exported(file).read_text("ascii").splitlines())
    assert (head["kind"], head["format"], head["store"], head["at"]) == (
        "asgi-metering books",
        1,
        "memory",
        FakeClock()(),
    )
    assert {table: head["counts"][table] for table in ("hold", "account", "grant", "entry", "event")} == {
        "hold": 2,
        "account": 2,
        "grant": 2,
        "entry": 3,
        "event": 2,
    }
    assert [row["kind"] for row in rows] == [
        *["hold"] * 2,
        *["account", "grant", "entry", "entry"],
        *["account", "grant", "entry"],
        *["counter", "event", "event"],
    ]
    assert (end["kind"], end["counts"]) == ("end", head["counts"])


def test_export_is_for_its_owner_alone(file: Path) -> None:
    """Payers, and answers that were kept for replays, are nobody else's to read."""
    assert stat.S_IMODE(exported(file).stat().st_mode) == 0o600


def test_export_keeps_what_stood_there(file: Path) -> None:
    """A file is never overwritten: what stood there is kept beside it, with the time in its name (DESIGN 8)."""
    file.write_text("mine")

    async def export() -> Moved:
        return await export_books(await lived(), file)

    backup = asyncio.run(export()).backup
    assert backup is not None
    assert backup.read_text() == "mine"
    assert sorted(file.parent.iterdir()) == sorted([file, backup])
    assert imported(file)["grant"]


@pytest.mark.parametrize("place", ["nowhere/books.jsonl", "."])
def test_export_to_where_nothing_can_be_written(place: str, tmp_path: Path) -> None:
    """A missing folder, or a folder for a file, is a mistake that is told."""
    with pytest.raises(ConfigurationError, match="cannot be written"):
        exported(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_export_that_fails_leaves_nothing(file: Path) -> None:
    """A row that JSON cannot tell fails the export, with its kind; what stood there stays, and nothing is left."""
    file.write_text("mine")
    store = MemoryStore(FakeClock())
    asyncio.run(store.run([Emit((("e", {"when": {1, 2}}),))]))
    with pytest.raises(UnwritableError, match=r"A row of 'event' cannot be exported: .*set is not JSON-safe"):
        exported(file, store)
    assert file.read_text() == "mine"
    assert list(file.parent.iterdir()) == [file]


class Large(Books):
    """Books with many events of a kilobyte each, made while they are read."""

    now = 0.0

    def __init__(self, count: int) -> None:
        self.count = count

    async def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """A page at a time."""
        if table == Table.EVENT:
            for start in range(0, self.count, 100):
                yield [Event(f"{start + n}", 0.0, {"text": f"{start + n:01000}"}) for n in range(100)]

    async def counts(self) -> Mapping[str, int]:
        """Without making them."""
        return {**dict.fromkeys(TABLES, 0), Table.EVENT: self.count}


class Readable(MemoryStore):
    """A store whose books are others."""

    def __init__(self, books: Books) -> None:
        super().__init__(FakeClock())
        self.others = books

    @asynccontextmanager
    async def books(self) -> AsyncIterator[Books]:
        """The others."""
        yield self.others


def test_export_in_bounded_memory(file: Path) -> None:
    """What an export keeps in memory does not grow with what it writes."""
    store = Readable(Large(5_000))
    tracemalloc.start()
    try:
        exported(file, store)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert file.stat().st_size > 5_000_000
    assert peak < 4_000_000


# -- what is refused ---------------------------------------------------------------------------------------


def _refused(file: Path, match: str) -> None:
    """Importing *file* is refused, and writes nothing, to a store that is not even made."""
    database = file.with_name("new.db")
    store = SQLiteStore(database, synchronous="OFF")
    with pytest.raises(ConfigurationError, match=match):
        imported(file, store)
    assert not database.exists()


def test_refuse_a_file_that_was_cut(file: Path) -> None:
    """Wherever a file is cut, it is refused before anything is written."""
    content = exported(file).read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for end in (*ends[:-1], *(end - 1 for end in ends[1:]), len(content) - 40, len(content) - 1):
        file.write_bytes(content[:end])
        _refused(file, r"books in '.*' are cut: \d+ of \d+ rows came, and no end. Nothing was imported")
    for end in (0, 1, ends[0] - 2):
        file.write_bytes(content[:end])
        _refused(file, "is not the header of exported books")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text.replace('"amount":100', '"amount":101', 1), "digest is another one"),
        (lambda text: text.replace('"hold":2', '"hold":3', 1), "digest is another one"),
        (lambda text: text.replace('"payer":"ann"', '"buyer":"ann"', 1), r"Line \d of .* is no row of the books"),
        (lambda text: text.replace('"kind":"hold"', '"kind":"hole"', 1), "Line 2 of .* is no row of the books"),
        (lambda text: text.replace('{"kind":"hold"', '["kind":"hold"', 1), "Line 2 of .* is not JSON"),
        (lambda text: text.replace("\n", "\n7\n", 1), "Line 2 of .* is no JSON object"),
        (lambda text: text + "{}\n", "stands behind the end"),
        (lambda text: text.replace('"discrepancies":0', '"more":0', 1), "has the fields"),
        (lambda text: text.replace('"format":1', '"format":2', 1), "says format 2, written by asgi_metering '0"),
        (lambda text: text.replace("asgi-metering books", "books", 1), "not the header"),
        (lambda text: "7\n" + text, "not the header"),
    ],
)
def test_refuse_a_file_that_was_changed(file: Path, change: Callable[[str], str], match: str) -> None:
    """A file that is not what was exported, or of a newer format, is refused with a sentence that says so."""
    content = exported(file).read_text("ascii")
    assert change(content) != content
    file.write_text(change(content), "ascii")
    _refused(file, match)


def test_import_what_an_older_version_wrote(file: Path) -> None:
    """A file of a version that did not know a table has no rows of it; all others are checked as ever."""
    lines = exported(file).read_bytes().splitlines(keepends=True)
    lines[0] = lines[0].replace(b'"reading":0,', b"")
    end = json.loads(lines.pop())
    for told in (end["counts"], end["sums"]):
        del told["reading"]
    end["sha256"] = hashlib.sha256(b"".join(lines)).hexdigest()
    file.write_bytes(b"".join([*lines, json.dumps(end, separators=(",", ":")).encode(), b"\n"]))
    assert imported(file)["reading"] == {}
    for told in ([], {}):
        end["sums"] = told
        file.write_bytes(b"".join([*lines, json.dumps(end, separators=(",", ":")).encode(), b"\n"]))
        _refused(file, "digest is another one")


def test_refuse_a_file_that_is_not_there(file: Path) -> None:
    """A file that cannot be read is a mistake that is told."""
    _refused(file, "cannot be read: No such file or directory")


def test_refuse_a_store_that_is_not_empty(file: Path) -> None:
    """Books are imported into an empty store only; what it has is told, and stays."""
    exported(file)

    async def story() -> None:
        store = await lived()
        before = await whole(store)
        with pytest.raises(ConfigurationError, match=r"The memory store is not empty, .* 2 of 'hold', 2 of 'account'"):
            await import_books(store, file)
        assert await whole(store) == before

    asyncio.run(story())


def test_refuse_books_that_do_not_balance(file: Path) -> None:
    """Books that did not balance where they come from are exported and told so, and imported only on demand."""

    async def story() -> None:
        store = await lived()
        account = store._state.accounts["ann", "credits"]
        store._state.accounts["ann", "credits"] = account._replace(settled=6)
        told = (await export_books(store, file)).discrepancies
        assert told[0].startswith("'ann' in 'credits': settled is 6 in the account and 5 in its rows.")
        other = MemoryStore(FakeClock())
        with pytest.raises(ConfigurationError, match=r"do not balance, so nothing was imported: 'ann' in 'credits'"):
            await import_books(other, file)
        assert not any((await whole(other)).values())
        assert (await import_books(other, file, unbalanced=True)).discrepancies == told
        assert await whole(other) == await whole(store)

    asyncio.run(story())


def test_refuse_a_store_that_cannot_be_moved() -> None:
    """A store without the two verbs says that it cannot be moved; the suite asks it for nothing else."""

    class Fixed(MemoryStore):
        name = "fixed"
        books, fill = Store.books, Store.fill

    class Suite(StoreConformance):
        async def make_store(self, clock: FakeClock) -> Store:
            return Fixed(clock)

    Suite().test_move_to_memory_and_back()
    with pytest.raises(ConfigurationError, match="The fixed store cannot hand out all of its rows"):
        Fixed().books()
    with pytest.raises(ConfigurationError, match="The fixed store cannot take rows"):
        Fixed().fill()


# -- stores without transactions ---------------------------------------------------------------------------


class _Straight(Filling):
    """Writes what is put at once, and fails when it is told to."""

    now = 0.0

    def __init__(self, inner: Filling, store: Plain) -> None:
        self.inner, self.store = inner, store

    async def rows(self, table: str) -> AsyncGenerator[Sequence[Any], None]:
        """Those of the store, in no order where none is promised."""
        async for page in self.inner.rows(table):
            yield page if table not in (Table.COUNTER, Table.UNIT) else list(reversed(page))

    async def put(self, table: str, rows: Sequence[Any]) -> int:
        """Put, as long as the store works."""
        if not self.store.works_for:
            raise StoreError("The store is down.")
        self.store.works_for -= 1
        return await self.inner.put(table, rows)


class Plain(MemoryStore):
    """A store without transactions and snapshots."""

    works_for = 1_000

    @asynccontextmanager
    async def books(self) -> AsyncIterator[Books]:
        """Its rows."""
        async with super().books() as books:
            yield _Straight(books, self)  # type: ignore[arg-type]

    @asynccontextmanager
    async def fill(self) -> AsyncIterator[Filling]:
        """Keeps what was put, however it is left."""
        failure = None
        async with super().fill() as inner:
            try:
                yield _Straight(inner, self)
            except StoreError as error:
                failure = error
        if failure is not None:
            raise failure


def test_resume_an_import_that_was_cut(file: Path) -> None:
    """Where a store has no transactions, an import that was cut anywhere is resumed, and keeps the same rows."""

    async def story() -> None:
        source = await lived()
        await export_books(source, file)
        for works_for in range(1, 9):
            store = Plain(FakeClock())
            store.works_for = works_for
            with pytest.raises(StoreError, match="is down"):
                await import_books(store, file)
            store.works_for = 1_000
            with pytest.raises(ConfigurationError, match="resume it"):
                await import_books(store, file)
            moved = await import_books(store, file, resume=True)
            assert 0 < moved.new < sum(moved.counts.values())
            assert await whole(store) == await whole(source)
            assert (await import_books(store, file, resume=True)).new == 0

    asyncio.run(story())


@pytest.mark.parametrize("known", [1, 1_000])
def test_resume_into_other_rows(file: Path, known: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with rows that are not in the file is no import that was cut: nothing is written."""
    monkeypatch.setattr("asgi_metering.stores.moving.moves.KNOWN_ROWS", known)
    exported(file)

    async def story() -> None:
        store = MemoryStore(FakeClock())
        await store.run([PostGrant("g1", "ann", "credits", 100), Emit((("e1", {"n": 1}), ("e9", {})))])
        before = await whole(store)
        with pytest.raises(ConfigurationError, match=r"has rows that are not in '.*', .* is one of \d\."):
            await import_books(store, file, resume=True)
        assert await whole(store) == before

    asyncio.run(story())


def test_import_what_is_not_kept(file: Path) -> None:
    """A store that keeps other rows than it was given is found out; where it can, it keeps nothing."""
    exported(file)

    class Lossy(MemoryStore):
        @asynccontextmanager
        async def fill(self) -> AsyncIterator[Filling]:
            """Loses the events."""
            async with super().fill() as inner:

                async def put(table: str, rows: Sequence[Any]) -> int:
                    return 0 if table == Table.EVENT else await type(inner).put(inner, table, rows)

                inner.put = put  # type: ignore[method-assign]
                yield inner

    store = Lossy(FakeClock())
    with pytest.raises(StoreError, match="The memory store keeps other rows of 'event' than the file has: 0, and 2"):
        imported(file, store)
    assert not any(asyncio.run(whole(store)).values())


def test_export_of_what_is_written_meanwhile(file: Path) -> None:
    """A store that is written to while it is read, and has no instants, fails its export and says whom to stop."""

    class Busy(Large):
        async def counts(self) -> Mapping[str, int]:
            return {**await super().counts(), Table.EVENT: self.count - 1}

    with pytest.raises(
        StoreContendedError, match=r"there were 99 rows of 'event', and 100 came\. Stop whoever uses it"
    ):
        exported(file, Readable(Busy(100)))
    assert not file.exists()


# -- while others work -------------------------------------------------------------------------------------


def test_fill_memory_that_is_used_meanwhile() -> None:
    """A memory store that is written to while it is filled keeps what was written, and nothing else."""

    async def story() -> None:
        store = MemoryStore(FakeClock())

        async def fill() -> None:
            async with store.fill() as filling:
                await filling.put(Table.EVENT, [Event("e", 1.0, {})])
                await store.run([PostGrant("g", "p", "credits", 1)])

        with pytest.raises(StoreContendedError, match="was written to while it was filled"):
            await fill()
        state = await whole(store)
        assert (len(state["grant"]), state["event"]) == (1, [])

    asyncio.run(story())


def test_fill_sqlite_keeps_others_out(tmp_path: Path) -> None:
    """While a file is filled nobody else writes it; who reads sees nothing of it until it is whole."""

    async def story() -> None:
        store, other = (SQLiteStore(tmp_path / "b.db", synchronous="OFF", busy_timeout_s=0.05) for _ in range(2))
        await store.open()
        await other.open()
        grant = Grant("p", "credits", "g", 5, 0, 1.0, 2e9, 1)
        async with store.fill() as filling:
            for writer in (store, other):
                with pytest.raises(StoreContendedError):
                    await writer.run([PostGrant("g", "p", "credits", 1)])
            await filling.put(Table.GRANT, [grant])
            for writer in (store, other):
                assert not any((await whole(writer)).values())
        assert list((await whole(other))["grant"].values()) == [grant]
        await store.close()
        await other.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    "bad",
    [Account("p", "credits", 2**63), Account("\ud800", "credits"), Account("p", None)],  # type: ignore[arg-type]
)
def test_fill_sqlite_with_what_it_cannot_keep(tmp_path: Path, bad: Account) -> None:
    """A row that SQLite cannot keep is told as such; what is put behind it is refused, and nothing is kept."""

    async def fill(store: Store) -> None:
        async with store.fill() as filling:
            await filling.put(Table.EVENT, [Event("e", 1.0, {})])
            with pytest.raises(UnwritableError, match="A row of 'account' cannot be kept in a SQLite file"):
                await filling.put(Table.ACCOUNT, [Account("q", "credits"), bad])
            with pytest.raises(StoreUnavailableError, match="is over"):
                await filling.put(Table.EVENT, [Event("f", 1.0, {})])

    async def story() -> None:
        store = SQLiteStore(tmp_path / "b.db", synchronous="OFF")
        await store.open()
        with pytest.raises(StoreUnavailableError, match=r"is over\. Begin again"):
            await fill(store)
        assert not any((await whole(store)).values())
        await store.close()

    asyncio.run(story())


def test_go_on_forgetting_after_a_move() -> None:
    """A memory store that was filled bounds what it keeps as one that lived through it: the oldest call goes first."""

    async def story() -> None:
        clock = FakeClock()
        source = MemoryStore(clock)
        calls = [Admit(f"c{number}", "p", "credits", 1, 1, WALLET) for number in range(4)]
        await source.run([PostGrant("g", "p", "credits", 9), *calls])
        for call in ("c2", "c0", "c1"):
            await source.run([End(call, 1, Basis.USAGE)])
            clock.advance(1.0)
        store = MemoryStore(FakeClock(), bounds=Bounds(ended_holds=3))
        async with source.books() as books, store.fill() as filling:
            for table in TABLES:
                async for rows in books.rows(table):
                    await filling.put(table, rows)
        assert set((await whole(store))["hold"]) == {"c0", "c1", "c2", "c3"}
        await store.run([End("c3", 1, Basis.USAGE)])
        assert set((await whole(store))["hold"]) == {"c0", "c1", "c3"}

    asyncio.run(story())


# -- the proof ---------------------------------------------------------------------------------------------


def test_prove_rows_without_an_account() -> None:
    """Rows and calls in flight whose account is missing are found, and so is a ledger that lacks lines."""

    async def story() -> list[Page]:
        async with (await lived()).books() as books:
            return [Page(table, rows) for table in TABLES async for rows in books.rows(table)]

    hold = next(page for page in asyncio.run(story()) if page.table == Table.HOLD)
    proof = Proof()
    proof.take(hold)
    proof.take(Page(Table.GRANT, (Grant("zoe", "credits", "g", 5, 0, 1.0, 2.0, 1, settled=3),)))
    proof.take(Page(Table.ACCOUNT, (Account("zzz", "credits", entries=1),)))
    proof.finish()
    assert proof.accounts == 1
    assert [sentence.partition(".")[0] for sentence in proof.discrepancies] == [
        "'zoe' in 'credits': granted is 0 in the account and 5 in its rows",
        "'zoe' in 'credits': settled is 0 in the account and 3 in its rows",
        "'zzz' in 'credits': the ledger ends with line 0 of 1",
        "'ann' in 'credits': held by live holds is 0 in the account and 10 in its rows",
    ]


def test_tell_a_bounded_number_of_discrepancies() -> None:
    """However much is wrong, so many sentences are kept."""
    proof = Proof()
    for number in range(MAX_SENTENCES):
        proof.take(Page(Table.ACCOUNT, (Account(f"p{number:03}", "credits", 1, 1),)))
    proof.finish()
    assert len(proof.discrepancies) == MAX_SENTENCES
    assert proof.accounts == MAX_SENTENCES


def test_lines_of_equal_rows_are_equal() -> None:
    """However a store keeps a mapping or a whole number of seconds, equal rows are one line."""
    one = Event("e", 1, {"a": 1, "b": MappingProxyType({"x": None, "y": (1, 2)})})
    other = Event("e", 1.0, {"b": {"y": [1, 2], "x": None}, "a": 1})
    assert lines_of(Page(Table.EVENT, (one,))) == lines_of(Page(Table.EVENT, (other,)))


def test_read_a_header() -> None:
    """A header says the same after its way through the file."""
    line = b'{"kind":"asgi-metering books","format":1,"version":"9","store":"s","namespace":"n","at":1.5,"counts":{}}\n'
    assert header_of(line, "Line 1").line() == line
