"""Bodies of refusals, as clients and the model SDKs read them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.amounts import Unit
from asgi_metering.asgi import answers, problems
from asgi_metering.asgi.answers import Answer, AnswerOptions
from asgi_metering.asgi.problems import (
    MAX_BODY,
    MAX_FIELD_VALUE,
    MAX_FIELDS,
    Rendered,
    close_frame,
    ndjson_error,
    problem,
    render,
    sse_error,
)
from asgi_metering.decisions import Decision, Reason, Refusal, WindowState
from asgi_metering.policies import ERROR_SHAPES, ErrorShape
from tests.asgi.test_answers import NOW, POOL, RATE, SPENT, TABLE, TOO_LARGE, allowance_spent, ask, credits_short

SHAPES = list(ERROR_SHAPES)
TOKENS = WindowState("tokens-per-minute", 200_000, 5, 12.5, 60.0, "tokens")


def fields_of(rendered: Rendered) -> dict[bytes, bytes]:
    """The header fields by name, each of which is there once."""
    fields = dict(rendered.headers)
    assert len(fields) == len(rendered.headers)
    return fields


@pytest.mark.parametrize("shape", SHAPES)
def test_say_again_what_would_be_said_anew(shape: ErrorShape) -> None:
    """Refusals that differ in anything that a body tells are never taken for each other, however alike they are."""
    refusals = [refusal for refusal, *_ in TABLE]
    refusals += [RATE._replace(required=2), RATE._replace(retry_after_s=2.0), POOL._replace(level="global")]
    refusals += [credits_short(transient=True), allowance_spent(9), RATE._replace(name="per-hour", detail="Too fast.")]
    said: list[tuple[Any, ...]] = [
        (refusal, {"line": line, "plan": plan, "unit": unit, "options": options, "allowance_status": status})
        for refusal in refusals
        for line, plan in (("", None), ("chat", "pro"))
        for unit in (Unit("credits"), Unit("calls", 0))
        for options in (AnswerOptions(), AnswerOptions(type_base="urn:other:"))
        for status in (402, 429)
    ]
    again = [render(ask(refusal, **told), shape) for refusal, told in said]
    for rendered, (refusal, told) in zip(again, said, strict=True):
        answers._said.cache_clear()
        problems._standard.cache_clear()
        assert render(ask(refusal, **told), shape) == rendered


def test_say_again_in_fields_of_its_own() -> None:
    """What a server or a middleware adds to the fields of one refusal does not stand on the next one."""
    first = render(ask(RATE))
    before = [*first.headers]
    first.headers.append((b"via", b"1.1 proxy"))
    assert render(ask(RATE)).headers == before


def test_spell_the_quota_vector_to_the_byte() -> None:
    """A 429 has the vector's head, and its body begins with the vector's members (http-semantics section 2)."""
    rendered = render(ask(RATE, Decision("c", NOW, RATE, windows=(SPENT,)), line="search"))
    assert rendered.status == 429
    assert rendered.headers == [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(rendered.body)),
        (b"ratelimit-policy", b'"per-minute";q=60;w=60'),
        (b"ratelimit", b'"per-minute";r=0;t=30'),
        (b"retry-after", b"30"),
        (b"cache-control", b"no-store"),
    ]
    assert rendered.body == (
        b'{"type":"https://iana.org/assignments/http-problem-types#quota-exceeded","title":"Quota exceeded",'
        b'"status":429,"violated-policies":["per-minute"],'
        b'"detail":"The limit \'per-minute\' allows 60 requests per window; this call takes 1 and 0 are left.",'
        b'"code":"rate_limit","unit":"requests","line":"search","required":1,"available":0,"limit":60,'
        b'"remedy":"Retry in 30 seconds.","retry_after":30}'
    )


def test_spell_the_credit_vector_to_the_byte() -> None:
    """A terminal 402 has the members of the vector, no Retry-After, and is not stored (http-semantics section 2)."""
    refusal = Refusal(Reason.CREDITS, "credit", 5, 2, 0)
    options = AnswerOptions(type_base="https://example.com/problems/")
    rendered = render(ask(refusal, Decision("c", NOW, refusal), unit=Unit("credit", 0), options=options))
    assert rendered == Rendered(
        402,
        [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(rendered.body)),
            (b"cache-control", b"no-store"),
        ],
        b'{"type":"https://example.com/problems/insufficient-credits","title":"Insufficient credits","status":402,'
        b'"detail":"This call needs 5 credit; 2 available.","code":"insufficient_credits","unit":"credit",'
        b'"required":"5","available":"2","held":"0","transient":false,"remedy":"Add credit, then retry."}',
    )


def test_spell_an_allowance_with_everything_that_is_known() -> None:
    """A spent allowance tells plan, limit, used, reset and what to do (S0.13, S0.21, S4.3)."""
    members = problem(ask(allowance_spent(), plan="free", line="premium"))
    assert members == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Quota exceeded",
        "status": 429,
        "violated-policies": ["daily"],
        "detail": "This call needs 1 credits; 0 left of the allowance 'daily' of 10.",
        "code": "allowance",
        "unit": "credits",
        "line": "premium",
        "required": "1",
        "available": "0",
        "held": "0",
        "limit": "10",
        "used": "10",
        "plan": "free",
        "remedy": "Retry after 2026-11-22T00:00:00Z, when an allowance begins anew.",
        "resets_at": "2026-11-22T00:00:00Z",
        "retry_after": 86_400,
    }


@pytest.mark.parametrize(
    ("plan", "message"), [("free", "Upgrade to Pro for 20 a day."), ("pro", "Come back tomorrow.")]
)
def test_word_a_spent_allowance_by_plan(plan: str, message: str) -> None:
    """An application's hook knows plan, cap, what was used and the reset, and may answer as it always did (S0.21)."""
    words = {"free": "Upgrade to Pro for 20 a day.", "pro": "Come back tomorrow."}

    def worded(members: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        told = {name: members[name] for name in ("plan", "limit", "used", "resets_at")}
        return {"error": "premium_model_daily_cap", "message": words[members["plan"]], **told}, {"x-plan": plan}

    rendered = render(ask(allowance_spent(), plan=plan), "problem", worded)
    assert (rendered.status, dict(rendered.headers)[b"x-plan"]) == (429, plan.encode())
    assert json.loads(rendered.body) == {
        "error": "premium_model_daily_cap",
        "message": message,
        "plan": plan,
        "limit": "10",
        "used": "10",
        "resets_at": "2026-11-22T00:00:00Z",
    }


def test_name_the_level_of_a_full_pool() -> None:
    """A full pool says whether it is the caller's or everybody's, and of everybody's no numbers (S0.42)."""
    assert problem(ask(POOL))["level"] == "caller"
    everybody = problem(ask(POOL._replace(level="global")))
    assert set(everybody) == {
        "type",
        "title",
        "status",
        "violated-policies",
        "detail",
        "code",
        "level",
        "remedy",
        "retry_after",
    }


def test_tell_transient_credits_from_terminal_ones() -> None:
    """A 402 that passes when calls in progress end is marked and has a wait; a terminal one neither."""
    passing, terminal = problem(ask(credits_short(transient=True))), problem(ask(credits_short()))
    assert (passing["transient"], passing["retry_after"]) == (True, 1)
    assert terminal["transient"] is False
    assert "retry_after" not in terminal


def test_spell_openai_to_the_byte() -> None:
    """OpenAI's shape has its four members, both sentences, and our facts beside them."""
    rendered = render(ask(credits_short(), line="chat"), "openai")
    assert rendered.headers == [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(rendered.body)),
        (b"cache-control", b"no-store"),
        (b"x-should-retry", b"false"),
    ]
    assert rendered.body == (
        b'{"error":{"message":"This call needs 5 credits; 2 available, and 1 held by calls in progress. '
        b'Add credits, then retry.","type":"insufficient_quota","param":null,"code":"insufficient_quota",'
        b'"metering":{"code":"insufficient_credits","unit":"credits","line":"chat","required":"5","available":"2",'
        b'"held":"1","transient":false,"remedy":"Add credits, then retry."}}}'
    )


