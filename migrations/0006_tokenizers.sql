CREATE TABLE tokenizers (
    id          text PRIMARY KEY,                       -- tok_…
    project_id  text NOT NULL REFERENCES projects (id),
    name        text NOT NULL,
    state       text NOT NULL CHECK (state IN ('queued', 'running', 'ready', 'failed')),
    job_id      text NOT NULL REFERENCES jobs (id),
    type        text NOT NULL CHECK (type IN ('bpe', 'imported')),
    dataset_id  text,
    file_id     text REFERENCES files (id),
    vocabulary  bigint,                                 -- asked for, then as trained
    added_roles text[] NOT NULL DEFAULT '{}',           -- roles that an uploaded one lacked
    artifact    text,
    sha256      text,
    error       jsonb,
    metadata    jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    deleted_at  timestamptz
);
CREATE INDEX tokenizers_listing ON tokenizers (project_id, created_at DESC, id DESC) WHERE deleted_at IS NULL;
