"""The journal's file: what is kept is there, in order, for whoever has the turn, whatever becomes of processes."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.errors import ConfigurationError, JournalError
from asgi_metering.journal import Journal
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import End

ROOT = Path(__file__).parents[2]


def end(call: str, amount: int = 1) -> tuple[End]:
    """What is to be done for one call."""
    return (End(call, amount, Basis.USAGE),)


def play(path: Path, scene: Callable[[Journal], Awaitable[None]], **settings: Any) -> None:
    """Play *scene* on a journal that is opened before and closed after it."""

    async def opened() -> None:
        journal = Journal(path, **settings)
        await journal.open()
        try:
            await scene(journal)
        finally:
            await journal.close()

    asyncio.run(opened())


async def ids(journal: Journal) -> list[str]:
    """The calls whose entries are due."""
    return [entry.id for entry in await journal.due(100)]


def test_keep_in_order_until_it_is_done(tmp_path: Path) -> None:
    """Entries come back in the order in which they were kept, also from a file that was opened again."""

    async def write(journal: Journal) -> None:
        await journal.keep({"a": end("a"), "b": end("b")})
        await journal.keep({"c": end("c")})

    async def read(journal: Journal) -> None:
        entries = await journal.due(2)
        assert [(entry.id, entry.steps) for entry in entries] == [("a", end("a")), ("b", end("b"))]
        await journal.done(entries)
        assert await ids(journal) == ["c"]
        assert await journal.counts() == (1, 0)

    play(tmp_path / "j", write)
    play(tmp_path / "j", read)


def test_keep_one_entry_for_each_call(tmp_path: Path) -> None:
    """What is kept anew for a call replaces what was, at the end; who finished the old one does not forget the new."""

    async def scene(journal: Journal) -> None:
        await journal.keep({"a": end("a", 1), "b": end("b")})
        old = await journal.due(1)
        await journal.keep({"a": end("a", 2)})
        await journal.done(old)
        assert [entry.steps for entry in await journal.due(9)] == [end("b"), end("a", 2)]
        await journal.drop("b")
        assert await ids(journal) == ["a"]

    play(tmp_path / "j", scene)


def test_hold_back_what_is_not_due(tmp_path: Path) -> None:
    """An entry for later is not read off before, unless it is kept anew for now."""
    now = [100.0]

    async def scene(journal: Journal) -> None:
        await journal.keep({"a": end("a"), "b": end("b")}, due_in_s=60)
        assert await ids(journal) == []
        await journal.keep({"b": end("b")})
        assert await ids(journal) == ["b"]
        now[0] = 160.0
        assert await ids(journal) == ["a", "b"]

    play(tmp_path / "j", scene, clock=lambda: now[0])


def test_set_aside_what_can_never_be_done(tmp_path: Path) -> None:
    """It is kept, counted apart and read off no more, until a person says that it is mended."""

    async def scene(journal: Journal) -> None:
        await journal.keep({"a": end("a"), "b": end("b")})
        first, _ = await journal.due(2)
        await journal.set_aside(first, "Nobody knows its unit.")
        await journal.done([first])
        assert await ids(journal) == ["b"]
        assert await journal.counts() == (1, 1)
        await journal.restore()
        assert await ids(journal) == ["a", "b"]

    play(tmp_path / "j", scene)


def test_show_text_of_another_version(tmp_path: Path) -> None:
    """What cannot be read says why, and stops nothing that stands behind it."""

    async def scene(journal: Journal) -> None:
        await journal.keep({"a": end("a"), "b": end("b")})
        with sqlite3.connect(tmp_path / "j") as other:
            other.execute("UPDATE entry SET steps = '[{\"row\":\"Tomorrow\"}]' WHERE id = 'a'")
        other.close()
        strange, known = await journal.due(2)
        assert (strange.steps, known.steps, known.fault) == ((), end("b"), "")
        assert "Tomorrow" in strange.fault

    play(tmp_path / "j", scene)


def test_keep_no_more_than_its_bound(tmp_path: Path) -> None:
    """A full journal refuses, keeps all it has, and takes entries again when some are done."""

    async def scene(journal: Journal) -> None:
        await journal.keep({"a": end("a"), "b": end("b")})
        with pytest.raises(JournalError, match=r"has its 2 entries\. Bring the store back"):
            await journal.keep({"c": end("c"), "a": end("a", 9)})
        assert [entry.steps for entry in await journal.due(9)] == [end("a"), end("b")]
        await journal.keep({"a": end("a", 2)})
        await journal.done(await journal.due(1))
        await journal.keep({"c": end("c")})
        assert await ids(journal) == ["a", "c"]

    play(tmp_path / "j", scene, max_entries=2)


def test_refuse_what_is_no_text(tmp_path: Path) -> None:
    """An entry that cannot be written says so, and harms nobody."""

    async def scene(journal: Journal) -> None:
        with pytest.raises(JournalError, match="cannot write one of 1 entries"):
            await journal.keep({"a": (End("a", 1, event={"day": object()}),)})
        assert await journal.counts() == (0, 0)

    play(tmp_path / "j", scene)


def test_wait_for_the_disk(tmp_path: Path) -> None:
    """What is kept survives a power cut: commits wait for the disk, whatever the library was built to do."""

    async def scene(journal: Journal) -> None:
        assert await journal._in_thread(lambda each: each.execute("PRAGMA synchronous").fetchone()) == (2,)

    play(tmp_path / "j", scene)


def test_refuse_files_that_are_none_of_ours(tmp_path: Path) -> None:
    """A folder that is missing, another program's database, or no database at all: a mistake of the set-up."""
    foreign = sqlite3.connect(tmp_path / "foreign")
    foreign.execute("CREATE TABLE theirs (a)")
    foreign.close()
    (tmp_path / "text").write_text("no database" * 100)
    for name, said in (("none/j", "does not exist"), ("foreign", "no journal of this version"), ("text", "no journal")):
        with pytest.raises(ConfigurationError, match=said):
            play(tmp_path / name, ids)  # type: ignore[arg-type]
    for nowhere in ("", ":memory:"):
        with pytest.raises(ConfigurationError, match="names no file"):
            Journal(nowhere)


