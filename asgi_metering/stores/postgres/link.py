"""
One connection, and the way to send it several statements in one round trip.

The only place that knows how the driver talks. Statements go out in pipeline mode, with their parameters as text.
Where the server may keep them prepared, it does; otherwise nothing stays on its side of the connection when a
transaction ends: a pooler may give the next one to another server connection. Knows no table and no metering.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asgi_metering.errors import MissingExtraError
from asgi_metering.stores.postgres.prepared import Prepared

if TYPE_CHECKING:
    from psycopg import AsyncConnection
    from psycopg.pq.abc import PGresult

__all__ = ["CutError", "Link", "Statement", "connect", "driver"]

Rows = list[tuple[Any, ...]]

_Encoded = tuple[str, list[bytes | None], bytes | None]
"""A text, its values, and the name that it is run by, if it has one."""

_BINARY: Final = 1


class Statement(NamedTuple):
    """
    One statement of a trip.

    Attributes:
        text: With ``$1``, ``$2``... whose types it says itself.
        values: As text; see `statements.array`.
    """

    text: str
    values: tuple[str | None, ...] = ()


_REPLAN: Final = Statement("DISCARD PLANS")
_FORGET: Final = Statement("DEALLOCATE ALL")


class CutError(Exception):
    """We closed the connection ourselves, because no answer came in time."""


def driver() -> Any:
    """
    The driver's module.

    Raises:
        MissingExtraError: It is not installed, or finds no libpq.
    """
    try:
        import psycopg
    except ImportError as missing:
        raise MissingExtraError("The PostgreSQL store", "postgres") from missing
    return psycopg


async def connect(conninfo: str, connect_timeout_s: float, *, prepares: bool = False) -> Link:
    """
    Connect.

    Args:
        conninfo: As libpq takes it.
        connect_timeout_s: For all addresses together; also for a server that accepts and says nothing.
        prepares: Whether the server may keep statements prepared.

    Raises:
        TimeoutError, psycopg.Error: It cannot be done.
    """
    async with asyncio.timeout(connect_timeout_s):
        connection = await driver().AsyncConnection.connect(conninfo, autocommit=True, prepare_threshold=None)
    return Link(connection, prepares=prepares)


def _unnamed(text: str) -> None:
    """What runs as it is."""


class Link:
    """
    A connection that is open, used by one trip at a time.

    Attributes:
        prepares: Whether the server may keep what is sent with ``prepare``.
        is_open: Whether it can be used. After any failure but a statement's own it cannot: what the server has done
            is not known, and answers and questions would go out of step.
    """

    def __init__(self, connection: AsyncConnection[Any], *, prepares: bool) -> None:
        from psycopg.adapt import Transformer

        self._connection = connection
        self._pgconn = connection.pgconn
        self._transformer = Transformer(connection)
        self._loop = asyncio.get_running_loop()
        self._wake: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self._is_in_step = True
        self._prepared = Prepared()
        self.prepares = prepares
        self.is_open = True
        self._pgconn.nonblocking = 1
        self._pgconn.enter_pipeline_mode()
        self._file = self._pgconn.socket
        self._loop.add_reader(self._file, self._read)

    def replanning(self) -> Sequence[Statement]:
        """What goes into a transaction that has begun, so that no plan becomes older than it may; mostly nothing."""
        return (_REPLAN,) if self.prepares and self._prepared.is_due() else ()

    async def prepare_anew(self, answer_within_s: float) -> bool:
        """
        Have the server forget what is prepared, outside of a transaction; False where that was of no use of late.

        Raises as `trip`.
        """
        if not self._prepared.renew():
            return False
        await self.trip([_FORGET], answer_within_s)
        return True

    async def trip(
        self, statements: Sequence[Statement], answer_within_s: float, *, prepare: bool = False
    ) -> list[Rows]:
        """
        Send *statements*, and return the rows of each. One round trip.

        A statement that fails keeps those behind it from running; what it means for the transaction is the caller's.

        Args:
            statements: In order.
            answer_within_s: For all of them.
            prepare: Whether they come again and again, so that the server may keep them: the caller begins its
                transaction again at the codes of `prepared.FORGOTTEN`, and at `prepared.CHANGED`.

        Raises:
            CutError: No answer came in time.
            UnicodeEncodeError: A value has lone surrogates; nothing was sent.
            psycopg.Error: What the server says about a statement, or that the connection is lost.
        """
        # Before the first of them goes out: a text that cannot be sent shall not cost the connection.
        named = self._prepared.name if prepare and self.prepares else _unnamed
        encoded = [
            (text, [None if value is None else value.encode() for value in values], named(text))
            for text, values in statements
        ]
        timer = self._loop.call_later(answer_within_s, self._cut)
        self._is_in_step = False
        try:
            sent = self._send(encoded)
            self._pgconn.pipeline_sync()
            return self._loaded(sent, await self._answered())
        except BaseException as failure:
            if not self._is_in_step:
                self.close()
            if isinstance(self._failure, CutError):
                raise self._failure from failure
            raise
        finally:
            timer.cancel()

    def _send(self, encoded: Iterable[_Encoded]) -> list[str | None]:
        """Hand it to the driver; returned is, for each result to come, the text that it only prepares, or None."""
        pgconn, prepared, sent = self._pgconn, self._prepared, list[str | None]()
        for text, values, name in encoded:
            if name is None:
                pgconn.send_query_params(text.encode(), values, result_format=_BINARY)
            else:
                if text not in prepared and text not in sent:
                    pgconn.send_prepare(name, text.encode())
                    sent.append(text)
                pgconn.send_query_prepared(name, values, result_format=_BINARY)
            sent.append(None)
        return sent

    async def _answered(self) -> list[PGresult]:
        """The result of each statement; the first ones are read before the last are sent, if they are many."""
        from psycopg.pq import ConnStatus, ExecStatus

        results: list[PGresult] = []
        pgconn = self._pgconn
        while True:
            self._flush()
            while not pgconn.is_busy():
                result = pgconn.get_result()
                if result is None:
                    # The end of one statement's results; or of everything, where the server has said goodbye.
                    if pgconn.status != ConnStatus.OK:
                        raise self._goodbye(results)
                elif result.status == ExecStatus.PIPELINE_SYNC:
                    self._is_in_step = True
                    return results
                else:
                    results.append(result)
            try:
                await self._woken()
            except CutError:
                raise
            except Exception as lost:
                # What came before the end says more than that it ended.
                raise self._goodbye(results, lost) from lost

    def _goodbye(self, results: list[PGresult], lost: Exception | None = None) -> Exception:
        """What the server said before it closed the connection; *lost*, or what libpq says, where it said nothing."""
        from psycopg import OperationalError
        from psycopg.errors import error_from_result
        from psycopg.pq import DiagnosticField, ExecStatus

        if lost is not None:
            while not self._pgconn.is_busy() and (result := self._pgconn.get_result()) is not None:
                results.append(result)
        for result in results:
            # Without a code it is libpq's own.
            if result.status == ExecStatus.FATAL_ERROR and result.error_field(DiagnosticField.SQLSTATE):
                return error_from_result(result)
        return lost or OperationalError(self._pgconn.get_error_message())

    def _flush(self) -> None:
        if self._pgconn.flush():
            self._loop.add_writer(self._file, self._write)

    def _write(self) -> None:
        self._loop.remove_writer(self._file)
        self._ring()

    def _read(self) -> None:
        """Something came; when nobody waits, that the server has gone."""
        try:
            self._pgconn.consume_input()
        except Exception as failure:  # noqa: BLE001 -- it is told to whoever uses the connection next
            self._failure = self._failure or failure
            self._loop.remove_reader(self._file)
            if self._wake is None:
                self.close()
        self._ring()

    def _ring(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _woken(self) -> None:
        if self._failure is None:
            self._wake = self._loop.create_future()
            try:
                await self._wake
            finally:
                self._wake = None
        if self._failure is not None:
            raise self._failure

    def _loaded(self, sent: Sequence[str | None], results: Sequence[PGresult]) -> list[Rows]:
        from psycopg import errors
        from psycopg.pq import ExecStatus

        loaded: list[Rows] = []
        transformer = self._transformer
        for prepared, result in zip(sent, results, strict=True):
            if result.status == ExecStatus.TUPLES_OK:
                transformer.set_pgresult(result)
                loaded.append(transformer.load_rows(0, result.ntuples, tuple))
            elif result.status == ExecStatus.COMMAND_OK:
                if prepared is None:
                    loaded.append([])
                else:
                    self._prepared.is_kept(prepared)
            else:
                raise errors.error_from_result(result)
        return loaded

    # -- the end -------------------------------------------------------------------------------------------

    def _cut(self) -> None:
        """
        Give the server up.

        Not by cancelling: that would ask the same silent server. The kernel closes the connection, whoever waits for
        it is told so at once.
        """
        self._failure = CutError()
        with suppress(OSError), socket.socket(fileno=os.dup(self._file)) as stopped:
            stopped.shutdown(socket.SHUT_RDWR)
        self._ring()

    def close(self) -> None:
        """Close it; an open transaction is rolled back by the server. Calling it again changes nothing."""
        if not self.is_open:
            return
        self.is_open = False
        if not self._loop.is_closed():
            self._loop.remove_reader(self._file)
            self._loop.remove_writer(self._file)
        self._pgconn.finish()
