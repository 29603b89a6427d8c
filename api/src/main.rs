//! The binary `lathe`: reads the configuration and hands over to the part that was asked for.
//!
//! A part that fails ends the process with status 1 and one sentence on standard error. The worker's
//! statuses are those of `lathe_model::protocol::Exit`.

use std::{error::Error, future::Future, io::Write, process::ExitCode};

use clap::Parser;
use lathe_api::{
    auth,
    config::{ApiArgs, Cli, Command, DatabaseArgs, KeyCommand, LogOptions, RunnerArgs},
    demo, engine_server, health_check, keys, logging, migrate, openapi, otlp, server,
    state::{self, AppState},
    supervisor::{self, Database, ServeError},
};
use lathe_jobs::{artifacts::Artifacts, housekeeping, log_filter, runner, store_id};
use sqlx::{Connection, PgConnection};
use tokio::signal::unix::{SignalKind, signal};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(sentence) = logging::install(&cli.log) {
        return failed(sentence);
    }
    let traces = match traced_part(&cli.command).map_or(Ok(None), |part| otlp::install(cli.log.collector(), part).map(Some)) {
        Ok(traces) => traces,
        Err(sentence) => return failed(sentence),
    };
    let ended = run(cli.command, &cli.log);
    // Whatever was running has ended with its runtime.
    if let Some(traces) = traces {
        traces.flush();
    }
    match ended {
        Ok(status) => status,
        Err(error) => failed(error),
    }
}

/// The name in traces of a process that has spans of its own.
fn traced_part(command: &Command) -> Option<&'static str> {
    match command {
        Command::Api(_) => Some("api"),
        Command::Runner(_) => Some("runner"),
        Command::Engine(_) => Some("engine"),
        _ => None,
    }
}

fn failed(error: impl std::fmt::Display) -> ExitCode {
    eprintln!("lathe: {error}");
    ExitCode::FAILURE
}

fn run(command: Command, log: &LogOptions) -> Result<ExitCode, Box<dyn Error + Send + Sync>> {
    // Tensor work has threads of its own, set before the first tensor; tokio is for the others.
    if let Command::Worker = command {
        return Ok(ExitCode::from(u8::try_from(lathe_jobs::run::worker::run()).unwrap_or(1)));
    }
    if let Command::Devices = command {
        println!("{}", serde_json::to_string(&lathe_model::device::find())?);
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::Serve(args) => Ok(supervisor::serve(&args, log, stopped()?).await?),
            Command::Api(args) => run_api(*args).await,
            Command::Runner(args) => run_runner(args, log).await,
            Command::Engine(args) => Ok(engine_server::run(args, stopped()?).await?),
            Command::Demo(config) => Ok(demo::run(*config, stopped()?).await?),
            Command::Migrate(args) => {
                let database = Database::attach(&args).await?;
                let migrated = match database.connect().await {
                    Ok(mut conn) => migrate::run(&mut conn).await.map_err(ServeError::from),
                    Err(error) => Err(error),
                };
                database.close().await;
                Ok(migrated?)
            }
            Command::Health(args) => Ok(health_check::run(args.listen).await?),
            Command::Openapi => Ok(std::io::stdout().write_all(openapi::text().as_bytes())?),
            Command::Key(args) => {
                let database = Database::attach(&args.database).await?;
                let done = run_key(&database, &args.command).await;
                database.close().await;
                Ok(std::io::stdout().write_all(done?.as_bytes())?)
            }
            Command::Worker | Command::Devices => Ok(()),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn run_key(database: &Database, command: &KeyCommand) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut conn = database.connect().await?;
    migrate::run(&mut conn).await?;
    Ok(keys::run(&mut conn, command).await?)
}

async fn run_api(args: ApiArgs) -> Outcome {
    let database_url = required(&args.database)?;
    let db = state::pool_options(state::QUERY_DEADLINE).connect(&database_url).await?;
    let mut conn = db.acquire().await?;
    migrate::check(&mut conn).await?;
    if let Some(key) = args.options.api_key.as_deref().filter(|key| !key.is_empty()) {
        auth::bootstrap(&mut conn, key).await?;
    }
    let artifacts = Artifacts::open(args.store.folder(&args.database))?
        .with_reserve(args.store.disk_low_bytes)
        .with_bucket(args.store.bucket()?);
    store_id::write(&mut conn, &artifacts).await?;
    drop(conn);
    tokio::spawn(housekeeping::keep_copies(db.clone(), artifacts.clone(), args.store.disk_low_bytes));
    tokio::spawn(log_filter::follow(db.clone(), logging::apply));
    let state = AppState::new(db, artifacts, args.options.config(&args.store));
    let (stop, shutdown) = (stopped()?, state.shutdown.clone());
    tokio::spawn(async move {
        stop.await;
        shutdown.cancel();
    });
    Ok(server::serve(supervisor::listener(&args.options)?, state).await?)
}

async fn run_runner(args: RunnerArgs, log: &LogOptions) -> Outcome {
    let database_url = required(&args.database)?;
    let mut conn = PgConnection::connect(&database_url).await?;
    migrate::check(&mut conn).await?;
    conn.close().await?;
    let mut config = args.options.config(database_url, &args.store, &args.database)?;
    config.schema_version = Some(migrate::binary_version());
    config.otlp_endpoint = log.collector().map(str::to_owned);
    Ok(runner::run(config, stopped()?).await?)
}

fn required(database: &DatabaseArgs) -> Result<String, &'static str> {
    database.database_url.clone().ok_or("this needs a database: set DATABASE_URL or --database-url")
}

/// Resolves at the first Ctrl-C or SIGTERM; the signals are caught from now on.
fn stopped() -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}
