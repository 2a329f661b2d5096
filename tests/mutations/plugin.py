"""
The pytest plugin of a mutated run: changes one module's source text, and writes down what failed.

Loaded by ``-p tests.mutations.plugin`` before any conftest. A module that is imported already gets its functions
changed; where that is not enough, everything of ours is imported anew, the change in its way. Knows one change, out of
the environment, and nothing of what it is for.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from tests.mutations.swapping import swapped

__all__ = ["CHANGE", "REPORT", "install"]

CHANGE = "MUTATION_CHANGE"
"""JSON of ``module``, ``old`` and ``new``; absent: nothing is changed."""

REPORT = "MUTATION_REPORT"
"""The file that the outcome of each test is written to, as JSON."""

TICK_S = 0.05
"""Between two looks at a test that runs. Looks that a busy machine has no time for are not made up for."""

PATIENCE = 50
"""
Looks at a mutated test until it is given up: many a mutation shows by waiting for ever, and no test that is named takes
a tenth of them. They count the times that this process had its turn, so that a machine that stalls takes none of them.
"""

MORE_PATIENCE = 200
"""And at a test of the code as it is, which must pass."""

AGAIN = 20
"""Looks from giving up to giving up again: a task that is interrupted keeps what was raised to itself, and waits on."""


OURS = ("asgi_metering", "tests")
"""Packages that a change may show in: theirs is what is imported anew."""

KEPT = "tests.mutations."
"""But not what runs already."""


class MutantLoader(importlib.machinery.SourceFileLoader):
    """Loads one module with its text changed, past every cache of bytecode."""

    def __init__(self, name: str, path: str, old: str, new: str) -> None:
        super().__init__(name, path)
        self.old = old
        self.new = new
        self.applied = False

    def get_code(self, fullname: str) -> CodeType:
        _, changed = texts(fullname, Path(self.path), self.old, self.new)
        self.applied = True
        return compile(changed, self.path, "exec", dont_inherit=True)


class MutantFinder:
    """Hands one module to its loader, and leaves all others alone."""

    def __init__(self, module: str, old: str, new: str) -> None:
        self.module = module
        spec = importlib.machinery.PathFinder.find_spec
        self._find = spec
        self._old, self._new = old, new
        self.loader: MutantLoader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        spec = self._find(fullname, path, target)
        if spec is None or spec.origin is None:
            raise pytest.UsageError(f"There is no module {fullname!r} to change.")
        self.loader = MutantLoader(fullname, spec.origin, self._old, self._new)
        spec.loader = self.loader
        return spec


def texts(module: str, path: Path, old: str, new: str) -> tuple[str, str]:
    """The source of a module, as it is and changed. Raises `pytest.UsageError` unless *old* is there once."""
    source = path.read_text(encoding="utf-8")
    found = source.count(old)
    if found != 1:
        raise pytest.UsageError(f"The snippet occurs {found} times in {module}, not once: {old!r}")
    return source, source.replace(old, new)


def install(change: dict[str, str]) -> MutantFinder | None:
    """Make the change where its module is imported already; else put it in the way of that. None: it is made."""
    name, old, new = change["module"], change["old"], change["new"]
    module = sys.modules.get(name)
    if module is not None:
        if swapped(module, *texts(name, Path(str(module.__file__)), old, new)):
            return None
        for imported in list(sys.modules):
            if imported.partition(".")[0] in OURS and not f"{imported}.".startswith(KEPT):
                del sys.modules[imported]
    finder = MutantFinder(name, old, new)
    sys.meta_path.insert(0, finder)
    return finder


_finder = install(json.loads(os.environ[CHANGE])) if CHANGE in os.environ else None
_outcomes: dict[str, dict[str, Any]] = {}
_failed_to_collect: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Fail a test that takes too long, however it is held up."""
    looks = 0
    patience = PATIENCE if CHANGE in os.environ else MORE_PATIENCE

    def look(_number: int, _frame: object) -> None:
        nonlocal looks
        looks += 1
        if looks >= patience and (looks - patience) % AGAIN == 0:
            pytest.fail(f"Not done after {looks} looks, {TICK_S} s apart.")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Keep of each test the first phase that was not passed, and what was raised in it."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        raised = None if call.excinfo is None else call.excinfo.typename
        kept = _outcomes.setdefault(item.nodeid, {"outcome": report.outcome, "when": report.when, "raised": raised})
        if kept["outcome"] == "passed" != report.outcome:
            kept.update(outcome=report.outcome, when=report.when, raised=raised)
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keep what could not even be collected."""
    if report.failed:
        _failed_to_collect.append(f"{report.nodeid}: {report.longreprtext[-500:]}")


def pytest_sessionfinish() -> None:
    """Write down what happened, and whether the change was there at all."""
    report = {
        "applied": _finder is None or (_finder.loader is not None and _finder.loader.applied),
        "collection": _failed_to_collect,
        "tests": _outcomes,
    }
    Path(os.environ[REPORT]).write_text(json.dumps(report), encoding="utf-8")
