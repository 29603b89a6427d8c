//! Flags and their environment twins, read once: everything that a process is told from outside.
//!
//! A flag wins over its twin. No other module reads the environment, except for what one process of
//! Lathe tells another (an engine's secret).

use std::{net::SocketAddr, num::NonZeroU32, path::PathBuf, time::Duration};

use axum::http::HeaderValue;
use clap::{Args, Parser, Subcommand, ValueEnum, builder::FalseyValueParser};
use lathe_jobs::{
    artifacts::bucket::{Bucket, BucketError},
    context::RunnerConfig,
    internal_addr::InternalAddr,
};

use crate::state::ApiConfig;

/// The variable by which `serve` hands its listening socket to the api, so that the port outlives a
/// restart and clients wait instead of being refused.
pub const LISTEN_FD: &str = "LATHE_LISTEN_FD";

/// Where the API is served unless told otherwise.
const LISTEN: &str = "127.0.0.1:8080";

/// The standard name, so that what sets it for a whole machine reaches Lathe too. Engines are told by it as well.
const OTLP_ENDPOINT: &str = lathe_jobs::replicas::OTLP_ENDPOINT;

#[derive(Debug, Parser)]
#[command(name = "lathe", version, about = "A corpus becomes a language model that answers over HTTP.", max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub log: LogOptions,
}

#[derive(Clone, Debug, Args)]
pub struct LogOptions {
    /// How log lines look.
    #[arg(long, global = true, env = "LATHE_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// What is logged, by module: `info`, `lathe_jobs=debug`, …
    #[arg(long, global = true, env = "LATHE_LOG", default_value = "info,sqlx=warn", value_name = "FILTER")]
    pub log: String,
    /// A collector of OpenTelemetry, `http://localhost:4318`, that traces are sent to; without it, there are none.
    #[arg(long, global = true, env = OTLP_ENDPOINT, value_parser = otlp_endpoint, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
}

impl LogOptions {
    /// The twins that say the same to a child.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LATHE_LOG_FORMAT", self.log_format.as_str().to_owned()),
            ("LATHE_LOG", self.log.clone()),
            (OTLP_ENDPOINT, self.otlp_endpoint.clone().unwrap_or_default()),
        ]
    }

    /// Where traces go, if anywhere.
    pub fn collector(&self) -> Option<&str> {
        self.otlp_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty())
    }
}

