"""
Running mutations: asks the server for mutated runs, a few at once, and judges what they wrote down.

Knows what a red test is: one whose body failed, for a reason that is not the mutation's own clumsiness.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.mutations.entries import Mutation

__all__ = ["MAX_AT_ONCE", "Run", "Runs"]

ROOT = Path(__file__).parents[2]

MAX_AT_ONCE = 2
"""Runs at once: as many as the smallest machine of a CI has cores."""

RUN_TIMEOUT_S = 100.0
"""Bound of one run, startup of the server included: below the bound of the test that waits for it."""

CLUMSY = frozenset({"NameError", "UnboundLocalError", "SyntaxError", "IndentationError", "ImportError"})
"""What a mutation raises that is not one: its text does not fit where it was put."""


@dataclass(frozen=True)
class Run:
    """
    What one run wrote down.

    Attributes:
        applied: Whether the change was in the code that ran.
        collection: What could not be collected.
        tests: By node id: ``outcome``, ``when`` and what was ``raised``.
        output: Of pytest.
    """

    applied: bool
    collection: list[str]
    tests: dict[str, dict[str, Any]]
    output: str

    @property
    def is_green(self) -> bool:
        """All tests ran and passed."""
        return bool(self.tests) and not self.collection and not self._without("passed")

    def why_not_red(self) -> str:
        """Why this run does not show that every test notices the change; empty if it does."""
        if self.collection or not self.tests or not self.applied:
            return f"It did not run as it should:\n{self.output[-3000:]}"
        unnoticed = self._without("failed")
        if unnoticed:
            return f"Not noticed by {', '.join(unnoticed)}."
        elsewhere = [name for name, test in self.tests.items() if test["when"] != "call" or test["raised"] in CLUMSY]
        return f"Failed for another reason: {elsewhere}\n{self.output[-3000:]}" if elsewhere else ""

    def _without(self, outcome: str) -> list[str]:
        return [name for name, test in self.tests.items() if test["outcome"] != outcome]


@dataclass
class Runs:
    """
    A server of mutated runs, as a context manager.

    A run may be begun before it is asked for, so that the next one runs while a test looks at the last.
    """

    _directory: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)
    _server: subprocess.Popen[bytes] | None = None
    _begun: set[str] = field(default_factory=set)
    _ended: set[str] = field(default_factory=set)
    _unread: bytes = b""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.mutations.server"]
        self._server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        for pipe in (self._server.stdin, self._server.stdout):
            assert pipe is not None
            pipe.close()
        self._server.wait(RUN_TIMEOUT_S)
        self._directory.cleanup()

    def begin(self, name: str, mutation: Mutation | None, tests: tuple[str, ...]) -> None:
        """Begin a run unless it was begun before, or enough are under way."""
        if name in self._begun or len(self._begun - self._ended) >= MAX_AT_ONCE:
            return
        assert self._server is not None
        assert self._server.stdin is not None
        directory = Path(self._directory.name, name)
        directory.mkdir()
        change = None if mutation is None else {"module": mutation.module, "old": mutation.old, "new": mutation.new}
        asked = {"id": name, "change": change, "tests": tests, "directory": str(directory)}
        self._server.stdin.write(json.dumps(asked).encode() + b"\n")
        self._server.stdin.flush()
        self._begun.add(name)

    def result(self, name: str, mutation: Mutation | None, tests: tuple[str, ...]) -> Run:
        """
        Run *tests* under *mutation* and return what happened.

        Raises:
            TimeoutError: It did not end in time.
        """
        while name not in self._ended:
            self.begin(name, mutation, tests)
            self._read()
        directory = Path(self._directory.name, name)
        output = (directory / "output.txt").read_text(encoding="utf-8")
        report = directory / "report.json"
        if not report.exists():
            return Run(False, ["pytest did not even begin."], {}, output)
        return Run(**json.loads(report.read_text(encoding="utf-8")), output=output)

    def _read(self) -> None:
        """Wait for one more run to end."""
        assert self._server is not None
        assert self._server.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._server.stdout], [], [], RUN_TIMEOUT_S)
            more = self._server.stdout.read1(4096) if ready else b""  # type: ignore[attr-defined]
            if not more:
                raise TimeoutError(f"No mutated run ended within {RUN_TIMEOUT_S} s.")
            self._unread += more
        name, _, self._unread = self._unread.partition(b"\n")
        self._ended.add(name.decode())
