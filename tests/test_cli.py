"""The command line: what each command prints for people and for programs, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Metering
from asgi_metering.cli import main
from asgi_metering.rules.operations import Admit, WalletSource

GRANT = ("grant", "ann", "12.5", "--id", "payment-1")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty file, named to every command by the environment, as an operator has it."""
    url = f"sqlite:///{tmp_path}/metering.db?synchronous=OFF"
    monkeypatch.setenv("ASGI_METERING_STORE", url)
    return url


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command and return its exit code, its output and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as exit_:  # argparse's own mistakes
            code = int(str(exit_.code))
        return code, *capsys.readouterr()

    return run


def rows(answer: tuple[int, str, str]) -> Any:
    """What a program reads of a command that did what was asked."""
    code, output, errors = answer
    assert (code, errors) == (0, "")
    return json.loads(output)


def table(answer: tuple[int, str, str]) -> list[list[str]]:
    """The cells of a table, its head first, of a command that did what was asked."""
    code, output, errors = answer
    assert (code, errors) == (0, "")
    return [line.split() for line in output.splitlines()]


def charge(store: str, payer: str, amount: str) -> None:
    """Run one call of the line ``search`` to its end."""

    async def work() -> None:
        async with Metering(store, sinks=()) as metering, metering.charge(payer=payer, line="search", price=amount):
            pass

    asyncio.run(work())


# What operators do


@pytest.mark.usefixtures("store")
def test_grant_once(run: Run) -> None:
    """A grant shows what it gave and what there is now; its repeat is not applied and changes nothing."""
    head = ["id", "granted", "applied", "available"]
    assert table(run(*GRANT)) == [head, ["payment-1", "12.5", "True", "12.5"]]
    assert table(run(*GRANT)) == [head, ["payment-1", "12.5", "False", "12.5"]]


@pytest.mark.usefixtures("store")
def test_grant_for_programs(run: Run) -> None:
    """With --json the same is read by programs, amounts as text so that no digit is lost."""
    (row,) = rows(run(*GRANT, "--json"))
    assert row == {"id": "payment-1", "granted": "12.5", "applied": True, "available": "12.5"}


@pytest.mark.usefixtures("store")
def test_grant_with_an_end_and_a_priority(run: Run) -> None:
    """Priority, expiry and actor are the grant's: the same id with another priority is another grant, and refused."""
    options = ("--priority", "5", "--expires", "2100-01-01T00:00:00+01:00", "--actor", "stripe")
    assert rows(run(*GRANT, *options, "--json"))[0]["applied"] is True
    assert rows(run(*GRANT, *options, "--json"))[0]["applied"] is False
    code, output, errors = run(*GRANT, "--priority", "6", *options[2:])
    assert (code, output) == (2, "")
    assert "'payment-1' exists with priority=5, and came again with priority=6" in errors


@pytest.mark.usefixtures("store")
def test_grant_in_a_unit_of_its_own(run: Run) -> None:
    """A unit has books of its own, and counts in its own parts."""
    run(*GRANT)
    assert rows(run("grant", "ann", "7", "--id", "payment-1", "--unit", "usd_micros:0", "--json"))[0]["granted"] == "7"
    assert rows(run("balance", "ann", "--unit", "usd_micros:0", "--json"))[0]["available"] == "7"
    assert rows(run("balance", "ann", "--json"))[0]["available"] == "12.5"


def test_balance_of_an_account(run: Run, store: str) -> None:
    """A balance shows the numbers of which it is the difference, in whole units."""
    run(*GRANT)
    charge(store, "ann", "2")
    head = ["granted", "settled", "held", "expired", "available", "debt"]
    assert table(run("balance", "ann")) == [head, ["12.5", "2", "0", "0", "10.5", "0"]]
    assert rows(run("balance", "ann", "--json")) == [
        {"granted": "12.5", "settled": "2", "held": "0", "expired": "0", "available": "10.5", "debt": "0"}
    ]


@pytest.mark.usefixtures("store")
def test_balance_of_nobody(run: Run) -> None:
    """An unknown account of a database that is there has zeros."""
    run(*GRANT)
    assert set(rows(run("balance", "nobody", "--json"))[0].values()) == {"0"}


