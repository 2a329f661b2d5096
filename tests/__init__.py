"""The test suite; `tests/` mirrors the package."""
