-- How fast a job gets on, for the time that is left: wall time of a step, evaluations and checkpoints
-- included. `tokens_per_second` is the speed of training alone.

ALTER TABLE jobs ADD COLUMN seconds_per_step double precision;