def test_statement_of_an_account(run: Run, store: str) -> None:
    """A statement has a line for each grant and each charge, with what was left after it."""
    run(*GRANT)
    charge(store, "ann", "2")
    grant, charged = rows(run("statement", "ann", "--json"))
    assert {**grant, "at": ""} == {
        "number": 1,
        "at": "",
        "kind": "grant",
        "amount": "12.5",
        "line": "",
        "basis": "",
        "available": "12.5",
        "ref": "payment-1",
    }
    assert {**charged, "at": "", "ref": ""} == {
        "number": 2,
        "at": "",
        "kind": "settle",
        "amount": "2",
        "line": "search",
        "basis": "usage",
        "available": "10.5",
        "ref": "",
    }
    head, _, line = table(run("statement", "ann"))
    assert head == ["number", "at", "kind", "amount", "line", "basis", "available", "ref"]
    assert line == ["2", charged["at"], "settle", "2", "search", "usage", "10.5", charged["ref"]]
    assert charged["at"].endswith("+00:00")


def test_holds_in_flight(run: Run, store: str) -> None:
    """A hold that has not ended is shown with its payer, line, amount and state."""
    run(*GRANT)
    assert rows(run("holds", "--json")) == []

    async def hold() -> None:
        async with Metering(store, sinks=()) as metering:
            ask = Admit("call-1", "ann", "credits", 3_000_000, 3_000_000, (WalletSource(),), line="chat")
            assert (await metering.decide(ask)).admitted

    asyncio.run(hold())
    head, line = table(run("holds"))
    assert head == ["id", "payer", "line", "amount", "state", "since"]
    assert line[:5] == ["call-1", "ann", "chat", "3", "held"]
    (row,) = rows(run("holds", "--json"))
    assert (row["id"], row["amount"], row["state"]) == ("call-1", "3", "held")


def held(store: str, call: str, *, parts: int = 3_000_000, ttl_s: float = 60.0, **options: Any) -> None:
    """Leave a call of ann's that nobody ends."""

    async def hold() -> None:
        async with Metering(store, sinks=()) as metering:
            ask = Admit(call, "ann", "credits", parts, parts, (WalletSource(),), ttl_s=ttl_s, **options)
            assert (await metering.decide(ask)).admitted

    asyncio.run(hold())


def charged(run: Run) -> str:
    """Id of ann's last charge."""
    return str(rows(run("statement", "ann", "--json"))[-1]["ref"])


def test_refund_a_part_once(run: Run, store: str) -> None:
    """A refund shows what came back; its repeat is not applied and changes nothing."""
    run(*GRANT)
    charge(store, "ann", "2")
    call = charged(run)
    head = ["id", "payer", "refunded", "returned", "lapsed", "applied", "available"]
    refund = ("refund", call, "--id", "r-1", "--amount", "0.5")
    assert table(run(*refund)) == [head, ["r-1", "ann", "0.5", "0.5", "0", "True", "11"]]
    assert rows(run(*refund, "--json"))[0]["applied"] is False
    assert rows(run("refund", call, "--id", "r-2", "--payer", "ann", "--json"))[0]["refunded"] == "1.5"


def test_refund_what_was_not_charged(run: Run, store: str) -> None:
    """An unknown call, too much, and another amount under one id are mistakes with their mend."""
    run(*GRANT)
    charge(store, "ann", "2")
    call = charged(run)
    assert rows(run("refund", call, "--id", "r", "--amount", "1", "--json"))
    for arguments, mend in (
        (("nobodys", "--id", "x"), "Check the id; for a refund of an old charge say whose it was"),
        ((call, "--id", "x", "--amount", "3"), "Refund less"),
        ((call, "--id", "r", "--amount", "2"), "Use a new id for a new refund"),
    ):
        code, output, errors = run("refund", *arguments)
        assert (code, output, errors.count("\n")) == (2, "", 1)
        assert mend in errors


