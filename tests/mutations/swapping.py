"""
Swapping: changes a module that is imported already, by giving its functions the code of the changed text.

Everything that the change leaves as it is stays imported, which is most of what a run would do. Never guesses: where
anything but bodies of functions differs, or one of them cannot be found, nothing is changed and the answer is False.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

__all__ = ["swapped"]

CO_OPTIMIZED = 0x1
"""Flag of the code of functions; the bodies of modules and classes do not have it."""


def swapped(module: ModuleType, text: str, changed: str) -> bool:
    """
    Make *module* behave as if it had been imported from the text *changed*; whether that could be done.

    Args:
        module: As it was imported from *text*.
        text: Its source.
        changed: The other source.

    Raises:
        SyntaxError: *changed* is no Python.
    """
    path = str(module.__file__)
    pairs = _differences(_compiled(text, path), _compiled(changed, path))
    if not pairs:
        return False
    live = {function.__code__: function for function in _functions(vars(module), module.__name__)}
    if any(old not in live for old, _ in pairs):
        return False
    for old, new in pairs:
        live[old].__code__ = new
    return True


def _compiled(text: str, path: str) -> CodeType:
    return compile(text, path, "exec", dont_inherit=True)


def _differences(old: CodeType, new: CodeType) -> list[tuple[CodeType, CodeType]]:
    """Functions that differ, as (old, new); none where the bodies around them differ in anything but their lines."""
    if _shape(old) != _shape(new):
        return []
    found = []
    for one, other in zip(_within(old), _within(new), strict=True):
        if _same(one, other):
            continue
        if one.co_flags & CO_OPTIMIZED:
            if (one.co_name, one.co_freevars) != (other.co_name, other.co_freevars):
                return []
            found.append((one, other))
        else:
            inner = _differences(one, other)
            if not inner:
                return []
            found.extend(inner)
    return found


def _same(one: CodeType, other: CodeType) -> bool:
    """Whether they do the same, whatever lines they stand on."""
    return _shape(one) == _shape(other) and all(map(_same, _within(one), _within(other)))


def _shape(code: CodeType) -> tuple[Any, ...]:
    """What is done, without what the functions within do and the lines that all stand on."""
    # From Python 3.13 on the body of a class has its own line among them.
    line = None if code.co_flags & CO_OPTIMIZED else code.co_firstlineno
    told = [value for value in code.co_consts if type(value) is not int or value != line]
    constants = [(type(value), None if isinstance(value, CodeType) else repr(value)) for value in told]
    names = (code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, code.co_exceptiontable, code.co_flags, code.co_argcount, constants, names


def _within(code: CodeType) -> list[CodeType]:
    return [value for value in code.co_consts if isinstance(value, CodeType)]


def _functions(names: Mapping[str, Any], module: str) -> Iterator[FunctionType]:
    """The functions of a module, those of its classes and those behind decorators included."""
    for value in list(names.values()):
        if isinstance(value, type):
            if value.__module__ == module:
                yield from _functions(vars(value), module)
        else:
            yield from _behind(value)


def _behind(value: Any) -> Iterator[FunctionType]:
    """The functions that a name in a namespace leads to."""
    if isinstance(value, property):
        for part in (value.fget, value.fset, value.fdel):
            yield from _behind(part)
    elif isinstance(value, staticmethod | classmethod | MethodType):
        yield from _behind(value.__func__)
    elif isinstance(value, functools.cached_property):
        yield from _behind(value.func)
    elif isinstance(value, FunctionType):
        yield value
        yield from _behind(getattr(value, "__wrapped__", None))
    elif isinstance(getattr(value, "__wrapped__", None), FunctionType):
        yield value.__wrapped__