def test_spell_anthropic_to_the_byte() -> None:
    """Anthropic's shape has type and message, and our code and facts where its SDK looks for details."""
    rendered = render(ask(POOL), "anthropic")
    assert rendered.headers == [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(rendered.body)),
        (b"retry-after", b"1"),
        (b"cache-control", b"no-store"),
        (b"x-should-retry", b"true"),
    ]
    assert rendered.body == (
        b'{"type":"error","error":{"type":"rate_limit_error","message":"4 calls are running; 4 may run at once. '
        b'Let a running call end, then retry, in 1 second or so.","details":{"error_code":"concurrency",'
        b'"violated-policies":["chat"],"code":"concurrency","unit":"concurrent-requests","required":1,"available":0,'
        b'"held":4,"limit":4,"level":"caller","remedy":"Let a running call end, then retry, in 1 second or so.",'
        b'"retry_after":1}}}'
    )


Handler = Callable[[httpx2.Request], httpx2.Response]


def replay(rendered: Rendered, requests: list[httpx2.Request] | None = None) -> Handler:
    """A server that answers every request with *rendered*."""

    def handler(request: httpx2.Request) -> httpx2.Response:
        if requests is not None:
            requests.append(request)
        return httpx2.Response(rendered.status, headers=rendered.headers, content=rendered.body)

    return handler


