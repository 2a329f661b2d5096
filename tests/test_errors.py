"""Errors: the class says whose move was wrong, the sentence what to do."""

from __future__ import annotations

import pickle

import pytest

from asgi_metering import errors
from asgi_metering.errors import (
    AmountError,
    CallClosedError,
    ConfigurationError,
    IdempotencyConflictError,
    IdentityError,
    InvalidKeyError,
    MeteringError,
    MissingExtraError,
    NoCallError,
    PayerError,
    SettlementError,
    StoreContendedError,
    StoreError,
    StoreUnavailableError,
    UnknownHoldError,
    UsageError,
)

CLASSES = [getattr(errors, name) for name in errors.__all__]

BUILT_INS = [
    (ConfigurationError, ValueError),
    (MissingExtraError, ImportError),
    (AmountError, ValueError),
    (InvalidKeyError, ValueError),
    (UsageError, ValueError),
    (PayerError, LookupError),
    (NoCallError, LookupError),
    (UnknownHoldError, LookupError),
    (IdempotencyConflictError, ValueError),
]


@pytest.mark.parametrize("error", CLASSES)
def test_catch_every_error_by_one_class(error: type[Exception]) -> None:
    """Everything that the package raises on purpose is a `MeteringError` and says what it means."""
    assert issubclass(error, MeteringError)
    assert error.__doc__


def test_list_every_error() -> None:
    """No error of the module is missing from its list of names."""
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)


@pytest.mark.parametrize(("error", "builtin"), BUILT_INS)
def test_catch_a_callers_mistake_by_its_builtin(error: type[Exception], builtin: type[Exception]) -> None:
    """A wrong value is a ValueError and a missing thing a LookupError, as everywhere in Python."""
    assert issubclass(error, builtin)


@pytest.mark.parametrize("error", [StoreUnavailableError, StoreContendedError])
def test_tell_the_stores_fault_from_the_callers(error: type[Exception]) -> None:
    """What the store could not do is a `StoreError`, and no mistake of whoever called."""
    assert issubclass(error, StoreError)
    assert not issubclass(error, (ValueError, LookupError))


@pytest.mark.parametrize("error", [IdentityError, CallClosedError, SettlementError])
def test_keep_apart_what_is_nobodys_value(error: type[Exception]) -> None:
    """Failures that no argument causes are neither value errors nor the store's."""
    assert not issubclass(error, (ValueError, LookupError, StoreError))


def test_name_the_first_field_that_differs() -> None:
    """A conflict of ids carries all that it says as attributes, so that nobody parses the sentence."""
    error = IdempotencyConflictError("grant", "inv-1", "amount", 5, 7)
    assert (error.what, error.key, error.field, error.stored, error.given) == ("grant", "inv-1", "amount", 5, 7)
    assert str(error) == (
        "The grant 'inv-1' exists with amount=5, and came again with amount=7, in smallest parts. Use a new id for a "
        "new grant."
    )


def test_say_whose_end_is_not_booked() -> None:
    """S3.10: an end that is not booked names its call, line and payer, also to another process."""
    for error in (found := SettlementError("It ran.", "c1", "podcast", "ann"), pickle.loads(pickle.dumps(found))):
        assert (str(error), error.call, error.line, error.payer) == ("It ran.", "c1", "podcast", "ann")
        assert error.reason == "settlement_failed"


def test_name_the_extra_that_is_missing() -> None:
    """A missing package is an error with the command that installs it."""
    error = MissingExtraError("The Redis store", "redis")
    assert (error.feature, error.extra) == ("The Redis store", "redis")
    assert str(error) == (
        "The Redis store needs a package that is not installed. Run: pip install 'asgi-metering[redis]'"
    )


@pytest.mark.parametrize(
    "error",
    [
        IdempotencyConflictError("grant", "inv-1", "amount", 5, 7),
        MissingExtraError("The Redis store", "redis"),
        StoreUnavailableError("No answer."),
    ],
)
def test_carry_an_error_to_another_process(error: MeteringError) -> None:
    """An error of a worker arrives whole where it is pickled to."""
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
