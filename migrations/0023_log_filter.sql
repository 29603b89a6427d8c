-- What every api and runner logs, where an admin has set it; without a row, what each was started with.

CREATE TABLE log_filter (
    single      boolean PRIMARY KEY DEFAULT true CHECK (single),
    filter      text NOT NULL,
    expires_at  timestamptz                             -- NULL: until it is changed
);
