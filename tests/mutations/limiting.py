"""How each rule of who is counted, and where limits come from, is switched off, and which test must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

ADMISSION = "asgi_metering.admission"
ASKING = "asgi_metering.asking"
CALL = "asgi_metering.call"
CHOSEN = "asgi_metering.chosen"
EFFECTIVE = "asgi_metering.asgi.effective"
FLAT = "asgi_metering.asgi.flat"
GUARDS = "asgi_metering.guards"
MIDDLEWARE = "asgi_metering.asgi.middleware"
NAMED = "asgi_metering.named"
PLANS = "asgi_metering.plans"
REFUSALS = "asgi_metering.asgi.refusals"
TABLE = "asgi_metering.asgi.table"


def _keys(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_keys.py::{name}" for name in names)


def _flat(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/asgi/test_flat.py::{name}" for name in names)


def _defaults(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/asgi/test_defaults.py::{name}" for name in names)


KEYS = (
    Mutation(
        0,
        "a client has as many addresses as its network",
        ASKING,
        "    return hashed(network_of(address))\n",
        "    return hashed(address)\n",
        _keys("test_count_together_what_the_key_says[address-network]"),
    ),
    Mutation(
        0,
        "everybody is counted beside its payer",
        ASKING,
        '    if rate.key in ("caller", "payer") and call.caller is not None:\n',
        '    if isinstance(rate.key, str) and rate.key != "address" and call.caller is not None:\n',
        _keys(
            "test_count_together_what_the_key_says[global]",
            "test_count_together_what_the_key_says[attribute-of-payers]",
        ),
    ),
    Mutation(
        0,
        "who has no team is in one with all others",
        ASKING,
        '        return f"caller:{caller.id}" if value is None else hashed(f"{wanted}:{value}")\n',
        '        return hashed(f"{wanted}:{value}")\n',
        _keys("test_count_together_what_the_key_says[attribute-absent]"),
    ),
    Mutation(
        0,
        "a changed attribute is asked for as before",
        PLANS,
        "            yield lambda caller, key=rate.key: attribute_of(caller, key)",
        "            yield lambda caller, key=rate.key: None",
        _keys("test_ask_the_store_once_for_all_levels"),
    ),
    Mutation(
        0,
        "levels of one number are one count",
        ASKING,
        '    return hashed(f"{rate.level}={answered}")\n',
        "    return hashed(answered)\n",
        _keys("test_tell_two_functions_apart_by_their_levels"),
    ),
    Mutation(
        0,
        "named keys of one number are one count",
        ASKING,
        '        return hashed(f"{wanted}:{answered}")\n',
        "        return hashed(answered)\n",
        _keys("test_count_a_named_key_apart_from_others"),
    ),
    Mutation(
        0,
        "a key that was replaced counts on",
        NAMED,
        "        self._bound = {}\n\n    def __delitem__",
        "\n    def __delitem__",
        _keys("test_replace_a_key_while_it_runs"),
    ),
    Mutation(
        0,
        "a shared scope counts each amount apart",
        ASKING,
        "    if rate.shares or (rate.chosen and limit not in rate.limits):\n",
        "    if rate.chosen and limit not in rate.limits:\n",
        _keys("test_share_one_count_between_two_routes"),
    ),
    Mutation(
        0,
        "another plan is another count",
        ASKING,
        "    if rate.shares or (rate.chosen and limit not in rate.limits):\n",
        "    if rate.shares:\n",
        _keys("test_count_on_when_the_plan_changes"),
    ),
    Mutation(
        0,
        "two limits of one count take twice",
        ASKING,
        "    if len({limit.key for limit in limits}) == len(limits):\n",
        "    if True:\n",
        _keys(
            "test_count_once_what_two_limits_count_alike[caller]",
            "test_count_once_what_two_limits_count_alike[address]",
        ),
    ),
    Mutation(
        0,
        "an unknown plan gets the largest",
        CHOSEN,
        "        return min(self._readable(), key=_speed).text\n",
        "        return max(self._readable(), key=_speed).text\n",
        _keys("test_limit_by_plan"),
    ),
    Mutation(
        0,
        "invented methods are counted apart",
        ASKING,
        '    return method if method in known or method in _METHODS else "OTHER"\n',
        "    return method\n",
        _defaults("test_count_invented_methods_as_one"),
    ),
    Mutation(
        0,
        "exempt callers have teams",
        ASKING,
        "(rate.key in _BY_IDENTITY or rate.key.startswith(ATTRIBUTE))",
        "rate.key in _BY_IDENTITY",
        _keys("test_exempt_a_caller_of_levels"),
    ),
    Mutation(
        0,
        "a refusal names no level",
        ASKING,
        "    return refusal._replace(level=max(levels, key=len)) if levels else refusal\n",
        "    return refusal\n",
        _keys("test_decide_all_levels_at_once", "test_wait_for_the_last_of_the_failing_levels"),
    ),
    Mutation(
        0,
        "two functions may mean one another",
        GUARDS,
        "        if _is_confused(policy, rates, counter):\n",
        "        if False:\n",
        ("tests/test_limiting.py::test_refuse_what_cannot_work[functions-alike]",),
    ),
)

FLATS = (
    Mutation(
        0,
        "no limits of the middleware",
        MIDDLEWARE,
        "                if self.limits is None:\n                    await run(",
        "                if True:\n                    await run(",
        _flat("test_refuse_without_reading_a_byte", "test_count_every_request_in_one_bucket"),
    ),
    Mutation(
        0,
        "limits of an inner layer are not counted",
        MIDDLEWARE,
        "        if self.limits is None or not isinstance(opening, Exchange):\n",
        "        if True:\n",
        _flat("test_count_where_the_limits_are_of_an_inner_layer"),
    ),
    Mutation(
        0,
        "two layers count in one bucket",
        FLAT,
        "    if not depth:\n",
        "    if True:\n",
        _flat("test_count_once_in_each_of_two_layers"),
    ),
    Mutation(
        0,
        "default limits trust a route that was not taken",
        FLAT,
        "    if trusted is not None:\n",
        "    if False:\n",
        _defaults(
            "test_count_a_request_that_took_another_route[/free-/plain]",
            "test_count_a_request_that_took_another_route[/own-/broken]",
        ),
    ),
    Mutation(
        0,
        "unknown paths are not counted by default",
        FLAT,
        "        if row is not None and not defaults_apply(row):\n",
        "        if row is None or not defaults_apply(row):\n",
        _defaults(
            "test_count_each_route_by_default[flood-404-around]", "test_count_each_route_by_default[asgi-around]"
        ),
    ),
    Mutation(
        0,
        "default limits count decorated routes too",
        FLAT,
        "    return not any(map(_overrides, policies))\n",
        "    return True\n",
        _defaults("test_count_each_route_by_default[fastapi-router-own-added]"),
    ),
    Mutation(
        0,
        "unlimited means nothing",
        FLAT,
        "    if is_unlimited(row.endpoint):\n",
        "    if False:\n",
        _defaults("test_count_each_route_by_default[unlimited-around]"),
    ),
    Mutation(
        0,
        "slots of the middleware are kept",
        FLAT,
        "        runtime.finish(call)\n",
        "",
        _flat("test_hold_a_slot_until_the_answer_is_out"),
    ),
    Mutation(
        0,
        "everybody is identified for an address",
        ADMISSION,
        "    if not call.opening.is_flat or any(map(needs_caller, counted)):\n",
        "    if True:\n",
        _flat("test_ask_nobody_who_it_is_for_an_address"),
    ),
    Mutation(
        0,
        "who was nobody stays nobody",
        CALL,
        "        if caller is not None:\n            self.caller, self._identified = caller, True\n",
        "        self.caller, self._identified = caller, True\n",
        _flat("test_ask_again_who_was_not_known"),
    ),
    Mutation(
        0,
        "refusals tell of the endpoint's windows alone",
        REFUSALS,
        "        decision if decision is None or before is None else with_windows(decision, before),\n",
        "        decision,\n",
        _flat("test_tell_one_set_of_fields"),
    ),
    Mutation(
        0,
        "every path is remembered",
        TABLE,
        "        if len(self._known) >= MAX_PATHS:\n",
        "        if False:\n",
        _defaults("test_forget_paths_that_clients_invent"),
    ),
    Mutation(
        0,
        "configured limits may be dead",
        EFFECTIVE,
        "        if name not in named:\n",
        "        if False:\n",
        ("tests/asgi/test_effective.py::test_refuse_to_start_with_names_that_nobody_knows[unused]",),
    ),
)

MUTATIONS = (*KEYS, *FLATS)