def stream(body: bytes) -> Handler:
    """A server whose event stream has begun with 200 and says *body*."""
    return lambda _: httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=body)


def ask_openai(handler: Handler, *, retries: int = 0, streamed: bool = False) -> Any:
    """Ask for a chat completion with the real SDK."""
    with httpx2.Client(transport=httpx2.MockTransport(handler)) as http:
        client = openai.OpenAI(api_key="k", base_url="http://service/v1", http_client=http, max_retries=retries)
        answered = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=streamed
        )
        return list(answered) if streamed else answered


def ask_openai_responses(handler: Handler) -> Any:
    """Ask for a streamed response with the real SDK."""
    with httpx2.Client(transport=httpx2.MockTransport(handler)) as http:
        client = openai.OpenAI(api_key="k", base_url="http://service/v1", http_client=http, max_retries=0)
        return list(client.responses.create(model="m", input="hi", stream=True))


def ask_anthropic(handler: Handler, *, retries: int = 0, streamed: bool = False) -> Any:
    """Ask for a message with the real SDK."""
    with httpx2.Client(transport=httpx2.MockTransport(handler)) as http:
        client = anthropic.Anthropic(api_key="k", base_url="http://service", http_client=http, max_retries=retries)
        answered = client.messages.create(
            model="m", max_tokens=5, messages=[{"role": "user", "content": "hi"}], stream=streamed
        )
        return list(answered) if streamed else answered


OPENAI_ERRORS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    402: openai.APIStatusError,
    403: openai.PermissionDeniedError,
    409: openai.ConflictError,
    413: openai.APIStatusError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    503: openai.InternalServerError,
}

OPENAI_CODES = {
    Reason.UNAUTHENTICATED: ("invalid_request_error", "invalid_api_key"),
    Reason.IDENTITY_DOWN: ("server_error", "identity_unavailable"),
    Reason.PAYER: ("server_error", "payer_unresolved"),
    Reason.KEY_MISSING: ("invalid_request_error", "idempotency_key_missing"),
    Reason.KEY_INVALID: ("invalid_request_error", "idempotency_key_invalid"),
    Reason.BODY: ("invalid_request_error", "body_not_fingerprinted"),
    Reason.REPLAYED: ("invalid_request_error", "replayed"),
    Reason.IN_FLIGHT: ("invalid_request_error", "in_flight"),
    Reason.FINGERPRINT: ("invalid_request_error", "fingerprint_mismatch"),
    Reason.POLICY: ("request_forbidden", "policy"),
    Reason.UPSTREAM: ("server_error", "upstream_headroom"),
    Reason.EXCEEDS_LIMIT: ("requests", "exceeds_limit"),
    Reason.RATE_LIMIT: ("requests", "rate_limit_exceeded"),
    Reason.ALLOWANCE: ("insufficient_quota", "insufficient_quota"),
    Reason.STORE_DOWN: ("server_error", "store_unavailable"),
    Reason.ENDED: ("invalid_request_error", "call_ended"),
}


@pytest.mark.parametrize("refusal", [refusal for refusal, *_ in TABLE])
def test_raise_the_openai_sdks_own_error(refusal: Refusal) -> None:
    """The OpenAI SDK raises the error of the status, with type and code as OpenAI has them, and our facts."""
    answered = ask(refusal)
    with pytest.raises(openai.APIStatusError) as caught:
        ask_openai(replay(render(answered, "openai")))
    error = caught.value
    assert type(error) is OPENAI_ERRORS[answered.status]
    if refusal.reason in OPENAI_CODES:
        assert (error.type, error.code) == OPENAI_CODES[refusal.reason]
    assert error.param is None
    assert answered.remedy in str(error)
    assert isinstance(error.body, dict)
    assert error.body["metering"]["code"] == refusal.reason.value


