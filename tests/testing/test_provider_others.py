"""What the bundled provider writes as Groq, Mistral and Gemini: their own fields, usage as asked, and refusals."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from asgi_metering.testing.provider import Provider
from asgi_metering.usage import UsageReader
from tests.testing.support import MESSAGES, PROMPT, PROMPT_TOKENS, ask, events

KEYS = {"authorization": "Bearer sk-any", "x-goog-api-key": "sk-any"}

GROQ = "/openai/v1/chat/completions"
MISTRAL = "/mistral/v1/chat/completions"
GEMINI = "gemini"

VENDORS = [GROQ, MISTRAL, GEMINI]


def said(provider: Provider, vendor: str, model: str, *, stream: bool = False, **more: Any) -> httpx2.Response:
    """One request for *model* in the shape of *vendor*."""
    if vendor != GEMINI:
        return ask(provider, vendor, {"model": model, "messages": MESSAGES, "stream": stream, **more}, headers=KEYS)
    verb = "streamGenerateContent?alt=sse" if stream else "generateContent"
    body = {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [{"role": "user", "parts": [{"text": PROMPT}]}],
        **more,
    }
    return ask(provider, f"/v1beta/models/{model}:{verb}", body, headers=KEYS)


def usages(vendor: str, response: httpx2.Response, *, stream: bool) -> list[Any]:
    """Every usage that was told, wherever the vendor tells it; ``...`` for a chunk without."""
    documents = events(response) if stream else [response.json()]
    if vendor == GEMINI:
        return [each.get("usageMetadata", ...) for each in documents]
    if vendor == GROQ and stream:
        return [each.get("x_groq", {}).get("usage", ...) for each in documents]
    return [each.get("usage", ...) for each in documents]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("vendor", VENDORS)
def test_usage_is_counted_and_read(vendor: str, stream: bool) -> None:
    """What each answer tells is what the provider counted, and what our own reader makes of it."""
    provider = Provider()
    response = said(provider, vendor, "echo:words-6:cached-2:reasoning-3", stream=stream)
    (seen,) = provider.requests
    assert seen.counts is not None
    assert (seen.counts.input, seen.counts.output, seen.usage_sent) == (PROMPT_TOKENS, 9, True)
    reader = UsageReader(response.headers["content-type"])
    reader.feed(response.content)
    reader.end()
    report = reader.report()
    assert report is not None
    assert report.usage is not None
    assert (report.usage.input, report.usage.output, report.model) == (PROMPT_TOKENS, 9, "echo")
    assert (report.usage.cached, report.usage.reasoning) == ((None, None) if vendor == MISTRAL else (2, 3))
    assert (report.complete, report.finish_reason in ("stop", "STOP")) == (True, True)


@pytest.mark.parametrize("vendor", VENDORS)
def test_streams_tell_usage_where_the_vendor_does(vendor: str) -> None:
    """Groq and Mistral tell it on the chunk that ends, unasked; Gemini on every chunk, as the sum so far."""
    told = usages(vendor, said(Provider(), vendor, "echo:words-3", stream=True), stream=True)
    if vendor == GEMINI:
        assert [each["candidatesTokenCount"] for each in told] == [1, 2, 3]
    else:
        assert [each is ... for each in told] == [True] * (len(told) - 1) + [False]


def test_groq_tells_usage_twice_where_it_is_asked_to() -> None:
    """With ``include_usage`` a Groq stream has a chunk of usage behind that of ``x_groq``, with the same counts."""
    options = {"stream_options": {"include_usage": True}}
    documents = events(said(Provider(), GROQ, "echo", stream=True, **options))
    assert documents[-1]["usage"]["completion_tokens"] == documents[-2]["x_groq"]["usage"]["completion_tokens"] == 20


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("vendor", VENDORS)
def test_usage_is_left_out_as_asked(vendor: str, stream: bool) -> None:
    """It can be missing, null or zero, in each vendor's own field."""
    absent, null, zero = (
        usages(vendor, said(Provider(), vendor, f"echo:words-2:{kind}-usage", stream=stream), stream=stream)
        for kind in ("no", "null", "zero")
    )
    assert set(map(repr, absent)) == {"Ellipsis"}
    assert null[-1] is None
    assert zero[-1].get("total_tokens", zero[-1].get("totalTokenCount")) == 0


@pytest.mark.parametrize(
    ("vendor", "expected"),
    [
        (GROQ, ("requests", "0", "3")),
        (MISTRAL, ("rate_limited", "0", "3")),
        (GEMINI, ("RESOURCE_EXHAUSTED", None, None)),
    ],
)
def test_refusal_says_when_to_come_back(vendor: str, expected: tuple[str, str | None, str | None]) -> None:
    """A 429 has the vendor's own body and fields; Gemini has the delay in its body, and no field at all."""
    response = said(Provider(), vendor, "echo:rate-limited-3")
    assert response.status_code == 429
    error = response.json().get("error", response.json())
    left = response.headers.get(
        "x-ratelimit-remaining-requests", response.headers.get("x-ratelimit-remaining-req-minute")
    )
    assert (error.get("status", error.get("type")), left, response.headers.get("retry-after")) == expected
    if vendor == GEMINI:
        assert error["details"][0]["retryDelay"] == "3s"


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(
    ("behaviour", "status"), [("overloaded", 503), ("error-418", 418), ("nonsense", 404), ("out-of-credit", 429)]
)
def test_refusals_have_their_status(vendor: str, behaviour: str, status: int) -> None:
    """Each refusal comes with the vendor's status for it, and without a time where none is known."""
    response = said(Provider(), vendor, f"echo:{behaviour}")
    assert response.status_code == status
    assert "retry-after" not in response.headers


def test_gemini_refuses_what_it_cannot_read() -> None:
    """A wrong path, a missing key, a missing prompt and a wrong bound are told apart."""
    provider = Provider()
    good = {"contents": [{"parts": [{"text": "Hi"}]}]}
    path = "/v1/models/echo:generateContent"
    statuses = [
        ask(provider, path, good, headers=KEYS).status_code,
        ask(provider, "/v1/models/echo:countTokens", good, headers=KEYS).status_code,
        ask(provider, path, good, headers={}).status_code,
        ask(provider, path, {}, headers=KEYS).status_code,
        ask(provider, path, {**good, "generationConfig": {"maxOutputTokens": 0}}, headers=KEYS).status_code,
    ]
    assert statuses == [200, 404, 401, 400, 400]
    whole = ask(provider, path, {**good, "generationConfig": {"maxOutputTokens": 2}}, headers=KEYS).json()
    assert (whole["candidates"][0]["finishReason"], whole["usageMetadata"]["candidatesTokenCount"]) == ("MAX_TOKENS", 2)


def test_gemini_stream_breaks_in_band_and_may_be_empty() -> None:
    """An error comes as an event of its own, and an answer without a word is one chunk with its usage."""
    assert events(said(Provider(), GEMINI, "echo:error-after-2", stream=True))[-1]["error"]["status"] == "INTERNAL"
    (only,) = events(said(Provider(), GEMINI, "echo:words-0", stream=True))
    assert only["usageMetadata"]["candidatesTokenCount"] == 0


def test_first_requests_are_limited_as_asked() -> None:
    """`limited-first` answers 429 with nothing left so many times for the very name, then as ever."""
    provider = Provider()
    answers = [said(provider, GROQ, "echo:limited-first-2") for _ in range(3)]
    assert [each.status_code for each in answers] == [429, 429, 200]
    assert answers[0].headers["retry-after"] == "0"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "0"
