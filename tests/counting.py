"""An application whose limits count requests by who sends them, as tests of keys and of the middleware share it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from asgi_metering import Caller, Metering, MeteringMiddleware
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.harness.drive import Drive, body, drive, headers, http_scope, status

__all__ = ["Hall", "caller_of", "names_of"]


def caller_of(connection: Any) -> Caller | None:
    """Whoever the request's fields say: ``x-key``, ``x-payer``, ``x-plan``, ``x-team``, ``x-exempt``."""
    said = connection.headers
    if "x-key" not in said:
        return None
    return Caller(
        said["x-key"],
        said.get("x-payer", ""),
        plan=said.get("x-plan"),
        attributes={"team": said.get("x-team")},
        exempt="x-exempt" in said,
    )


class Hall:
    """
    An application on the memory store, with a clock of its own.

    Args:
        app: Behind the middleware; a Starlette application of *routes* by default.
        routes: Endpoints by path, for GET and POST.
        middleware: What the middleware is told besides its metering.
        metering: What that is told besides its store.
    """

    def __init__(
        self,
        app: Any = None,
        *,
        routes: Mapping[str, Any] | None = None,
        metering: Mapping[str, Any] | None = None,
        **middleware: Any,
    ) -> None:
        self.clock = FakeClock()
        self.asked = 0
        self.metering = Metering(
            MemoryStore(self.clock), **{"identify": self._identify, "sinks": (), **(metering or {})}
        )
        listed = [Route(path, endpoint, methods=["GET", "POST", "PUT"]) for path, endpoint in (routes or {}).items()]
        inner = Starlette(routes=listed) if app is None else app
        self.app = MeteringMiddleware(inner, metering=self.metering, **middleware)

    def _identify(self, connection: Any) -> Caller | None:
        self.asked += 1
        return caller_of(connection)

    async def ask(
        self, path: str = "/", method: str = "GET", *, client: str | None = "192.0.2.1", root: str = "", **said: str
    ) -> Drive:
        """One request; *said* are fields by the names that `caller_of` reads."""
        fields = [(f"x-{name.replace('_', '-')}", value) for name, value in said.items()]
        address = None if client is None else (client, 50_000)
        return await drive(self.app, {**http_scope(path, method, headers=fields, client=address), "root_path": root})

    async def statuses(self, *paths: str, **said: Any) -> list[int]:
        """What requests to *paths* are answered, one after the other."""
        return [status((await self.ask(path, **said)).log) for path in paths]

    async def each(self, *who: Mapping[str, Any], path: str = "/") -> list[int]:
        """What requests of *who* are answered, one after the other."""
        return [status((await self.ask(path, **said)).log) for said in who]


async def answer(request: Request) -> JSONResponse:
    """An endpoint of no limits."""
    return JSONResponse({"path": request.url.path})


def names_of(driven: Drive) -> list[str]:
    """Names of the windows that a response tells of."""
    told = [value for name, value in headers(driven.log) if name == "ratelimit-policy"]
    assert len(told) <= 1
    return [item.partition(";")[0].strip(' "') for item in told[0].split(",")] if told else []


def problem_of(driven: Drive) -> Any:
    """The body of a refusal."""
    return json.loads(body(driven.log))
