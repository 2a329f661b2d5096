"""A store that the environment names, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from asgi_metering.cli import main
from tests.cli.commands import Run


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty file, named to every command by the environment, as an operator has it."""
    url = f"sqlite:///{tmp_path}/metering.db?synchronous=OFF"
    monkeypatch.setenv("ASGI_METERING_STORE", url)
    return url


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command and return its exit code, its output and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as exit_:  # argparse's own mistakes
            code = int(str(exit_.code))
        return code, *capsys.readouterr()

    return run
