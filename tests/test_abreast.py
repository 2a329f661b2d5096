"""Commands side by side end as one: what they print is shown in order, and one that fails is a failure of all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.abreast import main

WAIT_FOR = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\nprint('first')"
MAKE = "import pathlib, sys\npathlib.Path(sys.argv[1]).touch()\nprint('second')"


def test_run_side_by_side_and_show_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first waits for what the second does, and is shown first all the same."""
    sign = os.fspath(tmp_path / "sign")
    assert main([sys.executable, "-c", WAIT_FOR, sign, "+", sys.executable, "-c", MAKE, sign]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line in ("first", "second")]
    assert shown == ["first", "second"]


@pytest.mark.parametrize("codes", [(3, 0), (0, 3), (3, 4)])
def test_fail_with_the_first_that_fails(codes: tuple[int, int]) -> None:
    """One that fails is not hidden by the others."""
    one, other = (["sh", "-c", f"exit {code}"] for code in codes)
    assert main([*one, "+", *other]) == 3
