//! Serving models: the runner's half. A replica is a leased row, and an engine process behind it.
//!
//! Somebody who wants a model served inserts a queued row and waits until it is ready. A runner with
//! memory for it claims the row, starts `lathe engine`, and keeps the lease. Replicas that nobody uses
//! are unloaded. An engine that dies while it loads fails its row; one that dies later, or no longer
//! says that it is alive, is queued again after a pause, until it has died [`DEATHS`] times without
//! living long in between. A database that is away stops no engine.

use std::{
    borrow::Cow,
    ffi::OsString,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use lathe_model::{failure, protocol::FailureCode};
use serde::Deserialize;
use sqlx::{PgConnection, PgPool};
use tokio::task::JoinSet;

use crate::{
    child::{Bounds, Child, Start, crash_message},
    context::Context,
    ids, settle,
    state::ReplicaState,
    waiting::answered,
};

/// Announces a change of a replica; the payload is its id.
pub const CHANNEL: &str = "lathe_replicas";

/// The environment variable with the engine's bearer token.
const SECRET_VARIABLE: &str = "LATHE_ENGINE_SECRET";

/// The environment variable with the address that traces are sent to.
pub const OTLP_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

const POLL: Duration = Duration::from_secs(1);
/// How long an engine may take to load its model.
const LOAD: Duration = Duration::from_secs(300);
/// A loaded engine that is not heard of for so long hangs.
const SILENCE: Duration = Duration::from_secs(10);
/// How long an engine that is told to stop may finish what it generates.
const DRAIN: Duration = Duration::from_secs(30);
/// The same when the runner itself stops.
const DRAIN_AT_STOP: Duration = Duration::from_secs(3);
/// Deaths one soon after another at which a replica fails: its model, or what it is asked, kills it.
const DEATHS: i32 = 3;
/// An engine that has lived so long has died of something new.
const LIVED_SECONDS: f64 = 300.0;
/// A replica is not unloaded for another one sooner after its last use.
const EVICT_AFTER_SECONDS: f64 = 10.0;

/// A replica that this runner serves.
#[derive(Clone, Debug)]
struct Claimed {
    id: String,
    token: String,
    artifact: String,
    secret: String,
}

/// What an engine says: once that its model is loaded, and from then on every second that it lives.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Report {
    Ready(Ready),
    Alive(Alive),
}

#[derive(Debug, Deserialize)]
struct Alive {
    /// Sequences that it generates or that wait.
    open: u64,
}

#[derive(Debug, Deserialize)]
struct Ready {
    address: String,
    memory_bytes: u64,
}

/// Serves queued replicas until the runner stops, and then waits for their ends.
pub async fn keep(context: Arc<Context>) {
    let mut serving = JoinSet::new();
    while !context.is_stopping() {
        // Registered before the query, so that what is queued after it is not missed.
        let wake = context.wake_replicas.notified();
        let claimed = if context.takes_work() { answered(claim(&context)).await } else { Ok(None) };
        match claimed {
            Ok(Some(replica)) => {
                serving.spawn(serve(context.clone(), replica));
                continue;
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "replicas cannot be claimed"),
        }
        tokio::select! {
            () = wake => {}
            () = tokio::time::sleep(POLL) => {}
            Some(_) = serving.join_next() => {}
            () = context.must_stop() => {}
        }
    }
    while serving.join_next().await.is_some() {}
}