@pytest.mark.parametrize(
    ("refusal", "code", "kind"),
    [
        (credits_short(), "insufficient_quota", "insufficient_quota"),
        (credits_short(transient=True), "credits_in_flight", "credits_in_flight"),
        (POOL, "rate_limit_exceeded", "requests"),
        (POOL._replace(level="global"), "concurrency", "server_error"),
    ],
)
def test_tell_openai_clients_whether_money_or_patience_is_missing(refusal: Refusal, code: str, kind: str) -> None:
    """Only what a retry cannot mend is insufficient quota, which OpenAI's clients take as final (trap 5)."""
    with pytest.raises(openai.APIStatusError) as caught:
        ask_openai(replay(render(ask(refusal), "openai")))
    assert (caught.value.code, caught.value.type) == (code, kind)


def test_tell_openai_clients_which_meter_is_spent() -> None:
    """A limit on tokens has the type of OpenAI's own token limits."""
    refusal = Refusal(Reason.RATE_LIMIT, TOKENS.name, 900, 5, 0, 200_000, retry_after_s=12.5)
    answered = ask(refusal, Decision("c", NOW, refusal, windows=(TOKENS,)))
    with pytest.raises(openai.RateLimitError) as caught:
        ask_openai(replay(render(answered, "openai")))
    assert (caught.value.type, caught.value.code) == ("tokens", "rate_limit_exceeded")


ANTHROPIC_ERRORS: dict[int, type[anthropic.APIStatusError]] = {
    400: anthropic.BadRequestError,
    401: anthropic.AuthenticationError,
    402: anthropic.PaymentRequiredError,
    403: anthropic.PermissionDeniedError,
    409: anthropic.ConflictError,
    413: anthropic.RequestTooLargeError,
    422: anthropic.UnprocessableEntityError,
    429: anthropic.RateLimitError,
    503: anthropic.ServiceUnavailableError,
}

ANTHROPIC_TYPES = {
    Reason.UNAUTHENTICATED: "authentication_error",
    Reason.IDENTITY_DOWN: "api_error",
    Reason.PAYER: "api_error",
    Reason.KEY_MISSING: "invalid_request_error",
    Reason.KEY_INVALID: "invalid_request_error",
    Reason.BODY: "request_too_large",
    Reason.REPLAYED: "conflict_error",
    Reason.IN_FLIGHT: "conflict_error",
    Reason.FINGERPRINT: "invalid_request_error",
    Reason.POLICY: "permission_error",
    Reason.UPSTREAM: "overloaded_error",
    Reason.EXCEEDS_LIMIT: "rate_limit_error",
    Reason.RATE_LIMIT: "rate_limit_error",
    Reason.ALLOWANCE: "rate_limit_error",
    Reason.CREDITS: "billing_error",
    Reason.STORE_DOWN: "api_error",
    Reason.ENDED: "conflict_error",
}


@pytest.mark.parametrize("refusal", [refusal for refusal, *_ in TABLE])
def test_raise_the_anthropic_sdks_own_error(refusal: Refusal) -> None:
    """The Anthropic SDK raises the error of the status, with its type, and our code as its error code."""
    answered = ask(refusal)
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask_anthropic(replay(render(answered, "anthropic")))
    error = caught.value
    assert type(error) is ANTHROPIC_ERRORS[answered.status]
    pool = "overloaded_error" if answered.status == 503 else "rate_limit_error"
    assert error.type == ANTHROPIC_TYPES.get(refusal.reason, pool)
    assert error.error_code == refusal.reason.value
    assert error.api_message == f"{answered.detail} {answered.remedy}"
    assert error.details is not None
    assert error.details.to_dict()["remedy"] == answered.remedy


def test_answer_anthropic_402_for_an_allowance_as_billing() -> None:
    """A spent allowance that answers 402 is a matter of billing."""
    with pytest.raises(anthropic.PaymentRequiredError) as caught:
        ask_anthropic(replay(render(ask(allowance_spent(), allowance_status=402), "anthropic")))
    assert caught.value.type == "billing_error"


