"""
The scripts: their files, and the names by which the server knows them. Does not know what they do.

What runs for every call is a function of the server's, which it makes once; a script is made anew for each run. Where
the server has no functions, or keeps them from us, the same text runs as a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha1
from importlib.resources import files

__all__ = ["Scripts"]

_CALLS = ("common", "book", "work", "limits", "sources", "admit", "end", "renew", "part", "calls")
"""One text, in this order."""

_ALONE = ("apply", "claim", "acknowledge", "emit", "share", "everything", "read_account", "lines")

_RUN_ALONE = "keys, args, call = KEYS, ARGV, redis.call\n"
_RUN_CALLS = "return M.calls(KEYS, ARGV)\n"

_LIBRARY = """#!lua name={name}
local function make()
{text}return M.calls
end

-- While a library is loaded it may not even look at strings: it is made when it is first called, and kept. Without keys
-- somebody only looks whether it is there.
local made
redis.register_function('{name}', function(keys, args)
  if keys[1] then
    made = made or make()
    return made(keys, args)
  end
end)
"""


class Scripts:
    """
    All scripts of the store, read once.

    Attributes:
        sha: Digests of the scripts, by name.
        calls: Name of the function that runs calls. It is that of its text: other versions have others.
        library: What makes it.
    """

    def __init__(self) -> None:
        self._texts, self.sha, self.library = _made()
        self.calls = _name(self.sha["calls"])

    def texts(self) -> list[str]:
        """What is loaded where a script is not known."""
        return list(self._texts.values())

    def as_script(self, command: Sequence[str | bytes | int]) -> Sequence[str | bytes | int]:
        """*command*, without functions."""
        return ("EVALSHA", self.sha["calls"], *command[2:]) if command[0] == "FCALL" else command


@cache
def _made() -> tuple[dict[str, str], dict[str, str], str]:
    """Texts and digests of the scripts, by name, and the library; made once, whatever stores there are."""
    common, calls = _file("common"), "".join(map(_file, _CALLS))
    texts = {name: common + _RUN_ALONE + _file(name) for name in _ALONE}
    texts["calls"] = calls + _RUN_CALLS
    sha = {name: _digest(text) for name, text in texts.items()}
    return texts, sha, _LIBRARY.format(name=_name(sha["calls"]), text=calls)


def _name(digest: str) -> str:
    return f"metering_{digest[:16]}"


def _digest(text: str) -> str:
    return sha1(text.encode(), usedforsecurity=False).hexdigest()


@cache
def _file(name: str) -> str:
    return (files(__package__) / "lua" / f"{name}.lua").read_text(encoding="utf-8")
