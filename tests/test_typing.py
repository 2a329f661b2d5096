"""What `mypy --strict` says of a user's code: nothing of right uses, and something of each wrong one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.uncounted

RIGHT = """\
from __future__ import annotations

from decimal import Decimal

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_metering import (
    CREDITS, Allowance, Call, Caller, Metering, MeteringMiddleware, TokenUsage, Unit, Wallet, billable, current_call,
    metered_app, rate_limited, up_to,
)
from asgi_metering.asgi.answers import AnswerOptions
from asgi_metering.asgi.fields import HeaderNames
from asgi_metering.prices import per_million_tokens


async def identify(connection: HTTPConnection) -> Caller | None:
    key = connection.headers.get("x-api-key")
    return Caller(key, payer="org", plan="free", attributes={"team": 3}) if key else None


def price_of(q: str) -> Decimal:
    return Decimal(len(q))


async def raw(scope: Scope, receive: Receive, send: Send) -> None: ...


PRICE = per_million_tokens(input=3, output=Decimal("1.5"))
metering = Metering("memory://", identify=identify, unit=CREDITS, on_store_down={"credits": "deny"})
plain = Metering(identify=lambda connection: Caller(connection.headers["x"]))


@rate_limited("60/minute", concurrency=4, key="payer", strategy="sliding")
@billable(2, on_disconnect="none", on_missing_usage="hold", errors="openai")
async def search(q: str) -> dict[str, int]:
    call: Call = current_call()
    await call.admit(billable(1), 2)
    return {"cap": call.affordable("output")}


@billable(price_of, sources=[Allowance({"free": 20}, per="month", status=402), Wallet()], unit=Unit("messages", 0))
def message(q: str) -> dict[str, int]:
    return {}


@billable(PRICE, hold=up_to(TokenUsage(input=1), at_least="0.01"), on_abort="hold")
async def stream(q: str) -> None: ...


inner: ASGIApp = metered_app(raw, billable(2), rate_limited("5/minute"), 3)
outer: ASGIApp = MeteringMiddleware(
    inner, metering, unenforced="allow", answers=AnswerOptions(names=HeaderNames.with_legacy())
)


async def main() -> int:
    async with metering.charge(payer="org", line="l", hold="0.2", on_error="hold", ttl_s=5) as call:
        call.record(TokenUsage(input=1))
    found: dict[str, int] = await search("x")
    return (await metering.grant("org", 1, id="x", kind="promotional")).amount + found["cap"]
"""
"""Uses of everything that is annotated, none of which is a mistake."""

WRONG = (
    "billable(1.5)",
    "billable(None)",
    'billable(1, on_disconnect="drown")',
    'billable(1, on_missing_usage="usage")',
    'billable(1, on_error="free")',
    'billable(1, on_late_error="usage")',
    'billable(1, on_early_disconnect="usage")',
    'billable(1, on_cut="none")',
    'billable(1, on_abort="usage")',
    'billable(1, on_eror="none")',
    'billable(1, errors="x")',
    'billable(1, unit="credits")',
    "billable(1, sources=Wallet())",
    "billable(PRICE, hold=1.5)",
    'up_to(1.5, at_least="1")',
    "up_to(1, at_least=0.5)",
    "rate_limited(60)",
    'rate_limited("60/minute", strategy="rolling")',
    'rate_limited("60/minute", key=7)',
    'rate_limited("60/minute", zone=None)',
    "Metering(3)",
    'Metering(identify=lambda connection: "ann")',
    "Metering(identify=lambda connection: Caller(connection.no_such))",
    'Metering(on_store_down={"credits": "x"})',
    'Metering(unit="credits")',
    'Metering(sinks=["x"])',
    'Allowance({"free": 1}, per="year")',
    "Allowance(1, status=403)",
    'Caller("ann", plan=["free"])',
    'Caller("ann", attributes=[1])',
    'current_call().affordable("tokens")',
    "current_call().admit(rate_limited)",
    "metered_app(raw, 1.5)",
    "metered_app(raw, identify)(1)",
    'MeteringMiddleware(raw, metering, unenforced="yes")',
    'MeteringMiddleware(raw, metering, answers="legacy")',
    'AnswerOptions(names="x")',
    'metering.charge(payer="a", line="b", price=1.5)',
    'metering.charge(payer="a", line="b", hold=1, on_foo=3)',
    'metering.charge(payer="a", line="b", hold=1, on_error="free")',
    'metering.charge(payer="a", line="b", hold=1, caller="bob")',
    'metering.grant("a", 1.5, id="x")',
    'metering.grant("a", 1, id="x", unit="credits")',
)
"""Lines of which each is a mistake."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What mypy tells, by line of the one file that it reads."""
    file = tmp_path_factory.mktemp("typed") / "usage.py"
    file.write_text(RIGHT + "\n".join(["", *WRONG]) + "\n" + "# mypy: disable-error-code=unused-coroutine\n")
    # With the options of the check of the package itself, whose cache knows all but one file then.
    options = ["--no-error-summary"]
    root = Path(__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--cache-dir", str(root / ".mypy_cache"), str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    lines = re.findall(r"usage\.py:(\d+): error: (.*)", ended.stdout)
    return {int(number): sentence for number, sentence in lines}


FIRST_WRONG = RIGHT.count("\n") + 2


def test_pass_right_uses(told: dict[int, str]) -> None:
    """DESIGN 2: what is written as the documentation has it passes the strictest check."""
    assert {number: sentence for number, sentence in told.items() if number < FIRST_WRONG} == {}


def test_tell_each_wrong_use(told: dict[int, str]) -> None:
    """DESIGN 2: wrong types and words are seen in the editor already, before anything is imported."""
    assert [line for at, line in enumerate(WRONG) if FIRST_WRONG + at not in told] == []
