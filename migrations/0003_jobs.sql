-- The queue. One row a job of any kind; one state column, changed only by guarded updates
-- (see docs/job-states.md). Time is this database's clock.

CREATE TABLE jobs (
    id            text PRIMARY KEY,                     -- ftjob-… for training, job_… for the others
    project_id    text NOT NULL REFERENCES projects (id),
    kind          text NOT NULL CHECK (kind IN ('ingest', 'tokenizer', 'statistics', 'train')),
    name          text,
    state         text NOT NULL CHECK (state IN ('blocked', 'queued', 'running', 'pausing', 'paused',
                                                 'cancelling', 'cancelled', 'succeeded', 'failed')),
    phase         text CHECK (phase IN ('preparing', 'training', 'evaluating', 'publishing')),
    pool          text NOT NULL CHECK (pool IN ('light', 'device')),
    devices       integer NOT NULL DEFAULT 1,
    priority      integer NOT NULL DEFAULT 0,
    run_after     timestamptz NOT NULL DEFAULT now(),
    spec          jsonb NOT NULL,                       -- what the worker runs; open fields are filled once, in preparing
    request       jsonb NOT NULL DEFAULT '{}',          -- the body as accepted, for answers in the client's own words
    metadata      jsonb NOT NULL DEFAULT '{}',
    dataset_id    text,                                 -- what it reads and makes; lineage, so no foreign keys
    validation_dataset_id text,
    tokenizer_id  text,
    base_model_id text,
    model_id      text,
    max_attempts  integer NOT NULL DEFAULT 3,
    failures      integer NOT NULL DEFAULT 0,           -- attempts that count; interruptions do not
    attempt       integer NOT NULL DEFAULT 0,           -- attempts begun; the newest one's number
    step          bigint NOT NULL DEFAULT 0,
    steps         bigint,
    loss          double precision,
    tokens_per_second double precision,
    trained_tokens bigint,
    error         jsonb,                                -- {code, message, param}
    next_event    bigint NOT NULL DEFAULT 1,
    created_at    timestamptz NOT NULL DEFAULT now(),
    queued_at     timestamptz,
    started_at    timestamptz,
    first_step_at timestamptz,
    finished_at   timestamptz,
    deleted_at    timestamptz,
    CONSTRAINT jobs_finished CHECK ((finished_at IS NOT NULL) = (state IN ('cancelled', 'succeeded', 'failed'))),
    CONSTRAINT jobs_error CHECK ((error IS NOT NULL) = (state = 'failed'))
);
CREATE INDEX jobs_claim ON jobs (pool, priority DESC, queued_at, id) WHERE state = 'queued';
CREATE INDEX jobs_listing ON jobs (project_id, kind, created_at DESC, id DESC) WHERE deleted_at IS NULL;
CREATE INDEX jobs_unfinished ON jobs (state) WHERE finished_at IS NULL;

CREATE TABLE job_dependencies (
    job_id   text NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    needs    text NOT NULL REFERENCES jobs (id),
    PRIMARY KEY (job_id, needs)
);
CREATE INDEX job_dependencies_needs ON job_dependencies (needs);

CREATE TABLE job_events (
    job_id      text NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    id          bigint NOT NULL,                        -- 1, 2, 3 … within the job, without gaps
    level       text NOT NULL CHECK (level IN ('info', 'warn', 'error')),
    code        text NOT NULL,
    message     text NOT NULL,
    data        jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, id)
);

CREATE TABLE job_metrics (
    job_id            text NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    step              bigint NOT NULL,
    loss              double precision NOT NULL,
    learning_rate     double precision NOT NULL,
    grad_norm         double precision NOT NULL,
    tokens            bigint NOT NULL,
    tokens_per_second double precision NOT NULL,
    validation_loss   double precision,
    PRIMARY KEY (job_id, step)
);
