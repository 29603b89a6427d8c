-- The registry: a model's row is made with its job, named at once, and ready when the job succeeds.

CREATE TABLE models (
    id             text PRIMARY KEY,                    -- model-…, or ft:base:org:suffix:id; checkpoints are named on the fly
    project_id     text NOT NULL REFERENCES projects (id),
    name           text NOT NULL,
    state          text NOT NULL CHECK (state IN ('queued', 'running', 'ready', 'failed')),
    job_id         text NOT NULL REFERENCES jobs (id),
    base_model_id  text,
    dataset_id     text,
    tokenizer_id   text,
    config         jsonb NOT NULL,                      -- ModelConfig
    template       text,
    artifact       text,
    parameters     bigint,
    weights_sha256 text,
    bytes          bigint,
    code_version   text NOT NULL,
    error          jsonb,
    metadata       jsonb NOT NULL DEFAULT '{}',
    created_at     timestamptz NOT NULL DEFAULT now(),
    deleted_at     timestamptz
);
CREATE INDEX models_listing ON models (project_id, created_at DESC, id DESC) WHERE deleted_at IS NULL;

-- A model being served. A leased row like an attempt; idle ones are unloaded.
CREATE TABLE replicas (
    id           text PRIMARY KEY,                      -- replica_…
    model_id     text NOT NULL REFERENCES models (id),
    checkpoint_id text REFERENCES checkpoints (id) ON DELETE SET NULL,
    artifact     text NOT NULL,                         -- the folder that is served
    state        text NOT NULL CHECK (state IN ('queued', 'starting', 'ready', 'stopping', 'stopped', 'failed')),
    runner_id    text REFERENCES runners (id),
    lease_token  text,
    expires_at   timestamptz,
    address      text,                                  -- host:port of the engine, once ready
    secret       text,                                  -- the engine's bearer token
    memory_bytes bigint NOT NULL,
    error        jsonb,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    stopped_at   timestamptz,
    CONSTRAINT replicas_ready CHECK (state <> 'ready' OR (address IS NOT NULL AND secret IS NOT NULL))
);
CREATE UNIQUE INDEX replicas_one_live ON replicas (artifact) WHERE state IN ('queued', 'starting', 'ready');
