"""
Names and keys: which strings may identify things.

Knows the shapes and bounds of identifiers. Never knows what they identify.
"""

from __future__ import annotations

import re

from asgi_metering.errors import ConfigurationError, InvalidKeyError

__all__ = ["MAX_KEY_LENGTH", "check_key", "check_name", "check_text", "is_field_name", "is_name"]

MAX_KEY_LENGTH = 255
"""Characters of an opaque key (payer, grant id, call id): what every store's index takes without care."""

SHOWN = 60
"""Characters of a refused text that an error repeats: enough to recognise it."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")


_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def check_name(name: str, what: str) -> str:
    """
    Return *name* if it may stand in metrics, header fields and SQL alike.

    Raises:
        ConfigurationError: Not 1 to 64 characters of ``[A-Za-z0-9_.-]``, beginning with a letter, digit or ``_``.
    """
    if not is_name(name):
        raise ConfigurationError(
            f"The {what} {name!r} is not 1 to 64 characters of letters, digits, '_', '.' and '-', beginning with one "
            f"of the first three. Choose another."
        )
    return name


def is_name(name: object) -> bool:
    """Whether `check_name` takes *name*."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_key(key: str, what: str) -> str:
    """
    Return *key* if it may identify an account, a grant or a call: 1 to 255 printable characters.

    Raises:
        InvalidKeyError: Not a str, empty, longer than 255, or with control characters or lone surrogates.
    """
    if not isinstance(key, str):
        raise InvalidKeyError(f"The {what} {key!r} is a {type(key).__name__}, not a str. Pass an opaque string.")
    if not key or len(key) > MAX_KEY_LENGTH:
        raise InvalidKeyError(
            f"The {what} has {len(key)} characters; 1 to {MAX_KEY_LENGTH} are allowed. Hash longer ones first."
        )
    if not key.isprintable():
        raise InvalidKeyError(f"The {what} {key!r} has characters that are not printable. Encode it first.")
    return key


def check_text(text: str, what: str) -> str:
    """
    Return *text* if it may stand in a statement: at most 255 printable characters, or none.

    Raises:
        ConfigurationError: Not a str, longer, or with control characters or lone surrogates.
    """
    if not isinstance(text, str) or len(text) > MAX_KEY_LENGTH or not text.isprintable():
        shown = repr(text)
        if len(shown) > MAX_KEY_LENGTH:
            shown = f"{shown[:SHOWN]}... ({len(shown)} characters)"
        raise ConfigurationError(
            f"The {what} {shown} is not a str of at most {MAX_KEY_LENGTH} printable characters. Shorten it, or leave "
            f"it out."
        )
    return text


def is_field_name(text: object, longest: int | None = None) -> bool:
    """Whether *text* may be the name of a header field (RFC 9110, 5.1: a token), of *longest* characters at most."""
    return isinstance(text, str) and _TOKEN.fullmatch(text) is not None and (longest is None or len(text) <= longest)
