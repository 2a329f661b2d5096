"""
What a mutation is: one handling of a pitfall switched off in the source, and the tests that must notice.

Knows the shape of an entry and nothing of how it is run.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mutation"]


@dataclass(frozen=True)
class Mutation:
    """
    One change of one module's source text.

    Attributes:
        pitfall: Its number in the list of pitfalls; 0 for a rule that has none.
        what: What is switched off, in a few words; names the entry.
        module: Dotted name of the module whose source is changed.
        old: Source text that occurs exactly once in it.
        new: What stands there instead.
        tests: Node ids, of which every one must fail.
    """

    pitfall: int
    what: str
    module: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.tests or self.old == self.new:
            raise ValueError(f"The mutation {self.what!r} changes nothing or names no test.")

    @property
    def id(self) -> str:
        """Names the entry in reports."""
        return f"{self.pitfall:02d}-{self.what.replace(' ', '-')}"
