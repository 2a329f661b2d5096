"""
What has to be right before the first request: the stack, the workers and the application behind it.

Asked by the lifespan where a server runs one, and by the first request where none comes. Knows nothing of either.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asgi_metering.asgi.audit import Layer, Report, audit, has_routes
from asgi_metering.asgi.effective import check_names
from asgi_metering.asgi.hearing import ExchangeOptions
from asgi_metering.asgi.types import Scope
from asgi_metering.errors import ConfigurationError

if TYPE_CHECKING:
    from asgi_metering.asgi.middleware import MeteringMiddleware

__all__ = ["check_stack", "examined"]

log = logging.getLogger("asgi_metering")


def check_stack(layers: Sequence[MeteringMiddleware]) -> None:
    """
    Refuse a stack of layers that do not share one object, or of which an inner one says what the outermost decides.

    Raises:
        ConfigurationError: With the layers' names; or what is wrong with one of them by itself.
    """
    for layer in layers:
        if layer.mistake is not None:
            raise layer.mistake
    if any(layer.metering is not layers[0].metering for layer in layers):
        names = ", ".join(type(layer).__name__ for layer in layers)
        raise ConfigurationError(
            f"The layers {names} do not share one Metering. Make one, and pass the same object to all of them."
        )
    for layer in layers[1:]:
        if layer.options not in (ExchangeOptions(), layers[0].options):
            inner, outer = type(layer).__name__, type(layers[0]).__name__
            raise ConfigurationError(
                f"{inner} has answers= or stop_on_disconnect= of its own, and {outer} outside of it answers for all "
                f"layers. Say it there."
            )


def examined(scope: Scope, layers: Sequence[MeteringMiddleware]) -> Report:
    """
    Audit the application behind the stack *layers*, outermost first; what looks wrong and may be meant is logged.

    Raises:
        ConfigurationError: It must not serve; a sentence for each mistake, with the mend.
    """
    outermost = layers[0]
    features = frozenset[str]().union(*(layer.features for layer in layers))
    unenforced = frozenset[str].intersection(*(layer.unenforced for layer in layers))
    # An app behind middleware that hides it is found through the scope, where frameworks put themselves.
    application = outermost.app if has_routes(outermost.app) else scope.get("app", outermost.app)
    report = audit(application, features, unenforced, outermost.metering)
    in_front = [
        Layer(layer.features, layer.metering, layer.application_limits, layer.default_limits, type(layer).__name__)
        for layer in layers
    ]
    errors, warnings = check_names(report.rows, in_front, outermost.metering)
    report.errors += errors
    report.warnings += warnings
    if report.errors:
        raise ConfigurationError("\n".join(report.errors))
    if any(policy.upstreams for row in report.rows for policy in row.policies):
        outermost.metering.headroom.is_used = True
    for warning in report.warnings:
        log.warning(warning)
    return report
