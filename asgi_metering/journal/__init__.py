"""
The journal: a local file that keeps what could not be handed to the store, until it can.

Knows operations as values and a file; nothing of stores, calls or retries.
"""

from asgi_metering.journal.file import Journal, JournalEntry
from asgi_metering.journal.looking import Waiting, give_up, look

__all__ = ["Journal", "JournalEntry", "Waiting", "give_up", "look"]
