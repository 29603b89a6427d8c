//! Lathe's side of `make bench PART=queue`: enqueues, claims and ends jobs through the functions that api
//! and runner use, in the database of `DATABASE_URL`. Answers a line with a line; `tests/bench` asks.
//!
//! The job is a dataset's token statistics. Its end writes no file, so that the queue alone is measured.
//!
//! | asked | answered |
//! |---|---|
//! | `backlog N` | how many jobs wait, once at least N do |
//! | `claim N` | the median time of N claims, in milliseconds; each is ended and replaced outside the time |
//! | `rate RUNNERS SECONDS` | jobs claimed and ended in a second, by so many claimers with a connection each |
//! | `latency N` | p50 and p99 of N times from before the request's transaction to the word that a waiting runner has claimed, in milliseconds |

use std::{
    io::{BufRead, Write},
    time::{Duration, Instant},
};

use lathe_jobs::{
    artifacts::Artifacts,
    context::RunnerConfig,
    ending::{self, Ending},
    events, ids,
    lease::{self, Claimant, Claimed},
    publish::Product,
    queue::{self, NewJob},
    runner,
    spec::Spec,
    state::Pool,
    store_id,
};
use serde_json::json;
use sqlx::{
    Connection, PgConnection, PgPool,
    postgres::{PgListener, PgPoolOptions},
};
use tokio::task::JoinSet;

static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("../migrations");

type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The rows that every job here names.
const WORLD: &str = "
    INSERT INTO projects (id, name) VALUES ('proj_bench', 'bench');
    INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at)
    VALUES ('runner_bench', 'bench', 'here', 1, '0', '[]', 1, 1, now() + interval '1 day');
    INSERT INTO jobs (id, project_id, kind, state, pool, spec, finished_at)
    VALUES ('job_first', 'proj_bench', 'ingest', 'succeeded', 'light', '{}', now());
    INSERT INTO datasets (id, project_id, name, state, job_id, source)
    VALUES ('ds_bench', 'proj_bench', 'bench', 'running', 'job_first', '{}')";

/// What [`Bench::enqueue`] writes, in one statement: a request a job would take half an hour.
const MANY: &str = "
    WITH made AS (
        INSERT INTO jobs (id, project_id, kind, state, pool, devices, spec, dataset_id, tokenizer_id, queued_at)
        SELECT 'job_' || md5(random()::text || n), 'proj_bench', 'statistics', 'queued', 'light', 1, '{\"kind\": \"statistics\"}',
            'ds_bench', 'tok_' || md5(random()::text || n), now()
        FROM generate_series(1, $1) n RETURNING id, tokenizer_id
    )
    INSERT INTO dataset_token_statistics (dataset_id, tokenizer_id, job_id) SELECT 'ds_bench', tokenizer_id, id FROM made";

#[derive(Clone)]
struct Bench {
    url: String,
    db: PgPool,
    artifacts: Artifacts,
}

impl Bench {
    async fn new(url: String, artifacts: Artifacts) -> Fallible<Bench> {
        let db = PgPoolOptions::new().max_connections(20).connect(&url).await?;
        MIGRATOR.run(&db).await?;
        sqlx::raw_sql(WORLD).execute(&db).await?;
        store_id::write(&mut *db.acquire().await?, &artifacts).await?;
        Ok(Bench { url, db, artifacts })
    }

    async fn answer(&self, question: &str) -> Fallible<String> {
        let words: Vec<&str> = question.split_whitespace().collect();
        Ok(match words[..] {
            ["backlog", jobs] => self.backlog(jobs.parse()?).await?.to_string(),
            ["claim", claims] => self.claim_time(claims.parse()?).await?.to_string(),
            ["rate", runners, seconds] => {
                self.rate(runners.parse()?, Duration::from_secs_f64(seconds.parse()?)).await?.to_string()
            }
            ["latency", jobs] => {
                let times = self.latency(jobs.parse()?).await?;
                format!("{} {}", quantile(&times, 0.5), quantile(&times, 0.99))
            }
            _ => return Err(format!("{question:?} is no question").into()),
        })
    }

    async fn backlog(&self, least: i64) -> Fallible<i64> {
        let waiting: i64 = sqlx::query_scalar("SELECT count(*) FROM jobs WHERE state = 'queued'").fetch_one(&self.db).await?;
        if waiting < least {
            sqlx::query(MANY).bind(least - waiting).execute(&self.db).await?;
            sqlx::raw_sql("VACUUM (ANALYZE) jobs").execute(&self.db).await?;
            sqlx::raw_sql("VACUUM (ANALYZE) dataset_token_statistics").execute(&self.db).await?;
            sqlx::raw_sql("CHECKPOINT").execute(&self.db).await?;
        }
        Ok(waiting.max(least))
    }

