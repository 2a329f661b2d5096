"""
Generators: endpoints and dependencies of FastAPI that yield, asked for before the first of their code runs.

Whoever runs a generator does so when its response has begun, and cannot say 429 any more. So the question is a
dependency of FastAPI's own, which it answers before. Decides nothing about a limit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeAlias

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

__all__ = ["Ask", "asked_first", "with_parameters"]

ASKED = "slowapi_asked"
"""The parameter by which FastAPI asks."""

Ask: TypeAlias = "Callable[[Request, Response], Awaitable[bool]]"
"""Counts a request; whether nobody else has to be asked for it. Raises where it is refused."""


def asked_first(guarded: Callable[..., Any], endpoint: Callable[..., Any], ask: Ask) -> Callable[..., Any]:
    """
    What runs instead of the generator function *endpoint*, once *ask* was answered.

    *guarded*, where that says that a middleware of ours is asked, and where nobody was; without FastAPI always.
    """
    try:
        from fastapi import Depends
    except ImportError:
        # Nothing else runs generator functions as endpoints.
        return guarded

    async def asked(connection: HTTPConnection, response: Response) -> bool:
        return isinstance(connection, Request) and await ask(connection, response)

    signature = inspect.signature(guarded)
    name = ASKED
    while name in signature.parameters:
        # Of another limiter.
        name += "_"

    @functools.wraps(guarded)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        run = endpoint if kwargs.pop(name, False) else guarded
        return run(*args, **kwargs)

    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[bool, Depends(asked)])
    wrapper.__signature__ = with_parameters(signature, parameter)  # type: ignore[attr-defined]
    return wrapper


def with_parameters(signature: inspect.Signature, *added: inspect.Parameter) -> inspect.Signature:
    """*signature* with these parameters, which are by name alone, before what takes all others."""
    parameters = list(signature.parameters.values())
    at = next((n for n, each in enumerate(parameters) if each.kind is each.VAR_KEYWORD), len(parameters))
    return signature.replace(parameters=[*parameters[:at], *added, *parameters[at:]])