RETRIES = [
    (credits_short(transient=True), [1]),
    (credits_short(), []),
    (TOO_LARGE, []),
    (RATE, [30]),
    (RATE._replace(retry_after_s=120.0), [120]),
    (RATE._replace(retry_after_s=121.0), []),
    (allowance_spent(), []),
    (Refusal(Reason.IN_FLIGHT, "key"), [1]),
    (Refusal(Reason.FINGERPRINT, "key"), []),
    (Refusal(Reason.STORE_DOWN, "store"), [3]),
]


@pytest.mark.parametrize(("shape", "caller"), [("openai", ask_openai), ("anthropic", ask_anthropic)])
@pytest.mark.parametrize(("refusal", "waits"), RETRIES)
def test_let_the_sdk_retry_only_what_can_pass(
    monkeypatch: pytest.MonkeyPatch,
    shape: ErrorShape,
    caller: Callable[..., Any],
    refusal: Refusal,
    waits: list[float],
) -> None:
    """The SDKs retry what a short wait mends, after that wait, and neither what never fits nor what takes hours."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    requests: list[httpx2.Request] = []
    with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)):
        caller(replay(render(ask(refusal), shape), requests), retries=1)
    assert slept == waits
    assert len(requests) == 1 + len(waits)


def test_leave_an_outage_of_unknown_length_to_the_sdk() -> None:
    """Where nobody knows whether a retry helps, nothing is said about it."""
    assert b"x-should-retry" not in fields_of(render(ask(Refusal(Reason.PAYER, "payer")), "openai"))


CHUNK = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'


@pytest.mark.parametrize("cut", [CHUNK, CHUNK + b": keep-al"])
def test_end_an_openai_stream_with_its_own_error(cut: bytes) -> None:
    """A chat stream that is cut, also inside a line, raises the SDK's error with our code."""
    answered = ask(credits_short())
    event = sse_error(answered, "openai", mid_event=not cut.endswith(b"\n\n"))
    with pytest.raises(openai.APIError) as caught:
        ask_openai(stream(cut + event), streamed=True)
    assert caught.value.code == "insufficient_quota"
    assert caught.value.message == f"{answered.detail} {answered.remedy}"


def test_end_an_openai_responses_stream_with_its_own_error() -> None:
    """The same event ends a stream of the responses API."""
    with pytest.raises(openai.APIError) as caught:
        ask_openai_responses(stream(sse_error(ask(credits_short(transient=True)), "openai")))
    assert caught.value.code == "credits_in_flight"


@pytest.mark.parametrize("cut", [b"event: ping\ndata: {}\n\n", b"event: ping\ndata: {}"])
def test_end_an_anthropic_stream_with_its_own_error(cut: bytes) -> None:
    """A message stream that is cut raises the SDK's error with its type and our code."""
    answered = ask(credits_short())
    event = sse_error(answered, "anthropic", mid_event=not cut.endswith(b"\n\n"))
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask_anthropic(stream(cut + event), streamed=True)
    assert (caught.value.type, caught.value.error_code) == ("billing_error", "insufficient_credits")


def test_spell_in_band_errors_to_the_byte() -> None:
    """An event is one line of data, named error unless OpenAI's, and a JSON line ends the line that was cut."""
    nobody = ask(Refusal(Reason.UNAUTHENTICATED, "caller"))
    body = {shape: render(nobody, shape).body for shape in SHAPES}
    assert sse_error(nobody) == b"event: error\ndata: " + body["problem"] + b"\n\n"
    assert sse_error(nobody, "openai") == b"data: " + body["openai"] + b"\n\n"
    assert sse_error(nobody, "anthropic") == b"event: error\ndata: " + body["anthropic"] + b"\n\n"
    assert sse_error(nobody, mid_event=True) == b"\n\nevent: error\ndata: " + body["problem"] + b"\n\n"
    assert ndjson_error(nobody) == body["problem"] + b"\n"
    assert ndjson_error(nobody, "openai", mid_line=True) == b"\n" + body["openai"] + b"\n"


@pytest.mark.parametrize("shape", SHAPES)
def test_keep_an_event_on_one_line_whatever_the_words(shape: ErrorShape) -> None:
    """Line breaks of any kind in what a rule says do not end the event."""
    words = "one\ntwo\r\nthree\u2028four\x85five"
    event = sse_error(ask(Refusal(Reason.POLICY, "p", detail=words)), shape)
    assert len(event.splitlines()) == (2 if shape == "openai" else 3)
    assert event.isascii()
    body = json.loads(event.partition(b"data: ")[2])
    assert words in (body["detail"] if shape == "problem" else body["error"]["message"])


