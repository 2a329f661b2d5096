"""
Commands side by side, for those that need one core each: ``python -m tests.abreast mypy + lint-imports``.

What each has printed is shown when it has ended, in the order given. Knows nothing of what they do.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Sequence

__all__ = ["BETWEEN", "main"]

BETWEEN = "+"
"""Stands between two commands, as a word of its own."""


def main(words: Sequence[str]) -> int:
    """Run the commands in *words*; 0 if all of them succeed, and the code of the first one that does not."""
    commands = [list(part) for is_gap, part in itertools.groupby(words, BETWEEN.__eq__) if not is_gap]
    running = []
    for command in commands:
        output = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it was shown)
        running.append((subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT), output))
    codes = []
    for command, (process, output) in zip(commands, running, strict=True):
        codes.append(process.wait())
        with output:
            output.seek(0)
            print(f"{' '.join(command)}\n{output.read().decode(errors='replace')}", flush=True)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
