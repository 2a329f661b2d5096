"""What the code says that it does is tested: each requirement id that the package cites is cited by a test."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = ROOT / "asgi_metering" / "testing" / "conformance"

LAST = {"S0": 57, "S1": 59, "S2": 44, "S3": 48, "S4": 18, "X": 10}
"""The last number of each section of the requirements; every section counts from 1."""

CITED = re.compile(r"\b(S\d+|X)\.(\d+)\b(?: to \1\.(\d+)\b)?")
"""One id, or a section's ids from one to another."""


def cited(text: str) -> list[tuple[str, int]]:
    """Every id that *text* cites, those between the ends of a range included."""
    found = []
    for section, first, last in CITED.findall(text):
        found += [(section, number) for number in range(int(first), int(last or first) + 1)]
    return found


def places(files: Iterable[Path]) -> dict[tuple[str, int], list[str]]:
    """Where each id is cited, as file and line."""
    found: dict[tuple[str, int], list[str]] = {}
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for requirement in cited(line):
                found.setdefault(requirement, []).append(f"{path.relative_to(ROOT)}:{number}")
    return found


@cache
def of_package() -> dict[tuple[str, int], list[str]]:
    """What the package and the README cite."""
    return places([ROOT / "README.md", *(ROOT / "asgi_metering").rglob("*.py")])


@cache
def of_tests() -> dict[tuple[str, int], list[str]]:
    """What the tests and the shipped suite cite."""
    return places(itertools.chain((ROOT / "tests").rglob("*.py"), SUITE.rglob("*.py")))


def test_cites_each_requirement_of_the_package_in_a_test() -> None:
    """Every id that the package's source or the README cites is cited by a test or by the shipped suite too."""
    assert len(of_package()) > 50
    assert {
        f"{section}.{number}": of_package()[section, number]
        for section, number in of_package().keys() - of_tests().keys()
    } == {}


def test_cites_requirements_that_exist() -> None:
    """No citation names a section or a number that the requirements do not have."""
    unknown = [
        (section, number, where)
        for (section, number), where in [*of_package().items(), *of_tests().items()]
        if not 1 <= number <= LAST.get(section, 0)
    ]
    assert unknown == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("as {0}.3 says", [3]),
        ("({0}.3, {0}.5)", [3, 5]),
        ("{0}.3 to {0}.5.", [3, 4, 5]),
        ("{0}.3 to somebody", [3]),
        ("A{0}.3, {0}3", []),
    ],
)
@pytest.mark.parametrize("section", LAST)
def test_reads_a_citation(section: str, text: str, found: list[int]) -> None:
    """Ids are read alone, in lists and in ranges, and nothing else is taken for one."""
    assert cited(text.format(section)) == [(section, number) for number in found]
