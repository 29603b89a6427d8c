-- Where a job belongs in a trace of the request that made it, as W3C Trace Context writes it; without one, a trace
-- begins with each attempt.

ALTER TABLE jobs ADD COLUMN traceparent text;
