"""
The table of routes: which of them a request will take, as far as that can be told before the application runs.

Knows the rows of the audit and how their paths are matched. What it answers is a guess, and has to be used as one:
middleware further in may change the path, and a framework may have rules of its own. Asks for no admission.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from asgi_metering.asgi.audit import HTTP_HANDLERS, Row
from asgi_metering.asgi.types import Scope

__all__ = ["RouteTable", "runs"]

MAX_PATHS = 4_096
"""Paths whose route is remembered: those that clients make up come and go."""

MAX_PATH = 256
"""Characters of such a path and its method: with longer ones a client could fill our memory."""


class _Entry(NamedTuple):
    row: Row
    exact: re.Pattern[str]
    below: re.Pattern[str] | None


class RouteTable:
    """
    The routes of one application, in its order.

    Args:
        rows: What the audit found; WebSockets are none of ours.
        root_path: Of an application that sets its own further in.
    """

    def __init__(self, rows: Sequence[Row], root_path: str = "") -> None:
        self._entries = [entry for row in rows if not row.is_websocket for entry in _entries(row)]
        self._root_path = root_path
        self._known: dict[tuple[str, str], Row | None] = {}

    def find(self, scope: Scope) -> Row | None:
        """The route that the request of *scope* will take; None for none that is known, and for what is mistaken."""
        place = (scope["method"], _path_below(scope["path"], self._root_path or scope.get("root_path", "")))
        if place in self._known:
            return self._known[place]
        if len(place[0]) + len(place[1]) > MAX_PATH:
            return self._find(*place)
        if len(self._known) >= MAX_PATHS:
            self._known = {}
        found = self._known[place] = self._find(*place)
        return found

    def _find(self, method: str, path: str) -> Row | None:
        mounted = None
        for row, exact, below in self._entries:
            if (not row.methods or method in row.methods) and exact.match(path):
                return row
            if mounted is None and below is not None and below.match(path):
                mounted = row
        return mounted


def _entries(row: Row) -> list[_Entry]:
    # Only applications with routes of Starlette's have rows.
    from starlette.routing import compile_path

    if not (row.path or row.methods or row.policy):
        # A host, or a mount that takes whatever no route does: no more than that is known of what it takes.
        return []
    path = row.path if row.path.startswith("/") else f"/{row.path}"
    try:
        exact, _, _ = compile_path(path)
        below = None if row.methods else compile_path(f"{path.rstrip('/')}/{{asgi_metering_rest:path}}")[0]
    except (AssertionError, ValueError):
        # Of a path that only its own framework can read nothing is known.
        return []
    return [_Entry(row, exact, below)]


def _path_below(path: str, root: str) -> str:
    """*path* as routes see it: without where the application is mounted, as Starlette cuts it."""
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def runs(row: Row, scope: Scope) -> bool:
    """Whether the framework that handled the request of *scope* says that it took *row*."""
    # Starlette and FastAPI name the endpoint, Litestar its handler.
    endpoint: Any = scope.get("endpoint") or getattr(scope.get("route_handler"), "fn", None)
    if isinstance(endpoint, type) and endpoint is not row.endpoint:
        handler = next((name for name, method in HTTP_HANDLERS.items() if method == scope["method"]), "")
        endpoint = getattr(endpoint, handler, None)
    return endpoint is not None and endpoint is row.endpoint
