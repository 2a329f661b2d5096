"""
Clamping: the affordable cap, written into a request in its dialect's own field.

Changes nothing else of a request, and never raises a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, TypeVar, cast

from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.estimates.bodies import ANSWERS, CONFIG_BOUNDS, CONFIGS, OUTPUT_BOUNDS, whole

__all__ = ["Body", "ClampDialect", "clamp"]

Body = TypeVar("Body")

ClampDialect: TypeAlias = Literal["openai-chat", "openai-responses", "openai-completions", "anthropic", "gemini"]
"""Whose field is meant."""

_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "openai-chat": ("max_completion_tokens", "max_tokens"),
    "openai-responses": ("max_output_tokens",),
    "openai-completions": ("max_tokens",),
    "anthropic": ("max_tokens",),
    "gemini": ("maxOutputTokens", "max_output_tokens"),
}
"""By dialect: the fields that bound one answer; the first is written where a request has none."""


def clamp(body: Body, cap: int, *, dialect: ClampDialect | None = None) -> Body:
    """
    Bound what *body* may have written to *cap* tokens: ``clamp(body, current_call().affordable())``.

    Args:
        body: A request to a model: a mapping, of which a copy is answered, or an object with ``model_copy`` (pydantic).
        cap: Output tokens of all answers together: of several (``n``) each gets its part.
        dialect: Whose field is written; told by the request's shape where it is not given. A request with ``messages``
            and no bound is taken for OpenAI's chat, unless it has ``system`` or ``anthropic_version``.

    Returns:
        The request with its own bound lowered, or with one where it had none. Bounds below the cap stay as they are.
        Bounds of other dialects that it has as well are lowered too: who sent them knows why.

    Raises:
        AmountError: The cap leaves no token for each answer: nothing can be asked for. Refuse such calls before,
            ``hold=up_to(at_least="0.01")``.
        ConfigurationError: The request is of no shape that is known; name its *dialect*.
    """
    fields = _fields_of(body)
    family = dialect or _family(fields)
    if family not in _FIELDS:
        raise ConfigurationError(f"dialect={family!r} is not known. Use one of {', '.join(map(repr, _FIELDS))}.")
    configs = {name: _fields_of(fields[name]) for name in CONFIGS if _has_fields(fields.get(name))}
    each = cap // _answers(fields, *configs.values())
    if each < 1:
        raise AmountError(
            f"A cap of {cap} tokens leaves none for an answer. Refuse such calls: hold=up_to(at_least='0.01'), say."
        )
    change: dict[str, Any] = _lowered(fields, OUTPUT_BOUNDS, each)
    if family == "gemini":
        configs = configs or {CONFIGS[0]: {}}
    elif change.keys().isdisjoint(_FIELDS[family]):
        change[_new_field(body, family)] = each
    for name, config in configs.items():
        inner = fields.get(name) or {}
        lowered = _lowered(config, CONFIG_BOUNDS, each)
        if family == "gemini" and not lowered:
            lowered = {_new_field(inner, family): each}
        if lowered:
            change[name] = _copied(inner, lowered)
    return _copied(body, change)


def _new_field(body: Any, family: str) -> str:
    """The field for a request without a bound: of a pydantic model one that it declares."""
    declared = getattr(type(body), "model_fields", {})
    return next((field for field in _FIELDS[family] if field in declared), _FIELDS[family][0])


def _has_fields(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(type(value), "model_fields")


def _lowered(place: Mapping[str, Any], bounds: Sequence[str], cap: int) -> dict[str, Any]:
    return {field: _lower(place[field], cap) for field in bounds if field in place}


def _lower(bound: Any, cap: int) -> int:
    read = whole(bound)
    return cap if read is None else min(read, cap)


def _answers(fields: Mapping[str, Any], *configs: Mapping[str, Any]) -> int:
    counts = [fields.get("best_of"), *(place.get(key) for place in (fields, *configs) for key in ANSWERS)]
    return max(1, *(whole(count) or 1 for count in counts))


def _family(fields: Mapping[str, Any]) -> str:
    if "contents" in fields:
        return "gemini"
    if "messages" in fields:
        is_anthropic = "system" in fields or "anthropic_version" in fields
        return "anthropic" if is_anthropic else "openai-chat"
    if "input" in fields:
        return "openai-responses"
    if "prompt" in fields:
        return "openai-completions"
    raise ConfigurationError(
        "The request has no messages, input, prompt or contents, so that its bound cannot be told. Name its dialect: "
        "clamp(body, cap, dialect='openai-chat'), say."
    )


def _fields_of(body: Any) -> Mapping[str, Any]:
    if isinstance(body, Mapping):
        return {name: value for name, value in body.items() if value is not None}
    names = getattr(type(body), "model_fields", None)
    if names is None:
        raise ConfigurationError(
            f"The request is a {type(body).__name__}, which cannot be clamped. Pass a mapping or a pydantic model."
        )
    found = {name: getattr(body, name) for name in names}
    return {name: value for name, value in {**found, **(body.model_extra or {})}.items() if value is not None}


def _copied(body: Body, change: Mapping[str, Any]) -> Body:
    if isinstance(body, Mapping):
        return cast("Body", {**body, **change})
    declared = getattr(type(body), "model_fields", {})
    model: Any = body
    missing = [name for name in change if name not in declared]
    if missing and model.model_config.get("extra") != "allow":
        raise ConfigurationError(
            f"{type(body).__name__} has no field {missing[0]!r} for the cap. Declare it, or name another dialect."
        )
    return cast("Body", model.model_copy(update=dict(change)))
