"""routes: the audit of an application."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest

from asgi_metering import Metering, TokenUsage
from asgi_metering.prices import per_token
from tests.cli.commands import Run, rows

MAIN = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from asgi_metering import Allowance, Metering, MeteringMiddleware, Unit, Wallet, billable, rate_limited, up_to
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
app.add_middleware(MeteringMiddleware, metering=Metering())
wrong = Starlette(routes=[Route("/plain", plain)])
bare = Starlette(routes=[Route("/health", health), Route("/search", search)])
around = MeteringMiddleware(bare, Metering())
text = Starlette(routes=[Route("/search", search)])
text.add_middleware(MeteringMiddleware, "memory://")
none = Starlette(routes=[Route("/search", search)])
none.add_middleware(MeteringMiddleware)
charge = Starlette(routes=[Route("/health", health)])
charge.add_middleware(MeteringMiddleware, metering=Metering(), default_limits=[billable(1)])
"""


TRYING = """
from starlette.applications import Starlette
from starlette.routing import Route
from asgi_metering import Metering, MeteringMiddleware, billable, rate_limited, requires_upstream

@requires_upstream("openai", label="eu", model=["gpt-5.5", "gpt-5.5-mini"])
@requires_upstream("acme", label=lambda request: "x", shadow=True)
@rate_limited("9/minute", concurrency=2)
@rate_limited("5/minute", shadow=True, scope="s", global_concurrency=3)
@billable(2, shadow=True)
async def tried(request): ...

app = MeteringMiddleware(Starlette(routes=[Route("/tried", tried, methods=["POST"])]), Metering())
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
        ["/chat", "GET,HEAD", "chat", "output 1 per token"],
        ["/health", "GET,HEAD"],
    ]
    reach, told = output.splitlines()[4:]
    assert reach.startswith(f"! /chat ({audited}.chat) is billable, and answers HEAD")
    assert told == f"! {audited}.plain is decorated, but no route reaches it."


def test_routes_mark_what_only_tells(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices, limits, slots and providers in the shadow say so; providers are shown where one is required (S4.16)."""
    name = f"trying_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(TRYING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, output, _ = run("routes", f"{name}:app")
    head, tried = (re.split(r" {2,}", line) for line in output.splitlines())
    assert (code, head[-2:]) == (0, ["concurrency", "upstream"])
    assert tried[2:] == [
        "tried",
        "2 (shadow)",
        "9/minute, 5/minute (shadow)",
        "2, 3 of everybody (shadow)",
        "openai/eu@gpt-5.5+gpt-5.5-mini, acme/<lambda>() (shadow)",
    ]


