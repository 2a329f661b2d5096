"""The journal: what it keeps, and who reads it off."""
