"""
Discretion: whose numbers an answer may tell (S0.40, DESIGN 10 "only the caller's own account").

Others may pay for a caller: the platform, or the owner of what is visited. What these have is theirs to know. Knows
who pays a call, or would have; changes words and numbers of an answer, and nothing that is decided.
"""

from __future__ import annotations

from asgi_metering.call import Call
from asgi_metering.decisions import MONEY, Reason, Refusal
from asgi_metering.errors import PayerError
from asgi_metering.sources import Payer, PaymentSource, Wallet

__all__ = ["discreet", "own_accounts", "tells_balance"]


def tells_balance(call: Call) -> bool:
    """Whether what is left to the payer of *call*, which was admitted, may be told to its caller."""
    if call.charge is None or not call.charge.has_payers:
        return True
    try:
        return _is_told(call, call.paid_by)
    except PayerError:
        # Of another route, whose charge key this one shares: nobody here says that it is told.
        return False


def own_accounts(call: Call) -> set[str | None]:
    """The accounts of which a caller may know everything: its own, and what pays its *call* if that is told."""
    own: set[str | None] = set() if call.caller is None else {call.caller.payer}
    return {*own, call.payer} if not call.admitted or tells_balance(call) else own


def discreet(call: Call, refusal: Refusal) -> Refusal:
    """*refusal* of *call*, or of its growth, without what the account of another payer has."""
    charge = call.charge
    if charge is None or not charge.has_payers or refusal.reason not in MONEY:
        return refusal
    payer = call.paid_by if call.admitted else _refusing(charge.sources, refusal).payer
    if payer is None or _is_told(call, payer):
        return refusal
    return without_numbers(refusal, f"This call needs more than its payer '{payer.name}' has left.")


def without_numbers(refusal: Refusal, told: str) -> Refusal:
    """*refusal* without what an account has, held or may use; *told* says it in words."""
    words = told if refusal.detail is None else refusal.detail
    return refusal._replace(available=None, held=None, limit=None, detail=words)


def _is_told(call: Call, payer: Payer | None) -> bool:
    # What is counted of each payer is the call's own, whoever's expense it is.
    if payer is None or payer.account is None or payer.told or call.counts_at_home(payer):
        return True
    return call.caller is not None and call.accounts.get(payer.name) == call.caller.payer


def _refusing(sources: tuple[PaymentSource, ...], refusal: Refusal) -> PaymentSource:
    """Whose words a refusal of all *sources* is in: of the first wallet, or where there is none of the last of them."""
    wallets = [source for source in sources if isinstance(source, Wallet)]
    return wallets[0] if wallets and refusal.reason is Reason.CREDITS else sources[-1]
