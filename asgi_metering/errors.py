"""
Every exception that the package raises on purpose.

The class says whose move was wrong: whoever configured (`ConfigurationError`), whoever called
(`MeteringError` children that are also `ValueError` or `LookupError`), or the store (`StoreError`).
Not enough balance, over a limit, already settled: these are answers, not errors (see `decisions`).
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "AmountError",
    "BalanceError",
    "CallClosedError",
    "ConfigurationError",
    "IdempotencyConflictError",
    "IdentityError",
    "InvalidKeyError",
    "JournalError",
    "MeteringError",
    "MissingExtraError",
    "NoCallError",
    "PayerError",
    "SettlementError",
    "StoreAvoidedError",
    "StoreContendedError",
    "StoreError",
    "StoreUnavailableError",
    "UnknownHoldError",
    "UnwritableError",
    "UsageError",
]


class MeteringError(Exception):
    """Base of every error of this package. Catch a child where you can name one."""


class ConfigurationError(MeteringError, ValueError):
    """The set-up is wrong; raised at import or at startup, never first on a paying request."""


class MissingExtraError(ConfigurationError, ImportError):
    """
    A feature needs a package that is not installed.

    Args:
        feature: What was asked for.
        extra: The extra of this package that brings what it needs.
        package: The package to install, where the extra brings another one for it.
    """

    def __init__(self, feature: str, extra: str, package: str = "") -> None:
        wanted = package or f"'asgi-metering[{extra}]'"
        super().__init__(f"{feature} needs a package that is not installed. Run: pip install {wanted}")
        self.feature = feature
        self.extra = extra
        self.package = package

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.feature, self.extra, self.package)


class AmountError(MeteringError, ValueError):
    """An amount, price or scale is not usable: a float, NaN, negative, too fine or too large."""


class BalanceError(MeteringError, ValueError):
    """A provider's balance could not be asked for, or its answer not be understood (S1.25 to S1.28)."""


class InvalidKeyError(MeteringError, ValueError):
    """A payer, grant id or other key is empty, too long or not printable."""


class UsageError(MeteringError, ValueError):
    """Reported usage is not usable: negative, NaN, absurd or contradictory."""


class IdentityError(MeteringError):
    """The `identify` function failed, so nobody can be charged; over HTTP the answer is 503."""


class PayerError(MeteringError, LookupError):
    """Who pays could not be resolved. The work does not run, and nobody else is charged (S0.25, S3.38)."""


class NoCallError(MeteringError, LookupError):
    """Metered code ran outside any metered call; the gate fails closed (pitfall 3)."""


class CallClosedError(MeteringError):
    """The call that this code belongs to has ended; it can neither admit nor charge any more (pitfall 1)."""


class UnknownHoldError(MeteringError, LookupError):
    """No hold has this id, live or kept."""


class IdempotencyConflictError(MeteringError, ValueError):
    """
    The same id came again with other input.

    Args:
        what: What the id identifies, such as ``"grant"``.
        key: The id.
        field: The first field that differs.
        stored: Its value in the first request.
        given: Its value now.
    """

    def __init__(self, what: str, key: str, field: str, stored: object, given: object) -> None:
        super().__init__(
            f"The {what} {key!r} exists with {field}={stored!r}, and came again with {field}={given!r}"
            f"{', in smallest parts' if field == 'amount' else ''}. Use a new id for a new {what}."
        )
        self.what = what
        self.key = key
        self.field = field
        self.stored = stored
        self.given = given

    def __reduce__(self) -> tuple[object, ...]:
        # Workers hand errors to one another pickled; what exceptions do by default is to repeat the message only.
        return type(self), (self.what, self.key, self.field, self.stored, self.given)


class SettlementError(MeteringError):
    """
    The work was done, but its end is not booked.

    Where the store is down it is queued and retried (S3.10); an end that cannot be booked at all is logged, and its
    hold is ended by its policy when it expires. What kept it from being booked is its cause, as far as that is known.

    Args:
        message: The sentence.
        call: The call's id, by which its receipt and its usage event will be found.
        line: The billing line.
        payer: Whose balance it is.

    Attributes:
        reason: For programs, beside the reasons of refusals (S3.42).
    """

    reason: Final = "settlement_failed"

    def __init__(self, message: str, call: str = "", line: str = "", payer: str = "") -> None:
        super().__init__(message)
        self.call = call
        self.line = line
        self.payer = payer

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (*self.args, self.call, self.line, self.payer)


class JournalError(MeteringError):
    """The journal could not be used: it is full, or its file or disk cannot be written."""


class StoreError(MeteringError):
    """The store could not do its part. Driver errors are chained as the cause."""


class StoreUnavailableError(StoreError):
    """No answer came in time. The operation may have happened: repeat it with the same id to learn it."""


class StoreAvoidedError(StoreUnavailableError):
    """The store was not asked at all, since it has not answered of late: nothing happened."""


class StoreContendedError(StoreError):
    """Bounded retries against concurrent writers are spent."""


class UnwritableError(StoreError):
    """The store works, and cannot run this one operation however often it is asked: something in it is not writable."""
