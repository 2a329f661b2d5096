"""
The server of mutated runs: imports what every run needs once, and forks a pytest for each that is asked for.

Reads one JSON object a line from its input (``id``, ``change``, ``tests``, ``directory``) and writes the id back when
the run has ended; output and report of the run are files in the directory. Never imports the package itself: that is
what the runs change.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.mutations.plugin import CHANGE, REPORT

__all__ = ["OPTIONS", "PRELOADED", "main"]

PRELOADED = (
    "_pytest.assertion.rewrite",
    "_pytest.capture",
    "_pytest.logging",
    "_pytest.python",
    "_pytest.terminal",
    "anyio._backends._asyncio",
    "asyncio",
    "fastapi",
    "fastapi.sse",
    "httpx2",
    "hypothesis",
    "limits",
    "opentelemetry.metrics",
    "opentelemetry.trace",
    "pydantic",
    "pytest_timeout",
    "starlette.applications",
    "starlette.middleware.gzip",
    "tests.harness.drive",
    "zoneinfo",
)
"""Imported before the fork: together they take longer than most runs."""

OPTIONS = (
    "-q",
    "--no-header",
    # The plugin has a bound of its own.
    "--timeout=0",
    # Plugins that were imported before the fork have their own assertions as they are.
    "-Wignore::pytest.PytestAssertRewriteWarning",
    *("-p", "no:cacheprovider"),
    *("-p", "pytest_timeout"),
    *("-p", "tests.mutations.plugin"),
)


def main() -> None:
    """Serve until the input ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    if any(name.partition(".")[0] == "asgi_metering" for name in sys.modules):
        raise RuntimeError("The package was imported before anything could be changed.")
    del sys.modules["tests.mutations.plugin"]
    # What is imported by now is never garbage, and the runs need not look at it.
    gc.freeze()
    # Nobody waits for the runs here, and none may stay a zombie.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        asked = json.loads(line)
        if os.fork() == 0:
            _run(asked)


def _run(asked: dict[str, Any]) -> None:
    """Be the run, write its id, and end the process without another word."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    directory = Path(asked["directory"])
    answers = os.dup(1)
    output = os.open(directory / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Looking for plugins, and importing those that no run needs, takes as long as a short run.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ[REPORT] = str(directory / "report.json")
    if asked["change"] is not None:
        os.environ[CHANGE] = json.dumps(asked["change"])
    # The first run compiles what the later ones share, whatever the environment says of writing beside the sources.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(directory.parent / "bytecode")
    try:
        import pytest

        pytest.main([*OPTIONS, *asked["tests"]])
    except BaseException:
        # Whatever it is, it belongs to the run and must not come back to the server's loop.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.write(answers, f"{asked['id']}\n".encode())
        os._exit(0)


if __name__ == "__main__":
    main()
