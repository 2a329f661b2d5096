"""
Discretion: whose numbers an answer may tell (S0.40, DESIGN 10 "only the caller's own account").

Others may pay for a caller: the platform, or the owner of what is visited. What these have is theirs to know. Knows
who pays a call, or would have; changes words and numbers of an answer, and nothing that is decided.
"""

from __future__ import annotations

from asgi_metering.call import Call
from asgi_metering.decisions import Reason, Refusal
from asgi_metering.sources import Payer, PaymentSource, Wallet

__all__ = ["MONEY", "discreet", "own_accounts", "tells_balance", "without_numbers"]

MONEY = frozenset({Reason.CREDITS, Reason.ALLOWANCE})
"""Reasons whose numbers are of an account."""


def tells_balance(call: Call) -> bool:
    """Whether what is left to the payer of *call*, which was admitted, may be told to its caller."""
    if call.charge is None or not call.charge.has_payers:
        return True
    payer = call.paid_by
    # Of an allowance for each payer that is the call's own account, though another one's credential is used.
    paid = None if payer is None or call.decision is None else call.accounts.get(payer.name) == call.decision.payer
    return not paid or _is_told(call, payer)


def own_accounts(call: Call) -> set[str | None]:
    """The accounts of which a caller may know everything: its own, and what pays its *call* if that is told."""
    own: set[str | None] = set() if call.caller is None else {call.caller.payer}
    return {*own, call.payer} if not call.admitted or tells_balance(call) else own


def discreet(call: Call, refusal: Refusal) -> Refusal:
    """*refusal* of *call*, or of its growth, without what the account of another payer has."""
    charge = call.charge
    if charge is None or not charge.has_payers or refusal.reason not in MONEY:
        return refusal
    if call.admitted:
        payer, is_told = call.paid_by, tells_balance(call)
    else:
        source = _refusing(charge.sources, refusal)
        payer, is_told = source.payer, source.each or _is_told(call, source.payer)
    if payer is None or is_told:
        return refusal
    return without_numbers(refusal, f"This call needs more than its payer '{payer.name}' has left.")


def without_numbers(refusal: Refusal, told: str) -> Refusal:
    """*refusal* without what an account has, held or may use; *told* says it in words."""
    words = told if refusal.detail is None else refusal.detail
    return refusal._replace(available=None, held=None, limit=None, detail=words)


def _is_told(call: Call, payer: Payer | None) -> bool:
    if payer is None or payer.account is None or payer.told:
        return True
    return call.caller is not None and call.accounts.get(payer.name) == call.caller.payer


def _refusing(sources: tuple[PaymentSource, ...], refusal: Refusal) -> PaymentSource:
    """Whose words a refusal of all *sources* is in: of the first wallet, or where there is none of the last of them."""
    wallets = [source for source in sources if isinstance(source, Wallet)]
    return wallets[0] if wallets and refusal.reason is Reason.CREDITS else sources[-1]
