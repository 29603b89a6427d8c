//! The binary `lathe`: reads the configuration and hands over to the part that was asked for.
//!
//! A part that fails ends the process with status 1 and one sentence on standard error. The worker's
//! statuses are those of `lathe_model::protocol::Exit`.

use std::{error::Error, future::Future, io::Write, process::ExitCode};

use clap::Parser;
use lathe_api::{
    auth,
    config::{ApiArgs, Cli, Command, DatabaseArgs},
    demo, engine_server, keys, logging, openapi, server,
    state::AppState,
};
use lathe_jobs::{artifacts::Artifacts, runner};
use sqlx::{Connection, PgConnection, postgres::PgPoolOptions};
use tokio::signal::unix::{SignalKind, signal};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(sentence) = logging::install(cli.log_format, &cli.log) {
        return failed(sentence);
    }
    match run(cli.command) {
        Ok(status) => status,
        Err(error) => failed(error),
    }
}

fn failed(error: impl std::fmt::Display) -> ExitCode {
    eprintln!("lathe: {error}");
    ExitCode::FAILURE
}

fn run(command: Command) -> Result<ExitCode, Box<dyn Error + Send + Sync>> {
    // Tensor work has threads of its own, set before the first tensor; tokio is for the others.
    if let Command::Worker = command {
        return Ok(ExitCode::from(u8::try_from(lathe_model::worker::run()).unwrap_or(1)));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::Serve(_) => Err("not built yet".into()),
            Command::Api(args) => run_api(*args).await,
            Command::Runner(args) => {
                let config = args.options.config(required(&args.database)?, args.store.folder(&args.database));
                Ok(runner::run(config, stopped()?).await?)
            }
            Command::Engine(args) => Ok(engine_server::run(args, stopped()?).await?),
            Command::Demo(config) => Ok(demo::run(config, stopped()?).await?),
            Command::Migrate(database) => {
                let mut conn = PgConnection::connect(&required(&database)?).await?;
                Ok(lathe_api::MIGRATOR.run(&mut conn).await?)
            }
            Command::Openapi => Ok(std::io::stdout().write_all(openapi::text().as_bytes())?),
            Command::Key(args) => {
                let mut conn = PgConnection::connect(&required(&args.database)?).await?;
                Ok(std::io::stdout().write_all(keys::run(&mut conn, &args.command).await?.as_bytes())?)
            }
            Command::Worker => Ok(()),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn run_api(args: ApiArgs) -> Outcome {
    let database_url = required(&args.database)?;
    let db = PgPoolOptions::new().max_connections(16).connect(&database_url).await?;
    if let Some(key) = &args.options.api_key {
        let mut conn = db.acquire().await?;
        auth::bootstrap(&mut conn, key).await?;
    }
    let artifacts = Artifacts::open(args.store.folder(&args.database))?;
    let listener = tokio::net::TcpListener::bind(args.options.listen).await?;
    let state = AppState::new(db, artifacts, args.options.config());
    let (stop, shutdown) = (stopped()?, state.shutdown.clone());
    tokio::spawn(async move {
        stop.await;
        shutdown.cancel();
    });
    Ok(server::serve(listener, state).await?)
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
