-- How many of the events that an attempt reported are written: a batch that is written again after a
-- commit without an answer adds none of them twice.
ALTER TABLE job_attempts ADD COLUMN events bigint NOT NULL DEFAULT 0;
