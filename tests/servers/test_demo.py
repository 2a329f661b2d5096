"""The demo as people start it, and what it says when a step does not do what it says."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from asgi_metering.cli import main
from asgi_metering.demo import run
from asgi_metering.demo.story import STEPS
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


def test_fail_when_a_step_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that does not do what it says is named, the others are played, and the demo exits with 1."""
    monkeypatch.setattr(run, "Provider", Silent)
    assert main(["demo"]) == 1
    output = capsys.readouterr().out
    assert titles(output) == [title for title, _ in STEPS]
    assert output.count("FAILED") == 1
    assert "FAILED: No quota of openai was captured." in output
    assert f"{len(STEPS) - 1} of {len(STEPS)} steps did what they say." in output
