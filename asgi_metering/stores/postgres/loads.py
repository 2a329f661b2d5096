"""
The statements that lock and load, for one schema: what a batch wants, and what one operation needs at its turn.

Every row is looked up by a key or an index. Knows how tables hang together, and no rule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final
from zlib import crc32

from asgi_metering.rules.operations import Sweep
from asgi_metering.rules.state import AccountKey, AllowanceKey, BucketKey, Checkpoint, Table
from asgi_metering.stores.postgres.link import Statement
from asgi_metering.stores.postgres.statements import Statements, array
from asgi_metering.stores.postgres.wants import Wants
from asgi_metering.stores.rows import MAPS

__all__ = ["Loads"]

_ROUNDING_S: Final = 1.0
"""Beyond it no two ways to add up the same times differ: one is for the index, the other is the rule's own."""

_PAST: Final = {
    Table.LEASE: "WHERE t.expires_at <= $1::float8 ORDER BY t.expires_at LIMIT $2::bigint",
    Table.COUNTER: (
        'WHERE t."end" + (t."end" - t.start) <= $1::float8 ORDER BY t."end" + (t."end" - t.start) LIMIT $2::bigint'
    ),
    Table.CHARGE_KEY: (
        f'WHERE t.members = 0 AND t."end" <= $1::float8 - $3::float8 + {_ROUNDING_S} '
        'AND t."end" + $3::float8 <= $1::float8 ORDER BY t."end", t.key LIMIT $2::bigint'
    ),
    Table.IDEMPOTENCY: (
        "WHERE t.expires_at <= $1::float8 AND t.receipt IS NOT NULL ORDER BY t.expires_at, t.key LIMIT $2::bigint"
    ),
    Table.READING: (
        "WHERE t.observed_at + $3::float8 <= $1::float8 ORDER BY t.observed_at, t.series, t.part LIMIT $2::bigint"
    ),
}


def _arrays(types: Sequence[str], keys: Collection[Sequence[Any]]) -> tuple[str, ...]:
    """One array for each column of *keys*."""
    columns: Iterable[Sequence[Any]] = zip(*keys, strict=True) if keys else [()] * len(types)
    return tuple([array(kind, column) for kind, column in zip(types, columns, strict=True)])


