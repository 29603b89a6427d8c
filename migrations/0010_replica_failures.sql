-- An engine that dies again and again is started less and less often, and then no more.

ALTER TABLE replicas
    ADD COLUMN failures  integer NOT NULL DEFAULT 0,    -- deaths one soon after another
    ADD COLUMN run_after timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN ready_at  timestamptz;                   -- when the engine said so last
