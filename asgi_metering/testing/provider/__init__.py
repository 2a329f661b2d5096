r"""
A model provider for tests and demos: the wire formats of OpenAI, Anthropic, Gemini, Groq and Mistral, without a
network or a bill.

Knows how they answer, count and fail. Never knows that somebody meters it.

    uvicorn --factory asgi_metering.testing.provider:Provider --port 9000
    curl -N localhost:9000/v1/chat/completions -H "authorization: Bearer any" \
         -d '{"model": "echo:slow:cut-after-5", "stream": true, "messages": [{"role": "user", "content": "Hi"}]}'

Paths: ``POST /v1/chat/completions``, ``/v1/responses``, ``/v1/messages``, ``/v1/messages/count_tokens``; Groq's
``/openai/v1/chat/completions``, Gemini's ``/v1/models/MODEL:generateContent`` and ``:streamGenerateContent``, and
``/mistral/v1/chat/completions``, for Mistral's own path is OpenAI's. So the base address of each SDK is the server's,
with ``/v1`` for OpenAI's and ``/mistral`` for Mistral's. Any key is taken unless `Provider` was given some. The base
name of the model is free ("echo", "gpt-5.5"), and the answer carries it. The text is always the same, and each word of
it is one token, so a maximum of 7 tokens gives 7 words; token counts are counted over the very texts of the prompt and
the answer. Limits count down and refill continuously, and beyond them there is a real 429.

What follows the base name, each part after a colon, in any order, makes the provider behave:

=====================  ====================================================================================
``words-N``            the answer has N words, if the maximum allows (default 20, up to 30,000)
``slow``, ``slow-MS``  MS milliseconds (50) before each delta; before a JSON answer, once for each word
``endless``            a stream that goes on until the client leaves
``error-STATUS``       refused with this status, 400 to 599, by the vendor's error body
``rate-limited``,      429 with ``retry-after`` of S seconds (2) and nothing left of the requests
``rate-limited-S``
``overloaded``         OpenAI 503, Anthropic 529
``out-of-credit``      OpenAI 429 ``insufficient_quota``, Anthropic 400
``fail-first-N``       the first N requests for this very model name get 500, later ones an answer
``limited-first-N``    the first N get 429 with ``retry-after: 0``, and later ones an answer
``cut-after-N``        the connection is cut after N deltas; a JSON answer is cut in its middle
``error-after-N``      the error event after N deltas; instead of a JSON answer, 500
``failed-after-N``     the same, and in the Responses API ``response.failed``, as JSON with status 200
``stall-after-N``      nothing more after N deltas, until the client leaves; instead of a JSON answer, nothing
``no-usage``           no ``usage`` anywhere, also where it was asked for
``null-usage``         ``usage: null``
``zero-usage``         a reported zero
``negative-usage``     -1 tokens
``usage-I-O``          I input and O output tokens, whatever was said; may be absurd
``running-usage``      chat streams carry the usage so far on every chunk, asked or not
``cached-N``           N input tokens came from the cache (at most the input)
``cache-write-N``      N input tokens were written to it (at most the rest)
``reasoning-N``        N output tokens were thought and not shown; they count towards the maximum
``no-quota``           no rate-limit fields
``crlf``               the stream's lines end in CR LF
``comments``           a comment line before each event
``torn``               each event comes in two pieces, torn inside a character where one has several bytes
=====================  ====================================================================================

A part that is unknown, out of bounds or contradicts another is a 404 that lists the parts. `Provider.requests` holds
what came, how much was sent, and whether the client left. A cut needs a server that closes the connection under an
application that ends early: uvicorn, hypercorn and granian do, daphne stalls instead.
"""

from __future__ import annotations

from asgi_metering.testing.provider.answers import TokenCounts, answer_text
from asgi_metering.testing.provider.app import Provider, SeenRequest
from asgi_metering.testing.provider.behaviour import BEHAVIOURS

__all__ = ["BEHAVIOURS", "Provider", "SeenRequest", "TokenCounts", "answer_text"]
