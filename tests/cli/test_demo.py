"""demo: what it needs, and what it says where it cannot run."""

from __future__ import annotations

import socket
import sys

import pytest

from tests.cli.commands import Run


def test_tell_that_the_port_is_taken(run: Run) -> None:
    """A port that somebody else has is named, with the way out."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, errors = run("demo", "--port", str(port))
    assert code == 2
    assert errors == (
        f"asgi-metering: Port {port} cannot be used: Address already in use. Choose another, or 0 for a free one.\n"
    )


def test_tell_what_the_demo_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its server the demo names the extra to install."""
    for module in ("run", "servers"):
        monkeypatch.delitem(sys.modules, f"asgi_metering.demo.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, output, errors = run("demo")
    assert (code, output) == (2, "")
    assert "The demo" in errors
    assert "asgi-metering[demo]" in errors