def test_close_a_websocket_with_the_status_as_its_code() -> None:
    """A socket closes with 4000 plus the status, and a reason that its frame can hold."""
    assert close_frame(ask(credits_short())) == (4402, "insufficient_credits: Insufficient credits")
    for refusal, status, *_ in TABLE:
        code, reason = close_frame(ask(refusal))
        assert code == 4000 + status
        assert len(reason.encode()) <= 123


def legacy_body(members: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """What clients of an older service expect (S4.4)."""
    body = {
        "detail": "Monthly message credit limit reached.",
        "creditsUsed": int(members["used"]),
        "creditsLimit": int(members["limit"]),
    }
    return body, {"X-Top-Up": "https://example.com/top-up"}


def messages_spent() -> Answer:
    """A monthly allowance of ten messages that was cut after forty."""
    refusal = Refusal(Reason.ALLOWANCE, "monthly", 1, -30, 0, 10, retry_after_s=60.0, resets_at=NOW + 60)
    return ask(refusal, unit=Unit("messages", 0), allowance_status=402)


def test_spell_a_legacy_body_by_the_hook() -> None:
    """A hook gives an older service's body as plain JSON with its length, and adds its fields (S4.4, S4.5)."""
    rendered = render(messages_spent(), customise=legacy_body)
    assert rendered.status == 402
    assert rendered.body == (b'{"detail":"Monthly message credit limit reached.","creditsUsed":40,"creditsLimit":10}')
    assert rendered.headers == [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(rendered.body)),
        (b"retry-after", b"60"),
        (b"cache-control", b"no-store"),
        (b"x-top-up", b"https://example.com/top-up"),
    ]


