"""
slowapi: an application that uses it goes on as it is, and its limits are counted by our admission.

    limiter = adopt(Limiter(key_func=get_remote_address))

put before the decorators. Imports slowapi, which nothing else here does. Knows nothing of how a limit is counted.

Where slowapi 0.1.10 is wrong, an adopted limiter is right. What slowapi does, what happens here, and the test:

- Its ASGI middleware sends the start again before each chunk of a stream, which servers end. Here: a stream passes as
  it is. `test_stream_behind_the_asgi_middleware_arrives_whole`
- Its middlewares see neither included routers nor mounted applications: no default limits. Here: they count.
  `test_included_and_mounted_routes_are_limited`
- What they cannot find they let pass. Here: it is counted before its answer, and logged.
  `test_endpoint_that_is_found_late_is_counted_late`
  So it is where it answers 404, 405 or raises. `test_endpoint_that_is_found_late_is_counted_whatever_it_answers`
- Of several routes that match they take the last one. Here: the one that runs.
  `test_first_route_that_matches_is_the_one_that_counts`
- They skip decorated endpoints: no application limits. Here: those count everywhere.
  `test_application_limits_count_decorated_endpoints_too`
- Where a function answers the limit they count the defaults too, and send all fields twice.
  `test_computed_limit_overrides_the_defaults_and_shows_one_set_of_fields`
- Decorated methods of a class are counted by the defaults as well.
  `test_method_of_a_class_that_is_decorated_is_not_limited_by_default`
- A default limit of ``key`` raises on each request. Here: it is asked with the key.
  `test_default_limit_may_depend_on_the_key`
- The one on `BaseHTTPMiddleware` passes by async handlers. `test_async_handler_is_awaited_behind_either_middleware`
- What a key function raises is given to the handler of 429. Here: it is answered as it is.
  `test_what_a_key_function_raises_is_answered_as_such`
- An endpoint needs ``request``, and ``response`` for header fields on what is no response. Here: neither.
  `test_endpoint_needs_neither_request_nor_response`
- Parameters of these names must be just that. Here: types tell.
  `test_parameters_named_request_and_response_may_be_anything`
- Endpoints of one name share limits, counts and exemptions. `test_endpoints_of_one_name_are_counted_apart`
- So do two routes of one function that is decorated twice. `test_one_function_on_two_routes_has_two_limits`
- One that is limited and exempt answers 500. Here: it is exempt. `test_endpoint_may_be_limited_and_exempt`
- Coroutines of async functions are taken for their answers. Here: they are awaited.
  `test_async_functions_are_awaited`
- Of a decorated dependency and its decorated endpoint it counts the one that runs first. Here: both count.
  `test_decorated_dependency_and_its_endpoint_count_both`
- With ``auto_check=False`` a decorated endpoint answers 500. Here: it is not limited.
  `test_request_filters_and_auto_check_are_heard`
- What one limit refuses, the ones before it have counted. Here: nothing has. `test_refused_request_has_spent_nothing`
- A cost that does not fit is spent. `test_cost_that_does_not_fit_leaves_room_for_one_that_does`
- A limit that is written twice counts twice. Here: once. `test_the_same_limit_written_twice_counts_once`
- Keys and scopes with slashes may be another client's. `test_key_with_a_slash_is_nobody_elses`
- A function for a scope raises. Here: it is asked. `test_scope_may_be_a_function`
- `RateLimitItem` objects limit nothing. Here: they are limits. `test_limits_may_be_items`
- A limit that is computed in one thread may hear of another thread's request.
  `test_request_that_a_limit_is_computed_for_is_its_own`
- A limit that cannot be read is logged, and limits nothing. Here: an error at import.
  `test_limit_that_is_none_is_an_error_at_import`
- ``default_limits="1/second"`` raises on each request.
  `test_setting_that_is_no_list_of_limits_is_an_error_at_adoption`
- A computed one that cannot be read lets the request pass. Here: it raises.
  `test_computed_limit_that_is_none_limits_nobody_for_free`
- The reset is a fraction, and fields are added to those that stand there.
  `test_reset_is_a_whole_second_and_fields_stand_once`
- A ``Retry-After`` of the endpoint that is no number or date raises.
  `test_wait_that_the_endpoint_set_is_read_in_any_form`
- Of two spent limits the first one's wait is told, if the other lasts longer.
  `test_wait_is_that_of_the_limit_that_lasts_longest`
- The log names whom a limit refused. Here: it does not. `test_log_of_a_refusal_names_no_client`
- The store is asked on the event loop, which stands still meanwhile.
  `test_store_that_does_not_answer_stops_no_other_request`
- With the store down each request answers 500, with ``swallow_errors`` too. Here: 503, or let in.
  `test_without_a_store_requests_are_answered_as_the_limiter_says`
- Costs are counted in fractions. Here: rounded up. `test_cost_is_what_a_request_takes`
- Limits that no middleware asks for are silent. Here: a warning at startup.
  `test_limits_that_nobody_asks_for_are_told`

What it keeps: ``Retry-After`` and the fields also on responses that were let in, HEAD that counts, an empty key that is
logged and not counted, the bodies, the statuses and the names. Generators of FastAPI's, endpoints and dependencies, are
asked for before they begin: behind our middleware the refusal is its, and else that of slowapi's handler.

What it does not keep: a decorated sync function is an async one afterwards, for nobody may wait for a store on the
event loop. Frameworks do not mind; who calls it as a helper awaits it, and sync code cannot: it gets a coroutine.
`test_decorated_sync_helper_is_awaited`
A moving window remembers 5,000 calls at most, and a larger one is refused.
`test_moving_window_of_more_calls_than_are_remembered_is_refused`
Behind our middleware a call is metered once: of an endpoint and its dependency only one may be decorated.
`test_decorated_dependency_of_a_decorated_endpoint_is_refused_behind_our_middleware`
Generators that were decorated before cannot be adopted. `test_generator_that_was_decorated_before_fails_at_adoption`
"""

