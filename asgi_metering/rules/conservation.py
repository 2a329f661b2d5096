"""
Conservation: the proof that an account's sums are the sums of its rows.

``granted - settled - expired - held = available`` holds by definition of available; what must be proven is that
each of the four is what the grants and the live holds say. Does not mend anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from asgi_metering.receipts import Source
from asgi_metering.rules.state import Account, Grant, Hold

__all__ = ["discrepancies"]


def discrepancies(account: Account, grants: Iterable[Grant], live_holds: Iterable[Hold]) -> list[str]:
    """
    Compare an account's sums with its rows; every sentence names one that is wrong. None: the books balance.

    Args:
        account: The account's row.
        grants: All of its grants, closed ones included.
        live_holds: Its holds that have not ended, those in doubt included.
    """
    grants = list(grants)
    begun = [grant for grant in grants if grant.begun]
    kept = [part for hold in live_holds for part in hold.parts if part.source is Source.GRANT]
    sums = {
        "granted": (account.granted, sum(grant.amount for grant in begun)),
        "settled": (account.settled, sum(grant.settled for grant in grants) + account.debt),
        "expired": (account.expired, sum(grant.expired for grant in grants)),
        "held by grants": (account.held, sum(grant.held for grant in grants)),
        "held by live holds": (account.held, sum(part.amount for part in kept)),
    }
    wrong = [
        f"{account.payer!r} in {account.unit!r}: {what} is {stored} in the account and {proven} in its rows."
        for what, (stored, proven) in sums.items()
        if stored != proven
    ]
    wrong.extend(
        f"{account.payer!r} in {account.unit!r}: grant {grant.id!r} is overdrawn by {-grant.free}."
        for grant in grants
        if grant.free < 0
    )
    if account.debt and any(grant.free and grant.begun and grant.expires_at > account.seen_at for grant in grants):
        wrong.append(f"{account.payer!r} in {account.unit!r}: debt of {account.debt} beside free units.")
    return wrong
