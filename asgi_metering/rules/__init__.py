"""
The rules: pure functions that decide about money, limits and time.

Nothing here awaits, reads a clock or touches a driver. `decide` takes the state, one operation and the time,
and returns an answer and the changes to make.
"""
