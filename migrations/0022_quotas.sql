-- What a project may take of the installation. NULL: as much as there is.

ALTER TABLE projects
    ADD COLUMN storage_quota_bytes bigint CHECK (storage_quota_bytes >= 0),
    ADD COLUMN running_jobs_quota  integer CHECK (running_jobs_quota >= 0);
CREATE INDEX projects_limited ON projects (id) WHERE running_jobs_quota IS NOT NULL;

ALTER TABLE datasets ADD COLUMN bytes bigint;            -- of the artifact
ALTER TABLE tokenizers ADD COLUMN bytes bigint;
CREATE INDEX uploads_pending ON uploads (project_id) WHERE state = 'pending';

-- Jobs of projects with a limit stand in a queue of their own project, so that a claim passes by the whole
-- of a project that may not run more, however many of its jobs wait.
ALTER TABLE jobs ADD COLUMN limited boolean NOT NULL DEFAULT false;
DROP INDEX jobs_claim;
CREATE INDEX jobs_claim ON jobs (pool, priority DESC, queued_at, id) WHERE state = 'queued' AND NOT limited;
CREATE INDEX jobs_claim_limited ON jobs (project_id, pool, priority DESC, queued_at, id) WHERE state = 'queued' AND limited;
