-- What was created, deleted, cancelled and revoked, and by whom. Written with the deed, in its transaction;
-- ids are kept after what they name has gone, so without foreign keys.

CREATE TABLE audit_log (
    id          text PRIMARY KEY,                       -- audit_…
    type        text NOT NULL,                          -- what was done to what: file.created
    resource_id text NOT NULL,
    project_id  text NOT NULL,                          -- the resource's
    actor       text NOT NULL CHECK (actor IN ('api_key', 'shell', 'system')),
    key_id      text,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT audit_log_key CHECK ((key_id IS NOT NULL) = (actor = 'api_key')),
    -- Each of these happens to a resource once; whoever asks for it again changes nothing.
    CONSTRAINT audit_log_once UNIQUE (resource_id, type)
);
CREATE INDEX audit_log_listing ON audit_log (created_at DESC, id DESC);
