"""Quota fields of a provider that a proxy passes through: captured, and kept from the client unless they may pass."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from asgi_metering import billable, metered_app, rate_limited
from asgi_metering.quotas import DIALECTS as SHIPPED
from asgi_metering.quotas import Dialect, DialectRegistry, QuotaLimit, Reading
from asgi_metering.tracking import QuotaTracker
from asgi_metering.upstream import QuotaReadings
from tests.harness.drive import Drive, drive, headers, http_scope
from tests.harness.drive import status as status_of
from tests.pitfalls.stage import staged
from tests.pitfalls.streams import plain

RESET = 1_795_000_060
"""Epoch seconds: the moment that the Anthropic fields name."""

Fields = tuple[tuple[bytes, bytes], ...]

OPENAI: Fields = (
    (b"x-ratelimit-limit-requests", b"60"),
    (b"x-ratelimit-remaining-requests", b"59"),
    (b"X-RateLimit-Reset-Requests", b"1s"),
    (b"x-ratelimit-limit-tokens", b"150000"),
    (b"x-ratelimit-remaining-tokens", b"149984"),
    (b"openai-organization", b"org-secret"),
)

ANTHROPIC: Fields = (
    (b"anthropic-ratelimit-requests-limit", b"50"),
    (b"anthropic-ratelimit-requests-remaining", b"49"),
    (b"anthropic-ratelimit-requests-reset", b"2026-11-18T11:07:40Z"),
    (b"anthropic-ratelimit-input-tokens-limit", b"80000"),
    (b"anthropic-ratelimit-input-tokens-remaining", b"79000"),
    (b"anthropic-organization-id", b"org-secret"),
)

COUNTS = {
    "openai": {"requests": (60, 59), "tokens": (150_000, 149_984)},
    "anthropic": {"requests": (50, 49), "input_tokens": (80_000, 79_000)},
}
"""Limit and remainder of each resource in the fields above."""

DIALECTS = [pytest.param("openai", OPENAI, id="openai"), pytest.param("anthropic", ANTHROPIC, id="anthropic")]

KEPT: Fields = ((b"content-type", b"application/json"), (b"x-request-id", b"req_1"), (b"retry-after", b"7"))
"""What is the client's own in the same response."""


def proxy(fields: Fields, status: int = 200) -> Any:
    """An app that passes a provider's answer through, header fields and all."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [*KEPT, *fields]})
        await send({"type": "http.response.body", "body": b"{}"})

    return plain(app)


def passed(app: Any) -> tuple[Drive, dict[str, Reading]]:
    """One request to *app*, and the readings behind it."""

    async def play() -> tuple[Drive, dict[str, Reading]]:
        async with staged(app) as stage:
            return await stage.drive(), stage.metering.quotas.all()

    return asyncio.run(play())


def counts(reading: Reading) -> dict[str, tuple[int | None, int | None]]:
    """Limit and remainder by resource."""
    return {limit.resource: (limit.limit, limit.remaining) for limit in reading.limits}


def lower(fields: Fields) -> set[tuple[str, str]]:
    """The fields as the client gets them, their names in lower case."""
    return {(name.decode().lower(), value.decode()) for name, value in fields}


def received(ended: Drive) -> set[tuple[str, str]]:
    """The fields that the client got, their names in lower case."""
    return {(name.lower(), value) for name, value in headers(ended.log)}


@pytest.mark.parametrize("status", [200, 429, 529])
@pytest.mark.parametrize(("provider", "fields"), DIALECTS)
def test_capture_and_remove_the_fields_of_a_provider(provider: str, fields: Fields, status: int) -> None:
    """DESIGN 2: a metered route keeps what a provider says of us as a reading, refusals included (S1.44)."""
    ended, readings = passed(metered_app(proxy(fields, status), billable(1)))
    assert status_of(ended.log) == status
    assert set(readings) == {provider}
    reading = readings[provider]
    assert (reading.dialect, reading.status, reading.retry_after_s) == (provider, status, 7)
    assert counts(reading) == COUNTS[provider]
    assert not lower(fields) & received(ended)
    assert not {name for name, _ in lower(fields)} & {name for name, _ in received(ended)}
    assert lower(KEPT) <= received(ended)


def test_capture_and_remove_the_fields_of_a_dialect_of_ones_own() -> None:
    """S1.34, S1.46: a dialect that the metering's readings know is captured here too, and kept from the client."""

    def read_acme(lines: Iterable[tuple[bytes, bytes]], _now: float) -> tuple[QuotaLimit, ...]:
        told = dict(lines)
        return (QuotaLimit(resource="requests", limit=60, remaining=int(told[b"quux-left"])),)

    acme = Dialect(name="acme", marks=(b"quux-",), read=read_acme, private=(b"quux-",))
    readings = QuotaReadings(dialects=DialectRegistry(acme, *SHIPPED.dialects))
    fields = ((b"Quux-Left", b"7"), (b"quux-account", b"secret"))

    async def play() -> tuple[Drive, dict[str, Reading]]:
        app = metered_app(proxy((*fields, *OPENAI)), billable(1))
        async with staged(app, packages=QuotaTracker(readings=readings)) as stage:
            return await stage.drive(), stage.metering.quotas.all()

    ended, told = asyncio.run(play())
    assert counts(told["acme"]) == {"requests": (60, 7)}
    assert not {name for name, _ in lower((*fields, *OPENAI))} & {name for name, _ in received(ended)}