    async fn claim_time(&self, claims: usize) -> Fallible<f64> {
        let mut conn = PgConnection::connect(&self.url).await?;
        let mut times = Vec::new();
        for _ in 0..claims {
            let begun = Instant::now();
            let claimed = lease::claim(&mut conn, &claimant()).await?.ok_or("nothing waits")?;
            times.push(begun.elapsed().as_secs_f64() * 1e3);
            self.end(&mut conn, &claimed).await?;
            enqueue(&mut conn).await?;
        }
        Ok(quantile(&times, 0.5))
    }

    async fn rate(&self, runners: usize, time: Duration) -> Fallible<f64> {
        let mut conns = Vec::new();
        for _ in 0..runners {
            conns.push(PgConnection::connect(&self.url).await?);
        }
        let (begun, mut claimers) = (Instant::now(), JoinSet::new());
        for mut conn in conns {
            let bench = self.clone();
            claimers.spawn(async move {
                let mut ended = 0;
                while begun.elapsed() < time {
                    let claimed = lease::claim(&mut conn, &claimant()).await?.ok_or("nothing waits")?;
                    bench.end(&mut conn, &claimed).await?;
                    ended += 1;
                }
                Fallible::Ok(ended)
            });
        }
        let mut ended = 0;
        while let Some(claimer) = claimers.join_next().await {
            ended += claimer??;
        }
        Ok(f64::from(ended) / begun.elapsed().as_secs_f64())
    }

    async fn end(&self, conn: &mut PgConnection, claimed: &Claimed) -> Fallible<()> {
        let product = Product::Statistics { statistics: json!({"tokens": 1}) };
        ending::finish(conn, &self.artifacts, &claimed.lease, Ending::Succeeded(product)).await?;
        Ok(())
    }

    /// A whole runner waits. Its jobs end before a process is started, since their dataset is not there.
    async fn latency(&self, jobs: usize) -> Fallible<Vec<f64>> {
        let config =
            RunnerConfig { offer_devices: false, disk_low_bytes: 0, ..RunnerConfig::new(&*self.url, self.artifacts.root()) };
        let (stop, mut stopped) = tokio::sync::watch::channel(false);
        let running = tokio::spawn(async move {
            let shutdown = async move { _ = stopped.changed().await };
            runner::run(config, shutdown).await
        });
        let mut heard = PgListener::connect(&self.url).await?;
        heard.listen(events::CHANNEL).await?;
        let mut conn = PgConnection::connect(&self.url).await?;
        let mut times = Vec::new();
        // The first ones meet a runner that is still starting.
        for at in 0..jobs + 5 {
            let begun = Instant::now();
            let id = enqueue(&mut conn).await?;
            while heard.recv().await?.payload() != id {}
            if at >= 5 {
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            // Its end is the second word; then the runner waits again.
            while heard.recv().await?.payload() != id {}
            tokio::time::sleep(Duration::from_millis(4)).await;
        }
        stop.send_replace(true);
        running.await??;
        Ok(times)
    }
}

fn claimant() -> Claimant {
    Claimant {
        runner_id: "runner_bench".into(),
        pool: Pool::Light,
        devices: 1,
        capacity: 1,
        offered: json!([]),
        lease_seconds: 600.0,
    }
}

/// As the api does: job and resource in one transaction.
async fn enqueue(conn: &mut PgConnection) -> Fallible<String> {
    let (id, tokenizer) = (ids::new("job"), ids::new("tok"));
    let mut tx = conn.begin().await?;
    let job = NewJob {
        id: id.clone(),
        project_id: "proj_bench".into(),
        name: None,
        spec: Spec::Statistics {},
        request: json!({}),
        metadata: json!({}),
        priority: 0,
        max_attempts: 3,
        devices: 1,
        dataset_id: Some("ds_bench".into()),
        validation_dataset_id: None,
        tokenizer_id: Some(tokenizer.clone()),
        base_model_id: None,
        model_id: None,
        needs: Vec::new(),
    };
    queue::enqueue(&mut tx, job).await?;
    sqlx::query("INSERT INTO dataset_token_statistics (dataset_id, tokenizer_id, job_id) VALUES ('ds_bench', $1, $2)")
        .bind(tokenizer)
        .bind(&id)
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(id)
}

fn quantile(times: &[f64], share: f64) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len()) - 1]
}

#[tokio::main]
async fn main() -> Fallible<()> {
    let folder = tempfile::tempdir()?;
    let bench = Bench::new(std::env::var("DATABASE_URL")?, Artifacts::open(folder.path())?).await?;
    for question in std::io::stdin().lock().lines() {
        let answer = bench.answer(&question?).await?;
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}
