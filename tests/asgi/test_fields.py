"""Header fields, as a client reads them."""

from __future__ import annotations

import re
from math import ceil, inf, isfinite, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.amounts import CREDITS, MAX_AMOUNT, Unit
from asgi_metering.asgi.fields import (
    MAX_SF_INTEGER,
    HeaderNames,
    field_name,
    field_value,
    limit_fields,
    retry_after_field,
    sf_string,
    whole_seconds,
)
from asgi_metering.decisions import Decision, WindowState
from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.ietf import read_limits
from asgi_metering.rules.operations import LimitAsk, WindowKind
from asgi_metering.rules.windows import look, window_state
from tests.asgi.structured import Token, parse_item, parse_list

NOW = 1_795_219_200.25
ON_THE_WIRE = re.compile(rb"[\x20-\x7e]+")

MINUTE = WindowState("per-minute", 60, 0, 29.4, 60.0, "requests")
DAY = WindowState("daily", 5000, 4321, 80_000.0, 86_400.0, "requests")
TOKENS = WindowState("200000-tokens-per-minute", 200_000, 7, 59.0, 60.0, "tokens")

windows_of_any_kind = st.lists(
    st.builds(
        WindowState,
        name=st.text(max_size=80) | st.sampled_from(["a", 'a"', "a\\", "é", "è", ""]),
        limit=st.integers(-5, 10**18),
        remaining=st.integers(-5, 10**18),
        reset_after_s=st.floats(),
        window_s=st.floats(),
        meter=st.sampled_from(["requests", "tokens", "content_bytes"]) | st.text(max_size=5),
    ),
    max_size=4,
).map(tuple)


def decision(*windows: WindowState, available: int | None = None, source: str | None = None) -> Decision:
    """A decision at a fixed moment over *windows*."""
    return Decision("call-1", NOW, available=available, source=source, windows=windows)


