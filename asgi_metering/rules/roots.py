"""
Roots: beside whose accounts a counter, a slot or a key is kept, where a store keeps payers apart.

The key itself says it, so that a row says it too: whoever moves rows knows where they belong. Nothing else reads it;
a store that has all in one place takes keys as they are.
"""

from __future__ import annotations

__all__ = ["root_of", "rooted"]

_BEGIN, _END = "@{", "}"


def rooted(key: str, root: str) -> str:
    """*key*, kept beside the accounts of the payer *root*; of nobody where that is empty."""
    return f"{key}{_BEGIN}{root}{_END}" if root else key


def root_of(key: str) -> str:
    """
    The payer that `rooted` named; empty where *key* is nobody's.

    Whatever the key looks like, it is the same one each time: a payer whose name has the marks of a root is found
    somewhere else than its accounts, and that costs only time.
    """
    _, begin, rest = key.rpartition(_BEGIN)
    return rest.rpartition(_END)[0] if begin else ""
