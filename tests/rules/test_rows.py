"""Rows that are built without their constructors have all their fields: nothing else would notice one that is not."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def builds() -> Iterator[tuple[str, int, str, list[ast.expr]]]:
    """Every ``build(Class, (field, ...))`` of the package: its module, line, class, and the fields given."""
    for path in sorted((ROOT / "asgi_metering").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        # Most modules build none: to parse them all takes longer than to collect all other tests of this folder.
        for node in ast.walk(ast.parse(text)) if "build(" in text else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "build":
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                row, fields = node.args
                assert isinstance(row, ast.Name), (module, node.lineno)
                assert isinstance(fields, ast.Tuple), (module, node.lineno)
                yield module, node.lineno, row.id, fields.elts


FOUND = list(builds())


def given(fields: list[ast.expr]) -> int:
    """How many fields are given; ``*part[:3]`` are three."""
    count = 0
    for field in fields:
        if isinstance(field, ast.Starred):
            assert isinstance(field.value, ast.Subscript)
            assert isinstance(field.value.slice, ast.Slice)
            assert isinstance(field.value.slice.upper, ast.Constant)
            count += int(str(field.value.slice.upper.value))
        else:
            count += 1
    return count


@pytest.mark.parametrize(("module", "line", "row", "fields"), FOUND, ids=[f"{at[0]}:{at[1]}" for at in FOUND])
def test_build_rows_with_all_their_fields(module: str, line: int, row: str, fields: list[ast.expr]) -> None:
    """A row that is built from a tuple is given as many fields as its class has."""
    assert given(fields) == len(getattr(importlib.import_module(module), row)._fields), (module, line)


def test_find_rows_that_are_built() -> None:
    """There are some, so that the test above is about something."""
    assert len(FOUND) > 10
