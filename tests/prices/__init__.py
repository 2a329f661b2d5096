"""Prices: exact, by whatever they go."""
