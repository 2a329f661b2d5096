-- What a moving log and a token bucket keep beside what all counters do. No row is written anew, nor read, and running
-- stores of older versions go on: what they add has the default.
ALTER TABLE counter ADD COLUMN IF NOT EXISTS extra TEXT COLLATE "C" NOT NULL DEFAULT '';

-- A log is written with every call that it counts: to squeeze it each time costs more than its room.
ALTER TABLE counter ALTER COLUMN extra SET STORAGE EXTERNAL;
