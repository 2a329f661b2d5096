"""The README says what the code does: its tables are the code's tables, its commands are what CI runs."""

from __future__ import annotations

import re
from pathlib import Path

from asgi_metering.outage import CHOICES, DEFAULTS
from asgi_metering.receipts import Basis
from asgi_metering.rules.ending import END_OF_CALL
from asgi_metering.rules.hold import diagram

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
        assert {Basis(name) for name in re.findall(r"`(\w+)`", shown_choices)} == set(choices)


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
