"""How the command is called, helps, and ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from asgi_metering import __version__
from tests.cli.commands import GRANT, Run


def test_run_as_a_module() -> None:
    """``python -m asgi_metering.cli`` is the same command."""
    ended = subprocess.run(
        [sys.executable, "-m", "asgi_metering.cli", "routes", "json:loads"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("asgi-metering: 'json:loads' is a function, but no ASGI application")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("pay",), "invalid choice: 'pay'"),
        (("balance",), "the following arguments are required: payer"),
        (("grant", "ann", "1"), "the following arguments are required: --id"),
        (("grant", "ann", "1", "--id", "x", "--priority", "high"), "invalid int value: 'high'"),
        (
            ("grant", "ann", "1", "--id", "x", "--expires", "2030-01-01"),
            "'2030-01-01' has no zone. Write 2027-01-01T00:00:00+00:00, say.",
        ),
        (
            ("grant", "ann", "1", "--id", "x", "--expires", "tomorrow"),
            "argument --expires: 'tomorrow' is not a date and time. Write 2027-01-01T00:00:00+00:00, say.",
        ),
        (("demo", "--port", "http"), "argument --port: 'http' is not a port. Use a number up to 65535; 0 takes a free"),
        (("demo", "--port", "70000"), "argument --port: '70000' is not a port."),
    ],
)
@pytest.mark.usefixtures("store")
def test_tell_how_to_use_a_command(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    """What is no command, or lacks a part, is told with the usage, and ends with 2."""
    code, output, errors = run(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("usage: asgi-metering")
    assert sentence in errors


COMMANDS = (
    "demo",
    "routes",
    "migrate",
    "export",
    "import",
    "init",
    "quotas",
    "poll",
    "journal",
    "grant",
    "balance",
    "statement",
    "refund",
    "holds",
    "reconcile",
    "resolve",
    "check",
)
WITHOUT_JSON = (None, "demo", "init")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_says_how_commands_end(run: Run, command: str | None) -> None:
    """The help of every command says what each argument is, and the exit codes; nearly all have --json (DESIGN 8)."""
    code, output, errors = run(*filter(None, (command, "--help")))
    assert (code, errors) == (0, "")
    assert re.findall(r"^  (\d+) +\S", output.partition("exit codes:")[2], re.MULTILINE) == [
        "0",
        "1",
        "2",
        "130",
        "141",
    ]
    assert ("--json" in output) is (command not in WITHOUT_JSON)
    assert "_moment" not in output
    assert "`" not in output
    listed = output.partition("exit codes:")[0]
    assert [
        line for line in listed.splitlines() if re.fullmatch(r"  \S+( [A-Z]+)?", line) and not _goes_on(listed, line)
    ] == []


def _goes_on(listed: str, line: str) -> bool:
    """Whether what *line* lists is explained in the next."""
    return listed.partition(f"{line}\n")[2].startswith("   ")


def test_tell_the_version(run: Run) -> None:
    """A report of a mistake can name the version."""
    assert run("--version") == (0, f"asgi-metering {__version__}\n", "")


def test_help_names_every_command(run: Run) -> None:
    """The list that the help is tested for is that of the program."""
    _, output, _ = run("--help")
    assert set(re.findall(r"^    (\w+)", output, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_end_quietly_when_the_reader_leaves(
    run: Run, store: str, monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    """Output into a pipe that nobody reads ends the command with 141, and without a traceback, buffered or not."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    run(*GRANT)
    command = Path(sys.executable).parent / "asgi-metering"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [command, "statement", "ann"], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_run_as_a_command(tmp_path: Path) -> None:
    """The installed command exits with what `main` returns, and a mistake shows no traceback."""
    command = Path(sys.executable).parent / "asgi-metering"
    good, bad = (
        subprocess.run([command, *GRANT, "--store", url], capture_output=True, text=True, timeout=60, check=False)
        for url in (f"sqlite:///{tmp_path}/metering.db", "mysql://secret:password@db")
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[0].split() == ["id", "granted", "applied", "available"]
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("asgi-metering: The store URL 'mysql://***@db'")
    assert "password" not in bad.stderr
    assert "Traceback" not in bad.stderr
