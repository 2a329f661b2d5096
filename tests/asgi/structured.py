"""A strict parser of structured fields (RFC 9651 section 4.2): what a client would make of ours."""

from __future__ import annotations

import base64
import re
from decimal import Decimal
from typing import Any, NamedTuple

NUMBER = re.compile(r"-?(?:[0-9]{1,12}\.[0-9]{1,3}|[0-9]{1,15})(?![0-9.])")
STRING = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
TOKEN = re.compile(r"[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*")
BYTES = re.compile(r":([A-Za-z0-9+/=]*):")
BOOLEAN = re.compile(r"\?([01])")
KEY = re.compile(r"[a-z*][a-z0-9_\-.*]*")
COMMA = re.compile(r"[ \t]*,[ \t]*")


class Item(NamedTuple):
    """A bare item and its parameters."""

    value: Any
    parameters: dict[str, Any]


class Token(str):
    """A value that is a Token, not a String."""

    __slots__ = ()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self.text, self.at)
        if match:
            self.at = match.end()
        return match

    def bare_item(self) -> Any:
        if match := self.take(NUMBER):
            return Decimal(match[0]) if "." in match[0] else int(match[0])
        if match := self.take(STRING):
            return re.sub(r"\\(.)", r"\1", match[1])
        if match := self.take(TOKEN):
            return Token(match[0])
        if match := self.take(BYTES):
            return base64.b64decode(match[1], validate=False)
        if match := self.take(BOOLEAN):
            return match[1] == "1"
        raise ValueError(f"no item at {self.at} of {self.text!r}")

    def item(self) -> Item:
        value = self.bare_item()
        parameters: dict[str, Any] = {}
        while self.text[self.at : self.at + 1] == ";":
            self.at += 1
            while self.text[self.at : self.at + 1] == " ":
                self.at += 1
            key = self.take(KEY)
            if key is None:
                raise ValueError(f"no parameter at {self.at} of {self.text!r}")
            if key[0] in parameters:
                raise ValueError(f"two parameters {key[0]!r} in {self.text!r}")
            if self.text[self.at : self.at + 1] == "=":
                self.at += 1
                parameters[key[0]] = self.bare_item()
            else:
                parameters[key[0]] = True
        return Item(value, parameters)

    def end(self) -> None:
        if self.at != len(self.text):
            raise ValueError(f"rest at {self.at} of {self.text!r}")


def parse_item(field: bytes) -> Item:
    """Parse a field that is an Item; ValueError where it is none."""
    reader = _Reader(field.decode("ascii"))
    item = reader.item()
    reader.end()
    return item


def parse_list(field: bytes) -> list[Item]:
    """Parse a field that is a List of Items; ValueError where it is none."""
    reader = _Reader(field.decode("ascii"))
    items = [reader.item()]
    while reader.take(COMMA):
        items.append(reader.item())
    reader.end()
    return items
