"""The README says what the code does: its tables are the code's tables, its commands are what CI runs."""

from __future__ import annotations

import re
from pathlib import Path

from asgi_metering.cli import _parser
from asgi_metering.outage import CHOICES, DEFAULTS
from asgi_metering.policies import Idempotency
from asgi_metering.rules.ending import DRAIN, DRAINABLE, END_OF_CALL
from asgi_metering.rules.hold import diagram
from asgi_metering.rules.operations import Sweep
from asgi_metering.rules.posting import MAX_LIVE_GRANTS
from asgi_metering.stores.forgetting import LATE_S, Bounds
from asgi_metering.stores.postgres.database import DEFAULT_NAMESPACE
from asgi_metering.stores.redis.cluster import MAX_PARTITIONS
from asgi_metering.stores.redis.partitions import PARTITIONS
from asgi_metering.stores.redis.parts import RESERVED_S

RETENTION = Sweep()
DAY_S = 86_400

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_draws_the_life_of_a_hold_from_the_table() -> None:
    """The README's diagram is the one that the table of transitions draws."""
    assert f"```\n{diagram()}\n```" in README


def test_lists_the_end_of_call_policies_of_the_code() -> None:
    """The README's table has every situation with its default and its choices."""
    for situation, (default, *choices) in END_OF_CALL.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| {situation.value} |"))
        _, _, shown_default, shown_choices, *_ = (cell.strip() for cell in row.split("|"))
        assert shown_default == f"`{default.value}`"
        drains = {DRAIN} if situation in DRAINABLE else set()
        assert set(re.findall(r"`(\w+)`", shown_choices)) == {choice.value for choice in choices} | drains


def test_tells_the_bounds_of_a_cluster() -> None:
    """The README's numbers of partitions and the life of a reservation are the code's."""
    assert f"a namespace is {PARTITIONS} partitions" in README
    assert f"hosts?partitions={PARTITIONS}`" in README
    assert f"from 1 to {MAX_PARTITIONS}, and is fixed" in README
    assert f"free again after {RESERVED_S:g} seconds" in README


def _row(start: str) -> list[str]:
    """The cells behind the first one of the table row that begins so."""
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_tells_how_long_rows_are_kept() -> None:
    """The README's table has the bounds of the code, for all stores and for memory (DESIGN "Retention")."""
    bounds = Bounds()
    calls, lines, windows = (
        f"{seconds / DAY_S:g} days"
        for seconds in (RETENTION.keep_holds_s, RETENTION.keep_entries_s, RETENTION.keep_windows_s)
    )
    assert _row("ended calls and their receipts") == [calls, f"the last {bounds.ended_holds:,}"]
    assert _row("ledger lines") == [lines, f"the last {bounds.entries:,} of an account"]
    assert _row("allowance windows") == [windows, f"{bounds.windows:,}, or {LATE_S / DAY_S:g} days"]
    assert _row("idempotency keys") == [f"{Idempotency().ttl_s / 3_600:g} hours, or `ttl_s`", ""]
    assert _row("charge keys") == [calls, ""]
    assert _row(f"grants; at most {MAX_LIVE_GRANTS} of an account") == ["for ever", ""]


def test_names_the_commands_that_move_books() -> None:
    """What the README says to type is what the command line takes, and the schema to back up is the default one."""
    (block,) = (block for block in README.split("```")[1::2] if block.startswith("\nasgi-metering export"))
    for line in block.strip().splitlines():
        program, *arguments = line.split()
        assert program == "asgi-metering"
        assert callable(_parser().parse_args(arguments).run)
    assert f"pg_dump --schema={DEFAULT_NAMESPACE}" in README


def test_lists_the_answers_of_each_layer_without_a_store() -> None:
    """The README's table has every layer with its choices, and marks the default."""
    told: dict[str, list[str]] = {}
    defaults = {}
    layer = ""
    for line in README.partition("## When the store is down")[2].splitlines():
        found = re.match(r'\| (\w*) ?\| `"(\w+)"`( \(default\))? \|', line)
        if found is not None:
            layer = found[1] or layer
            told.setdefault(layer, []).append(found[2])
            if found[3]:
                defaults[layer] = found[2]
    assert {name: set(answers) for name, answers in told.items()} == {
        name: set(answers) for name, answers in CHOICES.items()
    }
    assert defaults == DEFAULTS


def test_first_two_sh_blocks_are_single_lines_and_ci_runs_the_second() -> None:
    """The first command runs the demo; the second is, word for word, what `.ci/run` runs."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    demo, check = (block.strip() for block in blocks[:2])
    assert "\n" not in demo
    assert "\n" not in check
    assert demo.endswith("asgi-metering demo")
    assert check in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
