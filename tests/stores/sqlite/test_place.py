"""A file that somebody moves, removes or replaces while stores have it open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asgi_metering.errors import StoreUnavailableError
from asgi_metering.stores.contract import AccountRows
from asgi_metering.stores.sqlite import SQLiteStore
from tests.stores.sqlite.support import available, grant, play


def _move(path: Path) -> None:
    path.rename(path.with_name("moved"))


def _move_back(path: Path) -> None:
    assert not path.exists()
    path.with_name("moved").rename(path)


def _replace(path: Path) -> None:
    """As who restores a backup over a file in use, and leaves the log beside it."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    copy.replace(path)


@pytest.mark.parametrize("do", [_move, Path.unlink, _replace], ids=["moved", "removed", "replaced"])
def test_acknowledge_nothing_that_nobody_would_find(path: Path, do: Callable[[Path], None]) -> None:
    """Batches and reads say that the file is not where it was, and write no more to the one that has gone."""

    async def scene(store: SQLiteStore) -> None:
        await store.post([grant()])
        await store.read(AccountRows("p", "credits"))
        do(path)
        with pytest.raises(StoreUnavailableError, match="was moved, removed or replaced while it was in use"):
            await store.run([grant("lost")])
        with pytest.raises(StoreUnavailableError, match="was moved, removed or replaced while it was in use"):
            await store.read(AccountRows("p", "credits"))

    play(path, scene)


def test_go_on_when_the_file_is_back(path: Path) -> None:
    """While it is gone none is made in its place, where nobody would have credit; put back, it serves as before."""

    async def scene(store: SQLiteStore) -> None:
        await store.post([grant()])
        _move(path)
        for _ in range(3):
            with pytest.raises(StoreUnavailableError, match="Put it back"):
                await store.run([grant("more")])
            with pytest.raises(StoreUnavailableError, match="Put it back"):
                await store.read(AccountRows("p", "credits"))
        _move_back(path)
        await store.post([grant("more")])
        assert await available(store) == 200

    play(path, scene)
