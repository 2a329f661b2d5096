-- What workers told each other of their providers' answers: some dozen rows, each written anew with every new answer.
CREATE TABLE reading (
    series TEXT COLLATE "C" NOT NULL,
    part TEXT COLLATE "C" NOT NULL,
    observed_at DOUBLE PRECISION NOT NULL,
    -- JSON text
    told TEXT NOT NULL,
    PRIMARY KEY (series, part)
) WITH (fillfactor = 50);
