"""
Work: calls that nobody asked for over HTTP: of any block of code, of a client's method, with an event loop or without.

Knows how such a call begins and ends. Never knows what it does, nor how the store is asked.
"""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Unpack, cast

from asgi_metering.call import Call
from asgi_metering.caller import Caller
from asgi_metering.errors import ConfigurationError, SettlementError
from asgi_metering.holding import HoldSize
from asgi_metering.opening import CURRENT
from asgi_metering.outside import leave, prepared
from asgi_metering.policies import ChargeOptions, Price
from asgi_metering.portal import Portal
from asgi_metering.rules.ending import Cause
from asgi_metering.runtime import Runtime

if TYPE_CHECKING:
    from asgi_metering.metering import Metering

__all__ = ["Work"]

log = logging.getLogger("asgi_metering")


class Work(abc.ABC):
    """
    Charges for work outside HTTP. `Metering` is one.

    Attributes:
        end_timeout_s: How long the end of a call is waited for.
    """

    end_timeout_s: float
    _portal: Portal

    @abc.abstractmethod
    def runtime(self) -> Runtime:
        """The background of the running event loop."""

    def charge(
        self,
        *,
        line: str,
        payer: str | None = None,
        hold: HoldSize | None = None,
        price: Price | None = None,
        caller: Caller | None = None,
        **options: Unpack[ChargeOptions],
    ) -> AbstractAsyncContextManager[Call]:
        """
        Run one metered call outside HTTP: ``async with metering.charge(payer=..., line=..., hold="0.2") as call:``.

        Args:
            line: The billing line.
            payer: Whose account pays. Inside another call it may be left out: then whoever pays that one pays this
                one, with the same `Payer` (S0.27); its caller is this one's too.
            hold: Whole units to set aside, or an estimate as for `billable`.
            price: A fixed amount, or a measured price that `call.record` is charged by; the hold by default.
            caller: Who acts, where it is not the payer; its own payer does not count here.
            options: As for `billable`, where they mean something outside HTTP: see `ChargeOptions`. With an
                ``idempotency_key`` the body runs once; with a ``charge_key`` several calls are one charge.

        Raises:
            CallRefused: The payer cannot afford it, or its key was used before (`Reason.REPLAYED`, and
                ``decision.replay`` is the receipt; or it runs still, or for other work); the body did not run. Where a
                handler lets it rise before its first byte, its request is answered by it.
            CallCut: The body used up what can be held for it (``hold=slices(...)``): raised by `Call.record` inside of
                it, and charged as the end of call says (``on_cut``), not released.
            ConfigurationError: An argument that cannot work, such as an estimate without a price to charge by.
            AmountError: A price or hold that the unit cannot count.
            PayerError: No payer is given, and no call around this one says who pays.
            SettlementError: The body succeeded, but its end is not booked. Where the store is down it is retried
                (S3.10).

        Any other exception of the body, cancellation included, releases the hold and rises unchanged (S3.8), also where
        the store is down: the release is logged and retried then. Inside another call it is a call of its own; nothing
        but who pays and who calls is inherited (S0.29, S3.24).

        The call ends wherever the block is left, also in another task than it was entered in: that of a generator whose
        reader went away (pitfall 38). Such a block has the call at hand; `current_call` follows the task.
        """
        return self._charging({}, payer, caller, line, hold, price, options)

    @asynccontextmanager
    async def _charging(
        self,
        given: Mapping[str, Any],
        payer: str | None,
        caller: Caller | None,
        line: str,
        hold: HoldSize | None,
        price: Price | None,
        options: ChargeOptions,
    ) -> AsyncIterator[Call]:
        """`charge`, of work whose arguments are *given*: what looks like a request to a model is what it asks for."""
        outer = CURRENT.get()
        policy, call = prepared(_root(self), payer, caller, line, hold, price, options)
        opening = call.opening
        CURRENT.set(opening)
        try:
            await call.gate(policy, given)
            yield call
        except BaseException:
            call.see(Cause.ERROR)
            leave(opening, outer)
            if call.refusal is not None:
                opening.refused_inside()
            if call.admitted and not await self._is_booked(call):
                log.warning("Call %s of line %s failed, and its hold is not released yet.", call.id, call.line)
            raise
        call.first_byte = True
        call.see(Cause.COMPLETED)
        leave(opening, outer)
        if await self._is_booked(call):
            return
        raise SettlementError(
            f"Call {call.id!r} of line {call.line!r} ran, but its end is not booked. Where the store is down it is "
            f"retried, and its receipt will have this id; otherwise the log says what is wrong with it.",
            call.id,
            call.line,
            call.payer or "",
        ) from call.unbooked

    def charged(
        self,
        client: Any,
        method: str,
        *,
        line: str,
        payer: str | None = None,
        hold: HoldSize | None = None,
        price: Price | None = None,
        caller: Caller | None = None,
        **options: Unpack[ChargeOptions],
    ) -> Any:
        """
        *client*, each call of whose async *method* is charged; everything else of it is as it is (S3.41).

        ``metering.charged(AsyncOpenAI(http_client=...), "chat.completions.create", line="podcast", price=PRICE)``. The
        method is not called where the charge is refused. A stream that it answers is charged when that is exhausted,
        fails or is closed; if it is left early, what was observed by then (``on_disconnect``). What the method uses is
        told by an upstream client, or by what it calls itself.

        Args:
            client: Any object. What it answers elsewhere, a copy with other options for instance, is not charged.
            method: Its name, with dots for a part of a part.
            line: As of `charge`, for each call; as are:
            payer: Who pays.
            hold: What is set aside; by default what the method is asked for, by its keywords, as of an endpoint.
            price: What is charged.
            caller: Who acts.
            options: The rest.

        Raises:
            ConfigurationError: The client has no such method.

        The method raises as `charge` does, and what the client's own raises, unchanged (S3.8).
        """
        from asgi_metering.charged import ChargedClient

        found = client
        for name in method.split("."):
            found = getattr(found, name, None)
        if not callable(found):
            raise ConfigurationError(f"{client!r} has no method {method!r}. Name one that it has.")

        def charge(given: Mapping[str, Any]) -> AbstractAsyncContextManager[Call]:
            return self._charging({"request": given}, payer, caller, line, hold, price, options)

        return ChargedClient(client, tuple(method.split(".")), charge)

    @contextmanager
    def charge_sync(
        self,
        *,
        line: str,
        payer: str | None = None,
        hold: HoldSize | None = None,
        price: Price | None = None,
        caller: Caller | None = None,
        **options: Unpack[ChargeOptions],
    ) -> Iterator[Call]:
        """
        `charge` for code without an event loop (a Celery task, a script): ``with metering.charge_sync(...) as call:``.

        The call lives on this process's `portal`; the block runs where it stands, in any thread, with `current_call`.
        Arguments, errors and endings are those of `charge`.

        Raises:
            ConfigurationError: Also where the thread runs an event loop: use `charge` there.
        """
        outer = CURRENT.get()
        block = self.charge(line=line, payer=payer, hold=hold, price=price, caller=caller, **options)
        with self.portal().within(block) as call:
            CURRENT.set(call.opening)
            try:
                yield call
            finally:
                # Here, and not where it is left there: each thread has a context of its own.
                if CURRENT.get() is call.opening:
                    CURRENT.set(outer)

    def portal(self) -> Portal:
        """
        The thread of this process that runs the metering for code without an event loop, started by its first use.

        ``metering.portal().call(metering.grant, "org_7", 10, id="invoice-1")`` is any of the async verbs. A forked
        child has one of its own. `close` ends it.
        """
        return self._portal

    def close(self) -> None:
        """
        End this process's `portal`: drain, export, and give back what it uses. The next use starts it again.

        Where it is not called, the end of the process does it.
        """
        self.portal().close()

    async def _is_booked(self, call: Call) -> bool:
        """End *call* and wait for its receipt, bounded; False where it holds something and the ledger has no end."""
        ending = call.expects_ending()
        self.runtime().finish(call)
        try:
            # Not wait_for(), which on Python 3.11 swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(self.end_timeout_s):
                receipt = await asyncio.shield(ending)
        except TimeoutError:
            return False
        return receipt is not None or not call.has_hold


def _root(work: Work) -> Metering:
    """What the work belongs to: nothing else is one."""
    return cast("Metering", work)