def test_reconcile_calls_in_doubt(run: Run, store: str) -> None:
    """What is overdue is ended by its policy and named; a second time there is nothing to do."""
    run(*GRANT)
    held(store, "alive")
    held(store, "dead", ttl_s=0.0, grace_s=0.0)
    assert table(run("reconcile")) == [["ended"], ["dead"]]
    assert rows(run("reconcile", "--json")) == []
    assert [row["id"] for row in rows(run("holds", "--json"))] == ["alive"]
    assert rows(run("balance", "ann", "--json"))[0]["held"] == "3"


def test_resolve_a_call(run: Run, store: str) -> None:
    """A person charges a call, or releases it; who comes second learns what was decided."""
    run(*GRANT)
    held(store, "a")
    held(store, "b")
    head = ["id", "payer", "charged", "ended_by", "applied"]
    assert table(run("resolve", "a", "--charge", "1.5")) == [head, ["a", "ann", "1.5", "person", "True"]]
    assert table(run("resolve", "a", "--release")) == [head, ["a", "ann", "1.5", "person", "False"]]
    assert rows(run("resolve", "b", "--release", "--json"))[0]["charged"] == "0"
    assert rows(run("balance", "ann", "--json"))[0]["available"] == "11"


@pytest.mark.parametrize("arguments", [(), ("--release", "--charge", "1")], ids=["neither", "both"])
@pytest.mark.usefixtures("store")
def test_resolve_says_how(run: Run, arguments: tuple[str, ...]) -> None:
    """Nothing is released because somebody left an option out."""
    code, output, errors = run("resolve", "a", *arguments)
    assert (code, output) == (2, "")
    assert "--release" in errors


def test_amounts_of_another_unit_are_not_scaled(run: Run, store: str) -> None:
    """A hold in a unit that was not named shows its smallest parts: a wrong scale would show wrong money."""
    run("grant", "ann", "7", "--id", "m", "--unit", "messages:0")

    async def hold() -> None:
        async with Metering(store, sinks=()) as metering:
            assert (await metering.decide(Admit("c", "ann", "messages", 3, 3, (WalletSource(),)))).admitted

    asyncio.run(hold())
    assert rows(run("holds", "--json"))[0]["amount"] == "3 smallest parts of messages"
    assert rows(run("holds", "--unit", "messages:0", "--json"))[0]["amount"] == "3"


def test_check_books_that_balance(run: Run, store: str) -> None:
    """Books that balance are said to, with 0."""
    run(*GRANT)
    charge(store, "ann", "2")
    assert run("check") == (0, "The books balance: 1 account proven.\n", "")
    run("grant", "bob", "1", "--id", "payment-2")
    assert run("check") == (0, "The books balance: 2 accounts proven.\n", "")
    assert rows(run("check", "--json")) == {"balanced": True, "accounts": 2, "discrepancies": []}


@pytest.mark.usefixtures("store")
def test_check_books_that_do_not_balance(run: Run, tmp_path: Path) -> None:
    """A number that somebody has changed is named with what its rows prove, and the exit code is 1."""
    run(*GRANT)
    with sqlite3.connect(tmp_path / "metering.db") as connection:
        connection.execute("UPDATE account SET settled = 7 WHERE payer = 'ann'")
    connection.close()
    code, output, errors = run("check")
    assert (code, output, errors) == (
        1,
        "'ann' in 'credits': settled is 7 in the account and 0 in its rows.\n",
        "",
    )
    code, output, _ = run("check", "--json")
    assert (code, json.loads(output)["balanced"]) == (1, False)


# The audit

MAIN = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from asgi_metering import Allowance, Unit, Wallet, billable, rate_limited, up_to
from asgi_metering.prices import per_token
from asgi_metering.sources import Payer

SOURCES = [Allowance(20), Wallet(payer=Payer("acme"))]

def owner(request): ...

@rate_limited("60/minute", "5000/day", concurrency=4, global_concurrency=9)
@billable("0.5", on_disconnect="none", unit=Unit("messages", 1), sources=SOURCES, payer=owner)
async def search(request): ...

@billable(per_token(output=1), hold=up_to(owner, at_least="0.1"))
async def chat(request): ...

async def health(request): ...

def plain(request): ...

async def opaque(scope, receive, send): ...

def make(): return app

number = 3

gated = billable(2)(plain)

