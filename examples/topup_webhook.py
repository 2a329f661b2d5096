"""
A payment webhook that tops up: the payment's id is the grant's id, so a webhook that comes twice grants once.

    uvicorn examples.topup_webhook:app

Verifying the sender's signature is the payment provider's own recipe; here a shared secret stands for it.
"""

from __future__ import annotations

import hmac
from datetime import UTC, datetime, timedelta

from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel

from asgi_metering import Metering, MeteringMiddleware
from asgi_metering.errors import IdempotencyConflictError

SECRET = "whsec_example"

metering = Metering("sqlite:///metering.db")
app = FastAPI()
app.add_middleware(MeteringMiddleware, metering=metering)


class Payment(BaseModel):
    """What the payment provider sends."""

    id: str
    customer: str
    credits: str
    paid_at: datetime


@app.post("/webhooks/payments")
async def paid(payment: Payment, x_signature: str = Header()) -> dict[str, object]:
    """Grant what was paid for, for a year."""
    if not hmac.compare_digest(x_signature, SECRET):
        raise HTTPException(401, "The signature is not ours.")
    try:
        receipt = await metering.grant(
            payment.customer,
            payment.credits,
            id=payment.id,
            # From the payment and not from the clock: the same webhook is the same grant tomorrow.
            expires_at=payment.paid_at.astimezone(UTC) + timedelta(days=365),
            actor="payments",
        )
    except IdempotencyConflictError as conflict:
        raise HTTPException(409, str(conflict)) from conflict
    return {"granted": receipt.applied, "available": metering.unit.text(receipt.available)}
