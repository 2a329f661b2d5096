"""
What the capture of quotas adds to each answer of a provider, and what a question to the tracker takes.

``python -m tests.bench.quotas``; options: ``--rounds N``, ``--answers N``. Some ten seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asgi_metering.upstream.catalogue import template
from asgi_metering.upstream.readings import QuotaReadings
from asgi_metering.upstream.tracker import QuotaTracker
from asgi_metering.upstream.usage_log import UsageLog
from tests.bench.drive import Subject, Work, measure, table
from tests.quotas import captures, refusals

ROUNDS = 15
ANSWERS = 2_000
"""Of each subject in each round."""

QUESTIONS = 20
"""A question to the tracker stands for so many answers: it looks into a file and a log."""

PLAIN = [
    (name.encode(), value.encode())
    for name, value in {
        "date": "Thu, 21 Aug 2025 12:40:00 GMT",
        "content-type": "application/json",
        "transfer-encoding": "chunked",
        "connection": "keep-alive",
        "server": "cloudflare",
        "vary": "Accept-Encoding",
        "x-request-id": "req_1",
        "cf-cache-status": "DYNAMIC",
        "strict-transport-security": "max-age=31536000",
        "x-content-type-options": "nosniff",
        "cf-ray": "1-FRA",
        "alt-svc": 'h3=":443"; ma=86400',
    }.items()
]
"""What every answer has, and none of it tells a quota."""


def each_answer(headers: list[tuple[bytes, bytes]], status: int = 200, body: bytes | None = None) -> Work:
    """Work that records answers with these *headers*, of calls that began one after another."""
    readings = QuotaReadings()
    started_at = [1_755_780_000.0]

    async def work(count: int) -> None:
        record = readings.record
        for _ in range(count):
            started_at[0] += 0.001
            record("acme", headers, status, started_at[0], body=body)

    return work


def each_question(ask: Callable[[], Any]) -> Work:
    """Work that asks so often, but for `QUESTIONS` answers once."""

    async def work(count: int) -> None:
        for _ in range(max(1, count // QUESTIONS)):
            ask()

    return work


async def nothing(count: int) -> None:
    """A loop alone."""
    for _ in range(count):
        pass


async def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description="Benchmark of quotas")
    options.add_argument("--rounds", type=int, default=ROUNDS, help="at least 2")
    options.add_argument("--answers", type=int, default=ANSWERS, help="of each subject in each round")
    given = options.parse_args()
    print(f"Python {platform.python_version()}; {given.rounds} rounds of {given.answers} answers.\n")
    loop = "a loop"
    subjects = [
        Subject(loop, nothing),
        Subject("12 header fields, no quota", each_answer(PLAIN), loop),
        Subject("and OpenAI's 6 (18 fields)", each_answer(PLAIN + captures.parse_block(captures.OPENAI)[6:12]), loop),
        Subject("and Anthropic's 12", each_answer(PLAIN + captures.parse_block(captures.ANTHROPIC)[:12]), loop),
        Subject(
            "and Anthropic's unified 13", each_answer(PLAIN + captures.parse_block(captures.ANTHROPIC_UNIFIED)), loop
        ),
        Subject("429 of Groq, with its body", each_answer(PLAIN, 429, refusals.GROQ_DAILY), loop),
        Subject("429 of Gemini, with its body", each_answer(PLAIN, 429, refusals.GOOGLE_MINUTE), loop),
    ]
    rows = await measure(subjects, rounds=given.rounds, requests=given.answers)
    print(table("Per answer of a provider: reading and keeping what it says", rows, {}, "nothing", "CPU us"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quotas.json"
        path.write_text(template())
        tracker = QuotaTracker(path, log=UsageLog(Path(folder) / "usage.db"))
        assert tracker.log is not None
        tracker.log.add([])
        names = ("deepseek", "openrouter", "kilocode", "gemini")
        subjects = [
            Subject("statuses() of 11 packages, with a log", each_question(tracker.statuses)),
            Subject("rank() of 4 providers", each_question(lambda: tracker.rank(names))),
            Subject("snapshot()", each_question(tracker.snapshot)),
        ]
        asked = max(1, given.answers // QUESTIONS)
        rows = await measure(subjects, rounds=given.rounds, requests=asked * QUESTIONS, parts=1)
        rows = [type(row)(row.name, row.low, row.median, row.high, row.absolute * QUESTIONS, False) for row in rows]
        print(table("Per question to the tracker", rows, {}, "nothing", "CPU us"))
        tracker.log.close()


if __name__ == "__main__":
    asyncio.run(main())
