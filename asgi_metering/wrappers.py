"""
The wrappers: what the framework calls instead of an endpoint, one per kind of function.

The wrapper is the gate: it asks the request's call for admission with the endpoint's own arguments, and no line of
the endpoint runs on refusal. Knows nothing of what the policy says.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

from asgi_metering.call import Call
from asgi_metering.errors import ConfigurationError
from asgi_metering.opening import CURRENT, Opening

if TYPE_CHECKING:
    from asgi_metering.guards import Guard

__all__ = ["wrap"]


def wrap(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    """One wrapper per kind of function (pitfall 5); generators are asked for at their first byte (pitfall 7)."""
    if inspect.isasyncgenfunction(endpoint):
        wrapper = _async_generator(endpoint, guard)
    elif inspect.isgeneratorfunction(endpoint):
        wrapper = _sync_generator(endpoint, guard)
    elif inspect.iscoroutinefunction(endpoint):
        wrapper = _async_function(endpoint, guard)
    else:
        wrapper = _sync_function(endpoint, guard)
    functools.update_wrapper(wrapper, endpoint)
    wrapper.__signature__ = guard.signature  # type: ignore[attr-defined]
    return wrapper


def _async_function(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        opening = guard.opening(args, kwargs)
        if not opening.free:
            await opening.open_call().gate(guard.policy, guard.arguments(args, kwargs))
        if CURRENT.get() is opening:
            return await endpoint(*args, **kwargs)
        with _inside(opening):
            return await endpoint(*args, **kwargs)

    return wrapper


def _sync_function(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    """Becomes async, and runs the endpoint in the thread that the metering chose (pitfall 9)."""

    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        opening = guard.opening(args, kwargs)
        if not opening.free:
            await opening.open_call().gate(guard.policy, guard.arguments(args, kwargs))
        with _inside(opening):
            result = await opening.metering.run_sync(functools.partial(endpoint, *args, **kwargs))
            # A plain function may return what its framework awaits.
            return await result if inspect.isawaitable(result) else result

    return wrapper


@contextmanager
def _inside(opening: Opening) -> Iterator[None]:
    """
    Make *opening* the current one, for an endpoint that its framework runs in the context of another request.

    What the endpoint reports, and what its upstream calls use, belongs to the call that was gated (pitfalls 1, 2).
    """
    token = CURRENT.set(opening)
    try:
        yield
    finally:
        CURRENT.reset(token)


def _async_generator(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        opening = guard.opening(args, kwargs)
        if opening.free:
            return endpoint(*args, **kwargs)  # type: ignore[no-any-return]
        call = opening.open_call()
        call.expect(guard.policy, guard.arguments(args, kwargs))
        return _gated(call, endpoint, args, kwargs)

    return wrapper


async def _gated(
    call: Call, endpoint: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncIterator[Any]:
    await call.ensure()
    async with aclosing(endpoint(*args, **kwargs)) as items:
        step = items.asend(None)
        while True:
            try:
                item = await step
            except StopAsyncIteration:
                return
            try:
                sent = yield item
            except GeneratorExit:
                raise
            except BaseException as failure:  # noqa: BLE001 -- the endpoint's to handle: a dependency rolls back by it
                step = items.athrow(failure)
            else:
                step = items.asend(sent)


def _sync_generator(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
        opening = guard.opening(args, kwargs)
        if opening.free:
            return endpoint(*args, **kwargs)  # type: ignore[no-any-return]
        call = opening.open_call()
        call.expect(guard.policy, guard.arguments(args, kwargs))
        return _gated_in_thread(call, asyncio.get_running_loop(), endpoint, args, kwargs)

    return wrapper


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _gated_in_thread(
    call: Call,
    loop: asyncio.AbstractEventLoop,
    endpoint: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Iterator[Any]:
    if not call.admitted:
        # The framework runs a sync generator in a thread, before or while the response starts.
        if _runs_here(loop):
            raise ConfigurationError(
                "A metered sync generator was iterated on the event loop, which it would block for ever while it waits "
                "for its admission. Iterate it in a thread, or make it an async generator."
            )
        asyncio.run_coroutine_threadsafe(call.ensure(), loop).result()
    yield from endpoint(*args, **kwargs)
