"""The demo: an LLM gateway in front of the bundled provider, driven by a real client, step by step."""
