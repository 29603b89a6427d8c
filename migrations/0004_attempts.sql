-- Who runs what, under which lease. A claim makes an attempt with a fresh token; every write of a
-- worker's runner names that token, and none takes effect once the attempt has ended.

CREATE TABLE runners (
    id          text PRIMARY KEY,                       -- runner_…, new at every start
    name        text NOT NULL,
    host        text NOT NULL,
    pid         integer NOT NULL,
    version     text NOT NULL,
    devices     jsonb NOT NULL,                         -- what was found and why
    light_slots integer NOT NULL,
    device_slots integer NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    stopped_at  timestamptz
);

CREATE TABLE job_attempts (
    job_id      text NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    n           integer NOT NULL,
    runner_id   text NOT NULL REFERENCES runners (id),
    lease_token text NOT NULL,
    expires_at  timestamptz NOT NULL,
    rendezvous  text,
    numerics    jsonb,
    started_at  timestamptz NOT NULL DEFAULT now(),
    ended_at    timestamptz,
    outcome     text CHECK (outcome IN ('succeeded', 'failed', 'paused', 'cancelled', 'interrupted', 'lost')),
    PRIMARY KEY (job_id, n),
    CONSTRAINT job_attempts_token_unique UNIQUE (lease_token),
    CONSTRAINT job_attempts_outcome CHECK ((outcome IS NOT NULL) = (ended_at IS NOT NULL))
);
CREATE UNIQUE INDEX job_attempts_one_live ON job_attempts (job_id) WHERE ended_at IS NULL;
CREATE INDEX job_attempts_expiry ON job_attempts (expires_at) WHERE ended_at IS NULL;

CREATE TABLE attempt_ranks (
    job_id     text NOT NULL,
    attempt    integer NOT NULL,
    rank       integer NOT NULL,
    runner_id  text NOT NULL REFERENCES runners (id),
    devices    jsonb NOT NULL,
    state      text NOT NULL CHECK (state IN ('starting', 'running', 'ended')),
    step       bigint NOT NULL DEFAULT 0,
    heartbeat  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, attempt, rank),
    FOREIGN KEY (job_id, attempt) REFERENCES job_attempts (job_id, n) ON DELETE CASCADE
);

CREATE TABLE checkpoints (
    id              text PRIMARY KEY,                   -- ftckpt_…
    job_id          text NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    attempt         integer NOT NULL,
    step            bigint NOT NULL,
    artifact        text NOT NULL,                      -- folder key: checkpoints/<job>/<attempt>/<step>
    bytes           bigint NOT NULL,
    loss            double precision,
    validation_loss double precision,
    best            boolean NOT NULL DEFAULT false,
    created_at      timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT checkpoints_unique UNIQUE (job_id, attempt, step)
);
