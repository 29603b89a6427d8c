//! A runner: takes jobs for this machine's devices, and keeps their workers and engines.
//!
//! Two pools of slots, light work and devices, each with a loop that claims when a slot is free:
//! at once on a notification, and every second without one. A runner that is told to stop asks its
//! workers to save, ends their attempts as interrupted and its replicas as stopped, and goes within
//! ten seconds. A database that is away stops nothing that runs. A runner whose artifact folder is not
//! the api's takes nothing and says so until it is; one that the schema has outgrown takes nothing more.

mod attempt;
mod conversation;
mod execute;
mod gang;
mod lease_keeper;
mod outbox;
mod spans;

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use sqlx::postgres::{PgConnectOptions, PgListener};
use tokio::{
    sync::{Notify, broadcast, watch},
    task::JoinSet,
};

use crate::{
    artifacts::{ArtifactError, Artifacts},
    context::{Context, RunnerConfig},
    devices::{self, Device},
    housekeeping, ids,
    lease::{self, Claimant},
    log_filter, machine, reaper, replicas, settle,
    state::Pool,
    store_id::{self, StoreError},
    waiting::{self, answered},
};

/// How often work is looked for without a notification.
const POLL: Duration = Duration::from_secs(1);
/// How long a stopping runner waits for the last writes. Workers are killed after 8 seconds.
const GONE_AFTER: Duration = Duration::from_millis(9_300);

#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    #[error(transparent)]
    Artifacts(#[from] ArtifactError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the runner needs the database: {0}")]
    Database(#[from] sqlx::Error),
}

/// Runs until `shutdown` resolves and everything is put in order.
pub async fn run(config: RunnerConfig, shutdown: impl Future<Output = ()>) -> Result<(), RunnerError> {
    let artifacts = Artifacts::open(&config.artifacts)?.with_bucket(config.bucket.clone());
    // A runner that stands still in a transaction must not hold its rows longer than its lease.
    let idle = format!("{}ms", (config.lease_seconds * 1000.0).round());
    let options = config.database_url.parse::<PgConnectOptions>()?.options([("idle_in_transaction_session_timeout", idle)]);
    let db = waiting::pool_options()
        .max_connections(16)
        .acquire_timeout(Duration::from_secs_f64((config.lease_seconds / 3.0).clamp(1.0, 10.0)))
        .connect_with(options)
        .await?;
    let offered = match config.offer_devices {
        true => devices::find(&config.program, config.cpu_slots).await,
        false => Vec::new(),
    };
    let (stop, stopping) = watch::channel(false);
    let (leave, gone) = watch::channel(false);
    let context = Arc::new(Context {
        db,
        artifacts,
        runner_id: ids::new("runner"),
        stopping,
        gone,
        disk_low: watch::Sender::new(false),
        outdated: AtomicBool::new(false),
        wake: Notify::new(),
        wake_replicas: Notify::new(),
        spoken_of: broadcast::Sender::new(256),
        config,
    });
    tokio::pin!(shutdown);
    if !register_proven(&context, &offered, shutdown.as_mut()).await? {
        return Ok(());
    }
    let mut background = JoinSet::new();
    background.spawn(listen(context.clone()));
    background.spawn(stay_registered(context.clone()));
    background.spawn(watch_disk(context.clone()));
    background.spawn(reaper::run(context.db.clone(), context.artifacts.clone(), context.config.lease_seconds));
    background.spawn(housekeeping::run(context.clone()));
    background.spawn(log_filter::follow(context.db.clone(), context.config.log));
    let mut work = JoinSet::new();
    let light =
        (0..context.config.light_slots).map(|_| Device { threads: devices::cores().div_ceil(2), ..devices::cpu("light work") });
    work.spawn(claim_all(context.clone(), Pool::Light, light.collect()));
    work.spawn(claim_all(context.clone(), Pool::Device, offered));
    work.spawn(replicas::keep(context.clone()));
    shutdown.await;
    tracing::info!(runner.id = context.runner_id, "the runner is stopping");
    stop.send_replace(true);
    let done = async { while work.join_next().await.is_some() {} };
    if tokio::time::timeout(GONE_AFTER, done).await.is_err() {
        leave.send_replace(true);
        let _ = tokio::time::timeout(Duration::from_millis(300), async { while work.join_next().await.is_some() {} }).await;
    }
    background.shutdown().await;
    unregister(&context).await;
    Ok(())
}

/// How long a runner that starts beside its api waits for it before it says so.
const API_STARTS: Duration = Duration::from_secs(5);

/// Registers once the artifact folder is proven to be the api's. Until then the runner is registered as
/// refused, with the sentence; false: it is to stop.
async fn register_proven(
    context: &Context,
    offered: &[Device],
    mut shutdown: Pin<&mut impl Future<Output = ()>>,
) -> Result<bool, RunnerError> {
    let began = Instant::now();
    let mut said: Option<String> = None;
    loop {
        let mut conn = context.db.acquire().await?;
        let refusal = store_id::refusal(&mut conn, &context.artifacts).await?;
        drop(conn);
        let waits = said.is_none() && began.elapsed() < API_STARTS && refusal.as_ref().is_some_and(|refusal| refusal.may_pass);
        match refusal {
            None if said.is_none() => return register(context, offered, None).await.map(|()| true).map_err(Into::into),
            None => {
                sqlx::query!("UPDATE runners SET refused = NULL WHERE id = $1", context.runner_id).execute(&context.db).await?;
                tracing::info!(runner.id = context.runner_id, "the artifact folder is the api's: the runner begins to take work");
                return Ok(true);
            }
            Some(_) if waits => {}
            Some(store_id::Refusal { sentence, .. }) => {
                refuse(context, offered, &sentence, said.is_none()).await?;
                if said.as_ref() != Some(&sentence) {
                    tracing::error!(runner.id = context.runner_id, "{sentence}");
                }
                said = Some(sentence);
            }
        }
        let pause = if waits { POLL / 20 } else { POLL };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = &mut shutdown => {
                unregister(context).await;
                return Ok(false);
            }
        }
    }
}

