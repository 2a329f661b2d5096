"""Stores: where accounts, holds, counters and events live. `contract` says what one must do."""
