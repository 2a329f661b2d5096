"""Integrations: other packages' ways of saying what is metered, carried out by this one. Each imports its package."""
