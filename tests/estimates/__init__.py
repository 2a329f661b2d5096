"""Estimates: what a request may use, read from the request."""
