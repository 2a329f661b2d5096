"""Attributes: what every store can write, and what becomes of the rest."""

from __future__ import annotations

import datetime
import math
import uuid
from decimal import Decimal
from typing import Any

import pytest

from asgi_metering import Caller
from asgi_metering.attributes import check_attributes, plain_attributes
from asgi_metering.errors import ConfigurationError

SCALARS = {"text": "a", "whole": 2, "part": 0.5, "yes": True}


class Mute:
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("mute")


def test_check_scalars() -> None:
    """Scalars pass as they are, in a copy, and what is not known is left out."""
    given = {**SCALARS, "unknown": None}
    checked = check_attributes(given, "ann")
    assert checked == SCALARS
    assert checked is not given


@pytest.mark.parametrize("wrong", [uuid.UUID(int=1), datetime.date(2026, 1, 1), Decimal(1), [], {}, b"", math.nan])
def test_check_what_no_event_can_carry(wrong: Any) -> None:
    """The first value that is no scalar is named, with its class and the mend."""
    with pytest.raises(ConfigurationError, match=r"Attribute 'at' of ann is .*str\(value\)"):
        check_attributes({"at": wrong}, "ann")


def test_check_names() -> None:
    """A name has to be a str: JSON would make one of it, and two of them might be one."""
    with pytest.raises(ConfigurationError, match="Attribute 1 of ann"):
        check_attributes({1: "a"}, "ann")  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("given", "plain", "converted"),
    [
        (SCALARS, SCALARS, []),
        ({"at": datetime.date(2026, 1, 1), "n": None}, {"at": "2026-01-01"}, ["at"]),
        ({"x": math.inf, 1: "one"}, {"x": "inf", "1": "one"}, ["x", "1"]),
        ({"mute": Mute(), "long": ["a" * 5_000]}, {"mute": "<Mute>", "long": "['" + "a" * 998}, ["mute", "long"]),
        (["a"], {}, ["['a']"]),
    ],
)
def test_make_plain(given: Any, plain: dict[str, Any], converted: list[str]) -> None:
    """At the end of a call nothing is refused any more: what is no scalar becomes a bounded text, and is named."""
    assert plain_attributes(given) == (plain, converted)


def test_caller_refuses_what_no_event_can_carry() -> None:
    """A caller's attributes and type are checked where they are made, whatever the store."""
    caller = Caller("ann", attributes={"team": "a", "tier": None})
    assert caller.attributes == {"team": "a"}
    with pytest.raises(ConfigurationError, match="Attribute 'key' of caller 'ann'"):
        Caller("ann", attributes={"key": uuid.UUID(int=1)})  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="The type 7 of caller 'ann' is no str"):
        Caller("ann", type=7)  # type: ignore[arg-type]
