"""How the capture of a provider's quotas is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

READINGS = "asgi_metering.upstream.readings"
DRESSING = "asgi_metering.asgi.dressing"


def _passed(name: str, *cases: str) -> tuple[str, ...]:
    return tuple(f"tests/pitfalls/test_quotas.py::{name}[{case}]" for case in cases)


def _asked(name: str, *cases: str) -> tuple[str, ...]:
    return tuple(f"tests/upstream/test_booking.py::{name}[{case}]" for case in cases)


MUTATIONS = (
    Mutation(
        0,
        "fields of a provider never pass",
        DRESSING,
        "forward_quota_headers:\n        return given\n",
        "forward_quota_headers:\n        pass\n",
        _passed("test_let_fields_pass_where_the_route_says_so", "openai-200", "anthropic-429"),
    ),
    Mutation(
        0,
        "fields of a provider always pass",
        DRESSING,
        "    return [field for field in given if not is_quota_header(field[0])]\n",
        "    return given\n",
        _passed("test_capture_and_remove_the_fields_of_a_provider", "openai-200", "anthropic-429"),
    ),
    Mutation(
        0,
        "refusals that pass through are not captured",
        DRESSING,
        "    if not quotas:\n        return given\n",
        "    if not quotas or status >= 400:\n        return given\n",
        _passed("test_capture_and_remove_the_fields_of_a_provider", "openai-429", "anthropic-429", "anthropic-529")
        + _passed("test_let_fields_pass_where_the_route_says_so", "openai-429", "anthropic-429"),
    ),
    Mutation(
        0,
        "readings are as old as their answers",
        DRESSING,
        "status=status, started_at=call.started_at)\n",
        "status=status, started_at=None)\n",
        _passed("test_older_call_never_replaces_the_reading_of_a_newer_one", "200", "429"),
    ),
    Mutation(
        0,
        "refusals of upstreams are not captured",
        READINGS,
        "        series = _series(provider, label)\n        now =",
        "        if status is not None and status >= _REFUSED_FROM:\n            return None\n"
        "        series = _series(provider, label)\n        now =",
        _asked(
            "test_capture_the_quota_of_a_refusal_that_the_sdk_raises",
            "openai-async",
            "anthropic-sync",
        ),
    ),
)