def test_routes_tell_what_calls_used_of_their_holds(run: Run, audited: str, store: str) -> None:
    """With the store named, each measured route says by how much it holds too much, out of its latest calls."""
    assert run("routes", f"{audited}:app", "--store", "sqlite:///nowhere.db")[0] == 2

    async def calls() -> None:
        async with Metering(store, sinks=()) as metering:
            await metering.grant("ann", 100, id="g")
            for used in range(20):
                async with metering.charge(payer="ann", line="chat", price=per_token(output=1), hold=4) as call:
                    call.record(TokenUsage(output=1 + used // 19))

    assert (
        "! Nothing is told of the holds of /chat: no call of 'chat' in that store was charged by what it used.\n"
        in (run("routes", f"{audited}:app", "--store", _granted(run, store))[1])
    )
    asyncio.run(calls())
    code, output, _ = run("routes", f"{audited}:app", "--store", store)
    told = "holds are 3.81 x what is used, by 20 calls: p50 uses 0.25 of its hold, p95 0.25; suggestion: hold 0.28 x"
    assert code == 0
    assert [line for line in output.splitlines() if "holds are" in line] == [f"/chat  GET,HEAD: {told} as much"]
    found = json.loads(run("routes", f"{audited}:app", "--json", "--store", store)[1])["routes"]
    assert [(row["hold_use"]["calls"], row["hold_use"]["suggestion"]) for row in found if "hold_use" in row] == [
        (20, "0.28")
    ]


def _granted(run: Run, store: str) -> str:
    """A store in which nobody has called yet."""
    run("grant", "bob", "1", "--id", "g", "--store", store)
    return store


SOCKETS = """
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from asgi_metering import Metering, MeteringMiddleware, billable, rate_limited, slices

def tariff(websocket): ...

@rate_limited("9/minute", per="message")
@rate_limited(concurrency=2)
@billable("0.5", per="message", hold=slices(3))
async def talk(websocket): ...

@billable(tariff, per="second")
async def voice(websocket): ...

app = Starlette(routes=[WebSocketRoute("/talk", talk), WebSocketRoute("/voice", voice)])
app.add_middleware(MeteringMiddleware, Metering())
"""


def test_routes_of_websockets(run: Run, audited: str, tmp_path: Path) -> None:
    """A WebSocket is shown with what it is charged and limited for, and with the defaults of sessions."""
    (tmp_path / f"{audited}_sockets.py").write_text(SOCKETS)
    code, output, errors = run("routes", f"{audited}_sockets:app", "--verbose")
    assert (code, errors) == (0, "")
    assert [re.split(r" {2,}", line) for line in output.splitlines()[1:3]] == [
        ["/talk", "WEBSOCKET", "talk", "0.5 per message", "9/minute per message", "2"],
        ["/voice", "WEBSOCKET", "voice", "tariff() per second"],
    ]
    assert "  hold: 3 at first, the price at least, and more while it is open\n" in output
    assert "  hold: a slice at first, the price at least, and more while it is open\n" in output
    assert output.count("  error after the first byte, or call.fail(): observed\n") == 2


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
from asgi_metering import Idempotency, Metering, MeteringMiddleware, billable

def owner(request): ...

@billable(1, callers={"bot", "agent"}, idempotency=True, charge_key="X-Session", charge_per="week",
          charge_zone="Europe/Berlin")
async def once(request): ...

@billable(1, idempotency=Idempotency(3_600, 10, True, owner), charge_key=owner, charge_per=90)
async def twice(request): ...

keyed = Starlette(routes=[Route("/once", once), Route("/twice", twice, methods=["POST"])])
keyed.add_middleware(MeteringMiddleware, metering=Metering())
"""


def test_routes_with_their_keys(run: Run, audited: str, tmp_path: Path) -> None:
    """What runs once, what is charged once, and whom, is shown with all that was chosen for it (S2.28)."""
    (tmp_path / f"{audited}.py").write_text(KEYED)
    code, output, _ = run("routes", f"{audited}:keyed", "--verbose")
    assert code == 0
    once, twice = output.split("\n\n")[1:]
    assert once.splitlines()[4:7] == [
        "  callers: agent, bot",
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


def test_routes_that_are_decorated_in_vain(run: Run, audited: str) -> None:
    """A route that runs ungated is named with its mend, and the exit code is 1."""
    code, output, _ = run("routes", f"{audited}:wrong")
    assert code == 1
    assert f"! /plain runs {audited}.plain ungated: its metering decorators stand above the route's own." in output


@pytest.mark.parametrize(
    ("attribute", "sentence"),
    [
        ("bare", "Nothing gates /search ({name}.search): no middleware of ours is on the application or around it."),
        ("text", "The MeteringMiddleware has metering='memory://', which is no Metering. Make one, "),
        ("none", "The MeteringMiddleware has no metering=. Make one, "),
    ],
)
def test_routes_that_nothing_gates(run: Run, audited: str, attribute: str, sentence: str) -> None:
    """An application whose routes are decorated, and whose middleware is missing or cannot work, is a mistake."""
    code, output, _ = run("routes", f"{audited}:{attribute}")
    assert code == 1
    assert f"! {sentence.format(name=audited)}" in output
    assert run("routes", f"{audited}:around")[0] == 0


def test_routes_of_limits_that_are_none(run: Run, audited: str) -> None:
    """What a middleware was given for its limits is told as its startup tells it."""
    code, output, errors = run("routes", f"{audited}:charge")
    assert (code, output) == (2, "")
    assert errors.endswith("which is no limit. Write rate_limited('100/minute'), say.\n")


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