/// Takes the replica that has waited longest, if there is memory for it; otherwise makes room for it.
async fn claim(context: &Context) -> Result<Option<Claimed>, sqlx::Error> {
    let mut tx = context.db.begin().await?;
    let Some(next) = sqlx::query!(
        "SELECT id, memory_bytes FROM replicas WHERE state = 'queued' AND run_after <= now() ORDER BY created_at, id FOR UPDATE SKIP LOCKED LIMIT 1"
    )
    .fetch_optional(&mut *tx)
    .await?
    else {
        return Ok(None);
    };
    let taken = sqlx::query_scalar!(
        r#"SELECT coalesce(sum(memory_bytes), 0)::bigint AS "taken!" FROM replicas
           WHERE runner_id = $1 AND state IN ('starting', 'ready', 'stopping')"#,
        context.runner_id
    )
    .fetch_one(&mut *tx)
    .await?;
    let budget = i64::try_from(context.config.replica_memory_bytes).unwrap_or(i64::MAX);
    if taken > 0 && taken.saturating_add(next.memory_bytes) > budget {
        make_room(&mut tx, &context.runner_id).await?;
        tx.commit().await?;
        return Ok(None);
    }
    let (token, secret) = (ids::secret(), ids::secret());
    let artifact = sqlx::query_scalar!(
        "UPDATE replicas SET state = 'starting', runner_id = $2, lease_token = $3, secret = $4, error = NULL,
             expires_at = now() + make_interval(secs => $5), last_used_at = now()
         WHERE id = $1 AND state = 'queued' RETURNING artifact",
        next.id,
        context.runner_id,
        token,
        secret,
        context.config.lease_seconds,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    Ok(Some(Claimed { id: next.id, token, artifact, secret }))
}

/// Asks the replica that was used longest ago to go, if it is not in use.
async fn make_room(tx: &mut PgConnection, runner_id: &str) -> Result<(), sqlx::Error> {
    let asked = sqlx::query_scalar!(
        "UPDATE replicas SET state = 'stopping' WHERE state = 'ready' AND id = (
             SELECT id FROM replicas WHERE runner_id = $1 AND state = 'ready' AND last_used_at < now() - make_interval(secs => $2)
             ORDER BY last_used_at LIMIT 1)
         RETURNING id",
        runner_id,
        EVICT_AFTER_SECONDS,
    )
    .fetch_optional(&mut *tx)
    .await?;
    match asked {
        Some(id) => notify(tx, &id).await,
        None => Ok(()),
    }
}

/// How an engine came to its end.
enum End {
    /// It was asked to go, or nobody used it.
    Stopped,
    /// It never came to be ready; why, in a sentence, which for one that ended by itself comes with its status.
    NotLoaded(String),
    /// It was ready, and died or hangs; the same.
    Died(String),
    LeaseLost,
}