/// Keeps the row of a runner that takes no work.
async fn refuse(context: &Context, offered: &[Device], sentence: &str, first: bool) -> Result<(), sqlx::Error> {
    if first {
        return register(context, offered, Some(sentence)).await;
    }
    sqlx::query!(
        "UPDATE runners SET refused = $2, expires_at = now() + make_interval(secs => $3), stopped_at = NULL WHERE id = $1",
        context.runner_id,
        sentence,
        context.config.lease_seconds,
    )
    .execute(&context.db)
    .await
    .map(drop)
}

async fn unregister(context: &Context) {
    let unregister = sqlx::query!("UPDATE runners SET stopped_at = now() WHERE id = $1", context.runner_id);
    // What cannot be written in time runs out by itself.
    let _ = tokio::time::timeout(Duration::from_millis(300), unregister.execute(&context.db)).await;
}

async fn register(context: &Context, offered: &[Device], refused: Option<&str>) -> Result<(), sqlx::Error> {
    for device in offered {
        tracing::info!(device.name = device.name, device.threads = device.threads, why = device.why, "offers a device");
    }
    let config = &context.config;
    sqlx::query!(
        "INSERT INTO runners (id, name, host, pid, version, devices, light_slots, device_slots, expires_at, refused)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, now() + make_interval(secs => $9), $10)",
        context.runner_id,
        config.name,
        machine::host(),
        i32::try_from(std::process::id()).unwrap_or(0),
        env!("CARGO_PKG_VERSION"),
        serde_json::Value::Array(offered.iter().map(Device::describe).collect()),
        i32::try_from(config.light_slots).unwrap_or(i32::MAX),
        i32::try_from(offered.len()).unwrap_or(i32::MAX),
        config.lease_seconds,
        refused,
    )
    .execute(&context.db)
    .await?;
    tracing::info!(runner.id = context.runner_id, runner.name = config.name, "the runner is registered");
    Ok(())
}

async fn stay_registered(context: Arc<Context>) {
    let seconds = context.config.lease_seconds;
    loop {
        tokio::time::sleep(Duration::from_secs_f64(seconds / 3.0)).await;
        let renewal = sqlx::query!(
            "UPDATE runners SET expires_at = now() + make_interval(secs => $2), stopped_at = NULL WHERE id = $1",
            context.runner_id,
            seconds
        );
        if let Err(error) = answered(renewal.execute(&context.db)).await {
            tracing::warn!(%error, "the runner could not renew its registration");
        }
        if let Err(error) = answered(look_at_schema(&context)).await {
            tracing::warn!(%error, "the schema's version cannot be read");
        }
    }
}

