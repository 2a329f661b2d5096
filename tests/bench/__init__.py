"""The benchmark: what the layers add to a request and to a chunk, beside what peers add. Asserts no time."""
