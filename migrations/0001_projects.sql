-- Tenants and the keys that act for them. Nothing of one project is visible to another.

CREATE TABLE projects (
    id          text PRIMARY KEY,                       -- proj_…
    name        text NOT NULL,
    metadata    jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT projects_name_unique UNIQUE (name)
);

CREATE TABLE api_keys (
    id          text PRIMARY KEY,                       -- key_…
    project_id  text NOT NULL REFERENCES projects (id),
    name        text,
    scope       text NOT NULL CHECK (scope IN ('admin', 'project')),
    hash        text NOT NULL,                          -- sha256 of the secret, hex; the secret is shown once
    hint        text NOT NULL,                          -- the secret's last four characters
    metadata    jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    revoked_at  timestamptz,
    CONSTRAINT api_keys_hash_unique UNIQUE (hash)
);

-- The first answer to a creation, kept for 24 hours so that a retry gets it again.
CREATE TABLE idempotent_requests (
    project_id   text NOT NULL REFERENCES projects (id),
    key          text NOT NULL,                         -- Idempotency-Key, or key id + body hash for SDK retries
    body_sha256  text NOT NULL,                         -- method, path and body
    status       integer,                               -- NULL: still in flight
    response     jsonb,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    PRIMARY KEY (project_id, key)
);
CREATE INDEX idempotent_requests_expiry ON idempotent_requests (expires_at);
