"""What every command says of a mistake, and of where its store is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import GRANT, Run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("grant", "ann", "abc", "--id", "x"), "The grant 'abc' is not a number. Write whole units, such as '0.25'."),
        (("grant", "ann", "0", "--id", "x"), "The grant 'x' of '0' moves nothing. Use an amount above 0."),
        (("grant", "ann", "-5", "--id", "x"), "The grant '-5' is negative. Amounts start at 0."),
        (("grant", "ann", "0.1234567", "--id", "x"), "finer than unit 'credits' counts (6 digits after the point)."),
        (("grant", "", "1", "--id", "x"), "The payer has 0 characters; 1 to 255 are allowed."),
        (("grant", "ann", "1", "--id", "x", "--expires", "2001-01-01T00:00:00Z"), "Give it a later expiry."),
        (("balance", "ann", "--unit", "credits"), "--unit 'credits' is not name:scale, such as credits:6."),
        (("balance", "ann", "--unit", "credits:99"), "The scale 99 of unit 'credits' is not an int from 0 to 12."),
        (("balance", "ann", "--store", "mysql://db"), "has the scheme 'mysql'. Use one of: memory://, "),
        (("balance", "ann", "--store", "sqlite://"), "The store URL 'sqlite://' names no file."),
        (("balance", "ann", "--store", "memory://"), "The memory store keeps nothing between commands."),
        (("check", "--store", "memory://"), "Name a durable one."),
        ((*GRANT, "--store", "sqlite:////no/such/folder/m.db"), "The folder '/no/such/folder'"),
        (("export", "/no/such/folder/b.jsonl", "--store", "memory://"), "Name a durable one."),
        (("import", "/no/such/folder/b.jsonl"), "'/no/such/folder/b.jsonl' cannot be read: No such file or directory."),
        (("holds", "--store", "sqlite:////no/such/folder/m.db"), "There is no database '/no/such/folder/m.db'."),
    ],
)
@pytest.mark.usefixtures("store")
def test_tell_a_mistake(run: Run, arguments: tuple[str, ...], sentence: str) -> None:
    """A mistake is told in one line with its mend, on the error stream, and ends with 2."""
    code, output, errors = run(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("asgi-metering: ")
    assert sentence in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "command", [("balance", "ann"), ("statement", "ann"), ("holds",), ("check",), ("export", "books.jsonl")]
)
def test_tell_that_there_is_no_database(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Commands that only read make no file of a mistyped name, absolute or relative, encoded or not."""
    monkeypatch.chdir(tmp_path)
    for url, name in (
        (f"sqlite:///{tmp_path}/meterin.db", f"{tmp_path}/meterin.db"),
        ("sqlite:///my%20m.db", "my m.db"),
    ):
        sentence = f"There is no database '{name}'. Look at its spelling; the first grant or the application makes one."
        for more in ((), ("--json",)):
            assert run(*command, *more, "--store", url) == (2, "", f"asgi-metering: {sentence}\n")
    assert list(tmp_path.iterdir()) == []
    assert run(*GRANT, "--store", "sqlite:///my%20m.db")[0] == 0
    assert run(*command, "--store", "sqlite:///my%20m.db")[0] == 0


def test_tell_that_a_file_is_something_else(run: Run, tmp_path: Path) -> None:
    """A file of another kind is named, and not one byte of it is changed."""
    notes = tmp_path / "notes.txt"
    notes.write_text("Nobody shall write here. " * 100)
    code, output, errors = run("statement", "ann", "--store", f"sqlite:///{notes}")
    assert (code, output) == (2, "")
    assert f"'{notes}' is not a SQLite database." in errors
    assert notes.read_text() == "Nobody shall write here. " * 100
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "command", [("balance", "ann"), ("check",), ("grant", "ann", "1", "--id", "x"), ("import", "b")]
)
def test_tell_that_no_store_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    """Without --store and without the environment nothing is guessed."""
    monkeypatch.delenv("ASGI_METERING_STORE", raising=False)
    code, output, errors = run(*command)
    assert (code, output) == (2, "")
    assert errors == (
        "asgi-metering: No store is named. Pass --store sqlite:///metering.db, or set ASGI_METERING_STORE.\n"
    )
