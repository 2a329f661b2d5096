"""The cap goes into the field of the request's own dialect, and raises no bound."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.estimates import clamp


@pytest.mark.parametrize(
    ("body", "change"),
    [
        ({"messages": []}, {"max_completion_tokens": 100}),
        ({"messages": [], "max_tokens": 500}, {"max_tokens": 100}),
        ({"messages": [], "max_tokens": 50}, {"max_tokens": 50}),
        ({"messages": [], "max_tokens": 500, "max_completion_tokens": 50}, {"max_tokens": 100}),
        ({"messages": [], "max_tokens": None}, {"max_completion_tokens": 100}),
        ({"messages": [], "max_tokens": "all"}, {"max_tokens": 100}),
        ({"messages": [], "max_tokens": 500, "n": 3}, {"max_tokens": 33}),
        ({"messages": [], "max_tokens": "500", "n": "3"}, {"max_tokens": 33}),
        ({"messages": [], "max_tokens": 50.0, "n": 1.0}, {"max_tokens": 50}),
        (
            {"messages": [], "system": "x", "max_completion_tokens": 500},
            {"max_tokens": 100, "max_completion_tokens": 100},
        ),
        (
            {"messages": [], "contents": [], "max_tokens": 500},
            {"max_tokens": 100, "generationConfig": {"maxOutputTokens": 100}},
        ),
        (
            {"contents": [], "config": {"max_output_tokens": 500}, "generationConfig": {"maxOutputTokens": 1}},
            {"config": {"max_output_tokens": 100}},
        ),
        (
            {"input": "Hi", "config": {"maxOutputTokens": 500}},
            {"max_output_tokens": 100, "config": {"maxOutputTokens": 100}},
        ),
        ({"messages": [], "system": "Be brief."}, {"max_tokens": 100}),
        ({"messages": [], "anthropic_version": "x", "max_tokens": 7}, {"max_tokens": 7}),
        ({"input": "Hi"}, {"max_output_tokens": 100}),
        ({"prompt": "Hi", "best_of": 4}, {"max_tokens": 25}),
        ({"contents": []}, {"generationConfig": {"maxOutputTokens": 100}}),
        (
            {"contents": [], "generationConfig": {"maxOutputTokens": 500, "temperature": 1, "candidateCount": 2}},
            {"generationConfig": {"maxOutputTokens": 50, "temperature": 1, "candidateCount": 2}},
        ),
        ({"contents": [], "config": {"max_output_tokens": 50}}, {"config": {"max_output_tokens": 50}}),
    ],
)
def test_write_the_cap_where_the_dialect_has_it(body: dict[str, Any], change: dict[str, Any]) -> None:
    """OpenAI, Anthropic and Gemini bound answers by fields of their own; the request that was given is not changed."""
    before = copy.deepcopy(body)
    assert clamp(body, 100) == {**before, **change}
    assert body == before


@given(st.integers(1, 10**6), st.one_of(st.none(), st.integers(0, 10**6)), st.integers(1, 8))
def test_raise_no_bound(cap: int, bound: int | None, answers: int) -> None:
    """What a request asked for is never more behind the clamp than before it, and never more than is affordable."""
    body = {"messages": [], "max_tokens": bound, "n": answers}
    if cap < answers:
        with pytest.raises(AmountError):
            clamp(body, cap)
        return
    clamped = clamp(body, cap)
    written = clamped.get("max_tokens") if bound is not None else clamped.get("max_completion_tokens")
    assert isinstance(written, int)
    assert written * answers <= cap
    assert bound is None or written <= bound


class Request(BaseModel):
    """What an endpoint takes."""

    messages: list[dict[str, Any]] = []
    max_tokens: int | None = None


class Loose(BaseModel):
    """What lets anything pass."""

    model_config = ConfigDict(extra="allow")
    input: str = ""


class Strict(BaseModel):
    """What has no bound."""

    prompt: str = ""


def test_clamp_the_models_of_an_endpoint() -> None:
    """A pydantic model is copied, with the field that it declares; one without any says so."""
    asked = Request(max_tokens=500)
    assert clamp(asked, 100).max_tokens == 100
    assert asked.max_tokens == 500
    assert clamp(Request(), 100).max_tokens == 100
    assert clamp(Loose(), 100).model_extra == {"max_output_tokens": 100}
    assert clamp(Loose.model_validate({"max_output_tokens": 7}), 100).model_extra == {"max_output_tokens": 7}
    with pytest.raises(ConfigurationError, match="Strict has no field 'max_tokens'"):
        clamp(Strict(), 100)


def test_name_the_dialect_where_the_shape_says_nothing() -> None:
    """A request of no known shape needs its dialect named, and one that is known."""
    assert clamp({"text": "Hi"}, 5, dialect="openai-responses") == {"text": "Hi", "max_output_tokens": 5}
    with pytest.raises(ConfigurationError, match="Name its dialect"):
        clamp({"text": "Hi"}, 5)
    with pytest.raises(ConfigurationError, match="'cohere' is not known"):
        clamp({"messages": []}, 5, dialect="cohere")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="SimpleNamespace, which cannot be clamped"):
        clamp(SimpleNamespace(messages=[]), 5)


@pytest.mark.parametrize("cap", [0, -1, 2])
def test_refuse_a_cap_that_leaves_nothing(cap: int) -> None:
    """Where no token is left for each answer nothing can be asked for."""
    with pytest.raises(AmountError, match="leaves none for an answer"):
        clamp({"messages": [], "n": 3}, cap)
