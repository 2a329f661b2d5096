"""
Which HTTP library to build on: httpx2, which the model SDKs use now, or httpx, which others still use.

Knows how to find and tell apart the two. Never imports either before it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from asgi_metering.errors import ConfigurationError, MissingExtraError

__all__ = ["LIBRARIES", "choose_library", "library_of"]

LIBRARIES = ("httpx2", "httpx")
"""Names of the libraries, the preferred one first."""


def library_of(value: object) -> ModuleType | None:
    """Return the library that an object's class, or the class it derives from, belongs to; `None` if neither."""
    for cls in type(value).__mro__:
        root = cls.__module__.partition(".")[0]
        if root in LIBRARIES:
            return sys.modules[root]
    return _library_by_bases(value)


_BASES = ("BaseTransport", "AsyncBaseTransport", "SyncByteStream", "AsyncByteStream")


def _library_by_bases(value: object) -> ModuleType | None:
    """The same by the classes themselves: SDKs put their own names on those that they export, such as BaseTransport."""
    for name in LIBRARIES:
        library = sys.modules.get(name)
        if library is not None and isinstance(value, tuple(getattr(library, base) for base in _BASES)):
            return library
    return None


def choose_library(name: str | None, wrap: object = None) -> ModuleType:
    """
    Import the library called *name*, else the one that *wrap* belongs to, else the first one installed.

    Raises:
        ConfigurationError: *name* is not one of `LIBRARIES`.
        MissingExtraError: It is not installed, or none is.
    """
    if name is not None and name not in LIBRARIES:
        raise ConfigurationError(f"The HTTP library {name!r} is not known. Choose 'httpx2' or 'httpx'.")
    if name is None and (library := library_of(wrap)) is not None:
        return library
    for candidate in (name,) if name else LIBRARIES:
        try:
            return importlib.import_module(candidate)
        except ImportError:
            continue
    if name == "httpx":
        raise MissingExtraError("The upstream client on httpx", "upstream", "httpx")
    raise MissingExtraError("The upstream client", "upstream")
