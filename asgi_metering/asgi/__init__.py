"""The edge: the middleware, what its answers look like, and the audit of an application's routes."""