def named(fields: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The fields by name, each of which is there once."""
    assert len(dict(fields)) == len(fields), "a field twice"
    return dict(fields)


def test_emit_the_drafts_vector_to_the_byte() -> None:
    """A spent limit of 60 a minute is spelled as in the vector for 429 (http-semantics section 2)."""
    assert limit_fields(decision(MINUTE), CREDITS) == [
        (b"ratelimit-policy", b'"per-minute";q=60;w=60'),
        (b"ratelimit", b'"per-minute";r=0;t=30'),
    ]


def test_emit_two_policies_as_the_draft_lists_them() -> None:
    """Two policies parse to what the draft's example of two parses to, in policy order."""
    burst = WindowState("burst", 100, 100, 0.0, 60.0, "requests")
    daily = WindowState("daily", 1000, 999, 60.0, 86_400.0, "requests")
    ours = named(limit_fields(decision(burst, daily), CREDITS))[b"ratelimit-policy"]
    assert parse_list(ours) == parse_list(b'"burst";q=100;w=60,"daily";q=1000;w=86400')
    assert [item.value for item in parse_list(ours)] == ["burst", "daily"]


def test_name_a_registered_unit_as_the_registry_does() -> None:
    """A limit on content bytes is the draft's example of a unit, without its partition key."""
    window = WindowState("peruser", 65_535, 65_535, 0.0, 10.0, "content_bytes")
    assert limit_fields(decision(window), CREDITS)[0][1] == b'"peruser";q=65535;qu="content-bytes";w=10'


def test_name_a_unit_that_is_not_requests_and_only_that() -> None:
    """Tokens are said as tokens, because a policy without a unit counts requests."""
    policies = parse_list(limit_fields(decision(MINUTE, TOKENS), CREDITS)[0][1])
    assert "qu" not in policies[0].parameters
    assert policies[1].parameters == {"q": 200_000, "qu": "tokens", "w": 60}


def test_emit_no_limit_field_without_a_window() -> None:
    """A route without rate limits sends no limit fields, not even with the legacy names on."""
    assert limit_fields(decision(), CREDITS, HeaderNames.with_legacy()) == []


@given(windows_of_any_kind, st.text(max_size=20), st.integers(-MAX_AMOUNT, MAX_AMOUNT), st.text(max_size=5))
def test_emit_valid_structured_fields_whatever_comes(
    windows: tuple[WindowState, ...], failing: str, available: int, source: str
) -> None:
    """Whatever names and numbers come in, every field parses, is printable ASCII, and is there once (DESIGN 10)."""
    answered = decision(*windows, available=available, source=source)
    fields = named(limit_fields(answered, CREDITS, HeaderNames.with_legacy(), failing=failing, warn_below=5))
    assert all(ON_THE_WIRE.fullmatch(value) for value in fields.values())
    parse_item(fields[b"metering-available"])
    if not windows:
        return
    policies, states = parse_list(fields[b"ratelimit-policy"]), parse_list(fields[b"ratelimit"])
    names = [item.value for item in policies]
    assert names == [item.value for item in states]
    assert len(set(names)) == len(names)
    for policy, state in zip(policies, states, strict=True):
        assert type(policy.value) is str
        assert set(policy.parameters) <= {"q", "qu", "w"}
        assert set(state.parameters) <= {"r", "t"}
        for key in ("q", "r", "t"):
            assert 0 <= {**policy.parameters, **state.parameters}.get(key, 0) <= MAX_SF_INTEGER
        assert policy.parameters.get("w", 1) > 0
    for name in (b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"):
        assert fields.get(name, b"0").isdigit()


def test_show_a_name_once_with_what_refuses_first() -> None:
    """Two windows of one name become one item, consistent in both fields: that with less left (S2.33)."""
    loose = WindowState("api", 100, 40, 10.0, 60.0, "requests")
    tight = WindowState("api", 10, 3, 50.0, 60.0, "requests")
    assert limit_fields(decision(loose, DAY, tight), CREDITS) == [
        (b"ratelimit-policy", b'"api";q=10;w=60, "daily";q=5000;w=86400'),
        (b"ratelimit", b'"api";r=3;t=50, "daily";r=4321;t=80000'),
    ]


def test_show_names_that_differ_only_beyond_ascii_once() -> None:
    """Names that look alike once they are cleaned do not become two items of one name."""
    fields = limit_fields(decision(MINUTE._replace(name="é"), MINUTE._replace(name="è", remaining=1)), CREDITS)
    assert fields[1] == (b"ratelimit", b'"?";r=0;t=30')


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("plain", '"plain"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("a\r\nSet-Cookie: x=1", '"a??Set-Cookie: x=1"'),
        ("naïve\x7f", '"na?ve?"'),
        ("n" * 65, '"' + "n" * 64 + '"'),
    ],
)
def test_write_a_string_escaped_and_cleaned(text: str, written: str) -> None:
    """Quotes and backslashes are escaped, and what no header may carry becomes a question mark."""
    assert sf_string(text) == written


@pytest.mark.parametrize(
    ("seconds", "whole"),
    [
        (0.0, 0),
        (-3.0, 0),
        (1e-9, 0),
        (0.2, 1),
        (29.4, 30),
        (30.0, 30),
        (30.000001, 31),
        (1e30, MAX_SF_INTEGER),
        (inf, None),
        (nan, None),
    ],
)
def test_round_seconds_up(seconds: float, whole: int | None) -> None:
    """Seconds are rounded up to a whole number from 0, and what is no time is nothing."""
    assert whole_seconds(seconds) == whole


@given(st.floats(min_value=1.6e9, max_value=4e9), st.integers(1, 400 * 86_400))
def test_round_a_window_that_just_began_to_its_length(now: float, length_s: int) -> None:
    """A fixed window says at its first hit that it lasts as long as its policy says, whatever the time is."""
    ask = LimitAsk("w", "k", WindowKind.FIXED, 5, float(length_s))
    seen = look(ask, None, now)
    assert seen is not None
    fields = named(limit_fields(decision(window_state(seen, taken=True)), CREDITS))
    assert parse_list(fields[b"ratelimit"])[0].parameters["t"] == length_s
    assert parse_list(fields[b"ratelimit-policy"])[0].parameters["w"] == length_s


def test_leave_out_what_cannot_be_told() -> None:
    """A window that never gains anything has no reset, and one below a second is a second long, never longer."""
    never = WindowState("never", 0, 0, inf, inf, "requests")
    short = WindowState("short", 5, 5, 0.0, 0.25, "requests")
    assert limit_fields(decision(never, short), CREDITS, HeaderNames.with_legacy()) == [
        (b"ratelimit-policy", b'"never";q=0, "short";q=5;w=1'),
        (b"ratelimit", b'"never";r=0, "short";r=5;t=0'),
        (b"x-ratelimit-limit", b"0"),
        (b"x-ratelimit-remaining", b"0"),
    ]


def test_show_legacy_fields_of_the_window_that_refused() -> None:
    """On a refusal X-RateLimit tells of the limit that refused, and resets at a whole epoch second (trap 12)."""
    fields = named(limit_fields(decision(DAY, TOKENS), CREDITS, HeaderNames.with_legacy(), failing=TOKENS.name))
    assert fields[b"x-ratelimit-limit"] == b"200000"
    assert fields[b"x-ratelimit-remaining"] == b"7"
    assert fields[b"x-ratelimit-reset"] == b"%d" % ceil(NOW + TOKENS.reset_after_s)


def test_show_legacy_fields_of_the_tightest_window_that_counts_requests() -> None:
    """Without a refusal X-RateLimit tells of the request limit with the least left, for it can name no unit."""
    later = WindowState("per-hour", 100, 40, 900.0, 3600.0, "requests")
    sooner = WindowState("other-minute", 100, 40, 9.0, 60.0, "requests")
    fields = named(limit_fields(decision(DAY, sooner, later, TOKENS), CREDITS, HeaderNames.with_legacy()))
    assert (fields[b"x-ratelimit-limit"], fields[b"x-ratelimit-reset"]) == (b"100", b"%d" % ceil(NOW + 900))
    only_tokens = named(limit_fields(decision(TOKENS), CREDITS, HeaderNames.with_legacy()))
    assert only_tokens[b"x-ratelimit-limit"] == b"200000"


def test_send_no_legacy_field_unless_asked() -> None:
    """The default names are those of the draft, with Retry-After and what is left."""
    assert HeaderNames().exposed == (
        "ratelimit-policy",
        "ratelimit",
        "retry-after",
        "metering-available",
        "metering-payer",
    )


def test_name_and_switch_off_each_field() -> None:
    """Every field can be renamed or switched off by itself, and the wire has lower case."""
    names = HeaderNames(policy=None, state="X-Limits", limit="X-Limit", available="X-Left", retry_after="X-Wait")
    assert limit_fields(decision(MINUTE, available=1), CREDITS, names) == [
        (b"x-limits", b'"per-minute";r=0;t=30'),
        (b"x-limit", b"60"),
        (b"x-left", b'"0.000001";unit="credits"'),
    ]
    assert retry_after_field(7, names) == [(b"x-wait", b"7")]
    off = HeaderNames(policy="Limits", state=None, retry_after=None, available=None)
    assert limit_fields(decision(MINUTE, available=1), CREDITS, off) == [(b"limits", b'"per-minute";q=60;w=60')]
    assert retry_after_field(7, off) == []


@pytest.mark.parametrize("name", ["", "two words", "a:b", "caf\u00e9", "a\r\nb", "Content-Length", "x" * 65, 3])
def test_refuse_a_name_that_is_no_header_name(name: str) -> None:
    """A name that cannot be sent, or that frames the message, is refused when it is configured."""
    with pytest.raises(ConfigurationError, match="cannot carry a limit"):
        HeaderNames(state=name)


def test_refuse_one_name_for_two_fields() -> None:
    """Two fields under one name are refused: a client could not tell them apart (S2.33)."""
    with pytest.raises(ConfigurationError, match="stands for two fields"):
        HeaderNames(limit="RateLimit")


@pytest.mark.parametrize(
    ("parts", "unit", "text"),
    [
        (12_500_000, CREDITS, "12.5"),
        (1, CREDITS, "0.000001"),
        (MAX_AMOUNT, Unit("parts", 0), "9007199254740991"),
        (MAX_AMOUNT, Unit("fine", 12), "9007.199254740991"),
    ],
)
def test_tell_exactly_what_is_left(parts: int, unit: Unit, text: str) -> None:
    """What is left is exact in whole units, where a structured Decimal or Integer would have to round."""
    fields = named(limit_fields(decision(available=parts), unit))
    assert parse_item(fields[b"metering-available"]) == (text, {"unit": unit.name})


def test_spell_what_is_left_to_the_byte() -> None:
    """Of a wallet it is amount and unit, of an allowance its name as well."""
    wallet = limit_fields(decision(available=12_500_000, source="wallet"), CREDITS)
    assert wallet == [(b"metering-available", b'"12.5";unit="credits"')]
    premium = limit_fields(decision(available=3, source="daily"), Unit("premium", 0))
    assert premium == [(b"metering-available", b'"3";unit="premium";source="daily"')]


@pytest.mark.parametrize(
    ("parts", "status"),
    [(21, None), (20, Token("warning")), (1, Token("warning")), (0, Token("blocked")), (-4, Token("blocked"))],
)
def test_warn_from_four_fifths_on(parts: int, status: str | None) -> None:
    """From 80 % used or held on it warns, and at the limit it says blocked although this call was let in (S3.6)."""
    fields = named(limit_fields(decision(available=parts), Unit("parts", 0), warn_below=21))
    found = parse_item(fields[b"metering-available"]).parameters.get("status")
    assert (found, type(found)) == (status, type(status))


def test_warn_never_unless_asked() -> None:
    """Without a level nothing is worth a warning, however little is left."""
    assert limit_fields(decision(available=1), Unit("parts", 0))[0][1] == b'"1";unit="parts"'


def test_read_back_by_our_own_reader_of_provider_fields() -> None:
    """An application that meters us as its provider reads the same numbers."""
    fields = limit_fields(decision(MINUTE, DAY), CREDITS)
    read = {limit.resource: limit for limit in read_limits(fields, NOW)}
    assert (read["per_minute"].limit, read["per_minute"].remaining) == (60, 0)
    assert (read["daily"].limit, read["daily"].remaining) == (5000, 4321)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("abc", b"abc"),
        (" a b\t", b"a b"),
        ("", b""),
        ("a\r\nb", None),
        ("a\tb", None),
        ("h\u00e9", None),
        ("\x00", None),
    ],
)
def test_take_only_printable_values(text: str, value: bytes | None) -> None:
    """A value with anything but printable ASCII is no value."""
    assert field_value(text) == value


@pytest.mark.parametrize(
    ("text", "name"), [("X-Top-Up", b"x-top-up"), ("Content-Type", None), ("a b", None), ("", None), ("\u00fc", None)]
)
def test_take_only_names_that_frame_nothing(text: str, name: bytes | None) -> None:
    """A name is a token in lower case, and none that says how the message is read."""
    assert field_name(text) == name


@given(st.floats())
def test_never_round_a_wait_down(seconds: float) -> None:
    """A whole number of seconds is never earlier than what it stands for, but for half a microsecond."""
    whole = whole_seconds(seconds)
    if isfinite(seconds) and seconds < MAX_SF_INTEGER:
        assert whole is not None
        assert whole >= seconds - 1e-6
        assert whole < max(0.0, seconds) + 1
