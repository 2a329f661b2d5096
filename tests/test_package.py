"""The package as a whole: what importing it costs, and that what it offers is documented."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import asgi_metering

pytestmark = pytest.mark.uncounted

ROOT = Path(__file__).parent.parent

HEAVY = (
    "anyio",
    "fastapi",
    "genai_prices",
    "httpx",
    "httpx2",
    "limits",
    "opentelemetry",
    "pydantic",
    "redis",
    "sqlite3",
    "starlette",
    "tiktoken",
    "uvicorn",
)
"""Drivers, frameworks and SDKs: none may be imported before it is used."""


def _imported_by(code: str) -> set[str]:
    script = f"import sys; {code}; print('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return {name.partition(".")[0] for name in out.splitlines()}


def test_importing_the_package_imports_no_driver_framework_or_sdk() -> None:
    """`import asgi_metering` brings in nothing but itself and the standard library."""
    assert not _imported_by("import asgi_metering") & set(HEAVY)


def test_naming_what_applications_use_imports_no_driver_framework_or_sdk() -> None:
    """Decorators, middleware and a metering in memory without sinks need no third-party package (S2.22)."""
    code = (
        "from asgi_metering import *; "
        "Metering('memory://', sinks=()); "
        "billable(2); "
        "MeteringMiddleware(lambda: None, metering=Metering('memory://', sinks=()))"
    )
    assert not _imported_by(code) & set(HEAVY)


@pytest.mark.parametrize("name", [name for name in asgi_metering.__all__ if not name.startswith("_")])
def test_public_name_is_documented_and_shown(name: str) -> None:
    """Every public name has a docstring of its own and appears in the README or an example."""
    value = getattr(asgi_metering, name)
    shown = [ROOT / "README.md", *(ROOT / "examples").glob("*.py")]
    if not isinstance(value, asgi_metering.Unit):
        assert inspect.getdoc(value)
    assert any(name in path.read_text(encoding="utf-8") for path in shown)


def _modules() -> list[str]:
    return [
        module.name
        for module in pkgutil.walk_packages(asgi_metering.__path__, "asgi_metering.")
        if not module.name.endswith("__main__")
    ]


@pytest.mark.parametrize("name", _modules())
def test_module_says_what_it_knows(name: str) -> None:
    """Every module has a docstring."""
    assert inspect.getdoc(importlib.import_module(name))


def test_version_is_the_distributions() -> None:
    """The version that the package tells is the one that was installed."""
    from importlib.metadata import version

    assert asgi_metering.__version__ == version("asgi-metering")


@pytest.mark.parametrize("package", ["asgi_metering", "asgi_metering.testing"])
def test_offers_nothing_by_the_name_of_a_module(package: str) -> None:
    """A function that is imported late from a module of its own name would come out as that module."""
    module = importlib.import_module(package)
    assert {each.name for each in pkgutil.iter_modules(module.__path__)} & set(module._HOMES) == set()
