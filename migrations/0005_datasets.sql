CREATE TABLE datasets (
    id          text PRIMARY KEY,                       -- ds_…
    project_id  text NOT NULL REFERENCES projects (id),
    name        text NOT NULL,
    state       text NOT NULL CHECK (state IN ('queued', 'running', 'ready', 'failed')),
    job_id      text NOT NULL REFERENCES jobs (id),
    source      jsonb NOT NULL,                         -- as asked for
    artifact    text,                                   -- folder key, once ready
    sha256      text,
    statistics  jsonb,                                  -- rows, conversations, duplicates, bytes, characters, bad_rows
    error       jsonb,
    implicit    boolean NOT NULL DEFAULT false,         -- made for a fine-tuning job's training_file
    metadata    jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    deleted_at  timestamptz
);
CREATE INDEX datasets_listing ON datasets (project_id, created_at DESC, id DESC) WHERE deleted_at IS NULL;

CREATE TABLE dataset_files (
    dataset_id text NOT NULL REFERENCES datasets (id) ON DELETE CASCADE,
    position   integer NOT NULL,
    file_id    text NOT NULL REFERENCES files (id),
    PRIMARY KEY (dataset_id, position)
);
CREATE INDEX dataset_files_users ON dataset_files (file_id);

CREATE TABLE dataset_errors (
    dataset_id text NOT NULL REFERENCES datasets (id) ON DELETE CASCADE,
    n          bigint NOT NULL,
    file       text,
    line       bigint,
    field      text,
    message    text NOT NULL,
    keys       text[] NOT NULL DEFAULT '{}',
    PRIMARY KEY (dataset_id, n)
);

-- Token counts under a tokenizer, computed once by a job.
CREATE TABLE dataset_token_statistics (
    dataset_id   text NOT NULL REFERENCES datasets (id) ON DELETE CASCADE,
    tokenizer_id text NOT NULL,
    job_id       text NOT NULL REFERENCES jobs (id),
    statistics   jsonb,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (dataset_id, tokenizer_id)
);
