-- The order in which jobs were made. A job is made after what it needs, so this order never contradicts
-- the dependencies; whoever locks several jobs locks them in it (see docs/job-states.md).

ALTER TABLE jobs ADD COLUMN seq bigint;
UPDATE jobs SET seq = made.n
FROM (SELECT id, row_number() OVER (ORDER BY created_at, kind = 'train', id) AS n FROM jobs) made
WHERE made.id = jobs.id;
ALTER TABLE jobs ALTER COLUMN seq SET NOT NULL, ALTER COLUMN seq ADD GENERATED ALWAYS AS IDENTITY;
SELECT setval(pg_get_serial_sequence('jobs', 'seq'), (SELECT coalesce(max(seq), 0) + 1 FROM jobs), false);
ALTER TABLE jobs ADD CONSTRAINT jobs_seq_unique UNIQUE (seq);
