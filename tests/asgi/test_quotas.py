"""What upstreams still allow, over HTTP."""

from __future__ import annotations

import asyncio
import math
import re
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from asgi_metering.asgi.quotas import page, quotas_app
from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.packages import read_package
from asgi_metering.upstream.catalogue import template
from asgi_metering.upstream.readings import QuotaReadings
from asgi_metering.upstream.tracker import QuotaTracker
from tests.upstream.test_usage_log import NOW, clock

EVERYBODY = {"authorize": lambda connection: True}

HEADERS = [
    (b"x-ratelimit-limit-requests", b"60"),
    (b"x-ratelimit-remaining-requests", b"6"),
    (b"x-ratelimit-reset-requests", b"30s"),
    (b"openai-organization", b"org-secret"),
    (b"set-cookie", b"session=secret"),
    (b"authorization", b"Bearer secret"),
]


def get(app: Any, path: str = "/", method: str = "GET", **fields: str) -> Any:
    """One request in process."""

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=fields)

    return asyncio.run(ask())


def test_answer_has_the_shape_that_pages_expect() -> None:
    """Packages, counts by alert, flags, and what headers said by provider, with resets in ISO 8601 or null (S1.48)."""
    readings = QuotaReadings(clock=clock)
    readings.record("openai", HEADERS, 200, NOW)
    readings.record("groq", [(b"retry-after", b"7")], 429, NOW)
    packages = [
        read_package({"provider_id": "kilo", "total_credits": 5, "expiry_date": "2025-08-20"}, "gone"),
        read_package({"provider_id": "acme", "total_credits": 5}, "fine"),
    ]
    answer = get(quotas_app(QuotaTracker(packages, readings=readings, clock=clock), **EVERYBODY))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    told = answer.json()
    assert told.keys() == {"packages", "count", "by_alert", "has_use_or_lose", "has_exhausted", "header_snapshots"}
    assert (told["count"], told["by_alert"]) == (2, {"exhausted": 1, "ok": 1})
    assert (told["has_use_or_lose"], told["has_exhausted"]) == (False, True)
    assert [each["package_id"] for each in told["packages"]] == ["gone", "fine"]
    openai = told["header_snapshots"]["openai"]
    assert {name: openai[name] for name in openai if name.endswith(("requests", "tokens"))} == {
        "limit_requests": 60,
        "remaining_requests": 6,
        "reset_requests": "2025-08-21T12:40:30Z",
        "limit_tokens": None,
        "remaining_tokens": None,
        "reset_tokens": None,
    }
    assert (openai["dialect"], openai["retry_after_seconds"]) == ("openai", None)
    assert told["header_snapshots"]["groq"]["retry_after_seconds"] == 7
    assert "secret" not in answer.text


def test_answer_hides_what_looks_like_a_credential() -> None:
    """A key that somebody wrote into the catalogue is not shown, whatever its field is called (S1.50)."""
    entry = {"api_key": "secret", "Authorization": "secret", "clientSecret": {"a": "secret"}, "region": "eu"}
    answer = get(quotas_app(QuotaTracker([read_package(entry, "p")]), **EVERYBODY))
    assert answer.json()["packages"][0]["extras"] == {"region": "eu"}
    assert "secret" not in answer.text


def test_answer_is_never_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No catalogue, a broken one, and a tracker that fails are 200 and no list; the template counts 11 (S1.49)."""
    path = tmp_path / "quotas.json"
    app = quotas_app(QuotaTracker(path), **EVERYBODY)
    empty = get(app).json()
    assert (empty["packages"], empty["count"], empty["by_alert"]) == ([], 0, {})
    path.write_text(template())
    full = get(app).json()
    assert (full["count"], full["by_alert"]) == (11, {"ok": 11})
    path.write_text("{")
    assert get(app).json()["count"] == 11

    def fails() -> object:
        raise RuntimeError("what now?")

    for broken in (fails, lambda: {"packages": [date(2030, 1, 1)]}, lambda: {"packages": [math.nan]}):
        monkeypatch.setattr(app.tracker, "snapshot", broken)
        answer = get(app)
        assert (answer.status_code, answer.json()) == (200, empty)


def test_only_who_is_authorized_may_look() -> None:
    """Both the JSON and the page ask the authorizer, sync or async; there is no default (S1.52)."""

    async def authorize(connection: Any) -> bool:
        return bool(connection.headers.get("x-staff") == "yes")

    app = quotas_app(QuotaTracker(), authorize=authorize)
    for path in ("/", "/dashboard"):
        assert get(app, path).status_code == 403
        assert get(app, path, **{"x-staff": "yes"}).status_code == 200
    with pytest.raises(ConfigurationError, match="authorize=None cannot be called"):
        quotas_app(QuotaTracker(), authorize=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="There is no tracker to show"):
        quotas_app(None, **EVERYBODY)


def test_page_is_one_file_that_asks_beside_itself() -> None:
    """It loads nothing, asks each minute beside itself, sorts by urgency, has empty and error states (S1.51)."""
    text = page().decode()
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", text)
    assert 'const ORDER = ["use_or_lose", "exhausted", "topup", "watch", "ok"];' in text
    assert "EVERY_MS = 60000" in text
    assert 'location.pathname.replace(/\\/dashboard\\/?$/, "")' in text
    for field in (
        "remaining",
        "total",
        "days_until_expiry",
        "burn_per_day",
        "projected_days_left",
        "source",
        "confidence",
    ):
        assert f"each.{field}" in text
    assert "There are no packages" in text
    assert "could not be asked for" in text


def test_page_puts_names_in_as_text_alone() -> None:
    """Nothing of a catalogue becomes markup: there is no innerHTML, and the policy lets nothing else in (S1.52)."""
    text = page().decode()
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval", text)
    answer = get(quotas_app(QuotaTracker(), **EVERYBODY), "/dashboard")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'unsafe-inline'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.content == page()


def test_app_is_mounted_anywhere() -> None:
    """Under a path of one's own both answers are found, and a metering around it changes nothing (S1.51)."""
    outer = Starlette(routes=[Mount("/api/quotas", quotas_app(QuotaTracker(), **EVERYBODY))])
    assert get(outer, "/api/quotas/").json()["count"] == 0
    assert get(outer, "/api/quotas/dashboard").content == page()
    assert get(outer, "/api/quotas/other").status_code == 404


@pytest.mark.parametrize(
    ("path", "method", "expected"),
    [
        ("/", "HEAD", 200),
        ("/dashboard/", "HEAD", 200),
        ("/", "POST", 405),
        ("/else", "GET", 404),
        ("/else", "POST", 404),
    ],
)
def test_app_is_looked_at_alone(path: str, method: str, expected: int) -> None:
    """Other methods and paths are refused, and HEAD has no body."""
    answer = get(quotas_app(QuotaTracker(), **EVERYBODY), path, method)
    assert answer.status_code == expected
    assert (answer.content == b"") == (method == "HEAD")
    assert answer.headers.get("allow") == ("GET, HEAD" if expected == 405 else None)


def test_app_answers_a_lifespan_and_closes_websockets() -> None:
    """Alone under a server it starts and stops as any application."""

    async def play(scope: dict[str, Any], *messages: dict[str, Any]) -> list[str]:
        incoming, sent = iter(messages), []

        async def receive() -> dict[str, Any]:
            return next(incoming)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message["type"])

        await quotas_app(QuotaTracker(), **EVERYBODY)(scope, receive, send)
        return sent

    told = asyncio.run(play({"type": "lifespan"}, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}))
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert asyncio.run(play({"type": "websocket"})) == ["websocket.close"]
