"""Names and keys: which strings may identify things."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.errors import ConfigurationError, InvalidKeyError
from asgi_metering.names import MAX_KEY_LENGTH, check_key, check_name, check_text

NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_"


@pytest.mark.parametrize("name", ["a", "_", "0", "chat.v1-beta_2", "x" * 64])
def test_accept_a_name(name: str) -> None:
    """1 to 64 letters, digits, underscores, and then dots and dashes are a name."""
    assert check_name(name, "line") == name


@pytest.mark.parametrize(
    "name", ["", "x" * 65, "-a", ".a", "a b", "a\n", "\na", "a/b", "ä", "a:b", "a'b", None, 7, b"a", ["a"]]
)
def test_refuse_what_is_no_name(name: object) -> None:
    """Anything that metrics, header fields or SQL would have to quote is refused, and the error names it."""
    with pytest.raises(ConfigurationError, match="is not 1 to 64 characters of letters") as caught:
        check_name(name, "line")  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"The line {name!r} ")


@pytest.mark.uncounted
@given(st.sampled_from(NAMES), st.text(f"{NAMES}.-", max_size=63))
def test_accept_every_string_of_the_grammar(first: str, others: str) -> None:
    """The grammar of names is what the documentation says."""
    name = first + others
    assert check_name(name, "line") == name


@pytest.mark.parametrize("key", ["a", "org_7", "two words", "é", "日本", "🙂", "x" * MAX_KEY_LENGTH, "a/b:c'd\"e"])
def test_accept_an_opaque_key(key: str) -> None:
    """A key is any printable text of 1 to 255 characters."""
    assert check_key(key, "payer") == key


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("", "The payer has 0 characters; 1 to 255 are allowed"),
        ("x" * 256, "The payer has 256 characters"),
        ("a\x00b", "has characters that are not printable"),
        ("a\nb", "not printable"),
        ("a\r\nSet-Cookie: x", "not printable"),
        ("\ud800", "not printable"),
        ("\u202e", "not printable"),
        ("\x7f", "not printable"),
        (None, "The payer None is a NoneType, not a str"),
        (7, "The payer 7 is a int, not a str"),
        (b"org", "is a bytes, not a str"),
    ],
)
def test_refuse_what_is_no_key(key: object, sentence: str) -> None:
    """Control characters (S0.41), lone surrogates, nothing, too much, or no str at all: refused with a sentence."""
    with pytest.raises(InvalidKeyError, match=sentence):
        check_key(key, "payer")  # type: ignore[arg-type]


def test_keep_a_long_key_out_of_the_error() -> None:
    """A key may be long and may be personal: its length is told, not its text."""
    with pytest.raises(InvalidKeyError) as caught:
        check_key("secret" * 100, "payer")
    assert "secret" not in str(caught.value)


@pytest.mark.uncounted
@given(st.text())
def test_accept_only_keys_that_every_store_takes(key: str) -> None:
    """What passes is printable, encodes to UTF-8 and is within the bound; what is refused is an `InvalidKeyError`."""
    try:
        check_key(key, "payer")
    except InvalidKeyError:
        assert not key.isprintable() or not 1 <= len(key) <= MAX_KEY_LENGTH
    else:
        assert key.isprintable()
        assert 1 <= len(key) <= MAX_KEY_LENGTH
        key.encode()


@pytest.mark.parametrize("text", ["", "stripe", "Größe 3", "x" * 255])
def test_accept_a_text_of_a_statement(text: str) -> None:
    """Anything printable of up to 255 characters, or nothing."""
    assert check_text(text, "actor") == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [(None, "None"), (5, "5"), ("a\tb", "'a.tb'"), ("\udfff", ".*"), ("x" * 256, r"'x{59}\.\.\. \(258 characters\)")],
)
def test_refuse_what_is_no_text_of_a_statement(text: Any, shown: str) -> None:
    """What is no such text is shown, unless it is long, and named with the mend."""
    with pytest.raises(ConfigurationError, match=f"^The actor {shown} is not a str of at most 255 .* Shorten it, or"):
        check_text(text, "actor")
