"""
The text of an answer and its token counts.

Knows one fixed text and how to count it. Never knows a wire format: the counts are in the normal form,
where the input includes what was cached and the output includes what was reasoned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asgi_metering.testing.provider.behaviour import MAX_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_metering.testing.provider.behaviour import Behaviour

__all__ = ["DEFAULT_WORDS", "Answer", "TokenCounts", "answer_text", "plan", "word"]

DEFAULT_WORDS = 20
"""Words of an answer where neither the model's name nor the maximum says otherwise."""

_TEXT = (
    "the river runs past a small café where people count every word that comes out of the machine and pay only "
    "for what they really used while the meter ticks along without any noise and nobody asks who left before the "
    "end of it"
)
_WORDS = tuple(_TEXT.split())
# Each of them, with a blank before it, is one token of cl100k_base and of o200k_base, so that a maximum in tokens
# is a number of words. "café" is there for its two bytes: a torn stream tears them.


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """
    Tokens of one call: cached and cache_write are parts of the input, reasoning is a part of the output.

    Args:
        input: Every input token.
        output: Every output token, of all choices.
        cached: Read from the cache.
        cache_write: Written to the cache.
        reasoning: Thought, and not shown.
    """

    input: int
    output: int
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What will be said, if nothing stops it.

    Args:
        words: Words of each choice.
        choices: How many times the text is said.
        truncated: The maximum ended it, not the text.
        counts: What the whole of it uses.
        reported: What will be reported of that: `None` is ``null``.
        reports: Whether anything is reported at all.
    """

    words: int
    choices: int
    truncated: bool
    counts: TokenCounts
    reported: TokenCounts | None
    reports: bool

    @property
    def text(self) -> str:
        """The whole text of one choice."""
        return answer_text(self.words)


def word(index: int) -> str:
    """Return the delta at *index*, from 0: a word, with a blank before it except the first."""
    text = _WORDS[index % len(_WORDS)]
    return text if index == 0 else f" {text}"


def answer_text(words: int) -> str:
    """Return the first *words* words of the provider's text; so many deltas were sent, this is what was read."""
    return "".join(map(word, range(words)))


def plan(
    behaviour: Behaviour, prompt: str, max_tokens: int | None, choices: int, count: Callable[[str], int]
) -> Answer:
    """
    Decide on the answer to *prompt*.

    Args:
        behaviour: How to answer.
        prompt: The joined text of the request.
        max_tokens: Bound of each choice's output, thought included; `None` for none.
        choices: How many answers to give.
        count: Counts the tokens of a text.
    """
    wanted = _wanted_words(behaviour)
    room = MAX_WORDS + behaviour.reasoning if max_tokens is None else max_tokens
    reasoning = min(behaviour.reasoning, room)
    words = min(wanted, room - reasoning)
    input_tokens = count(prompt)
    cached = min(behaviour.cached, input_tokens)
    counts = TokenCounts(
        input=input_tokens,
        output=(count(answer_text(words)) + reasoning) * choices,
        cached=cached,
        cache_write=min(behaviour.cache_write, input_tokens - cached),
        reasoning=reasoning * choices,
    )
    truncated = words < wanted or reasoning < behaviour.reasoning
    return Answer(words, choices, truncated, counts, _reported(behaviour, counts), behaviour.usage != "missing")


def _wanted_words(behaviour: Behaviour) -> int:
    if behaviour.words is not None:
        return behaviour.words
    # An end after delta 30 needs a text that has more than 30.
    return max(DEFAULT_WORDS, behaviour.stop.after + 1 if behaviour.stop else 0)


def _reported(behaviour: Behaviour, counts: TokenCounts) -> TokenCounts | None:
    if behaviour.usage == "counted":
        return counts
    if behaviour.usage == "zero":
        return TokenCounts(0, 0)
    if behaviour.usage == "negative":
        return TokenCounts(-1, -1)
    if behaviour.usage == "fixed":
        return _fixed(behaviour)
    return None


def _fixed(behaviour: Behaviour) -> TokenCounts:
    input_tokens, output_tokens = behaviour.fixed_usage
    cached = min(behaviour.cached, input_tokens)
    return TokenCounts(
        input_tokens,
        output_tokens,
        cached,
        min(behaviour.cache_write, input_tokens - cached),
        min(behaviour.reasoning, output_tokens),
    )
