"""
Conservation: the proof that an account's sums are the sums of its rows.

``granted - settled - expired - held = available`` holds by definition of available; what must be proven is that
each of the four is what the grants and the live holds say, and once more what the ledger says. Does not mend anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from asgi_metering.receipts import Entry, Source
from asgi_metering.rules.retention import effect
from asgi_metering.rules.state import Account, AllowanceWindow, Checkpoint, Grant, Hold

__all__ = ["LedgerProof", "discrepancies", "ledger_discrepancies"]


def discrepancies(
    account: Account,
    grants: Iterable[Grant],
    live_holds: Iterable[Hold],
    allowances: Iterable[AllowanceWindow] | None = None,
) -> list[str]:
    """
    Compare an account's sums with its rows; every sentence names one that is wrong. None: the books balance.

    Args:
        account: The account's row.
        grants: All of its grants, closed ones included.
        live_holds: Its holds that have not ended, those in doubt included.
        allowances: Its allowance windows; None leaves them out of the proof.
    """
    grants, holds = list(grants), list(live_holds)
    kept: Counter[tuple[Source, str, float]] = Counter()
    for hold in holds:
        for part in hold.parts:
            kept[part.source, part.name, part.start] += part.amount
    wrong = [
        *_wrong_sums(account, grants, kept),
        *_wrong_grants(account, grants, kept),
        *_wrong_holds(holds),
    ]
    if allowances is not None:
        wrong.extend(_wrong_allowances(allowances, kept))
    return [f"{account.payer!r} in {account.unit!r}: {what}" for what in wrong]


def _wrong_sums(account: Account, grants: list[Grant], kept: Counter[tuple[Source, str, float]]) -> Iterable[str]:
    by_holds = sum(amount for (source, _, _), amount in kept.items() if source is not Source.ALLOWANCE)
    overdrawn = sum(amount for (source, _, _), amount in kept.items() if source is Source.DEBT)
    sums = {
        "granted": (account.granted, sum(grant.amount - grant.reversed for grant in grants if grant.begun)),
        "settled": (account.settled, sum(grant.settled for grant in grants) + account.debt),
        "expired": (account.expired, sum(grant.expired for grant in grants)),
        "held by grants": (account.held, sum(grant.held for grant in grants) + overdrawn),
        "held by live holds": (account.held, by_holds),
    }
    for what, (stored, proven) in sums.items():
        if stored != proven:
            yield f"{what} is {stored} in the account and {proven} in its rows."
    if account.debt < 0:
        yield f"the debt of {account.debt} is negative."


def _wrong_grants(account: Account, grants: list[Grant], kept: Counter[tuple[Source, str, float]]) -> Iterable[str]:
    for grant in grants:
        held = kept[Source.GRANT, grant.id, 0.0]
        if grant.held != held:
            yield f"grant {grant.id!r} keeps {grant.held} for holds that keep {held} of it."
        if min(grant.settled, grant.held, grant.expired, grant.reversed) < 0:
            yield f"grant {grant.id!r} has a negative sum."
        if grant.free < 0:
            yield f"grant {grant.id!r} is overdrawn by {-grant.free}."
        if not grant.begun and grant.free != grant.amount:
            yield f"grant {grant.id!r} was used before it began."
        if account.debt and grant.free and grant.begun and grant.expires_at > account.seen_at:
            yield f"debt of {account.debt} beside free units of grant {grant.id!r}."


def _wrong_holds(holds: list[Hold]) -> Iterable[str]:
    for hold in holds:
        parts = sum(part.amount for part in hold.parts)
        if hold.amount != parts:
            yield f"hold {hold.id!r} of {hold.amount} has parts of {parts}."


def _wrong_allowances(allowances: Iterable[AllowanceWindow], kept: Counter[tuple[Source, str, float]]) -> Iterable[str]:
    for window in allowances:
        held = kept[Source.ALLOWANCE, window.name, window.start]
        if window.held != held:
            yield (
                f"allowance {window.name!r} from {window.start} keeps {window.held} for holds that keep {held} of it."
            )
        if window.settled < 0:
            yield f"allowance {window.name!r} from {window.start} has settled {window.settled}, which is negative."


def ledger_discrepancies(
    account: Account, grants: Iterable[Grant], checkpoint: Checkpoint | None, entries: Iterable[Entry]
) -> list[str]:
    """
    Compare an account's sums with its ledger; every sentence names one that is wrong. None: the ledger proves them.

    Args:
        account: The account's row.
        grants: All of its grants, closed ones included.
        checkpoint: What its older lines were folded into, if some were (DESIGN "Retention").
        entries: Its lines behind the checkpoint, oldest first. Those written after *account* was read are left out.
    """
    proof = LedgerProof(account, checkpoint)
    proof.take(entries)
    return proof.discrepancies(grants)


class LedgerProof:
    """
    `ledger_discrepancies` of a ledger that comes in pages.

    Args:
        account: The account's row.
        checkpoint: What its older lines were folded into, if some were.
    """

    def __init__(self, account: Account, checkpoint: Checkpoint | None) -> None:
        self._account = account
        self._number, self._at = (checkpoint.number, checkpoint.at) if checkpoint is not None else (0, 0.0)
        self._sums = Counter(checkpoint.sums if checkpoint is not None else {})
        self._wrong: list[str] = []

    def take(self, entries: Iterable[Entry]) -> None:
        """Take the next lines, oldest first. Those written after the account was read are left out."""
        for line in entries:
            if line.number > self._account.entries:
                break
            if line.number != self._number + 1:
                self._wrong.append(f"line {line.number} follows line {self._number}.")
            if line.at < self._at:
                self._wrong.append(f"line {line.number} is older than the one before it.")
            self._number, self._at = line.number, line.at
            name, amount = effect(line)
            self._sums[name] += amount

    def discrepancies(self, grants: Iterable[Grant]) -> list[str]:
        """What is wrong, once all lines were taken; *grants* are all of the account's."""
        account, sums, wrong = self._account, self._sums, self._wrong
        if self._number != account.entries:
            wrong.append(f"the ledger ends with line {self._number} of {account.entries}.")
        promised = sum(grant.amount for grant in grants if not grant.begun)
        proofs = {
            "given": account.granted + promised,
            "settled": account.settled,
            "expired": account.expired,
        }
        wrong.extend(
            f"{name} is {stored} in the account and {sums[name]} in its ledger."
            for name, stored in proofs.items()
            if sums[name] != stored
        )
        return [f"{account.payer!r} in {account.unit!r}: {what}" for what in wrong]
