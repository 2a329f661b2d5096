"""
Attributes: what applications add to a usage event.

Knows which values every store can write and every sink can send. Never knows what they say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from asgi_metering.errors import ConfigurationError

__all__ = ["Scalar", "check_attributes", "plain_attributes"]

Scalar: TypeAlias = str | int | float | bool
"""What an attribute may be."""

MAX_CONVERTED = 1_000
"""Characters of a value that had to be converted: whole documents are no attributes."""


def check_attributes(attributes: Mapping[str, Any], whose: str) -> dict[str, Scalar]:
    """
    A copy of *attributes* without those that are None: what is not known is not told.

    Raises:
        ConfigurationError: A name that is no str, or a value that is no str, int, finite float or bool.
    """
    for name, value in attributes.items():
        if not isinstance(name, str) or (value is not None and not _is_scalar(value)):
            raise ConfigurationError(
                f"Attribute {name!r} of {whose} is {value!r}, a {type(value).__name__}. Names are str, values str, "
                f"int, finite float or bool; convert it: str(value)."
            )
    return {name: value for name, value in attributes.items() if value is not None}


def plain_attributes(attributes: Any) -> tuple[dict[str, Scalar], list[str]]:
    """
    *attributes* as every store takes them, and the names of those that had to be converted.

    For where nobody can be told any more: what is no scalar becomes its text, and None is left out. Never raises.
    """
    plain: dict[str, Scalar] = {}
    converted: list[str] = []
    if not isinstance(attributes, Mapping):
        return {}, [_as_text(attributes)]
    for name, value in attributes.items():
        key = name if isinstance(name, str) else _as_text(name)
        if value is None:
            continue
        if key is not name or not _is_scalar(value):
            converted.append(key)
        plain[key] = value if _is_scalar(value) else _as_text(value)
    return plain, converted


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _as_text(value: object) -> str:
    try:
        return str(value)[:MAX_CONVERTED]
    except Exception:  # noqa: BLE001 -- an object that cannot even say what it is shall not cost a charge
        return f"<{type(value).__name__}>"
