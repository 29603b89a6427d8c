//! Faults of every kind at random moments of random small jobs, on two runners and one database: no job is
//! lost, none is completed twice, no bit of an outcome changes, nothing is left behind, and what was broken
//! off goes on in time.
//!
//! A round is one job and one fault, both chosen by the round's seed, as the moment is. `make test` takes a
//! few rounds; `make chaos` takes `CHAOS_ROUNDS` of them and prints a table (docs/chaos.md). A seed that failed
//! is repeated with `CHAOS_SEED`.

mod fault;
mod record;
mod work;

use std::{
    str::FromStr,
    time::{Duration, Instant},
};

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use sqlx::{Connection, PgConnection};

use self::{
    fault::Fault,
    record::{Record, Round},
    work::{Bench, Made, Work},
};

/// The database is killed, the disk is full, a checkpoint is cut short, a runner stands still.
const FIRST_SEED: u64 = 103;
const ROUNDS: u64 = 4;

/// A job that has not ended so long after its fault never will.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two looks at a job.
const LOOK: Duration = Duration::from_millis(20);

fn setting<T: FromStr>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}")),
        Err(_) => default,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_whenever_nothing_is_lost_and_nothing_changes() {
    let rounds = setting("CHAOS_ROUNDS", ROUNDS);
    let first = setting("CHAOS_SEED", FIRST_SEED);
    let lease = setting("CHAOS_LEASE", 2.0);
    let bench = Bench::start(lease).await;
    let mut record = Record::new(lease);
    for seed in first..first + rounds {
        let round = round(&bench, seed).await;
        println!("{round}");
        record.rounds.push(round);
    }
    record.left = bench.left_behind().await;
    println!("\n{record}");
    assert!(record.holds(), "{}", bench.app.log_text());
}

/// The job of a seed, and its fault.
async fn round(bench: &Bench, seed: u64) -> Round {
    let mut random = StdRng::seed_from_u64(seed);
    let work = Work::ALL[random.random_range(0..Work::ALL.len())];
    let fault = Fault::any(&mut random);
    fault.prepare(bench).await;
    let begun = Instant::now();
    let made = bench.make(work).await;
    let (watched, struck) = tokio::join!(watch(bench, &made), strike(bench, fault, &made, &mut random));
    fault.after(bench).await;
    let mut complaints = Vec::new();
    let reclaimed = watched.reclaimed(&struck);
    match &watched.ended {
        Some(state) if state == "succeeded" => complaints.extend(bench.complaints(&made).await),
        Some(state) => {
            let (code, message) = bench.error(&made).await;
            // Only what has checkpoints to keep waits for room.
            if fault != Fault::FillDisk || work.is_training() || code != "disk_full" {
                complaints.push(format!("lost: it is {state}: {message}"));
            }
        }
        None => complaints.push("lost: it does not end".to_owned()),
    }
    bench.remove(&made).await;
    Round {
        seed,
        work,
        fault,
        delay: struck.at - begun,
        took: watched.took,
        undisturbed: bench.undisturbed(work),
        reclaimed,
        complaints,
    }
}

/// A fault: when it struck, and from when on the job can be expected to go on.
struct Struck {
    at: Instant,
    over: Instant,
}

async fn strike(bench: &Bench, fault: Fault, made: &Made, random: &mut impl Rng) -> Struck {
    tokio::time::sleep(bench.undisturbed(made.work).mul_f64(random.random_range(0.0..1.0))).await;
    let at = Instant::now();
    let over = fault.strike(bench, made, random).await;
    Struck { at, over }
}

/// What was seen of a job at one moment; None: the database did not answer.
struct Look {
    at: Instant,
    seen: Option<Seen>,
}

struct Seen {
    state: String,
    attempt: i32,
    /// A runner has renewed itself lately.
    a_runner: bool,
}

struct Watched {
    looks: Vec<Look>,
    /// The state in which the job ended, and after how long.
    ended: Option<String>,
    took: Duration,
}

impl Watched {
    /// How long the job stood still: from the fault, or from when database and a runner answered again, to its
    /// next claim. None where it was not interrupted.
    fn reclaimed(&self, struck: &Struck) -> Option<Duration> {
        let seen = |look: &Look| look.seen.as_ref().map(|seen| (look.at, seen.attempt, seen.a_runner, seen.state.clone()));
        let (_, before, _, state) = self.looks.iter().filter(|look| look.at <= struck.at).filter_map(seen).next_back()?;
        if before == 0 || state == "succeeded" {
            return None;
        }
        let mut after = self.looks.iter().filter(|look| look.at > struck.at).filter_map(seen);
        let (claimed, ..) = after.find(|(_, attempt, ..)| *attempt > before)?;
        let mut answered = self.looks.iter().filter(|look| look.at >= struck.over).filter_map(seen);
        let answering = answered.find(|(_, _, a_runner, _)| *a_runner).map_or(claimed, |(at, ..)| at);
        Some(claimed.saturating_duration_since(answering.max(struck.over)))
    }
}

/// Looks at a job until it has ended, whatever happens to the database meanwhile.
async fn watch(bench: &Bench, made: &Made) -> Watched {
    let (begun, mut looks, mut conn) = (Instant::now(), Vec::new(), None);
    while begun.elapsed() < PATIENCE {
        let seen = tokio::time::timeout(Duration::from_secs(1), look(bench, made, &mut conn)).await.ok().flatten();
        if seen.is_none() {
            conn = None;
        }
        let state = seen.as_ref().map(|seen| seen.state.clone());
        if state.as_deref() == Some("paused") {
            // A checkpoint did not fit: whoever made room goes on.
            let resume = bench.app.request(reqwest::Method::POST, &format!("/v1/training/jobs/{}/resume", made.job));
            let _ = resume.timeout(Duration::from_secs(1)).send().await;
        }
        looks.push(Look { at: Instant::now(), seen });
        if let Some(ended) = state.filter(|state| ["succeeded", "failed", "cancelled"].contains(&state.as_str())) {
            return Watched { looks, ended: Some(ended), took: begun.elapsed() };
        }
        tokio::time::sleep(LOOK).await;
    }
    Watched { looks, ended: None, took: begun.elapsed() }
}

async fn look(bench: &Bench, made: &Made, conn: &mut Option<PgConnection>) -> Option<Seen> {
    if conn.is_none() {
        *conn = PgConnection::connect(&bench.database_url).await.ok();
    }
    let query = "SELECT state, attempt, EXISTS (SELECT FROM runners WHERE stopped_at IS NULL AND expires_at > now()
                 + make_interval(secs => $2) / 2) FROM jobs WHERE id = $1";
    let asked = sqlx::query_as(query).bind(&made.job).bind(bench.lease).fetch_one(conn.as_mut()?);
    let (state, attempt, a_runner) = asked.await.ok()?;
    Some(Seen { state, attempt, a_runner })
}