app = Starlette(routes=[Route("/search", search, methods=["POST"]), Route("/chat", chat), Route("/health", health)])
wrong = Starlette(routes=[Route("/plain", plain)])
"""


@pytest.fixture
def audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of an application in the current folder, by a name that no other test uses."""
    name = f"audited_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_routes_of_an_application(run: Run, audited: str) -> None:
    """Each route is shown with its line, price and limits; unmetered ones too, so that none is forgotten (S2.28)."""
    code, output, errors = run("routes", f"{audited}:app")
    assert (code, errors) == (0, "")
    head = ["path", "methods", "line", "price", "unit", "limits", "concurrency"]
    assert [re.split(r" {2,}", line) for line in output.splitlines()[:4]] == [
        head,
        ["/search", "POST", "search", "0.5", "messages:1", "60/minute, 5000/day", "4, 9 of everybody"],
        ["/chat", "GET,HEAD", "chat", "TokenPrice"],
        ["/health", "GET,HEAD"],
    ]
    reach, told = output.splitlines()[4:]
    assert reach.startswith(f"! /chat ({audited}.chat) is billable, and answers HEAD")
    assert told == f"! {audited}.plain is decorated, but no route reaches it."


def test_routes_with_all_of_each_policy(run: Run, audited: str) -> None:
    """With --verbose each charge shows its hold, sources, payer and what it charges however a call ends (DESIGN 4)."""
    code, output, errors = run("routes", f"{audited}:app", "--verbose")
    assert (code, errors) == (0, "")
    search, chat = output.split("\n\n")[1:]
    assert search.splitlines()[:4] == [
        "/search  POST",
        "  hold: the price",
        "  sources: allowance, wallet of acme",
        "  payer: owner()",
    ]
    assert "  client gone after the first byte: none" in search.splitlines()
    assert chat.splitlines()[:4] == [
        "/chat  GET,HEAD",
        "  hold: up to owner(), at least 0.1",
        "  sources: wallet",
        "  payer: the caller's",
    ]
    assert "  cut: observed" in chat.splitlines()


KEYED = """
from starlette.applications import Starlette
from starlette.routing import Route
from asgi_metering import Idempotency, billable

def owner(request): ...

@billable(1, idempotency=True, charge_key="X-Session", charge_zone="Europe/Berlin", charge_per="week")
async def once(request): ...

@billable(1, idempotency=Idempotency(3_600, 10, True, owner), charge_key=owner, charge_per=90)
async def twice(request): ...

keyed = Starlette(routes=[Route("/once", once), Route("/twice", twice, methods=["POST"])])
"""


def test_routes_with_their_keys(run: Run, audited: str, tmp_path: Path) -> None:
    """What runs once, and what is charged once, is shown with all that was chosen for it."""
    (tmp_path / f"{audited}.py").write_text(KEYED)
    code, output, _ = run("routes", f"{audited}:keyed", "--verbose")
    assert code == 0
    once, twice = output.split("\n\n")[1:]
    assert once.splitlines()[4:6] == [
        "  idempotency: taken, for 86400 s, answers not kept",
        "  charge key: x-session per week in Europe/Berlin",
    ]
    assert twice.splitlines()[4:6] == [
        "  idempotency: required, for 3600 s, fingerprint owner(), answers kept up to 10 bytes",
        "  charge key: owner() per 90 s",
    ]
    assert rows(run("routes", f"{audited}:keyed", "--json"))["routes"][0]["charge_key"] == (
        "x-session per week in Europe/Berlin"
    )


def test_routes_for_programs(run: Run, audited: str) -> None:
    """With --json each metered route also says what it holds, who pays, and what it charges however a call ends."""
    found = rows(run("routes", f"{audited}:app", "--json"))
    search, chat, health = found["routes"]
    assert (search["end"]["client gone after the first byte"], chat["end"]["cut"]) == ("none", "observed")
    assert (search["concurrency"], search["payer"], chat["hold"]) == (
        "4, 9 of everybody",
        "owner()",
        "up to owner(), at least 0.1",
    )
    assert "end" not in health
    assert found["errors"] == []
    assert found["warnings"][1:] == [f"{audited}.plain is decorated, but no route reaches it."]