/// An address that the requests' paths are added to. An empty one is none, as OpenTelemetry has it.
fn otlp_endpoint(text: &str) -> Result<String, String> {
    let address = text.trim_end_matches('/');
    match address.parse::<axum::http::Uri>() {
        _ if address.is_empty() => Ok(String::new()),
        Ok(uri) if uri.scheme_str() == Some("http") && uri.host().is_some() && uri.query().is_none() => Ok(address.to_owned()),
        Ok(uri) if uri.scheme_str() == Some("https") => {
            Err("traces go over plain HTTP: name a collector that is near, which sends them on with TLS".to_owned())
        }
        _ => Err("an address is wanted like http://localhost:4318".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

impl LogFormat {
    pub fn as_str(self) -> &'static str {
        match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The whole stack on this machine: Postgres, api and runner, kept alive until Ctrl-C.
    Serve(Box<ServeArgs>),
    /// The HTTP API alone; needs a database.
    Api(Box<ApiArgs>),
    /// A runner alone: takes jobs and serves models on this machine's devices; needs a database.
    Runner(RunnerArgs),
    /// One job's work; started by a runner.
    #[command(hide = true)]
    Worker,
    /// Print the devices of this machine; started by a runner, since a driver may crash.
    #[command(hide = true)]
    Devices,
    /// One replica of a model; started by a runner.
    #[command(hide = true)]
    Engine(EngineArgs),
    /// Bring the database's schema up to this binary's, and end.
    Migrate(DatabaseArgs),
    /// Ask whether the api on this machine answers; for a container's health check.
    Health(HealthArgs),
    /// Print the OpenAPI document.
    Openapi,
    /// Make, list and revoke API keys.
    Key(KeyArgs),
    /// Train and tune a small model through the API of a fresh server, and show its answers.
    Demo(Box<DemoConfig>),
}

#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub database: DatabaseArgs,
    #[command(flatten)]
    pub store: StoreArgs,
    #[command(flatten)]
    pub api: ApiOptions,
    #[command(flatten)]
    pub runner: RunnerOptions,
    /// How many runners to start on this machine.
    #[arg(long, env = "LATHE_RUNNERS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub runners: u16,
}

/// Where rows live: a server of one's own, or the one embedded in a data directory.
#[derive(Clone, Debug, Args)]
pub struct DatabaseArgs {
    /// Where the embedded database, the artifacts and the key are kept.
    #[arg(long, global = true, env = "LATHE_DATA_DIR", default_value = "data", value_name = "FOLDER")]
    pub data_dir: PathBuf,
    /// A PostgreSQL (15 or newer) of one's own, `postgres://user:password@host/database`; without it, `serve`
    /// runs one in the data directory.
    #[arg(long, global = true, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct StoreArgs {
    /// Where files, datasets, checkpoints and models are kept [default: artifacts in the data directory].
    #[arg(long, env = "LATHE_ARTIFACTS", value_name = "FOLDER")]
    pub artifacts: Option<PathBuf>,
    /// A bucket where they lie instead, of which the folder is then a working copy: `s3://bucket/prefix`. Keys,
    /// region and endpoint come from the environment, as for Amazon's tools.
    #[arg(long, env = "LATHE_ARTIFACT_STORE", value_name = "URL")]
    pub artifact_store: Option<String>,
    /// Free bytes of the artifacts' disk below which `/readyz` fails and no job starts.
    #[arg(long, env = "LATHE_DISK_LOW", default_value_t = 1 << 30, value_name = "BYTES")]
    pub disk_low_bytes: u64,
}

impl StoreArgs {
    pub fn folder(&self, database: &DatabaseArgs) -> PathBuf {
        self.artifacts.clone().unwrap_or_else(|| database.data_dir.join("artifacts"))
    }

    /// # Errors
    /// A URL or settings that name no bucket.
    pub fn bucket(&self) -> Result<Option<Bucket>, BucketError> {
        self.artifact_store.as_deref().filter(|url| !url.is_empty()).map(Bucket::open).transpose()
    }
}

#[derive(Clone, Debug, Args)]
pub struct ApiArgs {
    #[command(flatten)]
    pub database: DatabaseArgs,
    #[command(flatten)]
    pub store: StoreArgs,
    #[command(flatten)]
    pub options: ApiOptions,
}

/// The API's limits and switches.
#[derive(Clone, Debug, Args)]
pub struct ApiOptions {
    /// The address to serve HTTP on.
    #[arg(long, env = "LATHE_LISTEN", default_value = LISTEN, value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// A listening socket that the parent opened, instead of `listen`.
    #[arg(long, env = LISTEN_FD, hide = true)]
    pub listen_fd: Option<i32>,
    /// The first admin key; without it, one is made and kept in the data directory.
    #[arg(long, env = "LATHE_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Bytes of a JSON body.
    #[arg(long, env = "LATHE_JSON_LIMIT", default_value_t = 4 << 20, value_name = "BYTES")]
    pub json_limit: u64,
    /// Bytes of an uploaded file.
    #[arg(long, env = "LATHE_FILE_LIMIT", default_value_t = 8 << 30, value_name = "BYTES")]
    pub file_limit: u64,
    /// Bytes of one part of an upload.
    #[arg(long, env = "LATHE_PART_LIMIT", default_value_t = 64 << 20, value_name = "BYTES")]
    pub part_limit: u64,
    /// Seconds in which a request's head must arrive.
    #[arg(long, env = "LATHE_HEADER_SECONDS", default_value_t = 10, value_name = "SECONDS")]
    pub header_seconds: u64,
    /// Seconds in which a body must bring its next bytes.
    #[arg(long, env = "LATHE_IDLE_BODY_SECONDS", default_value_t = 60, value_name = "SECONDS")]
    pub idle_body_seconds: u64,
    /// Seconds in which an answer of a model must be finished, from its start on a loaded model.
    #[arg(long, env = "LATHE_GENERATION_SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=604_800), value_name = "SECONDS")]
    pub generation_seconds: u64,
    /// Requests that one key may send in a minute; without it, as many as it likes
    #[arg(long, env = "LATHE_REQUESTS_PER_MINUTE", value_name = "REQUESTS")]
    pub requests_per_minute: Option<NonZeroU32>,
    /// Origins that browsers may call from; none, no CORS headers.
    #[arg(long = "cors-origin", env = "LATHE_CORS_ORIGIN", value_delimiter = ',', value_name = "ORIGIN")]
    pub cors_origins: Vec<HeaderValue>,
    /// A token of its own for `/metrics`, besides admin keys.
    #[arg(long, env = "LATHE_METRICS_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub metrics_token: Option<String>,
}

impl ApiOptions {
    /// The twins that say the same to a child.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let mut pairs = vec![
            ("LATHE_LISTEN", self.listen.to_string()),
            ("LATHE_JSON_LIMIT", self.json_limit.to_string()),
            ("LATHE_FILE_LIMIT", self.file_limit.to_string()),
            ("LATHE_PART_LIMIT", self.part_limit.to_string()),
            ("LATHE_HEADER_SECONDS", self.header_seconds.to_string()),
            ("LATHE_IDLE_BODY_SECONDS", self.idle_body_seconds.to_string()),
            ("LATHE_GENERATION_SECONDS", self.generation_seconds.to_string()),
        ];
        pairs.extend(self.api_key.clone().map(|key| ("LATHE_API_KEY", key)));
        pairs.extend(self.metrics_token.clone().map(|token| ("LATHE_METRICS_TOKEN", token)));
        pairs.extend(self.requests_per_minute.map(|limit| ("LATHE_REQUESTS_PER_MINUTE", limit.to_string())));
        if !self.cors_origins.is_empty() {
            let origins: Vec<&str> = self.cors_origins.iter().filter_map(|origin| origin.to_str().ok()).collect();
            pairs.push(("LATHE_CORS_ORIGIN", origins.join(",")));
        }
        pairs
    }

    pub fn config(&self, store: &StoreArgs) -> ApiConfig {
        ApiConfig {
            json_limit: usize::try_from(self.json_limit).unwrap_or(usize::MAX),
            file_limit: self.file_limit,
            part_limit: self.part_limit,
            requests_per_minute: self.requests_per_minute,
            cors_origins: self.cors_origins.clone(),
            metrics_token: self.metrics_token.clone(),
            disk_low_bytes: store.disk_low_bytes,
            header_timeout: Duration::from_secs(self.header_seconds),
            idle_body_timeout: Duration::from_secs(self.idle_body_seconds),
            generation_deadline: Duration::from_secs(self.generation_seconds),
            ..ApiConfig::default()
        }
    }
}

