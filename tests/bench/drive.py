"""
How subjects are timed: in one process, one after another within each round, in random order.

What counts is the CPU time of the process, so that what else runs on the machine does not. Machines are noisy and drift
still, so a figure is never taken alone: each round times every subject back to back with its base, and only differences
and ratios inside a round are kept. Medians and quartiles are over rounds.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

Work = Callable[[int], Awaitable[None]]
"""Runs so many requests."""


@dataclass
class Subject:
    """One thing to time, and what it is compared with."""

    name: str
    work: Work
    base: str | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """Microseconds of CPU per request, or per part of one, over the base: first quartile, median, third quartile."""

    name: str
    low: float
    median: float
    high: float
    absolute: float
    has_base: bool


async def measure(subjects: list[Subject], *, rounds: int, requests: int, parts: int = 1) -> list[Row]:
    """Time *subjects* interleaved; differences to each one's base, within rounds, for one of a request's *parts*."""
    count = requests * parts
    for subject in subjects:
        await subject.work(max(1, requests // 5))
    for _ in range(rounds):
        for subject in random.sample(subjects, len(subjects)):
            subject.seconds.append(await _time(subject.work, requests))
    by_name = {subject.name: subject for subject in subjects}
    rows = []
    for subject in subjects:
        base = by_name[subject.base].seconds if subject.base else [0.0] * rounds
        added = [1e6 * (mine - other) / count for mine, other in zip(subject.seconds, base, strict=True)]
        low, median, high = statistics.quantiles(added, n=4)
        absolute = 1e6 * statistics.median(subject.seconds) / count
        rows.append(Row(subject.name, low, median, high, absolute, subject.base is not None))
    return rows


async def _time(work: Work, requests: int) -> float:
    await asyncio.sleep(0)
    gc.collect()
    gc.disable()
    try:
        begun = time.process_time()
        await work(requests)
        return time.process_time() - begun
    finally:
        gc.enable()


def ratios(subjects: list[Subject], over: str, base: str) -> dict[str, tuple[float, float, float]]:
    """For each subject: what it adds to *base*, over what *over* adds, within rounds: quartiles of the ratio."""
    by_name = {subject.name: subject.seconds for subject in subjects}
    found = {}
    for subject in subjects:
        if subject.name in (over, base):
            continue
        pairs = zip(subject.seconds, by_name[over], by_name[base], strict=True)
        values = [(mine - bare) / (theirs - bare) for mine, theirs, bare in pairs if theirs > bare]
        if len(values) >= 2:
            low, median, high = statistics.quantiles(values, n=4)
            found[subject.name] = (low, median, high)
    return found


def shares(subjects: list[Subject], over: str) -> dict[str, tuple[float, float, float]]:
    """For each other subject: its whole time over that of *over*, within rounds: quartiles of the ratio."""
    theirs = next(subject.seconds for subject in subjects if subject.name == over)
    found = {}
    for subject in subjects:
        values = [mine / other for mine, other in zip(subject.seconds, theirs, strict=True) if other > 0]
        if subject.name != over and len(values) >= 2:
            low, median, high = statistics.quantiles(values, n=4)
            found[subject.name] = (low, median, high)
    return found


def spread(values: list[float]) -> str:
    """Median and quartiles in whole numbers; of one value the value alone."""
    if len(values) == 1:
        return f"{values[0]:.0f}"
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.0f} [{low:.0f} {high:.0f}]"


def table(title: str, rows: list[Row], ratio: dict[str, tuple[float, float, float]], over: str, unit: str) -> str:
    """The rows as Markdown."""
    lines = [f"### {title}", "", f"| subject | {unit} | {unit} over its base | over {over} |", "|---|---:|---:|---:|"]
    for row in rows:
        shown = ratio.get(row.name)
        by = "" if shown is None else f"{shown[1]:.2f} [{shown[0]:.2f} {shown[2]:.2f}]"
        added = f"{row.median:+.2f} [{row.low:+.2f} {row.high:+.2f}]" if row.has_base else ""
        lines.append(f"| {row.name} | {row.absolute:.2f} | {added} | {by} |")
    return "\n".join(lines) + "\n"
