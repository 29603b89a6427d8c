-- Uploaded bytes. A deleted row stays as a tombstone for lineage; its bytes go.

CREATE TABLE files (
    id          text PRIMARY KEY,                       -- file-…
    project_id  text NOT NULL REFERENCES projects (id),
    filename    text NOT NULL,
    purpose     text NOT NULL,
    bytes       bigint NOT NULL,
    sha256      text NOT NULL,
    artifact    text NOT NULL,                          -- key in the artifact store
    metadata    jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz,
    deleted_at  timestamptz
);
CREATE INDEX files_listing ON files (project_id, created_at DESC, id DESC) WHERE deleted_at IS NULL;

CREATE TABLE uploads (
    id          text PRIMARY KEY,                       -- upload_…
    project_id  text NOT NULL REFERENCES projects (id),
    filename    text NOT NULL,
    purpose     text NOT NULL,
    mime_type   text NOT NULL,
    bytes       bigint NOT NULL,                        -- promised at creation, checked at completion
    state       text NOT NULL CHECK (state IN ('pending', 'completed', 'cancelled', 'expired')),
    file_id     text REFERENCES files (id),
    file_expires_after bigint,                          -- seconds
    metadata    jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL
);

CREATE TABLE upload_parts (
    id          text PRIMARY KEY,                       -- part_…
    upload_id   text NOT NULL REFERENCES uploads (id) ON DELETE CASCADE,
    bytes       bigint NOT NULL,
    sha256      text NOT NULL,
    artifact    text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX upload_parts_of ON upload_parts (upload_id);
