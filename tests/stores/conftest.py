"""What the tests of the stores share."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("asgi_metering.testing.conformance")
