"""
Names of keys: where each row of a namespace is kept, and back from a key to what it names.

All keys of a namespace share its hash tag, so that one script may touch any of them, also on a Cluster. Does not know
what is kept under a key.
"""

from __future__ import annotations

from asgi_metering.errors import ConfigurationError

__all__ = ["GLUE", "Names", "escaped", "restored"]

GLUE = "\x1f"
"""Between the texts of a key; no escaped text contains it."""

MAX_NAMESPACE = 64
"""Characters: it is part of every key."""


def _escape(char: str) -> str:
    return f"%{ord(char):02x}" if ord(char) < 0x20 or char in "%\x7f" else char


def escaped(text: str) -> str:
    """*text* without control characters; other texts stay as they are, so that keys can be read."""
    if text.isprintable() and "%" not in text:
        return text
    return "".join(map(_escape, text))


def restored(text: str) -> str:
    """What was `escaped`."""
    if "%" not in text:
        return text
    first, *others = text.split("%")
    return first + "".join(chr(int(part[:2], 16)) + part[2:] for part in others)


def start_text(start: float) -> str:
    """A window's start as scripts write it too: with all its digits."""
    return f"{start:.17g}"


class Names:
    """
    The keys of one namespace.

    Args:
        namespace: Keeps several applications on one server apart.

    Raises:
        ConfigurationError: It is empty, too long, or not made of letters, digits and ``_ - . :``.
    """

    def __init__(self, namespace: str) -> None:
        plain = namespace.translate(str.maketrans("_-.:", "aaaa"))
        if not (plain.isascii() and plain.isalnum() and len(namespace) <= MAX_NAMESPACE):
            raise ConfigurationError(
                f"The namespace {namespace!r} is not usable in keys. Use 1 to {MAX_NAMESPACE} letters, digits and "
                f"characters of '_-.:'."
            )
        self.prefix = prefix = f"{{{namespace}}}:"
        self._hold = f"{prefix}h:"
        self.gate = f"{prefix}gate"
        # The second key never exists: where a slot is on its way to another node, a Cluster then runs no script that
        # names both, and none finds one row here and the next one there.
        self.fence = (self.gate, f"{prefix}fence")
        self.due = f"{prefix}z:due"
        self.ended = f"{prefix}z:ended"
        self.past_counters = f"{prefix}z:counters"
        self.pools = f"{prefix}z:pools"
        self.past_windows = f"{prefix}z:windows"
        self.past_charge_keys = f"{prefix}z:charge"
        self.past_idempotency = f"{prefix}z:idempotency"
        self.oldest_lines = f"{prefix}z:lines"
        self.accounts = f"{prefix}z:accounts"
        self.events = f"{prefix}events"
        self.event_order = f"{prefix}events:order"
        self.delivered = f"{prefix}z:delivered"
        self.readings = f"{prefix}readings"
        self.past_readings = f"{prefix}z:readings"

    def account(self, payer: str, unit: str) -> str:
        """An account's sums and its open grants."""
        return f"{self.prefix}a:{escaped(payer)}{GLUE}{escaped(unit)}"

    def of_account(self, kind: str, account: str) -> str:
        """
        What else an account has, by the name of its first key: ``G`` closed grants, ``l`` live holds by expiry,
        ``e`` ledger lines, ``r`` their refs, ``v`` allowance windows, ``p`` the checkpoint.
        """
        return f"{self.prefix}{kind}:{self.rest(account)}"

    def hold(self, call_id: str) -> str:
        """A hold."""
        # Every call has an id of its own, and most are plain: as `escaped`.
        is_plain = call_id.isprintable() and "%" not in call_id
        return self._hold + (call_id if is_plain else escaped(call_id))

    def counter(self, key: str) -> str:
        """A rate limit's counter."""
        return f"{self.prefix}c:{escaped(key)}"

    def pool(self, name: str) -> str:
        """A concurrency pool's leases, by expiry."""
        return f"{self.prefix}q:{escaped(name)}"

    def idempotency(self, key: str) -> str:
        """An idempotency key."""
        return f"{self.prefix}i:{escaped(key)}"

    def charge_key(self, key: str) -> str:
        """A charge key."""
        return f"{self.prefix}k:{escaped(key)}"

    def unit(self, name: str) -> str:
        """A declared unit."""
        return f"{self.prefix}u:{escaped(name)}"

    def reading(self, series: str, part: str) -> str:
        """The name of a part of a reading, among those that are shared."""
        return f"{escaped(series)}{GLUE}{part}"

    def bucket(self, payer: str, unit: str, name: str) -> str:
        """Where the start of an allowance's last window is kept."""
        return f"{self.prefix}W:{escaped(payer)}{GLUE}{escaped(unit)}{GLUE}{escaped(name)}"

    def window(self, payer: str, unit: str, name: str, start: float) -> str:
        """One window of an allowance."""
        return f"{self.prefix}w:{escaped(payer)}{GLUE}{escaped(unit)}{GLUE}{escaped(name)}{GLUE}{start_text(start)}"

    def kind(self, key: str) -> str:
        """The letter that says what is kept under *key*; a longer word for what is no row."""
        return key[len(self.prefix) :].partition(":")[0]

    def rest(self, key: str) -> str:
        """What follows the letter."""
        return key[len(self.prefix) + 2 :]

    def text(self, key: str) -> str:
        """The one text that *key* was made of."""
        return restored(self.rest(key))

    def pair(self, key: str) -> tuple[str, str]:
        """The two texts that *key* was made of: payer and unit of an account."""
        payer, unit = self.texts(key)
        return payer, unit

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts that *key* was made of."""
        return tuple(map(restored, self.rest(key).split(GLUE)))