def test_say_that_it_is_not_open(tmp_path: Path) -> None:
    """Before it is opened, and after it was closed, which may be done twice."""

    async def scene() -> None:
        journal = Journal(tmp_path / "j")
        with pytest.raises(JournalError, match="is not open"):
            await journal.keep({"a": end("a")})
        await journal.open()
        await journal.open()
        await journal.close()
        await journal.close()
        with pytest.raises(JournalError, match="is not open"):
            await journal.due(1)

    asyncio.run(scene())


def test_give_the_turn_to_one(tmp_path: Path) -> None:
    """Of two that share a file one reads it off; giving back, and closing, lets the other."""

    async def scene() -> None:
        one, other = Journal(tmp_path / "j"), Journal(tmp_path / "j")
        await one.open()
        await other.open()
        assert await one.take_turn()
        assert not await one.take_turn()
        assert not await other.take_turn()
        await one.give_turn_back()
        await one.give_turn_back()
        assert await other.take_turn()
        await other.close()
        assert await one.take_turn()
        await one.close()

    asyncio.run(scene())


@pytest.mark.parametrize("has_begun", [True, False])
def test_give_the_turn_back_that_nobody_waits_for(has_begun: bool, tmp_path: Path) -> None:
    """A reader that is cancelled while it takes its turn keeps it from nobody, taken already or not."""

    async def scene() -> None:
        one, other = Journal(tmp_path / "j"), Journal(tmp_path / "j")
        await one.open()
        await other.open()
        disk = threading.Event()
        if has_begun:
            # Taken, and its answer is on the way.
            taking = asyncio.create_task(one.take_turn())
            await asyncio.sleep(0)
            while one._turn is None:
                pass
        else:
            slow = asyncio.create_task(one._in_thread(lambda _: disk.wait(10)))
            taking = asyncio.create_task(one.take_turn())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        disk.set()
        if not has_begun:
            await slow
        await one.counts()
        assert await other.take_turn()
        await other.close()
        await one.close()

    asyncio.run(scene())


def test_fail_as_a_journal_where_its_thread_has_ended(tmp_path: Path) -> None:
    """Whoever comes while it is closed by another event loop is told by the error that journals have."""

    async def scene(journal: Journal) -> None:
        assert journal._thread is not None
        await journal._thread.stop()
        with pytest.raises(JournalError, match="has ended"):
            await journal.keep({"a": (End("a", None),)})

    play(tmp_path / "j", scene)


def process(path: Path, body: str) -> subprocess.Popen[str]:
    """A process that runs *body* with the open journal ``j``."""
    program = (
        "import asyncio, resource, sys\n"
        "from asgi_metering.errors import JournalError\n"
        "from asgi_metering.journal import Journal\n"
        "from asgi_metering.rules.operations import End\n"
        "async def main():\n"
        f"    j = Journal({str(path)!r})\n"
        "    await j.open()\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "asyncio.run(main())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_free_the_turn_of_a_process_that_was_killed(tmp_path: Path) -> None:
    """The operating system gives the turn back at once, and what that process kept is there."""
    path = tmp_path / "j"
    with process(
        path, "await j.keep({'a': (End('a', 1),)})\nprint(await j.take_turn(), flush=True)\nsys.stdin.read()"
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"

        async def scene(journal: Journal) -> None:
            assert not await journal.take_turn()
            other.send_signal(signal.SIGKILL)
            other.wait()
            assert await journal.take_turn()
            assert await ids(journal) == ["a"]

        play(path, scene)


def test_keep_for_several_processes_at_once(tmp_path: Path) -> None:
    """Nothing is lost where several processes write to one journal together, a new file included."""
    body = "for n in range(20):\n    await j.keep({f'{sys.argv[0]}{id(j)}.{n}': (End('a', 1),)})\nawait j.close()"
    others = [process(tmp_path / "j", body.replace("{id(j)}", f"p{number}")) for number in range(2)]
    for other in others:
        with other:
            other.communicate(timeout=30)
            assert other.returncode == 0

    async def scene(journal: Journal) -> None:
        assert await journal.counts() == (40, 0)

    play(tmp_path / "j", scene)


def test_say_that_the_disk_is_full(tmp_path: Path) -> None:
    """Where the file cannot grow an entry is refused with a sentence; those before it stay, and later ones may fit."""
    body = (
        "await j.keep({'a': (End('a', 1),)})\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, -1))\n"
        "try:\n"
        "    await j.keep({'b': (End('b', 1, event={'text': 'x' * 200_000}),)})\n"
        "except JournalError as refused:\n"
        "    print(refused)\n"
        "await j.keep({'c': (End('c', 1),)})\n"
        "print([entry.id for entry in await j.due(9)])"
    )
    with process(tmp_path / "j", body) as other:
        said = other.communicate(timeout=30)[0].splitlines()
    assert "could not be used: " in said[0]
    assert said[0].endswith("Look at its disk first.")
    assert said[1] == "['a', 'c']"
