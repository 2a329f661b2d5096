"""What an operator sees of a journal and does with it, while processes use it and when none is left."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Metering
from asgi_metering.cli import main
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.journal import Journal
from asgi_metering.journal.records import Steps
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, Backfill, Emit, End, Operation, WalletSource
from asgi_metering.stores.sqlite import SQLiteStore

PARTS = 1_000_000
"""Of a credit."""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``asgi-metering journal`` on this test's file and store: its exit code, its output and its errors."""
    monkeypatch.setenv("ASGI_METERING_STORE", url(tmp_path))

    def run(*arguments: str) -> tuple[int, str, str]:
        return main(("journal", str(tmp_path / "j"), *arguments)), *capsys.readouterr()

    return run


def url(folder: Path) -> str:
    """Of the store."""
    return f"sqlite:///{folder}/metering.db?synchronous=OFF"


def queued(call: str, payer: str = "ann", amount: int | None = 2 * PARTS) -> Steps:
    """What the journal keeps of a call that was let in while the store was down."""
    ask = Admit(call, payer, "credits", 2 * PARTS, 2 * PARTS, (WalletSource(),), line="chat", facts={"line": "chat"})
    return ask, End(call, amount, Basis.HOLD if amount else Basis.NONE, event={"outcome": "aborted"})


async def prepare(folder: Path, entries: dict[str, Steps], due_in_s: float = 0.0) -> None:
    """A store in which ann has credits, and a journal with these entries."""
    async with Metering(url(folder), sinks=()) as metering:
        await metering.grant("ann", 10, id="g")
    journal = Journal(folder / "j")
    await journal.open()
    await journal.keep(entries, due_in_s=due_in_s)
    await journal.close()


async def spent(folder: Path, payer: str = "ann") -> float:
    """Credits that were charged."""
    async with Metering(url(folder), sinks=()) as metering:
        return (await metering.balance(payer)).settled / PARTS


def rows(answer: tuple[int, str, str], code: int = 0) -> Any:
    """What a program reads."""
    assert answer[0] == code, answer
    return json.loads(answer[1])