#[derive(Clone, Debug, Args)]
pub struct RunnerArgs {
    #[command(flatten)]
    pub database: DatabaseArgs,
    #[command(flatten)]
    pub store: StoreArgs,
    #[command(flatten)]
    pub options: RunnerOptions,
}

#[derive(Clone, Debug, Args)]
pub struct RunnerOptions {
    /// Seconds after which a runner that is not heard of has lost its jobs.
    #[arg(long, env = "LATHE_LEASE_SECONDS", default_value_t = 10.0, value_parser = lease_seconds, value_name = "SECONDS")]
    pub lease_seconds: f64,
    /// Seconds after which a worker that shows no sign of progress is killed; its job is tried again.
    #[arg(long, env = "LATHE_STALL_SECONDS", default_value_t = 1800, value_parser = clap::value_parser!(u64).range(5..=604_800), value_name = "SECONDS")]
    pub stall_seconds: u64,
    /// The address on which engines and ranks listen, which have weaker protection than the API; `auto`, the one from which
    /// this machine reaches the database.
    #[arg(long, env = "LATHE_INTERNAL_ADDR", default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub internal_addr: InternalAddr,
    /// Decode in batches of one fixed shape, so that no answer depends on its neighbours at all.
    #[arg(long, env = "LATHE_DETERMINISTIC_DECODE", value_parser = FalseyValueParser::new())]
    pub deterministic_decode: bool,
    /// How many times its size a compressed file may unfold to.
    #[arg(long, env = "LATHE_DECOMPRESSION_RATIO", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..), value_name = "TIMES")]
    pub decompression_ratio: u64,
    /// Days for which entries of the audit log are kept.
    #[arg(long, env = "LATHE_AUDIT_DAYS", default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=36_500), value_name = "DAYS")]
    pub audit_days: u16,
    /// Ranks of trainings among which this machine's cores are divided; each GPU is one.
    #[arg(long, env = "LATHE_CPU_SLOTS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024), value_name = "RANKS")]
    pub cpu_slots: u16,
    /// Take no job that needs a device, so no training: data and tokenizers alone. Models are served all the same.
    #[arg(long, env = "LATHE_LIGHT_ONLY", value_parser = FalseyValueParser::new())]
    pub light_only: bool,
}

impl RunnerOptions {
    /// The twins that say the same to a child.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LATHE_LEASE_SECONDS", self.lease_seconds.to_string()),
            ("LATHE_STALL_SECONDS", self.stall_seconds.to_string()),
            ("LATHE_INTERNAL_ADDR", self.internal_addr.to_string()),
            ("LATHE_DETERMINISTIC_DECODE", self.deterministic_decode.to_string()),
            ("LATHE_DECOMPRESSION_RATIO", self.decompression_ratio.to_string()),
            ("LATHE_AUDIT_DAYS", self.audit_days.to_string()),
            ("LATHE_CPU_SLOTS", self.cpu_slots.to_string()),
            ("LATHE_LIGHT_ONLY", self.light_only.to_string()),
        ]
    }

    pub fn config(&self, database_url: String, store: &StoreArgs, database: &DatabaseArgs) -> Result<RunnerConfig, BucketError> {
        Ok(RunnerConfig {
            bucket: store.bucket()?,
            disk_low_bytes: store.disk_low_bytes,
            lease_seconds: self.lease_seconds,
            stall: Duration::from_secs(self.stall_seconds),
            internal_addr: self.internal_addr,
            deterministic_decode: self.deterministic_decode,
            decompression_ratio: self.decompression_ratio,
            audit_days: self.audit_days,
            log: crate::logging::apply,
            offer_devices: !self.light_only,
            cpu_slots: self.cpu_slots.into(),
            ..RunnerConfig::new(database_url, store.folder(database))
        })
    }
}