from __future__ import annotations

from typing import Any

from asgi_metering.errors import ConfigurationError, MissingExtraError
from asgi_metering.metering import Metering

try:
    from slowapi import Limiter
except ImportError:
    raise MissingExtraError("asgi_metering.integrations.slowapi", "slowapi") from None

from asgi_metering.integrations.slowapi.limiter import AdoptedLimiter, become_adopted
from asgi_metering.integrations.slowapi.middleware import stand_in
from asgi_metering.integrations.slowapi.startup import bind_endpoints, check_middleware, decorated_before

__all__ = ["AdoptedLimiter", "adopt"]


def adopt(limiter: Limiter, metering: Metering | None = None, *, app: Any = None) -> AdoptedLimiter:
    """
    Have *limiter* enforce its limits by our admission; the same object is returned.

    Args:
        limiter: Of slowapi, or of a class of yours below it.
        metering: Counts; the one of the `MeteringMiddleware`, if there is one. By default a metering of
            rates alone, at the limiter's own ``storage_uri``.
        app: A Starlette or FastAPI application whose endpoints were decorated already. They keep their ``request``
            parameter then.

    Put before the decorators, everything else may stay as it is: ``app.state.limiter``, the handler of
    `RateLimitExceeded`, slowapi's middlewares (which an application with `default_limits` needs as ever; they no
    longer tear streams). A route may have decorators of both kinds, slowapi's and ours, in any order; with ours it
    needs our middleware, and all of them are asked for in one admission.

    Functions of yours (``key_func``, ``exempt_when``, ``cost``, limits) run where slowapi runs them: on the event loop
    for an async endpoint, in a thread for a sync one; async ones are awaited on the loop. The store never blocks it.

    Raises:
        ConfigurationError: No `Limiter`; a limit that is none; a storage or strategy that we have not; endpoints that
            were decorated before and are on no route of *app*.
        MissingExtraError: The driver of the storage is not installed.

    Source: S2.29 to S2.33.
    """
    if not isinstance(limiter, Limiter):
        raise ConfigurationError(f"{limiter!r} is no slowapi Limiter. Make one: adopt(Limiter(key_func=...)).")
    if isinstance(limiter, AdoptedLimiter):
        raise ConfigurationError("The Limiter was adopted before. Adopt it once, where it is made.")
    early = decorated_before(limiter)
    if early and app is None:
        raise ConfigurationError(
            f"slowapi has decorated {', '.join(early)} before its Limiter was adopted. Put adopt() before the "
            f"decorators, or pass it the application: adopt(limiter, app=app)."
        )
    adopted = become_adopted(limiter, metering)
    stand_in()
    if app is not None:
        bind_endpoints(adopted, app)
        check_middleware(adopted, app)
    return adopted