/// Whether a newer version has brought the schema up meanwhile. Then its jobs may be such as this one does not
/// read: what runs goes on, and nothing more is taken.
async fn look_at_schema(context: &Context) -> Result<(), sqlx::Error> {
    let Some(known) = context.config.schema_version else { return Ok(()) };
    // The migrator makes this table, so no query of it can be checked.
    let found: i64 =
        sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM _sqlx_migrations WHERE success").fetch_one(&context.db).await?;
    if found <= known {
        return Ok(());
    }
    let sentence = format!(
        "The database's schema is version {found}, made by a newer Lathe; this runner knows versions up to {known}: start the newer one."
    );
    if !context.outdated.swap(true, Ordering::Relaxed) {
        tracing::error!(runner.id = context.runner_id, "{sentence} What has begun goes on, and no more is taken.");
    }
    refuse(context, &[], &sentence, false).await
}

async fn watch_disk(context: Arc<Context>) {
    loop {
        context.look_at_disk().await;
        tokio::time::sleep(POLL).await;
    }
}

/// Turns notifications into wake-ups; while there is no connection, polling alone finds work.
async fn listen(context: Arc<Context>) {
    loop {
        if let Err(error) = hear(&context).await {
            tracing::warn!(%error, "notifications cannot be heard; looking for work every second");
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn hear(context: &Context) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(&context.db).await?;
    listener.listen_all([settle::CHANNEL, replicas::CHANNEL]).await?;
    loop {
        let heard = waiting::notification(&mut listener).await?;
        match &heard {
            Some(notification) if notification.channel() == replicas::CHANNEL => context.wake_replicas.notify_waiters(),
            Some(notification) => {
                let _ = context.spoken_of.send(notification.payload().to_owned());
                context.wake.notify_waiters();
            }
            // The connection was lost and is made again; anything may have happened meanwhile.
            None => {
                context.wake.notify_waiters();
                context.wake_replicas.notify_waiters();
            }
        }
    }
}

/// Claims for one pool while slots of it are free: one for each rank of a job. Ends, after its attempts, when the runner stops.
async fn claim_all(context: Arc<Context>, pool: Pool, slots: Vec<Device>) {
    let (capacity, mut free, mut attempts) = (slots.len(), slots, JoinSet::new());
    loop {
        // Registered before the query, so that work queued after it is not missed.
        let wake = context.wake.notified();
        let mut full = true;
        if !free.is_empty()
            && let Some(claimed) = claim(&context, pool, &free, capacity).await
        {
            let ranks = usize::try_from(claimed.devices).unwrap_or(0).clamp(1, free.len());
            let (taken, context) = (free.drain(..ranks).collect::<Vec<_>>(), context.clone());
            attempts.spawn(async move {
                execute::run(context, claimed, taken.clone()).await;
                taken
            });
            full = false;
        }
        if context.is_stopping() {
            break;
        }
        if !full {
            continue;
        }
        tokio::select! {
            () = wake, if !free.is_empty() => {}
            () = tokio::time::sleep(POLL), if !free.is_empty() => {}
            Some(ended) = attempts.join_next() => match ended {
                Ok(taken) => free.extend(taken),
                Err(error) => tracing::error!(%error, "an attempt's task ended by itself; its slots are lost until the runner is started again"),
            },
            () = context.must_stop() => break,
        }
    }
    while attempts.join_next().await.is_some() {}
}

/// The next job, if there is one and this machine has room for it.
async fn claim(context: &Context, pool: Pool, free: &[Device], capacity: usize) -> Option<lease::Claimed> {
    if !context.takes_work() {
        return None;
    }
    // Asked anew: what a claim begins would have to stop again.
    if context.look_at_disk().await {
        return None;
    }
    let claimant = Claimant {
        runner_id: context.runner_id.clone(),
        pool,
        devices: i32::try_from(free.len()).unwrap_or(i32::MAX),
        capacity: i32::try_from(capacity).unwrap_or(i32::MAX),
        offered: serde_json::Value::Array(free.iter().map(Device::describe).collect()),
        lease_seconds: context.config.lease_seconds,
    };
    let claimed = match context.db.acquire().await {
        Ok(mut conn) => answered(lease::claim(&mut conn, &claimant)).await,
        Err(error) => Err(error),
    };
    claimed.unwrap_or_else(|error| {
        tracing::warn!(%error, "work cannot be claimed");
        None
    })
}
