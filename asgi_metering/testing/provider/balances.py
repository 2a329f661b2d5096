"""
Balance endpoints of providers, for tests of pollers: one account, told in each one's own way.

Knows the shapes of their answers. Never knows who asks.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["Balances"]


class Balances:
    """
    An ASGI application with the paths of the balance endpoints that `asgi_metering.quotas.balances` lists.

    Args:
        total: What was bought.
        used: Of it.
        key: The key that is known; None takes any.

    Attributes:
        total, used: May be changed at any time.
        failures: Status to answer with instead, by path.
        answers: JSON, or bytes as they are, to answer with instead, by path; also of paths of one's own.
        before: Awaited before each answer, with its path.
        seen: Path and headers of every request, in order.
    """

    def __init__(self, total: str | int = 25, used: str | int = 10, *, key: str | None = None) -> None:
        self.total, self.used = Decimal(total), Decimal(used)
        self.failures: dict[str, int] = {}
        self.answers: dict[str, Any] = {}
        self.before: Callable[[str], Awaitable[object]] | None = None
        self.seen: list[tuple[str, dict[str, str]]] = []
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request; a lifespan is answered too."""
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        path = scope["path"]
        fields = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append((path, fields))
        if self.before is not None:
            await self.before(path)
        status, payload = self._answer(path, fields)
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        headers = [(b"content-type", b"application/json"), (b"location", b"/elsewhere")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _answer(self, path: str, fields: dict[str, str]) -> tuple[int, Any]:
        given = fields.get("xi-api-key") or fields.get("authorization", "").removeprefix("Bearer ")
        if not given or self._key not in (None, given):
            return 401, {"error": "wrong key"}
        if path in self.failures:
            return self.failures[path], {"error": "failing"}
        if path in self.answers:
            return 200, self.answers[path]
        told = self._told()
        return (200, told[path]) if path in told else (404, {"error": "no such path"})

    def _told(self) -> dict[str, Any]:
        left = self.total - self.used
        shown = str(left)
        return {
            "/user/balance": {
                "is_available": left > 0,
                "balance_infos": [
                    {"currency": "CNY", "total_balance": "1", "granted_balance": "0", "topped_up_balance": "1"},
                    {
                        "currency": "USD",
                        "total_balance": shown,
                        "granted_balance": "5",
                        "topped_up_balance": str(self.total - 5),
                    },
                ],
            },
            "/api/v1/credits": {"data": {"total_credits": float(self.total), "total_usage": float(self.used)}},
            "/api/v1/key": {"data": {"limit": float(self.total), "limit_remaining": float(left), "limit_reset": None}},
            "/v1/users/me/balance": {"code": 0, "data": {"available_balance": float(left)}, "status": True},
            "/v1/user/info": {"code": 20000, "data": {"balance": "0", "chargeBalance": shown, "totalBalance": shown}},
            "/api/profile/balance": {"balance": float(left), "isDepleted": left <= 0},
            "/openapi/v1/billing/balance/detail": {"availableBalance": str(left * 10_000), "creditLimit": "0"},
            "/v1/credits": {"balance": shown, "total_used": str(self.used)},
            "/payment/checklist": {"stripe_balance": -float(left)},
            "/usage/current_balance": {"current_point_balance": float(left)},
            "/v1/user/subscription": {"character_count": int(self.used), "character_limit": int(self.total)},
            "/v1/token_plan/remains": {"model_remains": [{"current_interval_remaining_percent": float(left)}]},
            "/generic": {"data": {"total": shown, "used": 0}},
        }
