"""The bundled provider's quotas: fields that count down, refill and refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asgi_metering.testing.provider import Provider
from asgi_metering.testing.provider.quota import Bucket, go_duration, rfc3339

if TYPE_CHECKING:
    pass
from tests.testing.support import ANTHROPIC, CHAT, NOW, PROMPT_TOKENS, RESPONSES, ask, payload


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """Return the moment that the test chose."""
        return self.now


def test_openai_limits_count_down_and_refill() -> None:
    """Remaining requests and tokens fall by what was used, come back with time, and resets are Go durations."""
    clock = Clock()
    provider = Provider(requests_per_minute=60, tokens_per_minute=600, clock=clock)
    used = PROMPT_TOKENS + 20
    first = ask(provider, CHAT, payload(CHAT, "echo"))
    assert first.headers["x-ratelimit-limit-requests"] == "60"
    assert first.headers["x-ratelimit-remaining-requests"] == "59"
    assert first.headers["x-ratelimit-reset-requests"] == "1s"
    assert first.headers["x-ratelimit-remaining-tokens"] == str(600 - used)
    assert first.headers["x-ratelimit-reset-tokens"] == go_duration(used / 10)
    second = ask(provider, RESPONSES, payload(RESPONSES, "echo"))
    assert second.headers["x-ratelimit-remaining-tokens"] == str(600 - 2 * used)
    clock.now += 3_600
    third = ask(provider, CHAT, payload(CHAT, "echo"))
    assert third.headers["x-ratelimit-remaining-tokens"] == str(600 - used)
    assert third.json()["created"] == int(clock.now)


def test_openai_limits_refuse_and_take_nothing() -> None:
    """Beyond a limit there is a real 429 that says when to come back; it took nothing, so that moment is right."""
    clock = Clock()
    provider = Provider(requests_per_minute=60, tokens_per_minute=PROMPT_TOKENS + 20, clock=clock)
    assert ask(provider, CHAT, payload(CHAT, "echo")).status_code == 200
    clock.now += 30
    refused = ask(provider, CHAT, payload(CHAT, "echo"))
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "tokens"
    assert (refused.headers["retry-after"], refused.headers["x-ratelimit-remaining-tokens"]) == ("30", "0")
    assert refused.headers["x-ratelimit-remaining-requests"] == "60"
    clock.now += 29
    assert ask(provider, CHAT, payload(CHAT, "echo")).headers["retry-after"] == "1"
    clock.now += 1
    assert ask(provider, CHAT, payload(CHAT, "echo")).status_code == 200


def test_the_limit_that_lasts_longest_is_named() -> None:
    """Where two limits are used up, the refusal names the one to wait for, and its seconds."""
    clock = Clock()
    provider = Provider(requests_per_minute=1, tokens_per_minute=2 * (PROMPT_TOKENS + 20), clock=clock)
    ask(provider, CHAT, payload(CHAT, "echo"))
    refused = ask(provider, CHAT, payload(CHAT, "echo:words-40"))
    assert (refused.json()["error"]["type"], refused.headers["retry-after"]) == ("requests", "60")


def test_a_refusal_on_demand_says_what_is_left_now() -> None:
    """`rate-limited` empties the requests in its header fields only; the other limits are those of this moment."""
    clock = Clock()
    provider = Provider(clock=clock)
    ask(provider, CHAT, payload(CHAT, "echo"))
    ask(provider, ANTHROPIC, payload(ANTHROPIC, "echo"))
    clock.now += 60
    refused = ask(provider, CHAT, payload(CHAT, "echo:rate-limited-7"))
    assert refused.headers["x-ratelimit-remaining-tokens"] == "2000000"
    refused = ask(provider, ANTHROPIC, payload(ANTHROPIC, "echo:rate-limited-7"))
    assert refused.headers["anthropic-ratelimit-requests-reset"] == rfc3339(clock.now + 7)
    assert ask(provider, CHAT, payload(CHAT, "echo")).headers["x-ratelimit-remaining-requests"] == "4999"


@pytest.mark.parametrize("path", [CHAT, ANTHROPIC])
def test_a_request_above_the_limit_itself_never_fits(path: str) -> None:
    """A request that no refill can admit is a 429 without `retry-after`."""
    provider = Provider(tokens_per_minute=10, output_tokens_per_minute=10)
    refused = ask(provider, path, payload(path, "echo"))
    assert refused.status_code == 429
    assert "retry-after" not in refused.headers
    assert refused.headers.get("x-ratelimit-remaining-tokens", "10") == "10"


def test_anthropic_limits_count_down() -> None:
    """Four families, remaining tokens in thousands, resets as RFC 3339; cached input takes nothing."""
    provider = Provider(
        requests_per_minute=60, input_tokens_per_minute=80_000, output_tokens_per_minute=16_000, clock=lambda: NOW
    )
    model = f"echo:words-1600:cached-{PROMPT_TOKENS}"
    fields = ask(provider, ANTHROPIC, payload(ANTHROPIC, model, max_tokens=1_600)).headers
    left = {family: fields[f"anthropic-ratelimit-{family}-remaining"] for family in FAMILIES}
    assert left == {"requests": "59", "input-tokens": "80000", "output-tokens": "14000", "tokens": "94000"}
    assert fields["anthropic-ratelimit-tokens-limit"] == "96000"
    resets = {family: fields[f"anthropic-ratelimit-{family}-reset"] for family in FAMILIES}
    assert resets == {
        "requests": rfc3339(NOW + 1),
        "input-tokens": rfc3339(NOW),
        "output-tokens": rfc3339(NOW + 6),
        "tokens": rfc3339(NOW + 6),
    }


FAMILIES = ("requests", "input-tokens", "output-tokens", "tokens")


def test_no_quota_leaves_the_limits_unsaid() -> None:
    """`no-quota` answers without any rate-limit field."""
    for path in (CHAT, ANTHROPIC):
        fields = ask(Provider(), path, payload(path, "echo:no-quota")).headers
        assert not [name for name in fields if "ratelimit" in name]


def test_a_clock_that_steps_back_refills_nothing() -> None:
    """A bucket never loses or gains by a clock that goes backwards."""
    bucket = Bucket(60, NOW)
    bucket.take(50)
    bucket.refill(NOW - 100)
    assert (bucket.remaining, bucket.at) == (10, NOW)
    bucket.refill(NOW + 1)
    assert (bucket.remaining, bucket.at, bucket.full_in_s) == (11, NOW + 1, 49)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (1, "1s"),
        (360, "6m0s"),
        (0.02, "20ms"),
        (179.56, "2m59.56s"),
        (7.66, "7.66s"),
        (3723, "1h2m3s"),
        (578.016, "9m38.016s"),
        (0.12, "120ms"),
        (0, "0s"),
        (3600, "1h0m0s"),
        (0.9999, "1s"),
    ],
)
def test_write_go_durations(seconds: float, written: str) -> None:
    """The vectors of OpenAI's and Groq's headers, the other way round."""
    assert go_duration(seconds) == written


def test_write_rfc3339_never_early() -> None:
    """A moment is written in UTC and rounded up to the second."""
    assert rfc3339(1_755_780_058.2) == "2025-08-21T12:40:59Z"


# The text and its counts
