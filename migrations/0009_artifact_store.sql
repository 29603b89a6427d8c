-- Which artifact store belongs to this database. The api writes the id into the store too, and a runner
-- that does not read it there takes no work.

CREATE TABLE artifact_store (
    id         text PRIMARY KEY,                        -- store_…
    single     boolean NOT NULL DEFAULT true CHECK (single),
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT artifact_store_one UNIQUE (single)
);

ALTER TABLE runners ADD COLUMN refused text;            -- why it takes no work, in a sentence
