"""The command line on a Redis URL, from the first grant to the move."""

from __future__ import annotations

import asyncio
import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.cli import main
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, WalletSource
from asgi_metering.stores.urls import store_from_url
from tests.harness.valkey import ValkeyServer

_numbers = count()


async def _call(url: str) -> None:
    """Two calls of 2 and 3 credits, of which the second one stays in flight."""
    store = store_from_url(url)
    await store.open()
    calls = [Admit(call, "ann", "credits", n * 10**6, n * 10**6, (WalletSource(),)) for call, n in (("a", 2), ("b", 3))]
    await store.run([*calls, End("a", 2 * 10**6, Basis.USAGE)])
    await store.close()


def test_use_the_command_line(server: ValkeyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grant, balance, statement, holds, check, export and import work on a Redis URL as on any other."""
    first, other = (f"{server.url}?namespace=cli{next(_numbers)}" for _ in range(2))
    file = str(tmp_path / "books.jsonl")

    def told(*arguments: str) -> Any:
        code = main((*arguments, "--json"))
        output, errors = capsys.readouterr()
        assert (code, errors) == (0, "")
        return json.loads(output)

    def balance(store: str) -> dict[str, Any]:
        (row,) = told("balance", "ann", "--store", store)
        return dict(row)

    assert told("grant", "ann", "12.5", "--id", "payment-1", "--store", first)[0]["applied"] is True
    assert told("grant", "ann", "12.5", "--id", "payment-1", "--store", first)[0]["applied"] is False
    asyncio.run(_call(first))
    before = balance(first)
    assert (before["available"], before["held"]) == ("7.5", "3")
    lines = told("statement", "ann", "--store", first)
    holds = told("holds", "--store", first)
    assert len(lines) == 2
    assert [row["id"] for row in holds] == ["b"]
    assert told("check", "--store", first)

    exported = told("export", file, "--store", first)
    assert (exported["balanced"], exported["one_instant"], exported["accounts"]) == (True, False, 1)
    assert told("import", file, "--store", other)["rows"] == exported["rows"]
    assert balance(other) == before
    assert told("statement", "ann", "--store", other) == lines
    assert told("holds", "--store", other) == holds
    assert main(("import", file, "--store", other)) == 2
    assert "The redis store is not empty, so nothing was imported" in capsys.readouterr().err
