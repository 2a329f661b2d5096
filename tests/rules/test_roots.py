"""Roots: whose a counter, a slot or a key is."""

from __future__ import annotations

import pytest

from asgi_metering.rules.keys import key_rows
from asgi_metering.rules.operations import KeyAsk
from asgi_metering.rules.roots import root_of, rooted


@pytest.mark.parametrize("root", ["org_7", "a}b", "{x}", "é@b", "@"])
def test_root_of_a_key(root: str) -> None:
    """A key says whose it is, and so does each of its rows by a calendar."""
    key = rooted("/items/{id}|60/minute", root)
    assert root_of(key) == root
    assert [root_of(row) for row in key_rows(KeyAsk(key, (1.0, 2.0, 3.0, 4.0)))] == [root] * 3


@pytest.mark.parametrize("key", ["everybody", "/items/{id}|global", "open@{", ""])
def test_root_of_what_is_nobodys(key: str) -> None:
    """A key that names no payer is nobody's, and stays as it is."""
    assert (root_of(key), rooted(key, "")) == ("", key)
