"""How each handling at the gate is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

AUDIT = "asgi_metering.asgi.audit"
CALL = "asgi_metering.call"
EXCHANGE = "asgi_metering.asgi.exchange"
HEARING = "asgi_metering.asgi.hearing"
DRESSING = "asgi_metering.asgi.dressing"
GUARDS = "asgi_metering.guards"
LIFESPAN = "asgi_metering.asgi.lifespan"
MIDDLEWARE = "asgi_metering.asgi.middleware"
OPENING = "asgi_metering.opening"
STARTUP = "asgi_metering.asgi.startup"
WRAPPERS = "asgi_metering.wrappers"


def _in(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/pitfalls/test_{module}.py::{name}" for name in names)


def _of_decorators(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_decorators.py::{name}" for name in names)


CALLS = (
    Mutation(
        1,
        "a closed request opens calls",
        OPENING,
        "        if self.closed:\n            raise CallClosedError(\n",
        "        if False:\n            raise CallClosedError(\n",
        _in(
            "calls",
            "test_refuse_a_task_that_outlives_a_free_request",
            "test_end_unmetered_with_its_block",
        ),
    ),
    Mutation(
        1,
        "a request never closes",
        EXCHANGE,
        "        exchange.closed = True\n",
        "",
        _in("calls", "test_refuse_a_task_that_outlives_a_free_request"),
    ),
    Mutation(
        1,
        "the gate does not look whether the request is over",
        GUARDS,
        "        opening.check()\n        return opening\n",
        "        return opening\n",
        _in("calls", "test_refuse_a_task_that_outlives_a_free_request"),
    ),
    Mutation(
        2,
        "the context comes before the arguments",
        GUARDS,
        "        opening = self._opening_in((*args, *kwargs.values()) if kwargs else args) or CURRENT.get()\n",
        "        opening = CURRENT.get() or self._opening_in((*args, *kwargs.values()) if kwargs else args)\n",
        _in("calls", "test_charge_the_request_in_the_arguments[request]"),
    ),
    Mutation(
        2,
        "the request behind a context of MCP is not found",
        GUARDS,
        '    if not hasattr(type(value), "request_context"):\n',
        "    if True:\n",
        _in("calls", "test_charge_the_request_in_the_arguments[mcp-context]"),
    ),
    Mutation(
        2,
        "the endpoint sees another current call",
        WRAPPERS,
        "        if CURRENT.get() is opening:\n",
        "        if True:\n",
        _in("calls", "test_charge_the_request_in_the_arguments[request]"),
    ),
    Mutation(
        2,
        "the thread sees another current call",
        WRAPPERS,
        "        with _inside(opening):\n            result = ",
        "        if True:\n            result = ",
        _in("calls", "test_charge_the_request_in_the_arguments_of_a_sync_tool"),
    ),
    Mutation(
        3,
        "without a middleware everything is free",
        GUARDS,
        "        if opening is None:\n            raise NoCallError(self._no_call())\n",
        "        if opening is None:\n"
        "            from asgi_metering.metering import Metering\n"
        "            return Opening(Metering(sinks=()), frozenset(), None, free=True)\n"
        "            raise NoCallError(self._no_call())\n",
        _in(
            "calls",
            "test_fail_closed_without_middleware_in_fastapi[async]",
            "test_fail_closed_without_middleware_in_fastapi[sync]",
            "test_fail_closed_without_middleware_in_fastapi[async-raw]",
            "test_fail_closed_without_middleware_in_starlette[class/async]",
        ),
    ),
    Mutation(
        3,
        "without a middleware whole apps are free",
        "asgi_metering.asgi.app",
        "            if not isinstance(opening, Opening):\n                raise NoCallError(\n",
        "            if not isinstance(opening, Opening):\n"
        "                return await self.app(scope, receive, send)\n"
        "                raise NoCallError(\n",
        _in("calls", "test_fail_closed_without_middleware_in_starlette[mounted/app/]"),
    ),
)

STARTUP = (
    Mutation(
        4,
        "the audit overlooks bare routes",
        AUDIT,
        "        elif row is not None:\n            report.errors.append(\n",
        "        elif False:\n            report.errors.append(\n",
        _in(
            "startup",
            "test_refuse_to_start_with_decorators_in_the_wrong_order[plain-added]",
            "test_refuse_to_start_where_a_bare_function_is_routed_in_starlette",
        ),
    ),
    Mutation(
        4,
        "a wrapper that nobody keeps leaves no trace",
        GUARDS,
        "        plain.__dict__.setdefault(KEPT, []).append(guard)\n",
        "        pass\n",
        _in(
            "startup",
            "test_refuse_to_start_with_decorators_in_the_wrong_order[plain-wrapped]",
            "test_refuse_to_start_where_a_bare_function_is_routed_in_starlette",
        ),
    ),
    Mutation(
        4,
        "the audit stops at other decorators",
        AUDIT,
        "        row = bare.get(id(inspect.unwrap(guard.endpoint)))\n",
        "        row = bare.get(id(guard.endpoint))\n",
        _in("startup", "test_refuse_to_start_with_decorators_in_the_wrong_order[between-added]"),
    ),
    Mutation(
        4,
        "the audit does not enter included routers",
        AUDIT,
        "    if included is not None:\n",
        "    if included is not None:\n        return\n",
        _in("startup", "test_refuse_to_start_with_decorators_in_the_wrong_order[router-added]"),
    ),
    Mutation(
        4,
        "the audit does not enter mounts",
        AUDIT,
        "        yield from _walk(inner, replace(place.below(path), dependencies=()))\n",
        "",
        _in("startup", "test_refuse_to_start_with_decorators_in_the_wrong_order[mount-added]"),
    ),
    Mutation(
        4,
        "errors of the audit do not stop the startup",
        STARTUP,
        "    if report.errors:\n",
        "    if False:\n",
        _in("startup", "test_refuse_to_start_with_decorators_in_the_wrong_order[plain-wrapped]"),
    ),
    Mutation(
        0,
        "a missing credit layer is not found",
        AUDIT,
        '    if policy.charge is not None and "credits" not in covered:\n',
        "    if False:\n",
        _in(
            "layers",
            "test_refuse_to_start_without_a_layer[no-credits]",
            "test_refuse_to_start_wherever_the_policy_is[mount]",
            "test_refuse_to_start_wherever_the_policy_is[class]",
        ),
    ),
    Mutation(
        0,
        "layers of mounted apps do not count",
        AUDIT,
        "            yield Layer(features, kept.get(",
        "            yield Layer(frozenset(), kept.get(",
        _in("layers", "test_see_the_layers_of_a_mounted_application[sub-app]"),
    ),
    Mutation(
        31,
        "a refused startup raises nothing",
        LIFESPAN,
        "            raise self._refused.with_traceback(None) from None\n",
        "            return\n",
        _in("startup", "test_refuse_to_start_with_decorators_in_the_wrong_order[plain-added]"),
    ),
    Mutation(
        4,
        "nothing is audited where no lifespan comes",
        MIDDLEWARE,
        "            elif self.proven or self._prove(scope):\n",
        "            elif True:\n",
        _in(
            "startup",
            "test_refuse_every_request_of_what_must_not_serve[ungated]",
            "test_refuse_requests_after_a_refused_startup",
            "test_audit_a_mounted_application_on_its_first_request",
        ),
    ),
    Mutation(
        4,
        "dependencies reach nothing",
        AUDIT,
        "    found.extend(guard for row in report.rows for guard in row.dependencies)\n",
        "",
        _in("startup", "test_reach_decorated_dependencies[route]"),
    ),
    Mutation(
        0,
        "a unit has as many scales as it likes",
        AUDIT,
        "        if first != unit:\n",
        "        if False:\n",
        _in("startup", "test_refuse_one_unit_with_two_scales"),
    ),
    Mutation(
        12,
        "a HEAD that runs a paid handler is not told",
        AUDIT,
        '{"GET", "HEAD"} <= set(row.methods)',
        "False",
        _in("startup", "test_warn_of_a_head_that_runs_a_paid_handler"),
    ),
    Mutation(
        0,
        "two meterings may share a stack",
        STARTUP,
        "    if any(layer.metering is not layers[0].metering for layer in layers):\n",
        "    if False:\n",
        _in("layers", "test_refuse_to_start_with_two_meterings[plain]"),
    ),
    Mutation(
        0,
        "the audit does not compare meterings",
        AUDIT,
        "        if any(layer.metering not in (None, metering) for layer in row.layers):\n",
        "        if False:\n",
        _in("layers", "test_refuse_to_start_with_two_meterings[sub-app]"),
    ),
    Mutation(
        0,
        "amounts are first counted on the first request",
        AUDIT,
        "        check_amounts(charge, charge.unit or unit)\n",
        "        pass\n",
        _in("layers", "test_refuse_to_start_with_amounts_that_the_unit_cannot_count[fine]"),
    ),
)

ENDPOINTS = (
    Mutation(
        5,
        "async functions are not asked for",
        WRAPPERS,
        "            if not call.passes(guard.policy, guard.arguments(args, kwargs)):\n"
        "                await call.ensure()\n        if CURRENT",
        "            pass\n        if CURRENT",
        _in(
            "gate",
            "test_gate_every_kind_of_fastapi_function[async-added]",
            "test_gate_every_kind_of_starlette_endpoint[class/async-added]",
        ),
    ),
    Mutation(
        5,
        "sync functions are not asked for",
        WRAPPERS,
        "            if not call.passes(guard.policy, guard.arguments(args, kwargs)):\n"
        "                await call.ensure()\n        with _inside",
        "            pass\n        with _inside",
        _in(
            "gate",
            "test_gate_every_kind_of_fastapi_function[sync-wrapped]",
            "test_gate_every_kind_of_starlette_endpoint[class/sync-added]",
        ),
    ),
    Mutation(
        5,
        "async generators are taken for functions",
        WRAPPERS,
        "    if inspect.isasyncgenfunction(endpoint):\n",
        "    if False:\n",
        _in("gate", "test_settle_generators_once[async-jsonl-added-2.3]"),
    ),
    Mutation(
        5,
        "classes are let in",
        GUARDS,
        "    if inspect.isclass(plain):\n",
        "    if False:\n",
        _of_decorators("test_refuse_what_is_no_function[class-billable]"),
    ),
    Mutation(
        6,
        "the wrapper has no signature of its own",
        WRAPPERS,
        "    wrapper.__signature__ = guard.signature",
        "    wrapper.__signature__ = inspect.Signature()",
        _in("signatures", "test_leave_the_openapi_document_as_it_was", "test_serve_a_documented_application[added]"),
    ),
    Mutation(
        6,
        "annotations stay strings",
        GUARDS,
        "        return inspect.signature(endpoint, eval_str=True)\n",
        "        return inspect.signature(endpoint)\n",
        _in("signatures", "test_resolve_string_annotations_in_the_signature"),
    ),
    Mutation(
        7,
        "generators are not asked for at the start",
        EXCHANGE,
        "        if call.deferred:\n",
        "        if False:\n",
        _in(
            "gate",
            "test_refuse_generators_before_their_first_byte[async-jsonl-added-2.3]",
            "test_refuse_generators_before_their_first_byte[async-sse-added-2.3]",
            "test_refuse_generators_before_their_first_byte[sync-raw-wrapped-2.4]",
        ),
    ),
    Mutation(
        7,
        "the first step of an async generator does not ask",
        WRAPPERS,
        "    await call.ensure()\n    shown = _hidden(call.opening)\n",
        "    shown = _hidden(call.opening)\n",
        _in(
            "gate",
            "test_refuse_generators_before_their_first_byte[async-sse-added-2.3]",
            "test_refuse_a_generator_whose_first_step_met_the_refusal",
        ),
    ),
    Mutation(
        7,
        "the first step of a sync generator does not ask",
        WRAPPERS,
        "        asyncio.run_coroutine_threadsafe(call.ensure(), loop).result()\n",
        "        pass\n",
        _in("gate", "test_refuse_a_sync_generator_whose_first_step_met_the_refusal"),
    ),
    Mutation(
        7,
        "the generator is left to the collector",
        WRAPPERS,
        "        await (items.aclose() if shown is None else shown.awaited(items.aclose()))\n",
        "        pass\n",
        _in("gate", "test_close_a_gated_generator_with_its_consumer"),
    ),
    Mutation(
        7,
        "a generator finds the call that is charged around it",
        WRAPPERS,
        "    return None if CURRENT.get() is opening else _Shown(opening)\n",
        "    return None\n",
        _in(
            "gate",
            "test_show_a_generator_its_own_call_inside_of_what_a_dependency_charges[async]",
            "test_show_a_generator_its_own_call_inside_of_what_a_dependency_charges[sync]",
        ),
    ),
    Mutation(
        7,
        "what is thrown into a generator closes it",
        WRAPPERS,
        "                step = items.athrow(failure)\n",
        "                raise\n",
        _in(
            "gate",
            "test_show_a_gated_dependency_how_its_request_failed[answer-async]",
            "test_show_a_gated_dependency_how_its_request_failed[error-async]",
            "test_hand_what_is_sent_to_a_gated_generator[alone-async]",
        ),
    ),
    Mutation(
        2,
        "an endpoint belongs to what a dependency charges",
        GUARDS,
        "            opening = opening.around\n",
        "            break\n",
        _in(
            "gate",
            "test_charge_an_endpoint_inside_of_what_a_dependency_charges[async]",
            "test_charge_an_endpoint_inside_of_what_a_dependency_charges[sync]",
        ),
    ),
    Mutation(
        0,
        "what an inner layer says means nothing",
        "asgi_metering.asgi.startup",
        "        if layer.options not in (ExchangeOptions(), layers[0].options):\n",
        "        if False:\n",
        _in("layers", "test_refuse_to_start_with_layers_that_answer_differently[says0]"),
    ),
    Mutation(
        39,
        "explicit gates have one name",
        CALL,
        "        return self.gate(gather(policies, name, arguments, line=short), arguments)\n",
        '        return self.gate(gather(policies, "current_call.admit", arguments), arguments)\n',
        _in("gate", "test_count_handlers_that_ask_for_themselves_apart"),
    ),
    Mutation(
        8,
        "everybody at the gate asks",
        CALL,
        "        if self._asking:\n",
        "        if False:\n",
        _in("gate", "test_admit_once_when_the_gate_is_reached_twice_at_once"),
    ),
    Mutation(
        8,
        "who waits is told of the last answer for ever",
        CALL,
        "                waiting, self._decided = self._decided, None\n",
        "                waiting = self._decided\n",
        _in("gate", "test_ask_again_when_the_first_at_the_gate_was_cancelled"),
    ),
    Mutation(
        8,
        "a new question has the id of the abandoned one",
        CALL,
        "                    self.id = self.metering.new_id()\n",
        "                    pass\n",
        _in("gate", "test_ask_again_when_the_first_at_the_gate_was_cancelled"),
    ),
    Mutation(
        8,
        "a call takes any second policy",
        CALL,
        "            if self.policy is not policy or self.pending is None:\n",
        "            if False:\n",
        _in("gate", "test_refuse_another_price_inside_a_call", "test_refuse_a_second_explicit_gate"),
    ),
    Mutation(
        8,
        "the audit does not see policies in policies",
        AUDIT,
        "    if row.around is not None:\n",
        "    if False:\n",
        _in("layers", "test_refuse_to_start_with_a_policy_inside_a_policy"),
    ),
    Mutation(
        9,
        "sync endpoints run on the loop",
        WRAPPERS,
        "await opening.metering.run_sync(functools.partial(endpoint, *args, **kwargs))",
        "endpoint(*args, **kwargs)",
        _in(
            "gate",
            "test_run_sync_endpoints_off_the_loop[fastapi_app]",
            "test_run_sync_endpoints_off_the_loop[starlette_app]",
            "test_run_sync_endpoints_where_the_metering_says",
        ),
    ),
    Mutation(
        12,
        "OPTIONS is metered",
        HEARING,
        'FREE_METHODS = frozenset({"HEAD", "OPTIONS"})\n',
        'FREE_METHODS = frozenset({"HEAD"})\n',
        _in("gate", "test_charge_nothing_for_what_is_no_call[options-added]"),
    ),
    Mutation(
        12,
        "the explicit gate is never free",
        CALL,
        "        if opening.free and opening.stays_free():\n",
        "        if False:\n",
        _in("gate", "test_charge_nothing_for_what_is_no_call[explicit-added]"),
    ),
    Mutation(
        12,
        "free requests are asked for by decorators",
        MIDDLEWARE,
        '            free=scope["method"] in FREE_METHODS,\n',
        "",
        _in(
            "gate",
            "test_charge_nothing_for_what_is_no_call[head-wrapped]",
            "test_charge_nothing_for_what_is_no_call[options-wrapped]",
        ),
    ),
    Mutation(
        37,
        "a second middleware opens a second call",
        MIDDLEWARE,
        "            if opening is not None:\n                await self._join",
        "            if False:\n                await self._join",
        _in("layers", "test_do_exactly_what_the_layers_enable[credits-rates-up]"),
    ),
    Mutation(
        39,
        "limits are not named by the function",
        GUARDS,
        "replace(each, scope=own)",
        'replace(each, scope="route")',
        _in("gate", "test_label_by_the_decorated_function", "test_name_two_endpoints_of_one_name_apart"),
    ),
    Mutation(
        39,
        "two of one name are one",
        GUARDS,
        "    while name in _DECORATED:\n",
        "    while False:\n",
        _in("gate", "test_name_two_endpoints_of_one_name_apart"),
    ),
)

LAYERS = (
    Mutation(
        0,
        "an inner layer adds nothing",
        MIDDLEWARE,
        "        opening.features |= self.features\n",
        "",
        _in(
            "layers",
            "test_do_exactly_what_the_layers_enable[credits-rates-up]",
            "test_do_exactly_what_the_layers_enable[credits-events-quotas-rates-down]",
        ),
    ),
    Mutation(
        0,
        "rates are enforced without their layer",
        "asgi_metering.admission",
        'policy.gated if "rates" in features else ()',
        "policy.gated",
        _in("layers", "test_count_nothing_without_the_rate_limits[measured]"),
    ),
    Mutation(
        0,
        "rates are planned without their layer",
        "asgi_metering.plans",
        'policy.gated if "rates" in features else ()',
        "policy.gated",
        _in(
            "layers",
            "test_do_exactly_what_the_layers_enable[credits-up]",
            "test_count_nothing_without_the_rate_limits[fixed]",
        ),
    ),
    Mutation(
        0,
        "credits are enforced without their layer",
        "asgi_metering.admission",
        '    call.exempt = "credits" not in features\n',
        "    call.exempt = False\n",
        _in("layers", "test_do_exactly_what_the_layers_enable[events-up]"),
    ),
    Mutation(
        0,
        "what is only counted is charged by its usage",
        "asgi_metering.billing",
        "    if price is None or isinstance(price, FixedPrice) or call.exempt:\n",
        "    if price is None or isinstance(price, FixedPrice):\n",
        _in("layers", "test_charge_nothing_without_the_gate[measured-events-rates]"),
    ),
    Mutation(
        0,
        "quotas are captured without their layer",
        DRESSING,
        '        if call.policy is not None and "quotas" in call.opening.features:\n',
        "        if call.policy is not None:\n",
        _in("layers", "test_do_exactly_what_the_layers_enable[credits-up]"),
    ),
    Mutation(
        0,
        "events are told without their layer",
        "asgi_metering.billing",
        'if "events" in call.opening.features and call.metering.sinks:',
        "if call.metering.sinks:",
        _in("layers", "test_do_exactly_what_the_layers_enable[credits-up]"),
    ),
    Mutation(
        0,
        "the money alone answers for a dead store",
        "asgi_metering.outage",
        '    if any(answer == "deny" for _, answer in answers):\n',
        "    if False:\n",
        _in("frameworks", "test_let_the_strictest_layer_answer_for_a_dead_store[allow-deny]"),
    ),
    Mutation(
        0,
        "every response is dressed",
        EXCHANGE,
        "            return send(message)\n        return exchange.send",
        '            return send({**message, "metered": True})\n        return exchange.send',
        _in("layers", "test_change_no_byte_without_a_policy[GET-/json-2.3-whole]"),
    ),
)


def _of_computed(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_computed.py::{name}" for name in names)


COMPUTED = "asgi_metering.computed"

ARGUMENTS = (
    Mutation(
        0,
        "wrong answers are not checked",
        COMPUTED,
        "            _CHECKS[self.what](call, answered)\n",
        "            pass\n",
        _of_computed(
            "test_tell_a_wrong_answer[price-float-Answers]",
            "test_tell_a_wrong_answer[hold-negative-AsyncAnswers]",
            "test_tell_a_wrong_answer[key-bytes-Answers]",
            "test_tell_a_wrong_answer[cost-bool-Answers]",
        ),
    ),
    Mutation(
        0,
        "wrong answers are told by their exception alone",
        COMPUTED,
        '            log.error("%s The endpoint did not run, and nothing was charged.", error)\n',
        "",
        _of_computed("test_tell_a_wrong_answer[price-nan-Answers]"),
    ),
    Mutation(
        0,
        "what a callable raises becomes ours",
        COMPUTED,
        "            log.warning(told)\n            raise\n",
        "            log.warning(told)\n            raise ConfigurationError(told) from failure\n",
        _of_computed("test_raise_what_a_callable_raises[key-Answers]", "test_answer_as_a_callable_answers[price]"),
    ),
    Mutation(
        0,
        "async hooks are let in",
        "asgi_metering.checks",
        '    check_sync(customise, "customise=")\n',
        "",
        _of_decorators(
            "test_refuse_async_functions_that_nobody_awaits[customise]",
            "test_refuse_async_functions_that_nobody_awaits[object]",
        ),
    ),
)

MUTATIONS = (*CALLS, *STARTUP, *ENDPOINTS, *LAYERS, *ARGUMENTS)