@pytest.mark.parametrize(("provider", "fields"), DIALECTS)
def test_capture_behind_a_limit_alone(provider: str, fields: Fields) -> None:
    """DESIGN 2: a route that is limited and free is metered too: its provider's fields are kept, and not passed on."""
    ended, readings = passed(metered_app(proxy(fields), rate_limited("5/minute")))
    assert counts(readings[provider]) == COUNTS[provider]
    assert not {name for name, _ in lower(fields)} & {name for name, _ in received(ended)}


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize(("provider", "fields"), DIALECTS)
def test_let_fields_pass_where_the_route_says_so(provider: str, fields: Fields, status: int) -> None:
    """With ``forward_quota_headers`` the client has every field as it was, and the reading is kept as well."""
    ended, readings = passed(metered_app(proxy(fields, status), billable(1, forward_quota_headers=True)))
    assert lower((*KEPT, *fields)) <= received(ended)
    assert counts(readings[provider]) == COUNTS[provider]


OWN: Fields = ((b"X-RateLimit-Limit", b"5"), (b"x-ratelimit-remaining", b"4"), (b"x-ratelimit-reset", b"60"))
"""What applications say of limits of their own, by custom; some providers of theirs."""


@pytest.mark.parametrize("part", [billable(1), rate_limited("5/minute")], ids=["billable", "rate_limited"])
def test_let_the_fields_of_the_endpoint_itself_pass(part: Any) -> None:
    """Limits that an endpoint tells of itself are no provider's: the client has them, and they are no reading."""
    ended, readings = passed(metered_app(proxy(OWN), part))
    assert lower((*KEPT, *OWN)) <= received(ended)
    assert readings == {}


@pytest.mark.parametrize(
    ("fields", "part"),
    [((*OWN, *OPENAI), billable(1)), (OWN, billable(1, usage="openai-chat"))],
    ids=["with what only providers say", "where the route names a provider's dialect"],
)
def test_remove_customary_fields_of_a_provider(fields: Fields, part: Any) -> None:
    """DESIGN 2: the customary names are a provider's where its others come too, or the route passes its answers on."""
    ended, readings = passed(metered_app(proxy(fields), part))
    assert received(ended) & lower(fields) == set()
    (reading,) = readings.values()
    assert reading.limits


DRAFTED: Fields = (
    (b"RateLimit", b'"api";r=0;t=55'),
    (b"ratelimit-policy", b'"fixed window";"api";q=500;w=300'),
)
"""As Hugging Face sends them (reference, "IETF RateLimit fields")."""