class Loads:
    """
    The statements for one schema.

    Args:
        schema: Its name. Locks of other schemas have other numbers.

    Attributes:
        statements: Those that write.
    """

    def __init__(self, schema: str) -> None:
        self.statements = Statements(schema)
        self._seed = crc32(schema.encode())
        table = self.statements.table
        self._account, self._hold = table(Table.ACCOUNT), table(Table.HOLD)
        self._allowance, self._entry = table(Table.ALLOWANCE), table(Table.ENTRY)
        self._event_times = f"SELECT t.id, t.at, '{{}}', t.claimed_until, t.acknowledged_at FROM {table(Table.EVENT)} t"  # noqa: S608
        self._lock = self._lock_text()

    # -- what a batch wants --------------------------------------------------------------------------------

    def _lock_text(self) -> str:
        return f"""
            SELECT sorted.id, pg_advisory_xact_lock(sorted.lock) FROM (
                SELECT DISTINCT named.id, hashtextextended(named.lock COLLATE "C", {self._seed}) AS lock FROM (
                    SELECT NULL::text, unnest($1::text[])
                    UNION ALL
                    SELECT h.id, v.lock FROM {self._hold} h, LATERAL (VALUES
                        ('a' || h.payer || chr(31) || h.unit),
                        (CASE WHEN h.charge_key <> '' THEN 'k' || h.charge_key END),
                        (CASE WHEN h.idempotency_key <> '' THEN 'i' || h.idempotency_key END)
                    ) AS v(lock) WHERE h.id = ANY($2::text[]) AND v.lock IS NOT NULL
                    UNION ALL
                    SELECT h.id, 'c' || c.key FROM {self._hold} h, unnest(h.counter_keys) AS c(key)
                    WHERE h.id = ANY($3::text[])
                ) AS named(id, lock)
                ORDER BY lock
            ) AS sorted
        """  # noqa: S608 -- names of our own

    def lock(self, wants: Wants) -> Statement:
        """
        Wait for all locks of a batch, in one order for everybody, until the transaction ends.

        Returns the ids of the holds whose accounts and windows are among them, each at least once.

        Locks by name, and not of rows: a row that is not there yet can be locked, and looking changes nothing.
        """
        values = (list(wants.locks), list(wants.holds), list(wants.pinned))
        return Statement(self._lock, tuple([array("text", names) for names in values]))

    def time(self) -> Statement:
        """The server's time. Behind the locks, so that time and changes have one order."""
        return Statement("SELECT extract(epoch FROM clock_timestamp())::float8")

    def wanted(self, wants: Wants, since: float | None) -> Iterable[tuple[Statement, str]]:
        """
        Load all that *wants* names, each statement with its table.

        Args:
            wants: Of a batch.
            since: Leases that ended before this are left out; None is the beginning of the transaction.
        """
        holds, select = wants.holds, self.statements.select
        if holds:
            yield select(Table.HOLD, "WHERE t.id = ANY($1::text[])", array("text", list(holds))), Table.HOLD
        if holds or wants.accounts:
            yield self.books(wants.accounts, holds), Table.ACCOUNT
            yield self.open_grants(wants.accounts, holds), Table.GRANT
        if wants.grants:
            yield self.grants(wants.grants), Table.GRANT
        if wants.windows or holds:
            yield self.windows(wants.windows, holds), Table.ALLOWANCE
        if wants.rolling:
            yield self.rolling(wants.rolling), Table.ALLOWANCE
        if wants.counters or wants.pinned:
            yield self._counters(wants.counters, wants.pinned), Table.COUNTER
        if wants.pools:
            rest = "WHERE t.pool = ANY($1::text[]) AND t.expires_at > "
            rest += "coalesce($2::float8, extract(epoch FROM transaction_timestamp())::float8)"
            yield select(Table.LEASE, rest, array("text", list(wants.pools)), _number(since)), Table.LEASE
        if wants.readings:
            yield select(Table.READING, ""), Table.READING
        for table, keys in wants.texts.items():
            if keys:
                (key,) = MAPS[table].key
                yield select(table, f"WHERE t.{key} = ANY($1::text[])", array("text", list(keys))), table

    def _of(self, keys: Collection[AccountKey], holds: Collection[str]) -> tuple[str, tuple[str, ...]]:
        """The accounts *keys*, and those of *holds*, as rows (payer, unit), each once."""
        text, values = "SELECT * FROM unnest($1::text[], $2::text[])", _arrays(("text", "text"), keys)
        if not holds:
            return f"({text}) AS k(payer, unit)", values
        text += f" UNION SELECT h.payer, h.unit FROM {self._hold} h WHERE h.id = ANY($3::text[])"  # noqa: S608
        return f"({text}) AS k(payer, unit)", (*values, array("text", list(holds)))

    def books(self, keys: Collection[AccountKey], holds: Collection[str] = ()) -> Statement:
        """Accounts, those of *holds* as well."""
        wanted, values = self._of(keys, holds)
        return self.statements.select(Table.ACCOUNT, f"JOIN {wanted} ON t.payer = k.payer AND t.unit = k.unit", *values)

    def open_grants(self, keys: Collection[AccountKey], holds: Collection[str] = ()) -> Statement:
        """The open grants of accounts, those of *holds* as well."""
        wanted, values = self._of(keys, holds)
        return self.statements.select(
            Table.GRANT, f"JOIN {wanted} ON t.payer = k.payer AND t.unit = k.unit WHERE t.is_open", *values
        )

    def grants(self, keys: Collection[tuple[str, str, str]]) -> Statement:
        """Grants by key, open or closed."""
        return self.statements.select(
            Table.GRANT,
            "JOIN unnest($1::text[], $2::text[], $3::text[]) AS k(payer, unit, id) "
            "ON t.payer = k.payer AND t.unit = k.unit AND t.id = k.id",
            *_arrays(("text", "text", "text"), keys),
        )

    def windows(self, keys: Collection[AllowanceKey], holds: Collection[str]) -> Statement:
        """Allowance windows by key, and those that the parts of *holds* name."""
        text = "SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::float8[])"
        values = _arrays(("text", "text", "text", "float8"), keys)
        if holds:
            text += (
                f" UNION SELECT h.payer, h.unit, p.name, p.start FROM {self._hold} h, "  # noqa: S608
                "unnest(h.allowance_names, h.allowance_starts) AS p(name, start) WHERE h.id = ANY($5::text[])"
            )
            values = (*values, array("text", list(holds)))
        return self.statements.select(
            Table.ALLOWANCE,
            f"JOIN ({text}) AS k(payer, unit, name, start) "
            "ON t.payer = k.payer AND t.unit = k.unit AND t.name = k.name AND t.start = k.start",
            *values,
        )

    def rolling(self, keys: Collection[BucketKey]) -> Statement:
        """The last window of each allowance."""
        return Statement(
            f"SELECT {self.statements.fields(Table.ALLOWANCE)} "  # noqa: S608
            "FROM unnest($1::text[], $2::text[], $3::text[]) AS k(payer, unit, name) CROSS JOIN LATERAL "
            f"(SELECT w.* FROM {self._allowance} w WHERE w.payer = k.payer AND w.unit = k.unit AND w.name = k.name "
            "ORDER BY w.start DESC LIMIT 1) AS t",
            _arrays(("text", "text", "text"), keys),
        )

    def _counters(self, keys: Collection[str], holds: Collection[str]) -> Statement:
        values: tuple[str, ...]
        wanted, values = "SELECT unnest($1::text[])", (array("text", list(keys)),)
        if holds:
            wanted += (
                f" UNION SELECT c.key FROM {self._hold} h, unnest(h.counter_keys) AS c(key) "  # noqa: S608
                "WHERE h.id = ANY($2::text[])"
            )
            values = (*values, array("text", list(holds)))
        return self.statements.select(Table.COUNTER, f"JOIN ({wanted}) AS k(key) ON t.key = k.key", *values)

    # -- what one operation needs --------------------------------------------------------------------------

    def lines_of(self, key: AccountKey, ref: str) -> Statement:
        """The ledger lines about one call, grant or posting, oldest first."""
        rest = "WHERE t.payer = x.payer AND t.unit = x.unit AND t.ref = x.ref ORDER BY t.number"
        return self.statements.select(
            Table.ENTRY,
            f", unnest($1::text[], $2::text[], $3::text[]) AS x(payer, unit, ref) {rest}",
            *_arrays(("text", "text", "text"), [(*key, ref)]),
        )

    def paid_grants(self, key: AccountKey, amount: int) -> Statement:
        """Grants that were spent from, the last to burn first, until they make up *amount*."""
        return Statement(
            f"SELECT {self.statements.fields(Table.GRANT)} FROM ("  # noqa: S608
            "SELECT g.*, sum(g.settled) OVER (ORDER BY g.priority DESC, g.expires_at DESC, g.number DESC) - g.settled "
            f"AS before FROM {self.statements.table(Table.GRANT)} g, unnest($1::text[], $2::text[]) AS k(payer, unit) "
            "WHERE g.payer = k.payer AND g.unit = k.unit AND g.settled > 0"
            ") AS t WHERE t.before < $3::bigint",
            (*_arrays(("text", "text"), [key]), str(amount)),
        )

    def free_events(self, now: float, limit: int) -> Statement:
        """Events that nobody has claimed, oldest first."""
        return self.statements.select(
            Table.EVENT,
            "WHERE t.acknowledged_at IS NULL AND t.claimed_until <= $1::float8 ORDER BY t.position LIMIT $2::bigint",
            _number(now),
            str(limit),
        )

    def events(self, ids: Sequence[str]) -> Statement:
        """Events by id, without what they say: the rules look at the times alone."""
        text = f"{self._event_times} WHERE t.id = ANY($1::text[])"
        return Statement(text, (array("text", list(ids)),))

    def _overdue(self, taken: str) -> str:
        """
        The overdue holds ``t`` of accounts ``k``, in the order in which the policy ends them.

        An account that has seen a later time than now decides by that.
        """
        return (
            "FROM unnest($1::text[], $2::text[]) AS k(payer, unit) "  # noqa: S608 -- names of our own
            f"LEFT JOIN {self._account} a ON a.payer = k.payer AND a.unit = k.unit CROSS JOIN LATERAL "
            f"(SELECT h.* FROM {self._hold} h WHERE h.receipt IS NULL AND h.payer = k.payer AND h.unit = k.unit "
            f"AND h.expires_at {taken}) AS t"
        )

    def overdue_holds(self, keys: Sequence[AccountKey], now: float, limit: int) -> Statement:
        """Of each account the first *limit* overdue holds."""
        overdue = self._overdue("<= greatest($3::float8, a.seen_at) ORDER BY h.due_at, h.id LIMIT $4::bigint")
        return Statement(
            f"SELECT {self.statements.fields(Table.HOLD)} {overdue}",
            (*_arrays(("text", "text"), keys), _number(now), str(limit)),
        )

    def overdue_windows(self, keys: Sequence[AccountKey], now: float, limit: int) -> Statement:
        """The allowance windows that the parts of `overdue_holds` name."""
        overdue = self._overdue("<= greatest($3::float8, a.seen_at) ORDER BY h.due_at, h.id LIMIT $4::bigint")
        return Statement(
            f"SELECT DISTINCT {self.statements.fields(Table.ALLOWANCE, 'w')} {overdue} "
            "CROSS JOIN LATERAL unnest(t.allowance_names, t.allowance_starts) AS p(name, start) "
            f"JOIN {self._allowance} w ON w.payer = t.payer AND w.unit = t.unit AND w.name = p.name "
            "AND w.start = p.start",
            (*_arrays(("text", "text"), keys), _number(now), str(limit)),
        )

    def next_holds(self, keys: Sequence[AccountKey], now: float) -> Statement:
        """Of each account the next hold that will be overdue."""
        following = self._overdue("> greatest($3::float8, a.seen_at) ORDER BY h.expires_at LIMIT 1")
        return Statement(
            f"SELECT {self.statements.fields(Table.HOLD)} {following}", (*_arrays(("text", "text"), keys), _number(now))
        )

    # -- sweeping ------------------------------------------------------------------------------------------

    def swept_accounts(self, ask: Sweep, now: float | None, most: int) -> Statement:
        """The accounts, (payer, unit), that a sweep will change: at most *most* by overdue holds, the needy first."""
        clock = "(SELECT coalesce($1::float8, extract(epoch FROM clock_timestamp())::float8) AS now) AS c"
        text = f"""
            (SELECT h.payer, h.unit FROM {self._hold} h, {clock}
             WHERE h.receipt IS NULL AND h.expires_at <= c.now GROUP BY h.payer, h.unit
             ORDER BY bool_or(h.due_at <= c.now OR h.state = 'held') DESC, h.payer, h.unit LIMIT $2::bigint)
            UNION
            (SELECT o.payer, o.unit FROM (SELECT h.payer, h.unit FROM {self._hold} h, {clock}
             WHERE h.ended_at <= c.now - $4::float8 + {_ROUNDING_S} ORDER BY h.ended_at LIMIT $3::bigint) AS o)
            UNION
            (SELECT o.payer, o.unit FROM (SELECT w.payer, w.unit FROM {self._allowance} w, {clock}
             WHERE w.held = 0 AND w."end" <= c.now - $5::float8 + {_ROUNDING_S}
             ORDER BY w."end", w.payer, w.unit, w.name, w.start LIMIT $3::bigint) AS o)
            UNION
            (SELECT DISTINCT e.payer, e.unit FROM {self._entry} e, {clock}
             WHERE e.at <= c.now - $6::float8 + {_ROUNDING_S} ORDER BY e.payer, e.unit LIMIT $3::bigint)
        """  # noqa: S608
        kept = (ask.keep_holds_s, ask.keep_windows_s, ask.keep_entries_s)
        return Statement(text, (_number(now), str(most), str(ask.limit), *map(_number, kept)))

    def overdue_accounts(self, now: float) -> Statement:
        """All accounts, (payer, unit), with overdue holds, in order."""
        return Statement(
            f"SELECT DISTINCT h.payer, h.unit FROM {self._hold} h "  # noqa: S608
            "WHERE h.receipt IS NULL AND h.expires_at <= $1::float8 ORDER BY h.payer, h.unit",
            (_number(now),),
        )

    def old_holds(self, now: float, ask: Sweep) -> Statement:
        """Ended holds that were kept long enough."""
        return self.statements.select(
            Table.HOLD,
            f"WHERE t.ended_at <= $1::float8 - $2::float8 + {_ROUNDING_S} AND t.ended_at + $2::float8 <= $1::float8 "
            "ORDER BY t.ended_at LIMIT $3::bigint",
            _number(now),
            _number(ask.keep_holds_s),
            str(ask.limit),
        )

    def delivered_events(self, now: float, ask: Sweep) -> Statement:
        """Acknowledged events that were kept long enough, as `events`."""
        return Statement(
            f"{self._event_times} WHERE t.acknowledged_at <= $1::float8 - $2::float8 + {_ROUNDING_S} "
            "AND t.acknowledged_at + $2::float8 <= $1::float8 ORDER BY t.acknowledged_at, t.id LIMIT $3::bigint",
            (_number(now), _number(ask.keep_events_s), str(ask.limit)),
        )

    def past_windows(self, now: float, ask: Sweep) -> Statement:
        """Allowance windows that were kept long enough."""
        return self.statements.select(
            Table.ALLOWANCE,
            f'WHERE t.held = 0 AND t."end" <= $1::float8 - $2::float8 + {_ROUNDING_S} '
            'AND t."end" + $2::float8 <= $1::float8 '
            'ORDER BY t."end", t.payer, t.unit, t.name, t.start LIMIT $3::bigint',
            _number(now),
            _number(ask.keep_windows_s),
            str(ask.limit),
        )

    def past(self, table: str, now: float, ask: Sweep) -> Statement:
        """Rows of *table* that do not matter any more."""
        kept_s = {Table.CHARGE_KEY: ask.keep_holds_s, Table.READING: ask.keep_readings_s}.get(table)
        more = () if kept_s is None else (_number(kept_s),)
        return self.statements.select(table, _PAST[table], _number(now), str(ask.limit), *more)

    def old_accounts(self, now: float, ask: Sweep) -> Statement:
        """Accounts, (payer, unit), with ledger lines that were kept long enough."""
        return Statement(
            f"SELECT DISTINCT e.payer, e.unit FROM {self._entry} e WHERE e.at <= $1::float8 "  # noqa: S608
            "ORDER BY e.payer, e.unit LIMIT $2::bigint",
            (_number(now - ask.keep_entries_s), str(ask.limit)),
        )

    def checkpoints(self, keys: Sequence[AccountKey]) -> Statement:
        """The checkpoints of accounts."""
        wanted, values = self._of(keys, ())
        return self.statements.select(
            Table.CHECKPOINT, f"JOIN {wanted} ON t.payer = k.payer AND t.unit = k.unit", *values
        )

    def oldest_lines(self, keys: Sequence[AccountKey], limit: int) -> Statement:
        """The first *limit* ledger lines of each account."""
        return Statement(
            f"SELECT {self.statements.fields(Table.ENTRY)} FROM unnest($1::text[], $2::text[]) AS k(payer, unit) "  # noqa: S608
            f"CROSS JOIN LATERAL (SELECT e.* FROM {self._entry} e WHERE e.payer = k.payer AND e.unit = k.unit "
            "ORDER BY e.number LIMIT $3::bigint) AS t ORDER BY t.payer, t.unit, t.number",
            (*_arrays(("text", "text"), keys), str(limit)),
        )

    def folded(self, checkpoints: Sequence[Checkpoint]) -> Statement:
        """Take out the ledger lines that *checkpoints* stand for."""
        return Statement(
            f"DELETE FROM {self._entry} t USING unnest($1::text[], $2::text[], $3::bigint[]) AS x(payer, unit, number) "  # noqa: S608
            "WHERE t.payer = x.payer AND t.unit = x.unit AND t.number <= x.number",
            _arrays(("text", "text", "bigint"), [row[:3] for row in checkpoints]),
        )


def _number(value: float | None) -> str | None:
    return None if value is None else repr(float(value))
