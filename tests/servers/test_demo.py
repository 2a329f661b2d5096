"""The demo as people start it, and what it says when a step does not do what it says."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from asgi_metering import (
    CreditGateMiddleware,
    Metering,
    RateLimitMiddleware,
    UsageEventsMiddleware,
    Wallet,
    billable,
    up_to,
)
from asgi_metering.cli import main
from asgi_metering.demo import gateway, run
from asgi_metering.demo.story import STEPS
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.testing import Provider

COMMAND = str(Path(sys.executable).parent / "asgi-metering")

INTERRUPTIBLE = """
import signal, sys
from asgi_metering.cli import main
# A shell that starts the tests in the background has them ignore Ctrl-C, and so their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The demo, and the demo that stays, side by side; neither outlives the tests."""
    folder = tmp_path_factory.mktemp("demo")
    commands = {"demo": [COMMAND, "demo"], "serve": [sys.executable, "-c", INTERRUPTIBLE, "demo", "--serve"]}
    running = {
        name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
        for name, command in commands.items()
    }
    try:
        yield running
    finally:
        for process in running.values():
            with process:
                process.kill()


def titles(output: str) -> list[str]:
    """The steps that were played, in order."""
    return re.findall(r"^ ?\d+\. (.+)$", output, re.MULTILINE)


def test_play_every_step(started: dict[str, subprocess.Popen[str]]) -> None:
    """The demo exits with 0, has played and printed every step, and says nothing on the side."""
    output, errors = started["demo"].communicate(timeout=60)
    assert (started["demo"].returncode, errors) == (0, "")
    assert titles(output) == [title for title, _ in STEPS]
    assert f"{len(STEPS)} of {len(STEPS)} steps did what they say." in output
    assert "FAILED" not in output


def test_stay_until_interrupted(started: dict[str, subprocess.Popen[str]]) -> None:
    """With --serve the gateway answers what its curl lines ask, and Ctrl-C ends it with 130 and without a word."""
    process = started["serve"]
    assert process.stdout is not None
    output = ""
    while "key-nobody" not in output:
        line = process.stdout.readline()
        assert line, f"The demo ended: {output}"
        output += line
    url = re.findall(r"^A gateway at (\S+),", output, re.MULTILINE)[0]
    assert output.count(f"curl -N {url}/v1/") + output.count(f"curl -i {url}/v1/") == 3
    with httpx2.Client(base_url=url, timeout=20) as client:
        ask = {"model": "claude-echo", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
        answers = [
            client.post("/v1/messages", json=ask, headers={"x-api-key": "key-bob"}),
            client.post("/v1/chat/completions", json={}, headers={"authorization": "Bearer key-nobody"}),
        ]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert [answer.status_code for answer in answers] == [200, 401]
    assert (process.returncode, errors) == (130, "")


class Silent(Provider):
    """A provider that does not say what it still allows."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def without_quotas(message: Any) -> None:
            fields = [field for field in message.get("headers", ()) if b"ratelimit" not in field[0]]
            await send({**message, "headers": fields} if "headers" in message else message)

        await super().__call__(scope, receive, without_quotas)


class Forgetful(Metering):
    """Does not know a payment again."""

    async def grant(self, payer: str, amount: Any, *, id: str, **options: Any) -> Any:  # noqa: A002
        return await super().grant(payer, amount, id=uuid4().hex, **options)


class Doubtful(Metering):
    """Finds something wrong with its books."""

    async def check(self) -> list[str]:
        return [*await super().check(), "One unit is missing."]


def transparent(app: Any, metering: Metering) -> Any:
    """Every layer but the one that takes a provider's quotas out of the answer."""
    return RateLimitMiddleware(CreditGateMiddleware(UsageEventsMiddleware(app, metering), metering), metering)


def generous(*arguments: Any, **options: Any) -> Any:
    """Sells on credit."""
    return billable(*arguments, **options, sources=[Wallet(overdraft=1_000)])


def stern(*arguments: Any, **options: Any) -> Any:
    """Charges the whole hold of whoever leaves, and holds little."""
    return billable(*arguments, **{**options, "hold": up_to(1, at_least="0.01"), "on_disconnect": "hold"})


def unlimited(*_: Any) -> Any:
    """Limits nothing."""
    return lambda endpoint: endpoint


def twice(take: Any) -> CallbackSink:
    """Delivers every event two times."""
    return CallbackSink(lambda events: take([*events, *events]), "twice")


BREAKAGES: dict[str, tuple[Any, str, Any, str]] = {
    "402 before the first byte": (gateway, "billable", generous, "The status is 200, not 402."),
    "A payment": (run, "Metering", Forgetful, "The same payment was granted twice."),
    "An OpenAI stream, charged by its tokens": (
        gateway,
        "MeteringMiddleware",
        transparent,
        "The provider's own limits reached the client: ['x-ratelimit-",
    ),
    "429 after six calls a minute": (
        gateway,
        "rate_limited",
        unlimited,
        "The statuses are [200, 200, 200, 200, 200, 200, 200].",
    ),
    "A client that hangs up": (gateway, "billable", stern, "The basis is hold."),
    "What the providers still allow": (run, "Provider", Silent, "No quota of openai was captured."),
    "Usage events": (run, "CallbackSink", twice, "events for 10 calls."),
    "The books": (run, "Metering", Doubtful, "One unit is missing."),
}
"""By the step that then does not do what it says: where which name stands for what else, and what is said."""


@pytest.mark.parametrize("title", BREAKAGES)
def test_fail_when_a_step_fails(
    title: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that does not do what it says is named, the others are played, and the demo exits with 1."""
    module, name, broken, sentence = BREAKAGES[title]
    monkeypatch.setattr(module, name, broken)
    assert main(["demo"]) == 1
    output = capsys.readouterr().out
    assert titles(output) == [title for title, _ in STEPS]
    (failed,) = re.findall(r"^ ?\d+\. (.+)\n.*\n +FAILED: (.+)$", output, re.MULTILINE)
    assert failed[0] == title
    assert sentence in failed[1]
    assert f"{len(STEPS) - 1} of {len(STEPS)} steps did what they say." in output