@pytest.mark.parametrize("parts", [(), (rate_limited("5/minute"),)], ids=["charged", "limited too"])
def test_remove_the_drafts_fields_of_a_provider(parts: tuple[Any, ...]) -> None:
    """DESIGN 2: where a route passes answers on, the draft's fields in them are captured, and never the client's."""
    ended, readings = passed(metered_app(proxy(DRAFTED), billable(1, usage="openai-chat"), *parts))
    (reading,) = readings.values()
    assert (reading.dialect, counts(reading)) == ("ietf", {"api": (500, 0)})
    assert not lower(DRAFTED) & received(ended)
    ours = sorted(name for name, _ in received(ended) if name.startswith("ratelimit"))
    assert ours == (["ratelimit", "ratelimit-policy"] if parts else [])


def test_let_the_drafts_fields_of_the_endpoint_itself_pass() -> None:
    """Where nobody said that answers are passed on, the draft's fields are the application's own."""
    ended, readings = passed(metered_app(proxy(DRAFTED), billable(1)))
    assert lower(DRAFTED) <= received(ended)
    assert readings == {}


def test_read_resets_as_moments() -> None:
    """Captured resets are epoch seconds: Anthropic's are moments, OpenAI's count from the answer (trap 6)."""
    _, readings = passed(metered_app(proxy(ANTHROPIC), billable(1)))
    requests = readings["anthropic"].limit("requests")
    assert requests is not None
    assert requests.reset_at == RESET
    _, readings = passed(metered_app(proxy(OPENAI), billable(1)))
    reading = readings["openai"]
    requests = reading.limit("requests")
    assert requests is not None
    assert reading.received_at is not None
    assert requests.reset_at == reading.received_at + 1


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize("fields", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
def test_leave_a_route_without_a_policy_alone(fields: Fields, status: int) -> None:
    """S2.27: behind the middleware an unmetered route says what it says, and nothing of it is kept."""
    bare = proxy(fields, status)
    ended, readings = passed(bare)
    assert ended.log[0]["headers"] == [*KEPT, *fields]
    assert readings == {}


def test_answer_that_says_nothing_of_quotas_is_no_reading() -> None:
    """A metered response without a provider's fields leaves the readings as they are, ``Retry-After`` or not."""
    ended, readings = passed(metered_app(proxy(()), billable(1)))
    assert readings == {}
    assert lower(KEPT) <= received(ended)


def test_keep_readings_of_several_providers_apart() -> None:
    """Each provider has its latest reading, whatever others said since."""
    answers = [OPENAI, ANTHROPIC]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await proxy(answers.pop(0))(scope, receive, send)

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(1))) as stage:
            await stage.drive()
            await stage.drive()
            readings = stage.metering.quotas.all()
            assert {name: counts(reading) for name, reading in readings.items()} == COUNTS

    asyncio.run(play())


@pytest.mark.parametrize("late", [200, 429])
def test_older_call_never_replaces_the_reading_of_a_newer_one(late: int) -> None:
    """S1.45: the call that began first and is answered last does not overwrite what the later call was told."""
    fields = {left: ((b"x-ratelimit-remaining-requests", left), *OPENAI[:1]) for left in (b"10", b"9", b"8")}

    async def play() -> None:
        begun, answer = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/slow":
                begun.set()
                await answer.wait()
                await proxy(fields[b"10"], late)(scope, receive, send)
            else:
                await proxy(fields[scope["path"][1:].encode()])(scope, receive, send)

        async with staged(metered_app(plain(app), billable(1))) as stage:
            slow = asyncio.ensure_future(stage.drive("/slow"))
            await begun.wait()
            await asyncio.gather(_answered(stage, "/9", answer), slow)
            told = stage.metering.quotas.latest("openai")
            assert told is not None
            assert (counts(told), told.status) == ({"requests": (60, 9)}, 200)
            await stage.drive("/8")
            told = stage.metering.quotas.latest("openai")
            assert told is not None
            assert counts(told) == {"requests": (60, 8)}

    asyncio.run(play())


async def _answered(stage: Any, path: str, then: asyncio.Event) -> None:
    """Drive one request to the end of its response, and set *then*."""
    await drive(stage.app, http_scope(path))
    then.set()
