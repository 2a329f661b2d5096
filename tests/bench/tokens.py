"""
What counting tokens takes, by the length and the kind of a text: ``python -m tests.bench.tokens``.

Options: ``--rounds N`` and ``--chars N ...``. A cell is the fastest of its rounds, in milliseconds; ``~`` marks lengths
that are estimated rather than counted. Also told: what loading a vocabulary takes.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Sequence

from asgi_metering.tokens import ENCODINGS, count_tokens, preload

CHARS = (100, 1_000, 10_000, 100_000, 200_000, 1_000_000)
ROUNDS = 5

LOAD = """
import time
from asgi_metering.tokens import preload
begun = time.perf_counter()
preload([{!r}])
print(time.perf_counter() - begun)
"""


def texts(chars: int) -> dict[str, str]:
    """Texts of so many characters, of each kind."""
    drawn = random.Random(7)
    prose = "The quick brown fox jumps over the lazy dog, and nobody knows why it does.\n"
    code = "    for index, (name, value) in enumerate(sorted(table.items())):\n        total[name] += value * 3\n"
    return {
        "English": (prose * (chars // len(prose) + 1))[:chars],
        "code": (code * (chars // len(code) + 1))[:chars],
        "Chinese": "".join(chr(drawn.randrange(0x4E00, 0x9FFF)) for _ in range(chars)),
        "one letter": "a" * chars,
        "random letters": "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=chars)),
        "blanks": " " * chars,
        "NUL": "\0" * chars,
    }


def rows(chars: Sequence[int], rounds: int) -> list[tuple[str, ...]]:
    """A row for each encoding and kind of text, with a cell for each length."""
    preload(ENCODINGS)
    made = {length: texts(length) for length in chars}
    found = []
    for encoding in ENCODINGS:
        for kind in texts(1):
            cells = [cell(made[length][kind], encoding, rounds) for length in chars]
            found.append((encoding, kind, *cells))
    return found


def cell(text: str, encoding: str, rounds: int) -> str:
    """Milliseconds of the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        counted = count_tokens(text, encoding)
        best = min(best, time.perf_counter() - begun)
    return f"{'~' if counted.estimated else ''}{best * 1000:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--chars", type=int, nargs="+", default=CHARS)
    given = parser.parse_args(arguments)
    for encoding in ENCODINGS:
        took = subprocess.run([sys.executable, "-c", LOAD.format(encoding)], capture_output=True, text=True, check=True)
        print(f"loading {encoding}: {float(took.stdout) * 1000:.0f} ms")
    print(f"\n| encoding | text | {' | '.join(f'{length:,}' for length in given.chars)} |")
    print(f"|---|---|{'---:|' * len(given.chars)}")
    for row in rows(given.chars, given.rounds):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
