-- A claim and an end of a job look for what the job makes; without these, each reads every resource there is.

CREATE INDEX datasets_job ON datasets (job_id);
CREATE INDEX tokenizers_job ON tokenizers (job_id);
CREATE INDEX models_job ON models (job_id);
CREATE INDEX dataset_token_statistics_job ON dataset_token_statistics (job_id);