/// One engine from its start to its end.
async fn serve(context: Arc<Context>, replica: Claimed) {
    let log = context.artifacts.path(&format!("logs/replicas/{}.log", replica.id));
    let started = match fetch(&context, &replica).await {
        Ok(model) => {
            let started = start(&context, &replica, &model, &log).await;
            started.map_err(|error| End::NotLoaded(format!("The engine could not be started: {error}")))
        }
        Err(end) => Err(end),
    };
    let end = match started {
        Ok(mut engine) => {
            let end = attend(&context, &replica, &mut engine).await;
            if matches!(&end, End::Died(how) if !how.is_empty()) {
                engine.kill();
            }
            let drain = if context.is_stopping() { DRAIN_AT_STOP } else { DRAIN };
            let status = engine.stop(drain).await;
            match end {
                End::Died(how) if how.is_empty() => End::Died(crash_message("engine", status, &log)),
                End::NotLoaded(how) if how.is_empty() => End::NotLoaded(crash_message("engine", status, &log)),
                other => other,
            }
        }
        Err(end) => end,
    };
    while let Err(error) = answered(settle_end(&context.db, &replica, &end)).await {
        tracing::warn!(replica.id = replica.id, %error, "the end of a replica waits for the database");
        if context.is_stopping() {
            return;
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The model's folder, which may have to be copied from a bucket first; the lease is kept meanwhile.
async fn fetch(context: &Context, replica: &Claimed) -> Result<PathBuf, End> {
    let period = Duration::from_secs_f64(context.config.lease_seconds / 3.0);
    let mut beat = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    let mut fetching = pin!(context.artifacts.fetch(&replica.artifact));
    loop {
        tokio::select! {
            fetched = &mut fetching => return match fetched {
                Ok(Some(folder)) => Ok(folder),
                Ok(None) => Err(End::NotLoaded(format!("The model's files are missing from {}.", context.artifacts.described()))),
                Err(error) => Err(End::NotLoaded(format!("The model's files could not be fetched: {error}"))),
            },
            _ = beat.tick() => {}
            () = context.must_stop() => return Err(End::Stopped),
        }
        if let Some(end) = keep_lease(context, replica, false).await {
            return Err(end);
        }
    }
}

async fn start(context: &Context, replica: &Claimed, model: &Path, log: &Path) -> io::Result<Child> {
    let address = context.config.internal_addr.resolve(&context.db.connect_options()).await?;
    let mut arguments = vec!["engine".into(), "--model".into(), model.display().to_string()];
    arguments.extend(["--listen".into(), SocketAddr::new(address, 0).to_string()]);
    if context.config.deterministic_decode {
        arguments.push("--deterministic-decode".into());
    }
    let environment = environment(context.config.otlp_endpoint.as_deref(), &replica.secret);
    let program = context.config.program.clone();
    Child::start(Start { program, arguments, environment, log: log.to_owned(), bounds: Bounds::default() }).await
}

/// What an engine knows besides what every child does: its secret, and what OpenTelemetry's variables say of where
/// its traces go, which may hold a secret too.
fn environment(otlp_endpoint: Option<&str>, secret: &str) -> Vec<(Cow<'static, str>, String)> {
    let mut variables = vec![(SECRET_VARIABLE.into(), secret.to_owned()), ("MKL_CBWR".into(), "AUTO".into())];
    if let Some(endpoint) = otlp_endpoint {
        let of_traces = |name: &OsString| name.to_string_lossy().starts_with("OTEL_");
        let inherited = std::env::vars_os().filter(|(name, _)| of_traces(name));
        variables
            .extend(inherited.filter_map(|(name, value)| Some((name.into_string().ok()?.into(), value.into_string().ok()?))));
        variables.push((OTLP_ENDPOINT.into(), endpoint.to_owned()));
    }
    variables
}

/// Keeps the lease of a running engine until something ends it.
async fn attend(context: &Context, replica: &Claimed, engine: &mut Child) -> End {
    let (mut line, mut ready, mut open) = (Vec::new(), false, 0);
    let (period, load) = (Duration::from_secs_f64(context.config.lease_seconds / 3.0), tokio::time::Instant::now() + LOAD);
    let (mut beat, mut heard) = (tokio::time::interval(period), tokio::time::Instant::now());
    loop {
        let wake = context.wake_replicas.notified();
        let silent = if ready { heard + SILENCE } else { load };
        tokio::select! {
            // What was said is heard before its absence is looked at.
            biased;
            more = engine.report(&mut line) => match more {
                Ok(true) => match serde_json::from_slice(&std::mem::take(&mut line)) {
                    Ok(Report::Ready(loaded)) => {
                        match answered(announce(&context.db, replica, &loaded)).await {
                            Ok(true) => (ready, heard) = (true, tokio::time::Instant::now()),
                            Ok(false) => return End::LeaseLost,
                            Err(error) => return End::NotLoaded(format!("The database was away when the model was loaded: {error}")),
                        }
                        tracing::info!(replica.id = replica.id, address = loaded.address, "a model is served");
                    }
                    Ok(Report::Alive(alive)) => {
                        (open, heard) = (alive.open, tokio::time::Instant::now());
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(replica.id = replica.id, %error, "an engine's report cannot be read");
                        continue;
                    }
                },
                Ok(false) | Err(_) if ready => return End::Died(String::new()),
                Ok(false) | Err(_) => return End::NotLoaded(String::new()),
            },
            _ = beat.tick() => {}
            () = wake => {}
            () = tokio::time::sleep_until(silent), if !ready => return End::NotLoaded("The engine did not load the model in time.".into()),
            () = tokio::time::sleep_until(silent), if ready => {
                return End::Died("The engine no longer said that it was alive, and was killed.".into());
            }
            () = context.must_stop() => return End::Stopped,
        }
        if let Some(end) = keep_lease(context, replica, open > 0).await {
            return end;
        }
    }
}

/// Renews the lease; what it finds may be the engine's end.
async fn keep_lease(context: &Context, replica: &Claimed, in_use: bool) -> Option<End> {
    match answered(renew(context, replica, in_use)).await {
        Ok(Standing::Kept) => None,
        Ok(Standing::ToStop) => Some(End::Stopped),
        Ok(Standing::Lost) => Some(End::LeaseLost),
        Err(error) => {
            tracing::warn!(replica.id = replica.id, %error, "a replica's lease could not be renewed; it goes on serving");
            None
        }
    }
}

enum Standing {
    Kept,
    ToStop,
    Lost,
}

/// Renews the lease; a replica that nobody has used for long is marked as stopping.
async fn renew(context: &Context, replica: &Claimed, in_use: bool) -> Result<Standing, sqlx::Error> {
    let state = sqlx::query_scalar!(
        r#"UPDATE replicas SET expires_at = now() + make_interval(secs => $2),
               last_used_at = CASE WHEN $4 THEN now() ELSE last_used_at END,
               state = CASE WHEN state = 'ready' AND NOT $4 AND last_used_at < now() - make_interval(secs => $3) THEN 'stopping' ELSE state END
           WHERE lease_token = $1 AND state IN ('starting', 'ready', 'stopping')
           RETURNING state AS "state: ReplicaState""#,
        replica.token,
        context.config.lease_seconds,
        context.config.idle_seconds,
        in_use,
    )
    .fetch_optional(&context.db)
    .await?;
    Ok(match state {
        Some(ReplicaState::Stopping) => Standing::ToStop,
        Some(_) => Standing::Kept,
        None => Standing::Lost,
    })
}

/// Tells whoever waits; false: the lease is lost or the replica is not wanted any more.
async fn announce(db: &PgPool, replica: &Claimed, loaded: &Ready) -> Result<bool, sqlx::Error> {
    let mut tx = db.begin().await?;
    let changed = sqlx::query!(
        "UPDATE replicas SET state = 'ready', address = $2, memory_bytes = $3, last_used_at = now(), ready_at = now()
         WHERE lease_token = $1 AND state = 'starting'",
        replica.token,
        loaded.address,
        i64::try_from(loaded.memory_bytes).unwrap_or(i64::MAX),
    )
    .execute(&mut *tx)
    .await?;
    notify(&mut tx, &replica.id).await?;
    tx.commit().await?;
    Ok(changed.rows_affected() == 1)
}

async fn settle_end(db: &PgPool, replica: &Claimed, end: &End) -> Result<(), sqlx::Error> {
    let mut tx = db.begin().await?;
    match end {
        End::LeaseLost => return Ok(()),
        End::Stopped => {
            sqlx::query!(
                "UPDATE replicas SET state = 'stopped', stopped_at = now(), lease_token = NULL, expires_at = NULL
                 WHERE lease_token = $1 AND state IN ('starting', 'ready', 'stopping')",
                replica.token
            )
            .execute(&mut *tx)
            .await?;
        }
        End::NotLoaded(reason) => {
            tracing::error!(replica.id = replica.id, reason, "a model could not be loaded");
            let error = settle::error_of(&failure::retryable(FailureCode::WorkerCrashed, reason.clone()));
            sqlx::query!(
                "UPDATE replicas SET state = 'failed', error = $2, stopped_at = now(), lease_token = NULL, expires_at = NULL
                 WHERE lease_token = $1 AND state IN ('starting', 'stopping')",
                replica.token,
                error,
            )
            .execute(&mut *tx)
            .await?;
        }
        End::Died(how) => settle_death(&mut tx, replica, how).await?,
    }
    notify(&mut tx, &replica.id).await?;
    tx.commit().await
}

/// Queues a replica again whose engine has died, later each time, or fails it.
async fn settle_death(tx: &mut PgConnection, replica: &Claimed, how: &str) -> Result<(), sqlx::Error> {
    let Some(row) = sqlx::query!(
        r#"SELECT state AS "state: ReplicaState", failures, ready_at < now() - make_interval(secs => $2) AS lived FROM replicas
           WHERE lease_token = $1 AND state IN ('ready', 'stopping') FOR UPDATE"#,
        replica.token,
        LIVED_SECONDS,
    )
    .fetch_optional(&mut *tx)
    .await?
    else {
        return Ok(());
    };
    let deaths = if row.lived == Some(true) { 1 } else { row.failures + 1 };
    let state = match row.state {
        ReplicaState::Stopping => ReplicaState::Stopped,
        _ if deaths >= DEATHS => ReplicaState::Failed,
        _ => ReplicaState::Queued,
    };
    tracing::error!(replica.id = replica.id, replica.deaths = deaths, how, "an engine died");
    let message = format!("It died {deaths} times soon after it was loaded. {how}");
    let error =
        (state == ReplicaState::Failed).then(|| settle::error_of(&failure::retryable(FailureCode::WorkerCrashed, message)));
    sqlx::query!(
        "UPDATE replicas SET state = $2, failures = $3, error = $4, run_after = now() + make_interval(secs => $5),
             stopped_at = CASE WHEN $2 = 'queued' THEN NULL ELSE now() END,
             lease_token = NULL, expires_at = NULL, address = NULL, runner_id = NULL
         WHERE lease_token = $1",
        replica.token,
        state.as_str(),
        deaths,
        error,
        // The first death may be an accident, and somebody waits.
        4f64.powi(deaths.clamp(1, 6) - 1) - 1.0,
    )
    .execute(tx)
    .await
    .map(drop)
}

/// Takes replicas back from runners that are gone.
pub async fn reap(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let expired = sqlx::query_scalar!(
        "UPDATE replicas SET state = CASE WHEN state = 'stopping' THEN 'stopped' ELSE 'queued' END,
             stopped_at = CASE WHEN state = 'stopping' THEN now() END,
             lease_token = NULL, expires_at = NULL, address = NULL, runner_id = NULL
         WHERE state IN ('starting', 'ready', 'stopping') AND expires_at < now() RETURNING id"
    )
    .fetch_all(&mut *conn)
    .await?;
    for id in expired {
        tracing::warn!(replica.id = id, "took a replica back whose runner is gone");
        notify(conn, &id).await?;
    }
    Ok(())
}

/// Tells the engines that serve a checkpoint of this job to stop.
pub(crate) async fn stop_serving_checkpoints(tx: &mut PgConnection, job_id: &str) -> Result<(), sqlx::Error> {
    let asked = sqlx::query_scalar!(
        "UPDATE replicas r SET state = CASE WHEN r.state = 'queued' THEN 'stopped' ELSE 'stopping' END,
             stopped_at = CASE WHEN r.state = 'queued' THEN now() END
         FROM checkpoints c WHERE c.id = r.checkpoint_id AND c.job_id = $1 AND r.state IN ('queued', 'starting', 'ready')
         RETURNING r.id",
        job_id
    )
    .fetch_all(&mut *tx)
    .await?;
    for id in asked {
        notify(tx, &id).await?;
    }
    Ok(())
}

async fn notify(conn: &mut PgConnection, replica_id: &str) -> Result<(), sqlx::Error> {
    sqlx::query!("SELECT pg_notify('lathe_replicas', $1) AS told", replica_id).fetch_one(conn).await.map(drop)
}
