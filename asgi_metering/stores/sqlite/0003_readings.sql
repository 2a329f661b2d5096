-- What workers told each other of their providers' answers: some dozen rows, each written anew with every new answer.
CREATE TABLE reading (
    series TEXT NOT NULL,
    part TEXT NOT NULL,
    observed_at REAL NOT NULL,
    -- JSON text
    told TEXT NOT NULL,
    PRIMARY KEY (series, part)
) WITHOUT ROWID;
