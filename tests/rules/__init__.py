"""The rules: what is decided about money, limits and time, without a store, a clock or a wait."""
