"""
Clients of a gateway that leave in each phase of a call, under each policy: what the handler did, and what it costs.

The provider is the bundled one, the servers are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.servers import SERVER_KINDS
from tests.servers.app import HOLD
from tests.servers.books import CREDIT, Ended
from tests.servers.gateway import POLICIES
from tests.servers.house import House, house, key

LATE, EARLY = "client gone after the first byte", "client gone before the first byte"
WORDS = 30
MODELS = {"inside": f"echo:words-{WORDS}:slow-40:torn", "told": f"echo:words-{WORDS}", "end": f"echo:words-{WORDS}"}
SLOW = f"echo:words-{WORDS}:slow-40"
PHASES = ("dispatch", "head", "between", "inside", "told", "end")
"""Before the provider is asked; before its first word; between two events; inside of one; behind the usage; never."""


@pytest.fixture(params=SERVER_KINDS)
def gateway(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """The gateway on every kind of server."""
    grace_s = 1 if request.param == "hypercorn" else None
    with house(request.param, tmp_path, app="tests.servers.gateway:app", graceful_timeout_s=grace_s) as running:
        yield running


def leave(gateway: House, policy: str, phase: str) -> None:
    """A client that comes to *phase*, and leaves."""
    payer = gateway.books.grant(f"{policy}-{phase}", HOLD)
    client = gateway.client()
    path = f"/chat/{policy}?phase={phase}&model={MODELS.get(phase, SLOW)}"
    client.send_request("POST", path, headers=key(payer))
    gateway.wait_for("asked", key=payer)
    if phase != "dispatch":
        assert client.read_head().status == 200
    if phase == "between":
        client.read_events(3)
    elif phase == "inside":
        client.read_events(2)
        client.read_body(10)
    elif phase == "told":
        gateway.wait_for("told", key=payer)
    elif phase == "end":
        client.read_rest()
    if phase == "between":
        client.leave_rst()
    else:
        client.leave_fin()
    if phase == "told" and policy == "drain":
        gateway.wait_for("left", key=payer)
    if phase == "dispatch" or policy == "drain":
        gateway.let(payer)


def ended(gateway: House, policy: str, phase: str) -> Ended:
    """How the one call ended."""
    (call,) = gateway.books.ended(f"{policy}-{phase}")
    return call


def check(policy: str, phase: str, call: Ended, full: Ended) -> None:
    """*call* ended as its policy says for a client that left in *phase*; *full* is one whose client stayed."""
    if phase == "end":
        assert call == full, (policy, phase)
        return
    assert call.outcome == "client_gone", (policy, phase)
    if policy == "drain":
        assert (call.reason, call.basis, call.amount) == (full.reason, "usage", full.amount), phase
        return
    assert call.reason in ((LATE,) if phase in ("between", "inside", "told") else (EARLY, LATE)), (policy, phase)
    late = call.reason == LATE
    if policy == "usage":
        # A choice for late ends alone; what was not reported is estimated by the hold.
        told = phase == "told"
        expected = ("usage", full.amount) if told else ("estimate", HOLD * CREDIT)
        assert not late or (call.basis, call.amount) == expected, phase
        return
    amounts = {"none": 0, "hold": HOLD * CREDIT, "estimate": HOLD * CREDIT}
    assert call.basis == policy, (policy, phase)
    if policy in amounts:
        assert call.amount == amounts[policy], (policy, phase)
    elif phase == "told":
        assert call.amount == full.amount
    else:
        assert (0 if phase in ("dispatch", "head") else 1) <= call.amount / CREDIT < WORDS, phase


def test_leave_in_each_phase_under_each_policy(gateway: House) -> None:
    """The table of DESIGN "End of call", row by row, wherever in a call its client leaves."""
    policies = POLICIES if gateway.kind == SERVER_KINDS[0] else ("observed", "drain")
    calls = [(policy, phase) for policy in policies for phase in PHASES]
    for policy, phase in calls:
        leave(gateway, policy, phase)
    full = ended(gateway, policies[0], "end")
    assert (full.outcome, full.reason, full.basis) == ("completed", "completed, usage reported", "usage")
    for policy, phase in calls:
        check(policy, phase, ended(gateway, policy, phase), full)
