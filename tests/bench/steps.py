"""
Count the steps of the interpreter that a request takes: ``python -m tests.bench.steps [--where N] [--of NAME]``.

Bytecode instructions, which no noise of a machine changes: on CPython 3.11 some 20 to 25 ns each where caches are cold,
as behind a server. What C does by itself (a dict, a regular expression, a system call) is not seen.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import asgi_metering
from asgi_metering.events.sinks import CallbackSink
from tests.bench import subjects as s

OURS = str(Path(asgi_metering.__file__).parent)

WARM = 200
"""Requests that fill caches and plans first."""

REQUESTS = 200
"""Enough for several deliveries of events to be among them."""

FULLEST = "asgi_metering, 3 limits, lease, hold, settlement, event"


class Steps:
    """
    Instructions by function, while it counts.

    Attributes:
        by_code: How many each function took.
    """

    def __init__(self) -> None:
        self.by_code: Counter[CodeType] = Counter()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            self.by_code[frame.f_code] += 1
        return self._trace

    async def count(self, work: s.Work, requests: int) -> None:
        """Count what *requests* requests take."""
        await work(WARM)
        sys.settrace(self._trace)
        try:
            await work(requests)
        finally:
            sys.settrace(None)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.by_code.values())

    @property
    def ours(self) -> int:
        """Those of this package's functions."""
        return sum(steps for code, steps in self.by_code.items() if code.co_filename.startswith(OURS))


async def count_all(requests: int = REQUESTS) -> dict[str, Steps]:
    """The steps of each subject."""
    made = await s.metering(sinks=())
    telling = await s.metering(sinks=(CallbackSink(s.forget, "forgotten"),))
    three, few = s.PLENTY, ("1/day",)
    apps: dict[str, Callable[[], Any]] = {
        "bare Starlette": lambda: s.application(s.plain, 1),
        "limits, 3 limits": lambda: s.application(s.limits_called_directly(three), 1),
        "slowapi decorator, 3 limits": lambda: s.slowapi_decorator(three, 1),
        "asgi_metering, unmetered route": lambda: s.ours(made, s.plain, 1),
        "asgi_metering, 3 limits": lambda: s.ours(made, s.limited_by_us(three), 1),
        FULLEST: lambda: s.ours(telling, s.paid_by_us(three), 1),
        "asgi_metering, refused by a limit": lambda: s.ours(made, s.limited_by_us(few), 1),
    }
    counted = {}
    for name, app in apps.items():
        counted[name] = Steps()
        await counted[name].count(s.requests_to(app(), "/hit"), requests)
    await made.stop()
    await telling.stop()
    return counted


def table(counted: dict[str, Steps], requests: int) -> str:
    """One row for each subject."""
    bare = counted["bare Starlette"].total
    limits = counted["limits, 3 limits"].total - bare
    lines = [
        "| | steps | added to bare | over limits with 3 limits | in our functions |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, steps in counted.items():
        added = steps.total - bare
        figures = (f"{steps.total / requests:.0f}", f"{added / requests:.0f}", f"{added / limits:.2f}")
        lines.append(f"| {name} | {' | '.join(figures)} | {steps.ours / requests:.0f} |")
    return "\n".join(lines) + "\n"


def where(steps: Steps, requests: int, most: int) -> str:
    """The functions that take most of them; those of others by the last two parts of their paths."""
    return "\n".join(
        f"{count / requests:7.1f}  {_place(code)}  {code.co_qualname}"
        for code, count in steps.by_code.most_common(most)
    )


def _place(code: CodeType) -> str:
    path = Path(code.co_filename)
    return str(path.relative_to(OURS)) if path.is_relative_to(OURS) else "/".join(("...", *path.parts[-2:]))


def _chosen(counted: dict[str, Steps], part: str) -> str:
    """The subject whose name has *part* in it: the first, if several have."""
    for name in counted:
        if part in name:
            return name
    raise SystemExit(f"No subject has {part!r} in its name. There are: {'; '.join(counted)}.")


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and on demand where the steps of one subject are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--where", type=int, default=0, metavar="N", help="the N functions that take most")
    parser.add_argument("--of", default=FULLEST, metavar="NAME", help="of which subject: a part of its name")
    chosen = parser.parse_args(arguments)
    counted = asyncio.run(count_all(chosen.requests))
    print(table(counted, chosen.requests))
    if chosen.where:
        name = _chosen(counted, chosen.of)
        print(f"Of {name!r}:\n{where(counted[name], chosen.requests, chosen.where)}")


if __name__ == "__main__":
    main()
