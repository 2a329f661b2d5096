"""
The wrappers: what the framework calls instead of an endpoint, one per kind of function.

The wrapper is the gate: it asks the request's call for admission with the endpoint's own arguments, and no line of
the endpoint runs on refusal. Knows nothing of what the policy says.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asgi_metering.call import Call
from asgi_metering.errors import ConfigurationError
from asgi_metering.opening import CURRENT, Opening
from asgi_metering.returned import count_returned

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
        if not (opening.free and guard.is_free(opening, args, kwargs)):
            call = opening.open_call()
            if not call.passes(guard.policy, guard.arguments(args, kwargs)):
                await call.ensure()
        if CURRENT.get() is opening:
            if guard.count is None:
                return await endpoint(*args, **kwargs)
            result = await endpoint(*args, **kwargs)
        else:
            with _inside(opening):
                result = await endpoint(*args, **kwargs)
        if guard.count is not None:
            await count_returned(opening, guard.count, result, guard.arguments(args, kwargs))
        return result

    return wrapper


def _sync_function(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    """Becomes async, and runs the endpoint in the thread that the metering chose (pitfall 9)."""

    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        opening = guard.opening(args, kwargs)
        if not (opening.free and guard.is_free(opening, args, kwargs)):
            call = opening.open_call()
            if not call.passes(guard.policy, guard.arguments(args, kwargs)):
                await call.ensure()
        with _inside(opening):
            result = await opening.metering.run_sync(functools.partial(endpoint, *args, **kwargs))
            # A plain function may return what its framework awaits.
            result = await result if inspect.isawaitable(result) else result
        if guard.count is not None:
            await count_returned(opening, guard.count, result, guard.arguments(args, kwargs))
        return result

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
        if opening.free and guard.is_free(opening, args, kwargs):
            return endpoint(*args, **kwargs)  # type: ignore[no-any-return]
        call = opening.open_call()
        call.expect(guard.policy, guard.arguments(args, kwargs))
        return _gated(call, endpoint, args, kwargs)

    return wrapper


class _Shown:
    """
    Shows the steps of a generator the call that it was gated for, as `_inside` does for a function.

    Between two steps whoever iterates sees its own again; what a step itself makes current, as by a charge that lasts
    over several, the next one finds.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, opening: Opening) -> None:
        self._inner: Opening | None = opening
        self._outer: Opening | None = None

    def __enter__(self) -> None:
        self._outer = CURRENT.get()
        CURRENT.set(self._inner)

    def __exit__(self, *_: object) -> None:
        self._inner = CURRENT.get()
        CURRENT.set(self._outer)

    async def awaited(self, step: Awaitable[Any]) -> Any:
        """The result of *step*."""
        with self:
            return await step


def _hidden(opening: Opening) -> _Shown | None:
    """What shows *opening*; None where it is current already, as nearly always: steps cost nothing then."""
    return None if CURRENT.get() is opening else _Shown(opening)


async def _gated(
    call: Call, endpoint: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncIterator[Any]:
    await call.ensure()
    shown = _hidden(call.opening)
    items = endpoint(*args, **kwargs)
    try:
        step = items.asend(None)
        while True:
            try:
                item = await (step if shown is None else shown.awaited(step))
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
    finally:
        await (items.aclose() if shown is None else shown.awaited(items.aclose()))


def _sync_generator(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
        opening = guard.opening(args, kwargs)
        if opening.free and guard.is_free(opening, args, kwargs):
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
    shown = _hidden(call.opening)
    items = endpoint(*args, **kwargs)
    yield from items if shown is None else _each_shown(items, shown)


def _each_shown(items: Generator[Any, Any, Any], shown: _Shown) -> Iterator[Any]:
    step = functools.partial(next, items)
    try:
        while True:
            try:
                with shown:
                    item = step()
            except StopIteration:
                return
            try:
                sent = yield item
            except GeneratorExit:
                raise
            except BaseException as failure:  # noqa: BLE001 -- the endpoint's to handle, as above
                step = functools.partial(items.throw, failure)
            else:
                step = functools.partial(items.send, sent)
    finally:
        with shown:
            items.close()
