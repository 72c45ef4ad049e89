"""The httpx clients and transports that carry requests."""
