"""Proofs of a whole state, as several tests of stores need them."""

from __future__ import annotations

from asgi_metering.rules.conservation import discrepancies, ledger_discrepancies
from asgi_metering.rules.state import State

__all__ = ["assert_conserved"]


def assert_conserved(state: State) -> None:
    """Every account can be proven from its rows and from its ledger, whose lines are numbered without a gap."""
    for key, account in state.accounts.items():
        grants = [*state.grants.get(key, {}).values(), *state.closed_grants.get(key, {}).values()]
        windows = [row for place, row in state.allowances.items() if place[:2] == key]
        assert discrepancies(account, grants, state.live_holds(key), windows) == []
        lines = state.entries.get(key, [])
        assert ledger_discrepancies(account, grants, state.checkpoints.get(key), lines) == []
        assert [line.number for line in lines] == list(range(1, account.entries + 1))
