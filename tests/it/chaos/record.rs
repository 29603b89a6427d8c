//! What the rounds showed, as a table.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::{fault::Fault, work::Work};

/// The most that a job may stand still, from the later of its fault and the moment when database and a runner
/// answer.
const RECLAIMED: Duration = Duration::from_secs(15);

pub struct Round {
    pub seed: u64,
    pub work: Work,
    pub fault: Fault,
    /// From the request to the fault, and to the end.
    pub delay: Duration,
    pub took: Duration,
    pub undisturbed: Duration,
    pub reclaimed: Option<Duration>,
    pub complaints: Vec<String>,
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let work = format!("{:?}", self.work);
        write!(f, "seed {:4}  {work:11}  {:29}  after {:4.1} s", self.seed, self.fault, self.delay.as_secs_f64())?;
        if let Some(reclaimed) = self.reclaimed {
            write!(f, "  reclaimed in {:4.1} s", reclaimed.as_secs_f64())?;
        }
        self.complaints.iter().try_for_each(|complaint| write!(f, "\n    {complaint}"))
    }
}

pub struct Record {
    lease: Duration,
    pub rounds: Vec<Round>,
    /// Processes and files that should not be there, or should.
    pub left: Vec<String>,
}

impl Record {
    pub fn new(lease: f64) -> Record {
        Record { lease: Duration::from_secs_f64(lease), rounds: Vec::new(), left: Vec::new() }
    }

    fn complaints(&self, beginning: &str) -> usize {
        self.rounds.iter().filter(|round| round.complaints.iter().any(|one| one.starts_with(beginning))).count()
    }

    /// Sorted.
    fn reclaimed(&self, postgres: bool) -> Vec<Duration> {
        let rounds = self.rounds.iter().filter(|round| round.fault.stops_postgres() == postgres);
        let mut times: Vec<Duration> = rounds.filter_map(|round| round.reclaimed).collect();
        times.sort();
        times
    }

    /// Whether everything is as it should be.
    pub fn holds(&self) -> bool {
        let in_time = |postgres: bool, limit: Duration| self.reclaimed(postgres).last().is_none_or(|worst| *worst <= limit);
        self.left.is_empty()
            && self.rounds.iter().all(|round| round.complaints.is_empty())
            && in_time(false, RECLAIMED)
            && in_time(true, RECLAIMED + self.lease)
    }

    /// The share of the time of trainings that an undisturbed one would have taken.
    fn effective(&self) -> f64 {
        let trainings = || self.rounds.iter().filter(|round| round.work.is_training());
        let whole: f64 = trainings().map(|round| round.took.max(round.undisturbed).as_secs_f64()).sum();
        trainings().map(|round| round.undisturbed.as_secs_f64()).sum::<f64>() / whole
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "rounds, at a lease of {:?}: {}", self.lease, self.rounds.len())?;
        let mut kinds: BTreeMap<Fault, usize> = BTreeMap::new();
        self.rounds.iter().for_each(|round| *kinds.entry(round.fault).or_default() += 1);
        kinds.iter().try_for_each(|(fault, count)| writeln!(f, "  {fault:29} {count:4}"))?;
        for (name, beginning) in
            [("jobs lost", "lost"), ("jobs completed twice", "completed twice"), ("outcomes changed", "changed")]
        {
            writeln!(f, "{name:31} {:4}", self.complaints(beginning))?;
        }
        writeln!(f, "{:31} {:4}", "orphaned processes and files", self.left.len())?;
        self.left.iter().try_for_each(|left| writeln!(f, "  {left}"))?;
        for (name, postgres) in [("reclaim time", false), ("with PostgreSQL stopped", true)] {
            let times = self.reclaimed(postgres);
            let Some(worst) = times.last() else { continue };
            let quantile = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64();
            let worst = worst.as_secs_f64();
            writeln!(
                f,
                "{name:31} p50 {:.1} s, p99 {:.1} s, worst {worst:.1} s of {}",
                quantile(0.5),
                quantile(0.99),
                times.len()
            )?;
        }
        if self.rounds.iter().any(|round| round.work.is_training()) {
            writeln!(f, "effective training time         {:3.0} %", 100.0 * self.effective())?;
        }
        let failed: Vec<u64> = self.rounds.iter().filter(|round| !round.complaints.is_empty()).map(|round| round.seed).collect();
        match self.holds() {
            true => write!(f, "met"),
            false => write!(f, "short; seeds that failed: {failed:?}"),
        }
    }
}
