-- The rows of asgi_metering/rules/state.py, one table each, one column per field. What a column means is said there.
-- What stands behind "-- for queries" is computed from the row, so that it can be looked up by.
--
-- Amounts are BIGINT smallest parts. Times are DOUBLE PRECISION epoch seconds; infinity is a time that does not come.
-- Nested values are JSON text, and TEXT to PostgreSQL: its own JSON types cannot hold every string that JSON can.
-- Keys compare by their bytes (COLLATE "C"), the same order on every machine.
--
-- fillfactor: a row that changes with every call finds room beside its old version, and no index has to be touched.

CREATE TABLE account (
    payer TEXT COLLATE "C" NOT NULL,
    unit TEXT COLLATE "C" NOT NULL,
    granted BIGINT NOT NULL,
    settled BIGINT NOT NULL,
    held BIGINT NOT NULL,
    expired BIGINT NOT NULL,
    debt BIGINT NOT NULL,
    entries BIGINT NOT NULL,
    next_change_at DOUBLE PRECISION NOT NULL,
    next_due_at DOUBLE PRECISION NOT NULL,
    seen_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (payer, unit)
) WITH (fillfactor = 50);

CREATE TABLE "grant" (
    payer TEXT COLLATE "C" NOT NULL,
    unit TEXT COLLATE "C" NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    amount BIGINT NOT NULL,
    priority BIGINT NOT NULL,
    effective_at DOUBLE PRECISION NOT NULL,
    expires_at DOUBLE PRECISION NOT NULL,
    number BIGINT NOT NULL,
    kind TEXT NOT NULL,
    actor TEXT NOT NULL,
    settled BIGINT NOT NULL,
    held BIGINT NOT NULL,
    expired BIGINT NOT NULL,
    begun BOOLEAN NOT NULL,
    reversed BIGINT NOT NULL,
    -- for queries
    is_open BOOLEAN NOT NULL,
    PRIMARY KEY (payer, unit, id)
) WITH (fillfactor = 50);

-- What admission looks through; spent and lapsed grants pile up beside it without slowing it down.
CREATE INDEX grant_open ON "grant" (payer, unit) WHERE is_open;

CREATE TABLE hold (
    id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    payer TEXT COLLATE "C" NOT NULL,
    unit TEXT COLLATE "C" NOT NULL,
    amount BIGINT NOT NULL,
    parts TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    expires_at DOUBLE PRECISION NOT NULL,
    due_at DOUBLE PRECISION NOT NULL,
    ttl_s DOUBLE PRECISION NOT NULL,
    grace_s DOUBLE PRECISION NOT NULL,
    in_doubt TEXT NOT NULL,
    line TEXT NOT NULL,
    observed BIGINT NOT NULL,
    windows TEXT NOT NULL,
    pools TEXT NOT NULL,
    facts TEXT NOT NULL,
    receipt TEXT,
    "group" TEXT NOT NULL,
    charge_key TEXT COLLATE "C" NOT NULL,
    idempotency_key TEXT COLLATE "C" NOT NULL,
    -- for queries
    ended_at DOUBLE PRECISION,
    counter_keys TEXT[] COLLATE "C" NOT NULL,
    allowance_names TEXT[] COLLATE "C" NOT NULL,
    allowance_starts DOUBLE PRECISION[] NOT NULL,
    -- The order of admission.
    position BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY
);

-- Live holds by account, in the order in which the policy ends them. There are as many as calls in flight, so that a
-- sweep looks through all of them here.
CREATE INDEX hold_live ON hold (payer, unit, due_at, id, expires_at) WHERE receipt IS NULL;

CREATE INDEX hold_ended ON hold (ended_at) WHERE ended_at IS NOT NULL;

CREATE TABLE allowance (
    payer TEXT COLLATE "C" NOT NULL,
    unit TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    start DOUBLE PRECISION NOT NULL,
    "end" DOUBLE PRECISION NOT NULL,
    settled BIGINT NOT NULL,
    held BIGINT NOT NULL,
    PRIMARY KEY (payer, unit, name, start)
) WITH (fillfactor = 50);

CREATE INDEX allowance_past ON allowance ("end") WHERE held = 0;

CREATE TABLE counter (
    key TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    start DOUBLE PRECISION NOT NULL,
    "end" DOUBLE PRECISION NOT NULL,
    used BIGINT NOT NULL,
    previous BIGINT NOT NULL
) WITH (fillfactor = 50);

-- When a counter stops mattering: a sliding window is still the past of the next one.
CREATE INDEX counter_past ON counter (("end" + ("end" - start)));

CREATE TABLE lease (
    pool TEXT COLLATE "C" NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    expires_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (pool, id)
);

CREATE INDEX lease_dead ON lease (expires_at);

CREATE TABLE entry (
    payer TEXT COLLATE "C" NOT NULL,
    unit TEXT COLLATE "C" NOT NULL,
    number BIGINT NOT NULL,
    at DOUBLE PRECISION NOT NULL,
    kind TEXT NOT NULL,
    amount BIGINT NOT NULL,
    ref TEXT COLLATE "C" NOT NULL,
    line TEXT NOT NULL,
    basis TEXT,
    estimated BOOLEAN NOT NULL,
    available BIGINT NOT NULL,
    actor TEXT NOT NULL,
    parts TEXT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (payer, unit, number)
);

-- What refunds and corrections look up: the lines of one call, or of one posting.
CREATE INDEX entry_ref ON entry (payer, unit, ref);

-- What retention looks up.
CREATE INDEX entry_old ON entry (at);

CREATE TABLE event (
    id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    at DOUBLE PRECISION NOT NULL,
    payload TEXT NOT NULL,
    claimed_until DOUBLE PRECISION NOT NULL,
    -- NULL while it waits.
    acknowledged_at DOUBLE PRECISION,
    -- The order of the outbox.
    position BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY
);

-- What a claim looks through: events that wait.
CREATE INDEX event_next ON event (position) WHERE acknowledged_at IS NULL;

-- What a sweep forgets.
CREATE INDEX event_delivered ON event (acknowledged_at) WHERE acknowledged_at IS NOT NULL;

CREATE TABLE charge_key (
    key TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    start DOUBLE PRECISION NOT NULL,
    "end" DOUBLE PRECISION NOT NULL,
    hold TEXT NOT NULL,
    members BIGINT NOT NULL,
    settled BOOLEAN NOT NULL
);

CREATE INDEX charge_key_past ON charge_key ("end");

CREATE TABLE idempotency (
    key TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    call TEXT NOT NULL,
    expires_at DOUBLE PRECISION NOT NULL,
    receipt TEXT,
    reply TEXT
);

CREATE INDEX idempotency_past ON idempotency (expires_at);

CREATE TABLE checkpoint (
    payer TEXT COLLATE "C" NOT NULL,
    unit TEXT COLLATE "C" NOT NULL,
    number BIGINT NOT NULL,
    at DOUBLE PRECISION NOT NULL,
    sums TEXT NOT NULL,
    PRIMARY KEY (payer, unit)
);

CREATE TABLE unit (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    scale BIGINT NOT NULL
);
