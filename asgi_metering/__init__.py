"""Credits, rate limits, upstream quotas and usage events for ASGI APIs that charge for their calls."""
