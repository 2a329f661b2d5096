"""The scripts: their files, and the digests by which the server knows them. Does not know what they do."""

from __future__ import annotations

from functools import cache
from hashlib import sha1
from importlib.resources import files

__all__ = ["Scripts"]

_CALLS = ("common", "book", "work", "admit", "end", "renew", "calls")
"""One script, in this order."""

_ALONE = ("apply", "claim", "acknowledge", "emit", "everything", "read_account", "lines")


class Scripts:
    """All scripts of the store, read once."""

    def __init__(self) -> None:
        common = _file("common")
        texts = {"calls": "".join(map(_file, _CALLS))}
        texts |= {name: common + _file(name) for name in _ALONE}
        self._texts = texts
        self.sha = {name: sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in texts.items()}

    def texts(self) -> list[str]:
        """What is loaded."""
        return list(self._texts.values())


@cache
def _file(name: str) -> str:
    return (files(__package__) / "lua" / f"{name}.lua").read_text(encoding="utf-8")