/// Heartbeats are a fraction of a lease, so a very short one would be all heartbeats.
fn lease_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (1.0..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("a lease lasts 1 to 3600 seconds".to_owned()),
    }
}

/// What a runner tells the engine that it starts; the engine's secret is in the environment.
#[derive(Clone, Debug, Args)]
pub struct EngineArgs {
    /// A model's folder.
    #[arg(long)]
    pub model: PathBuf,
    #[arg(long)]
    pub listen: SocketAddr,
    #[arg(long)]
    pub deterministic_decode: bool,
}

#[derive(Clone, Debug, Args)]
pub struct HealthArgs {
    /// Where the api listens.
    #[arg(long, env = "LATHE_LISTEN", default_value = LISTEN, value_name = "ADDRESS")]
    pub listen: SocketAddr,
}

#[derive(Debug, Args)]
pub struct KeyArgs {
    #[command(subcommand)]
    pub command: KeyCommand,
    #[command(flatten)]
    pub database: DatabaseArgs,
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key and print it, this once.
    Create {
        /// The project's name; made if it is not there.
        #[arg(long, default_value = "default")]
        project: String,
        /// A name to tell the key by.
        #[arg(long)]
        name: Option<String>,
        /// Allow everything, other projects' administration included.
        #[arg(long)]
        admin: bool,
    },
    /// Show the keys, without their secrets.
    List {
        /// Of this project only.
        #[arg(long)]
        project: Option<String>,
    },
    /// Make a key useless, within two seconds.
    Revoke {
        /// The key's id, `key_…`.
        id: String,
    },
}

#[derive(Clone, Debug, Args)]
pub struct DemoConfig {
    #[command(flatten)]
    pub serve: ServeArgs,
    /// A text to pretrain on, instead of the built-in tasks.
    #[arg(long, env = "CORPUS", requires = "instructions", value_name = "FILE")]
    pub corpus: Option<PathBuf>,
    /// Instructions to tune on, beside a corpus.
    #[arg(long, env = "INSTRUCTIONS", requires = "corpus", value_name = "FILE")]
    pub instructions: Option<PathBuf>,
    /// Draws other rows and other initial weights; the score should not depend on it.
    #[arg(long, env = "SEED", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    pub seed: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    /// Whatever `serve` takes for its parts must reach them.
    #[test]
    fn every_option_is_passed_on() {
        let cli = Cli::try_parse_from([
            "lathe",
            "serve",
            "--api-key",
            "k",
            "--metrics-token",
            "t",
            "--cors-origin",
            "http://a",
            "--cors-origin",
            "http://b",
            "--requests-per-minute",
            "60",
            "--deterministic-decode",
            "--otlp-endpoint",
            "http://collector:4318/",
        ]);
        let cli = cli.expect("the flags are known");
        let Command::Serve(args) = cli.command else { panic!("another command") };
        for (group, passed) in [
            (ApiOptions::augment_args(clap::Command::new("api")), args.api.environment()),
            (RunnerOptions::augment_args(clap::Command::new("runner")), args.runner.environment()),
            (LogOptions::augment_args(clap::Command::new("log")), cli.log.environment()),
        ] {
            for twin in
                group.get_arguments().filter_map(|argument| argument.get_env()?.to_str()).filter(|twin| *twin != LISTEN_FD)
            {
                assert!(passed.iter().any(|(name, _)| *name == twin), "{twin} is not passed on");
            }
        }
        assert!(cli.log.environment().contains(&(OTLP_ENDPOINT, "http://collector:4318".to_owned())));
        assert!(args.api.environment().contains(&("LATHE_CORS_ORIGIN", "http://a,http://b".to_owned())));
    }

    #[test]
    fn traces_go_to_a_collector_over_http() {
        for (text, wanted) in [("http://c:4318/", Ok("http://c:4318")), ("http://c/otlp", Ok("http://c/otlp")), ("", Ok(""))] {
            assert_eq!(otlp_endpoint(text), wanted.map(str::to_owned));
        }
        for wrong in ["https://c:4318", "c:4318", "c", "grpc://c:4317", "http://c?x=1"] {
            assert!(otlp_endpoint(wrong).is_err(), "{wrong}");
        }
    }
}
