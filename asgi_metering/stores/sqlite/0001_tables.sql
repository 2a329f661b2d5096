-- The rows of asgi_metering/rules/state.py, one table each, one column per field. What a column means is said there.
-- Holds and ledger lines, which every call writes, have several fields in one column (packing.py).
--
-- Amounts are INTEGER smallest parts. Times are REAL epoch seconds; 9e999 (infinity) is a time that does not come.
-- Nested values are JSON text: a named tuple is the array of its fields. Flags are 0 and 1.

CREATE TABLE account (
    payer TEXT NOT NULL,
    unit TEXT NOT NULL,
    granted INTEGER NOT NULL,
    settled INTEGER NOT NULL,
    held INTEGER NOT NULL,
    expired INTEGER NOT NULL,
    debt INTEGER NOT NULL,
    entries INTEGER NOT NULL,
    next_change_at REAL NOT NULL,
    next_due_at REAL NOT NULL,
    seen_at REAL NOT NULL,
    PRIMARY KEY (payer, unit)
) WITHOUT ROWID;

CREATE TABLE "grant" (
    payer TEXT NOT NULL,
    unit TEXT NOT NULL,
    id TEXT NOT NULL,
    amount INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    effective_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    number INTEGER NOT NULL,
    kind TEXT NOT NULL,
    actor TEXT NOT NULL,
    settled INTEGER NOT NULL,
    held INTEGER NOT NULL,
    expired INTEGER NOT NULL,
    begun INTEGER NOT NULL,
    reversed INTEGER NOT NULL,
    -- Derived from the sums, so that the index below is left alone by what changes only them.
    "open" INTEGER NOT NULL,
    PRIMARY KEY (payer, unit, id)
) WITHOUT ROWID;

-- What admission looks through; spent and lapsed grants pile up beside it without slowing it down.
CREATE INDEX grant_open ON "grant" (payer, unit) WHERE "open";

CREATE TABLE hold (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    payer TEXT NOT NULL,
    unit TEXT NOT NULL,
    amount INTEGER NOT NULL,
    parts TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'held',
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    due_at REAL NOT NULL,
    observed INTEGER NOT NULL DEFAULT 0,
    -- [ttl_s, grace_s, in_doubt, line, pools, group]
    terms TEXT NOT NULL,
    -- [windows, facts, charge_key, idempotency_key]; empty where there is none of them.
    rest TEXT NOT NULL,
    -- [amount, available, entry, basis, estimated, ended_by, parts, applied, late, known]; whole where the hold does
    -- not say the same.
    receipt TEXT,
    -- The receipt's own time; until when an ended hold is kept depends on it.
    ended_at REAL
);

-- Live holds by account, in the order in which the policy ends them. There are as many as calls in flight, so that a
-- sweep looks through all of them here.
CREATE INDEX hold_live ON hold (payer, unit, due_at, expires_at) WHERE receipt IS NULL;

CREATE INDEX hold_ended ON hold (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE allowance (
    payer TEXT NOT NULL,
    unit TEXT NOT NULL,
    name TEXT NOT NULL,
    start REAL NOT NULL,
    "end" REAL NOT NULL,
    settled INTEGER NOT NULL,
    held INTEGER NOT NULL,
    PRIMARY KEY (payer, unit, name, start)
) WITHOUT ROWID;

-- What a sweep forgets.
CREATE INDEX allowance_past ON allowance ("end") WHERE held = 0;

CREATE TABLE counter (
    key TEXT NOT NULL PRIMARY KEY,
    start REAL NOT NULL,
    "end" REAL NOT NULL,
    used INTEGER NOT NULL,
    previous INTEGER NOT NULL
) WITHOUT ROWID;

-- When a counter stops mattering: a sliding window is still the past of the next one.
CREATE INDEX counter_past ON counter ("end" + ("end" - start));

CREATE TABLE lease (
    pool TEXT NOT NULL,
    id TEXT NOT NULL,
    expires_at REAL NOT NULL,
    PRIMARY KEY (pool, id)
) WITHOUT ROWID;

CREATE INDEX lease_dead ON lease (expires_at);

CREATE TABLE entry (
    payer TEXT NOT NULL,
    unit TEXT NOT NULL,
    number INTEGER NOT NULL,
    at REAL NOT NULL,
    amount INTEGER NOT NULL,
    ref TEXT NOT NULL,
    available INTEGER NOT NULL,
    -- [kind, line, basis, estimated, actor, parts, id]
    what TEXT NOT NULL,
    PRIMARY KEY (payer, unit, number)
) WITHOUT ROWID;

-- What refunds and corrections look up: the lines of one call, or of one posting. By their ref first: those of new
-- calls are neighbours then, whoever pays.
CREATE INDEX entry_ref ON entry (ref, payer, unit);

-- What a sweep folds into checkpoints.
CREATE INDEX entry_at ON entry (at);

CREATE TABLE event (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    at REAL NOT NULL,
    payload TEXT NOT NULL,
    claimed_until REAL NOT NULL DEFAULT 0,
    -- NULL while it waits.
    acknowledged_at REAL
);

-- What a claim looks through: events that wait.
CREATE INDEX event_next ON event (position) WHERE acknowledged_at IS NULL;

-- What a sweep forgets.
CREATE INDEX event_delivered ON event (acknowledged_at) WHERE acknowledged_at IS NOT NULL;

CREATE TABLE charge_key (
    key TEXT NOT NULL PRIMARY KEY,
    start REAL NOT NULL,
    "end" REAL NOT NULL,
    hold TEXT NOT NULL,
    members INTEGER NOT NULL,
    settled INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX charge_key_past ON charge_key ("end", key) WHERE members = 0;

CREATE TABLE idempotency (
    key TEXT NOT NULL PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    call TEXT NOT NULL,
    expires_at REAL NOT NULL,
    receipt TEXT,
    reply TEXT
) WITHOUT ROWID;

CREATE INDEX idempotency_past ON idempotency (expires_at, key) WHERE receipt IS NOT NULL;

CREATE TABLE checkpoint (
    payer TEXT NOT NULL,
    unit TEXT NOT NULL,
    number INTEGER NOT NULL,
    at REAL NOT NULL,
    sums TEXT NOT NULL,
    PRIMARY KEY (payer, unit)
) WITHOUT ROWID;

CREATE TABLE unit (
    name TEXT NOT NULL PRIMARY KEY,
    scale INTEGER NOT NULL
) WITHOUT ROWID;
