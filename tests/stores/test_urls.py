"""Store URLs that are mistakes, whatever store they name."""

from __future__ import annotations

import asyncio

import pytest

from asgi_metering.errors import MeteringError
from asgi_metering.stores.urls import store_from_url


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:secret#x@127.0.0.1:1/db",
        "postgresql://ann:secret?x@127.0.0.1:1/db",
        "postgresql://ann:secret/x@127.0.0.1:1/db",
        "postgresql://127.0.0.1:1/db?user=ann&password=secret&prepare=maybe",
        "redis://:secret#x@127.0.0.1:1/0",
        "redis://:secret?x@127.0.0.1:1/0",
        "redis://:secret/x@127.0.0.1:1/0",
        "mysql://ann:secret/x@127.0.0.1/db",
    ],
)
def test_show_no_password_that_is_written_as_it_is(url: str) -> None:
    """A password that ends the part of the URL where it should be is in no error."""

    async def run() -> None:
        await store_from_url(url).open()

    with pytest.raises(MeteringError) as raised:
        asyncio.run(run())
    assert "secret" not in str(raised.value)


def test_refuse_a_file_whose_name_is_cut() -> None:
    """Behind a '#' a URL has no path: two files that differ there only would be one."""
    with pytest.raises(MeteringError, match="Write %23 for one in its name"):
        store_from_url("sqlite:///app#1.db")
