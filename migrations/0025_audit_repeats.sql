-- Some deeds happen to a resource again and again: a job that is paused a second time, a quota that is set anew.

ALTER TABLE audit_log ADD COLUMN repeats boolean NOT NULL DEFAULT false;
ALTER TABLE audit_log DROP CONSTRAINT audit_log_once;
CREATE UNIQUE INDEX audit_log_once ON audit_log (resource_id, type) WHERE NOT repeats;
CREATE INDEX audit_log_resource ON audit_log (resource_id);