@pytest.mark.parametrize(
    ("attribute", "sentence"),
    [
        ("make", "is a function, but no ASGI application: it does not take scope, receive and send. Where it makes "),
        ("plain", "is a function, but no ASGI application"),
        ("number", "is of type int, no ASGI application. Name the application itself, such as main:app."),
        ("Starlette", "is the class Starlette, no ASGI application."),
    ],
)
def test_routes_of_what_is_no_application(run: Run, audited: str, attribute: str, sentence: str) -> None:
    """A factory, a class or a number is a mistake in the arguments, and no proof that nothing is wrong."""
    code, output, errors = run("routes", f"{audited}:{attribute}")
    assert (code, output) == (2, "")
    assert errors.startswith(f"asgi-metering: '{audited}:{attribute}' {sentence}")
    assert errors.count("\n") == 1


def test_run_as_a_module() -> None:
    """``python -m asgi_metering.cli`` is the same command."""
    ended = subprocess.run(
        [sys.executable, "-m", "asgi_metering.cli", "routes", "json:loads"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("asgi-metering: 'json:loads' is a function, but no ASGI application")


def test_routes_that_are_decorated_in_vain(run: Run, audited: str) -> None:
    """A route that runs ungated is named with its mend, and the exit code is 1."""
    code, output, _ = run("routes", f"{audited}:wrong")
    assert code == 1
    assert f"! /plain runs {audited}.plain ungated: its metering decorators stand above the route's own." in output


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("main", "'main' names no application. Write module:attribute, such as main:app."),
        (
            "no_such_module:app",
            "'no_such_module:app' cannot be imported: No module named 'no_such_module'. Look at its spelling.",
        ),
        (
            "json.no.such:app",
            "'json.no.such:app' cannot be imported: No module named 'json.no'. Look at its spelling.",
        ),
        ("json:app", "'json:app' cannot be imported: module 'json' has no attribute 'app'. Look at its spelling."),
        (":app", "':app' names no application. Write module:attribute, such as main:app."),
    ],
)
def test_routes_of_what_is_not_there(run: Run, audited: str, target: str, sentence: str) -> None:
    """An application that cannot be found is a mistake in the arguments."""
    assert run("routes", target) == (2, "", f"asgi-metering: {sentence}\n")


FAILING = {
    "value": (
        "def setting():\n    raise ValueError('SECRET_KEY is\\n  missing')\n\nsetting()\n",
        "raised ValueError at {name}.py, line 2: SECRET_KEY is missing.",
    ),
    "silent": ("assert False\n", "raised AssertionError at {name}.py, line 1: without a word."),
    "exit": ("import sys\nsys.exit('no settings.')\n", "raised SystemExit at {name}.py, line 2: no settings. Mend"),
    "syntax": ("app = (\n", "raised SyntaxError: '(' was never closed ({name}.py, line 1)."),
    "import": (
        "import no_such_driver\n",
        "raised ModuleNotFoundError at {name}.py, line 1: No module named 'no_such_d",
    ),
    "ours": (
        "from asgi_metering import billable\n\n@billable(0.25)\ndef f(): ...\n",
        "raised AmountError at {name}.py, line 3: The price 0.25 is a float. Write it as a str",
    ),
    "long": ("raise RuntimeError('x' * 5000)\n", "line 1: " + "x" * 300 + "... Mend that module"),
}


@pytest.mark.parametrize("failing", FAILING)
def test_routes_of_a_module_that_fails(run: Run, audited: str, tmp_path: Path, failing: str) -> None:
    """Whatever an application's module raises is told in one line with its place, and in full with --verbose."""
    name, (source, sentence) = f"failing_{audited}_{failing}", FAILING[failing]
    (tmp_path / f"{name}.py").write_text(source)
    code, output, errors = run("routes", f"{name}:app")
    assert (code, output) == (2, "")
    assert errors.startswith(f"asgi-metering: '{name}:app' cannot be imported, since its code ")
    assert sentence.format(name=name) in errors
    assert errors.endswith(" Mend that module; --verbose shows the traceback.\n")
    assert errors.count("\n") == 1
    code, output, errors = run("routes", f"{name}:app", "--verbose")
    assert (code, output) == (2, "")
    assert f'{name}.py", line ' in errors
    assert errors.splitlines()[-1].startswith(f"asgi-metering: '{name}:app' cannot be imported")


