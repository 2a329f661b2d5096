"""A module that is imported already behaves as its changed text says, or is left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutations.swapping import swapped

TEXT = """
import contextlib
import functools

LIMIT = 3

def plain(n):
    return n + 1

@contextlib.contextmanager
def managed():
    yield 1

def outer():
    return [n + 1 for n in range(2)]

def closed():
    step = 1
    def inner(n):
        return n + step
    return inner

class Kept:
    bound = 5

    def method(self):
        return super().__repr__() and 1

    @property
    def told(self):
        return 1

    @functools.cached_property
    def once(self):
        return 1

    @staticmethod
    def fixed():
        return 1

TABLE = {"plain": plain, "other": lambda n: n + 1}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of that text."""
    made = ModuleType("swapped_here")
    made.__file__ = str(tmp_path / "swapped_here.py")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(TEXT, made.__file__, "exec", dont_inherit=True), vars(made))
    return made


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("    return n + 1\n\n@", "    return n + 2\n\n@", "module.plain(0)"),
        ("    return n + 1\n\n@", "    n = n + 1\n    return n + 1\n\n@", "module.TABLE['plain'](0)"),
        ("    yield 1", "    yield 2", "module.managed().__enter__()"),
        ("[n + 1 for", "[n + 2 for", "module.outer()[0]"),
        ("return n + step", "return n + step + 1", "module.closed()(0)"),
        ("__repr__() and 1", "__repr__() and 2", "module.Kept().method()"),
        ("told(self):\n        return 1", "told(self):\n        return 2", "module.Kept().told"),
        ("once(self):\n        return 1", "once(self):\n        return 2", "module.Kept().once"),
        ("fixed():\n        return 1", "fixed():\n        return 2", "module.Kept.fixed()"),
    ],
)
def test_swap_the_bodies_of_functions(module: ModuleType, old: str, new: str, told: str) -> None:
    """Whatever stands for a function behaves as changed, and everything else as before."""
    assert eval(told) == 1
    assert TEXT.count(old) == 1
    assert swapped(module, TEXT, TEXT.replace(old, new))
    assert eval(told) == 2
    assert module.Kept().bound + module.LIMIT == 8


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("bound = 5", "bound = 6"),
        ("def plain(n):", "def plain(n=1):"),
        ("lambda n: n + 1", "lambda n: n + 2"),
        ("@property\n    ", ""),
        ("LIMIT = 3", "LIMIT = 3  # and nothing else"),
    ],
)
def test_leave_alone_what_is_more_than_bodies(module: ModuleType, old: str, new: str) -> None:
    """Where more differs, a function cannot be found, or nothing differs at all, nothing is changed."""
    code = module.plain.__code__
    assert not swapped(module, TEXT, TEXT.replace(old, new))
    assert module.plain.__code__ is code
