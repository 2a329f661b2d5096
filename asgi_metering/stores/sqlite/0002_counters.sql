-- What a moving log and a token bucket keep beside what all counters do.
ALTER TABLE counter ADD COLUMN extra TEXT NOT NULL DEFAULT '';