def test_routes_of_a_module_that_prints(run: Run, audited: str, tmp_path: Path) -> None:
    """What a module prints while it is imported goes to the error stream, and leaves the JSON whole."""
    (tmp_path / f"loud_{audited}.py").write_text(f"print('Hello!')\nfrom {audited} import app\n")
    code, output, errors = run("routes", f"loud_{audited}:app", "--json")
    assert (code, errors) == (0, "Hello!\n")
    assert len(json.loads(output)["routes"]) == 3


def test_routes_of_what_has_no_route_table(run: Run, audited: str) -> None:
    """Where nothing can be checked that is said, so that silence never looks like a proof."""
    code, output, _ = run("routes", f"{audited}:opaque")
    assert code == 0
    assert f"! {audited}:opaque has no route table that can be read, so nothing was checked." in output


# Moving


@pytest.fixture
def books(run: Run, store: str, tmp_path: Path) -> str:
    """A file with the books of ann."""
    run(*GRANT)
    file = str(tmp_path / "books.jsonl")
    assert run("export", file, "--store", store)[0] == 0
    return file


def test_move_the_books(run: Run, books: str, tmp_path: Path) -> None:
    """What was exported of one file is imported into another, proven on both ways, and a second import is refused."""
    other = f"sqlite:///{tmp_path}/other.db"
    code, output, errors = run("export", books)
    assert (code, errors) == (0, "")
    *counts, told, kept = output.splitlines()
    assert [line.split() for line in counts] == [
        ["rows", "number"],
        *[[table, "1"] for table in ("unit", "account", "grant", "entry")],
    ]
    assert told == "4 rows exported; 1 account proven."
    assert re.fullmatch(rf"What stood there is now '{books}\.\d{{8}}T\d{{6}}\.\d{{6}}Z\.bak'\.", kept)
    code, output, _ = run("import", books, "--store", other)
    assert (code, output.splitlines()[-1]) == (0, "4 rows imported; 1 account proven.")
    assert rows(run("balance", "ann", "--store", other, "--json")) == rows(run("balance", "ann", "--json"))
    code, _, errors = run("import", books, "--store", other)
    assert code == 2
    assert "The sqlite store is not empty, so nothing was imported" in errors
    assert run("import", books, "--store", other, "--resume")[1].splitlines()[-1] == (
        "0 rows imported; 1 account proven."
    )


def test_move_the_books_for_programs(run: Run, books: str, tmp_path: Path) -> None:
    """With --json both tell the rows of each kind, whether they balance, and where the old file is."""
    other = f"sqlite:///{tmp_path}/other.db"
    exported, imported = rows(run("export", books, "--json")), rows(run("import", books, "--store", other, "--json"))
    assert Path(exported.pop("backup")).exists()
    assert imported.pop("backup") is None
    assert (exported.pop("exported"), imported.pop("imported")) == (4, 4)
    assert exported == imported
    assert exported["rows"]["grant"] == 1
    assert (exported["balanced"], exported["one_instant"], exported["accounts"]) == (True, True, 1)


def test_move_books_that_do_not_balance(run: Run, store: str, books: str, tmp_path: Path) -> None:
    """Books that do not balance are exported and told with 1, refused with 2, and imported with 1 on demand."""
    other = f"sqlite:///{tmp_path}/other.db"
    with sqlite3.connect(tmp_path / "metering.db") as connection:
        connection.execute("UPDATE account SET settled = 7")
    connection.close()
    code, output, _ = run("export", books)
    assert code == 1
    assert "! 'ann' in 'credits': settled is 7 in the account and 0 in its rows." in output.splitlines()
    code, _, errors = run("import", books, "--store", other)
    assert code == 2
    assert "do not balance, so nothing was imported" in errors
    assert not (tmp_path / "other.db").exists()
    assert run("import", books, "--store", other, "--unbalanced")[0] == 1