def test_add_a_member_by_the_hook() -> None:
    """A hook that only adds keeps problem details, in every shape at the place for further members."""

    def hook(members: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        return {**members, "topup": "https://example.com/top-up", "detail": "Out of credits."}, {}

    answered = ask(credits_short())
    rendered = render(answered, customise=hook)
    assert fields_of(rendered)[b"content-type"] == b"application/problem+json"
    assert json.loads(rendered.body) == {
        **problem(answered),
        "topup": "https://example.com/top-up",
        "detail": "Out of credits.",
    }
    for shape, place in (("openai", "metering"), ("anthropic", "details")):
        error = json.loads(render(answered, shape, hook).body)["error"]
        assert error["message"] == f"Out of credits. {answered.remedy}"
        assert error[place]["topup"] == "https://example.com/top-up"
    assert b'"topup"' in sse_error(answered, customise=hook)
    assert b'"topup"' in ndjson_error(answered, customise=hook)


def test_say_the_title_where_the_hook_leaves_no_words() -> None:
    """A hook that takes all words away leaves the SDK shapes with the title."""
    error = json.loads(render(ask(credits_short()), "openai", lambda _: ({"detail": 3}, {})).body)["error"]
    assert error["message"] == "Insufficient credits"


def fail(_: Mapping[str, Any]) -> Any:
    """A hook that raises."""
    raise RuntimeError("no route to the shop")


def spoil(members: Any) -> Any:
    """A hook that ruins what it is given, then raises."""
    members.clear()
    raise KeyError("plan")


async def wait_for(members: Mapping[str, Any]) -> Any:
    """A hook that would have to be awaited."""
    return members, {}


def loop(_: Mapping[str, Any]) -> Any:
    """A hook whose body contains itself."""
    body: dict[str, Any] = {}
    body["self"] = body
    return body, {}


class HostileMapping(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise LookupError(key)

    def __iter__(self) -> Iterator[str]:
        raise OSError("gone")

    def __len__(self) -> int:
        return 1


class HostileName(str):
    """A header name that cannot be lowered."""

    __slots__ = ()

    def lower(self) -> str:
        """Fail."""
        raise OSError("gone")


@pytest.mark.parametrize(
    "hook",
    [
        fail,
        spoil,
        wait_for,
        loop,
        lambda _: None,
        lambda _: {"detail": "no headers"},
        lambda _: ({}, {}, {}),
        lambda _: ("text", {}),
        lambda _: ({}, [("a", "b")]),
        lambda _: ({1: "one"}, {}),
        lambda _: ({"a": object()}, {}),
        lambda _: ({"a": float("nan")}, {}),
        lambda _: ({"a": "x" * MAX_BODY}, {}),
        lambda _: (HostileMapping(), {}),
        lambda _: ({}, HostileMapping()),
        lambda _: ({}, {HostileName("x-a"): "b"}),
        lambda: ({}, {}),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_fall_back_when_the_hook_fails(shape: ErrorShape, hook: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A hook that raises or answers nonsense is logged, and the standard answer goes out, never a 500."""
    answered = ask(credits_short())
    with caplog.at_level(logging.WARNING, "asgi_metering.asgi"):
        assert render(answered, shape, hook) == render(answered, shape)
        assert sse_error(answered, shape, hook) == sse_error(answered, shape)
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.ERROR]
    assert "The standard body was sent" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Bad", "a\r\nSet-Cookie: session=1"),
        ("X-Bad", "caf\u00e9"),
        ("X-Bad", "x" * (MAX_FIELD_VALUE + 1)),
        ("X-Bad", 3),
        ("X Bad\r\n", "a"),
        (b"x-bad", "a"),
        ("Content-Length", "0"),
        ("Content-Type", "text/html"),
        ("Transfer-Encoding", "chunked"),
        ("Cache-Control", "public"),
        ("Retry-After", "0"),
        ("RateLimit", '"per-minute";r=60'),
        ("x-good", "twice"),
    ],
)
def test_leave_out_a_field_that_cannot_be_sent(name: Any, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A field that is none, that frames the message or that is ours is left out and logged; the rest is sent."""
    answered = ask(RATE, Decision("c", NOW, RATE, windows=(SPENT,)))
    rendered = render(answered, customise=lambda members: (members, {"X-Good": "yes", name: value}))
    assert rendered.headers == [*render(answered).headers, (b"x-good", b"yes")]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "\n" not in caplog.records[0].getMessage()


def test_let_the_hook_add_a_challenge() -> None:
    """A hook may ask for a payment: it adds a challenge beside ours, and its fields up to a bound (MPP, x402)."""
    challenge = 'Payment id="x7Tg", realm="api", method="example", intent="charge", request="eyJ9"'
    nobody = ask(Refusal(Reason.UNAUTHENTICATED, "caller"))
    rendered = render(nobody, customise=lambda members: (members, {"WWW-Authenticate": challenge}))
    assert [value for name, value in rendered.headers if name == b"www-authenticate"] == [b"Bearer", challenge.encode()]
    many = {f"x-{number}": "v" for number in range(MAX_FIELDS + 3)}
    assert (
        len(render(nobody, customise=lambda members: (members, many)).headers)
        == len(render(nobody).headers) + MAX_FIELDS
    )


@given(
    st.dictionaries(st.text(max_size=12), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)),
    st.dictionaries(st.text(max_size=12), st.text(max_size=30)),
    st.sampled_from(SHAPES),
)
def test_send_only_what_is_safe_whatever_the_hook_answers(
    body: dict[str, Any], headers: dict[str, str], shape: ErrorShape
) -> None:
    """Whatever a hook answers, the response has one JSON object of the stated length, and safe fields, each once."""
    rendered = render(ask(credits_short()), shape, lambda _: (body, headers))
    assert isinstance(json.loads(rendered.body), dict)
    fields = fields_of(rendered)
    assert fields[b"content-length"] == b"%d" % len(rendered.body)
    assert fields[b"cache-control"] == b"no-store"
    assert all(name == name.lower() and b" " not in name for name in fields)
    assert all(0x20 <= byte < 0x7F for value in fields.values() for byte in value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("refusal", [refusal for refusal, *_ in TABLE])
def test_spell_every_refusal_in_every_shape(shape: ErrorShape, refusal: Refusal) -> None:
    """Every refusal has a body in every shape, of the stated type and length."""
    rendered = render(ask(refusal), shape)
    fields = fields_of(rendered)
    assert fields[b"content-length"] == b"%d" % len(rendered.body)
    expected = b"application/problem+json" if shape == "problem" else b"application/json"
    assert fields[b"content-type"] == expected
    assert isinstance(json.loads(rendered.body), dict)


def test_render_the_same_answer_twice_alike() -> None:
    """An answer is a value: rendering it leaves it as it was, and no list is shared (budget on header fields)."""
    answered = ask(RATE, Decision("c", NOW, RATE, windows=(SPENT,)))
    first = render(answered, "openai")
    first.headers.append((b"x", b"y"))
    assert render(answered, "openai").headers == first.headers[:-1]