@contextmanager
def another(path: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has the journal open, says so, and keeps it until the block is left."""
    script = f"""
import asyncio, sys
from asgi_metering.journal import Journal
async def main():
    journal = Journal({str(path)!r})
    await journal.open()
    {body}
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
asyncio.run(main())
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
    finally:
        process.kill()
        process.communicate()


# -- looking -----------------------------------------------------------------------------------------------


def test_see_what_waits(run: Run, tmp_path: Path) -> None:
    """Each call shows whose it is, what it is charged, and whether it waits, runs or is set aside; nothing changes."""
    entries: dict[str, Steps] = {
        "held": (End("held", 3),),
        "queued": queued("queued"),
        "owed": (Backfill("owed", "bob", "tokens", 7, "chat"),),
        "free": (Emit((("free", {"payer": "eve", "line": "free"}),)),),
        "strange": queued("strange"),
    }

    async def play() -> None:
        await prepare(tmp_path, {"runs": queued("runs", amount=None)}, due_in_s=3_600.0)
        await prepare(tmp_path, entries)
        journal = Journal(tmp_path / "j")
        await journal.open()
        strange = next(entry for entry in await journal.due(9) if entry.id == "strange")
        await journal.set_aside(strange, "Nobody knows its unit.")
        await journal.close()

    asyncio.run(play())
    names = ("call", "state", "payer", "line", "unit", "amount", "why")
    assert [tuple(row[name] for name in names) for row in rows(run("--json"))] == [
        ("runs", "runs", "ann", "chat", "credits", "0", ""),
        ("held", "waits", "", "", "", "3 smallest parts", ""),
        ("queued", "waits", "ann", "chat", "credits", "2", ""),
        ("owed", "waits", "bob", "chat", "tokens", "7 smallest parts", ""),
        ("free", "waits", "eve", "free", "", "0", ""),
        ("strange", "set aside", "ann", "chat", "credits", "2", "Nobody knows its unit."),
    ]
    code, output, errors = run()
    assert (code, errors) == (0, "")
    assert output.splitlines()[0].split() == ["call", "state", "payer", "line", "amount", "due", "why"]
    assert len(output.splitlines()) == 7


def test_see_text_of_another_version(run: Run, tmp_path: Path) -> None:
    """What cannot be read is shown with the reason, among the others."""
    asyncio.run(prepare(tmp_path, {"a": (End("a", 1),), "b": queued("b")}))
    with closing(sqlite3.connect(tmp_path / "j")) as other, other:
        other.execute("UPDATE entry SET steps = '[{\"row\":\"Tomorrow\"}]' WHERE id = 'a'")
    first, second = rows(run("--json"))
    assert (first["call"], second["why"]) == ("a", "")
    assert "Tomorrow" in first["why"]


def test_look_beside_a_process_that_writes(run: Run, tmp_path: Path) -> None:
    """Looking waits for nobody and stops nobody, also while somebody is amid a write; it sees what is committed."""
    asyncio.run(prepare(tmp_path, {"a": queued("a")}))
    with closing(sqlite3.connect(tmp_path / "j", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM entry")
        assert [row["call"] for row in rows(run("--json"))] == ["a"]
        writer.execute("COMMIT")
    assert rows(run("--json")) == []


@pytest.mark.parametrize("option", [(), ("--replay",), ("--restore",), ("--lost",)])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no journal '{}'. Look at its spelling; the application makes it."),
        (b"Nobody shall write here. " * 100, "The file '{}' is no journal. Name the application's journal=."),
        (b"", "The file '{}' is no journal of this version. Name the application's journal=."),
    ],
)
def test_tell_that_there_is_no_journal(
    run: Run, tmp_path: Path, option: tuple[str, ...], content: bytes | None, sentence: str
) -> None:
    """A mistyped name, or another file, is told in one line, and neither made nor changed."""
    path = tmp_path / "j"
    asyncio.run(spent(tmp_path))
    if content is not None:
        path.write_bytes(content)
    assert run(*option) == (2, "", f"asgi-metering: {sentence.format(path)}\n")
    assert (path.read_bytes() if path.exists() else None) == content


# -- replaying ---------------------------------------------------------------------------------------------


def test_replay_what_waits(run: Run, tmp_path: Path) -> None:
    """What is due goes to the store, once; what runs stays, and a second time there is nothing to do."""

    async def play() -> None:
        await prepare(tmp_path, {"runs": queued("runs")}, due_in_s=3_600.0)
        await prepare(tmp_path, {"a": queued("a"), "b": queued("b", "bob"), "none": queued("none", amount=None)})

    asyncio.run(play())
    assert rows(run("--replay", "--json")) == [{"delivered": 3, "waiting": 0, "running": 1, "set_aside": 0}]
    assert [asyncio.run(spent(tmp_path, payer)) for payer in ("ann", "bob")] == [2, 2]
    assert rows(run("--replay", "--json")) == [{"delivered": 0, "waiting": 0, "running": 1, "set_aside": 0}]
    assert [row["call"] for row in rows(run("--json"))] == ["runs"]


def test_replay_calls_whose_process_is_gone(run: Run, tmp_path: Path) -> None:
    """With --lost calls that run are ended by their policy; not while a process has the journal open: they may run."""
    asyncio.run(prepare(tmp_path, {"runs": queued("runs")}, due_in_s=3_600.0))
    with another(tmp_path / "j", ""):
        code, output, errors = run("--replay", "--lost")
        assert (code, output) == (2, "")
        assert errors.startswith(f"asgi-metering: A process has the journal '{tmp_path}/j' open")
        assert [row["state"] for row in rows(run("--json"))] == ["runs"]
    assert rows(run("--lost", "--replay", "--json")) == [{"delivered": 1, "waiting": 0, "running": 0, "set_aside": 0}]
    assert asyncio.run(spent(tmp_path)) == 2


def test_replay_beside_a_process(run: Run, tmp_path: Path) -> None:
    """A process that only has it open is not disturbed; one that reads it off right now is left alone."""
    asyncio.run(prepare(tmp_path, {"a": queued("a")}))
    with another(tmp_path / "j", "await journal.take_turn()"):
        code, output, errors = run("--replay")
        assert (code, output) == (2, "")
        assert errors.startswith("asgi-metering: Another process reads the journal")
    with another(tmp_path / "j", ""):
        assert rows(run("--replay", "--json"))[0]["delivered"] == 1
    assert asyncio.run(spent(tmp_path)) == 2


def test_restore_what_was_set_aside(run: Run, tmp_path: Path) -> None:
    """What the store refuses for good is told by the exit code, until it is mended, restored and replayed."""
    asyncio.run(prepare(tmp_path, {"a": queued("a"), "b": queued("b")}))
    with closing(sqlite3.connect(tmp_path / "j")) as other, other:
        (good,) = other.execute("SELECT steps FROM entry WHERE id = 'a'").fetchone()
        other.execute("UPDATE entry SET steps = ? WHERE id = 'a'", (good.replace('"minimum":', '"least":'),))
    assert rows(run("--replay", "--json"), 1) == [{"delivered": 1, "waiting": 0, "running": 0, "set_aside": 1}]
    assert rows(run("--json"))[0]["state"] == "set aside"
    with closing(sqlite3.connect(tmp_path / "j")) as other, other:
        other.execute("UPDATE entry SET steps = ? WHERE id = 'a'", (good,))
    assert rows(run("--restore", "--json")) == [{"delivered": 0, "waiting": 1, "running": 0, "set_aside": 0}]
    assert rows(run("--replay", "--json")) == [{"delivered": 1, "waiting": 0, "running": 0, "set_aside": 0}]
    assert asyncio.run(spent(tmp_path)) == 4


def test_tell_that_a_store_cannot_be_reached(run: Run, tmp_path: Path) -> None:
    """Without a store nothing is done, and everything waits on."""
    asyncio.run(prepare(tmp_path, {"a": queued("a")}))
    code, output, errors = run("--replay", "--store", "redis://127.0.0.1:1/0")
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert [row["state"] for row in rows(run("--json"))] == ["waits"]


def test_keep_what_the_store_does_not_take(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that goes away meanwhile is told by the exit code; what it did not take waits on."""
    asyncio.run(prepare(tmp_path, {"a": queued("a")}))
    taken = SQLiteStore.run

    async def going(store: SQLiteStore, operations: Sequence[Operation]) -> Any:
        if any(isinstance(each, Admit) for each in operations):
            raise StoreUnavailableError("The disk says nothing.")
        return await taken(store, operations)

    monkeypatch.setattr(SQLiteStore, "run", going)
    # Nor what is asked alone, and begun at once.
    monkeypatch.setattr(SQLiteStore, "start", lambda *_: False)
    code, output, errors = run("--replay")
    assert (code, output) == (2, "")
    assert "asgi-metering: The store took 0 calls, and 1 wait still." in errors
    assert [row["state"] for row in rows(run("--json"))] == ["waits"]