def test_tell_that_a_store_has_no_instants(
    run: Run, books: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exported of a store that cannot be read at one instant is told to be looked at."""
    monkeypatch.setattr("asgi_metering.stores.sqlite.books._FileBooks.one_instant", False)
    code, output, _ = run("export", str(tmp_path / "again.jsonl"))
    assert code == 0
    assert output.splitlines()[-1].startswith("! This store cannot be read at one instant.")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("grant", "ann", "abc", "--id", "x"), "The grant 'abc' is not a number. Write whole units, such as '0.25'."),
        (("grant", "ann", "0", "--id", "x"), "The grant 'x' of '0' moves nothing. Use an amount above 0."),
        (("grant", "ann", "-5", "--id", "x"), "The grant '-5' is negative. Amounts start at 0."),
        (("grant", "ann", "0.1234567", "--id", "x"), "finer than unit 'credits' counts (6 digits after the point)."),
        (("grant", "", "1", "--id", "x"), "The payer has 0 characters; 1 to 255 are allowed."),
        (("grant", "ann", "1", "--id", "x", "--expires", "2001-01-01T00:00:00Z"), "Give it a later expiry."),
        (("balance", "ann", "--unit", "credits"), "--unit 'credits' is not name:scale, such as credits:6."),
        (("balance", "ann", "--unit", "credits:99"), "The scale 99 of unit 'credits' is not an int from 0 to 12."),
        (("balance", "ann", "--store", "mysql://db"), "has the scheme 'mysql'. Use one of: memory://, "),
        (("balance", "ann", "--store", "sqlite://"), "The store URL 'sqlite://' names no file."),
        (("balance", "ann", "--store", "memory://"), "The memory store keeps nothing between commands."),
        (("check", "--store", "memory://"), "Name a durable one."),
        ((*GRANT, "--store", "sqlite:////no/such/folder/m.db"), "The folder '/no/such/folder'"),
        (("export", "/no/such/folder/b.jsonl", "--store", "memory://"), "Name a durable one."),
        (("import", "/no/such/folder/b.jsonl"), "'/no/such/folder/b.jsonl' cannot be read: No such file or directory."),
        (("holds", "--store", "sqlite:////no/such/folder/m.db"), "There is no database '/no/such/folder/m.db'."),
    ],
)
@pytest.mark.usefixtures("store")
def test_tell_a_mistake(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    """A mistake is told in one line with its mend, on the error stream, and ends with 2."""
    code, output, errors = run(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("asgi-metering: ")
    assert sentence in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "command", [("balance", "ann"), ("statement", "ann"), ("holds",), ("check",), ("export", "books.jsonl")]
)
def test_tell_that_there_is_no_database(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Commands that only read make no file of a mistyped name, absolute or relative, encoded or not."""
    monkeypatch.chdir(tmp_path)
    for url, name in (
        (f"sqlite:///{tmp_path}/meterin.db", f"{tmp_path}/meterin.db"),
        ("sqlite:///my%20m.db", "my m.db"),
    ):
        sentence = f"There is no database '{name}'. Look at its spelling; the first grant or the application makes one."
        for more in ((), ("--json",)):
            assert run(*command, *more, "--store", url) == (2, "", f"asgi-metering: {sentence}\n")
    assert list(tmp_path.iterdir()) == []
    assert run(*GRANT, "--store", "sqlite:///my%20m.db")[0] == 0
    assert run(*command, "--store", "sqlite:///my%20m.db")[0] == 0


def test_tell_that_a_file_is_something_else(run: Run, tmp_path: Path) -> None:
    """A file of another kind is named, and not one byte of it is changed."""
    notes = tmp_path / "notes.txt"
    notes.write_text("Nobody shall write here. " * 100)
    code, output, errors = run("statement", "ann", "--store", f"sqlite:///{notes}")
    assert (code, output) == (2, "")
    assert f"'{notes}' is not a SQLite database." in errors
    assert notes.read_text() == "Nobody shall write here. " * 100
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("store")
def test_tell_a_grant_that_conflicts(run: Run) -> None:
    """The same id with another amount names both amounts and changes nothing."""
    run(*GRANT)
    code, output, errors = run("grant", "ann", "13", "--id", "payment-1")
    assert (code, output) == (2, "")
    assert "'payment-1' exists with amount=12500000, and came again with amount=13000000." in errors
    assert rows(run("balance", "ann", "--json"))[0]["granted"] == "12.5"


@pytest.mark.parametrize(
    "command", [("balance", "ann"), ("check",), ("grant", "ann", "1", "--id", "x"), ("import", "b")]
)
def test_tell_that_no_store_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    """Without --store and without the environment nothing is guessed."""
    monkeypatch.delenv("ASGI_METERING_STORE", raising=False)
    code, output, errors = run(*command)
    assert (code, output) == (2, "")
    assert errors == (
        "asgi-metering: No store is named. Pass --store sqlite:///metering.db, or set ASGI_METERING_STORE.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("pay",), "invalid choice: 'pay'"),
        (("balance",), "the following arguments are required: payer"),
        (("grant", "ann", "1"), "the following arguments are required: --id"),
        (("grant", "ann", "1", "--id", "x", "--priority", "high"), "invalid int value: 'high'"),
        (
            ("grant", "ann", "1", "--id", "x", "--expires", "2030-01-01"),
            "'2030-01-01' has no zone. Write 2027-01-01T00:00:00+00:00, say.",
        ),
        (
            ("grant", "ann", "1", "--id", "x", "--expires", "tomorrow"),
            "argument --expires: 'tomorrow' is not a date and time. Write 2027-01-01T00:00:00+00:00, say.",
        ),
        (("demo", "--port", "http"), "argument --port: 'http' is not a port. Use a number up to 65535; 0 takes a free"),
        (("demo", "--port", "70000"), "argument --port: '70000' is not a port."),
    ],
)
@pytest.mark.usefixtures("store")
def test_tell_how_to_use_a_command(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    """What is no command, or lacks a part, is told with the usage, and ends with 2."""
    code, output, errors = run(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("usage: asgi-metering")
    assert sentence in errors


COMMANDS = ("demo", "routes", "grant", "balance", "statement", "holds", "check", "journal", "export", "import")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_says_how_commands_end(run: Run, command: str | None) -> None:
    """The help of every command lists the exit codes, and that of all but the demo has --json (DESIGN 8)."""
    code, output, errors = run(*filter(None, (command, "--help")))
    assert (code, errors) == (0, "")
    assert re.findall(r"^  (\d+) +\S", output.partition("exit codes:")[2], re.MULTILINE) == [
        "0",
        "1",
        "2",
        "130",
        "141",
    ]
    if command not in (None, "demo"):
        assert "--json" in output
    assert "_moment" not in output


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_end_quietly_when_the_reader_leaves(
    run: Run, store: str, monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    """Output into a pipe that nobody reads ends the command with 141, and without a traceback, buffered or not."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    run(*GRANT)
    command = Path(sys.executable).parent / "asgi-metering"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [command, "statement", "ann"], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_tell_that_the_port_is_taken(run: Run) -> None:
    """A port that somebody else has is named, with the way out."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, errors = run("demo", "--port", str(port))
    assert code == 2
    assert errors == (
        f"asgi-metering: Port {port} cannot be used: Address already in use. Choose another, or 0 for a free one.\n"
    )


def test_tell_what_the_demo_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its server the demo names the extra to install."""
    for module in ("run", "servers"):
        monkeypatch.delitem(sys.modules, f"asgi_metering.demo.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, output, errors = run("demo")
    assert (code, output) == (2, "")
    assert "The demo" in errors
    assert "asgi-metering[demo]" in errors


def test_run_as_a_command(tmp_path: Path) -> None:
    """The installed command exits with what `main` returns, and a mistake shows no traceback."""
    command = Path(sys.executable).parent / "asgi-metering"
    good, bad = (
        subprocess.run([command, *GRANT, "--store", url], capture_output=True, text=True, timeout=60, check=False)
        for url in (f"sqlite:///{tmp_path}/metering.db", "mysql://secret:password@db")
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[0].split() == ["id", "granted", "applied", "available"]
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("asgi-metering: The store URL 'mysql://***@db'")
    assert "password" not in bad.stderr
    assert "Traceback" not in bad.stderr
