//! Signs of life of a worker, for whoever would otherwise have to guess whether it hangs.
//!
//! A process has one task. Loops of it that may run long without a report call [`beat`]; once a second
//! [`tell`] says whether one of them did, or whether the processor was used at all: a single micro-batch of
//! a large model may take hours, and nothing can be asked inside of it. A deadlock does neither.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::protocol::Report;

const PERIOD: Duration = Duration::from_secs(1);

/// Processor time in a period from which on the process counts as working.
const WORKING: Duration = Duration::from_millis(50);

static BEATS: AtomicU64 = AtomicU64::new(0);

/// Work goes on. Costs next to nothing.
pub fn beat() {
    BEATS.fetch_add(1, Ordering::Relaxed);
}

/// Reports once a second for as long as the process lives; a second in which nothing happened is silent.
pub fn tell(mut report: impl FnMut(Report)) -> ! {
    let mut before = (BEATS.load(Ordering::Relaxed), processor_time());
    loop {
        std::thread::sleep(PERIOD);
        let now = (BEATS.load(Ordering::Relaxed), processor_time());
        if let Some(progress) = sign(before, now) {
            report(Report::Alive { progress });
        }
        before = now;
    }
}

/// Whether there was progress between two counts of beats and processor time; `None`: no life at all.
fn sign(before: (u64, Duration), now: (u64, Duration)) -> Option<bool> {
    let worked = now.1.saturating_sub(before.1) >= WORKING;
    (now.0 != before.0).then_some(true).or(worked.then_some(false))
}

/// Of all threads of this process.
fn processor_time() -> Duration {
    // SAFETY: the structure is plain numbers, valid when zeroed, and outlives the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let of = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    of(usage.ru_utime) + of(usage.ru_stime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_is_progress_and_work_without_one_is_life() {
        let at = |beats, milliseconds| (beats, Duration::from_millis(milliseconds));
        assert_eq!(sign(at(1, 0), at(2, 0)), Some(true));
        assert_eq!(sign(at(2, 0), at(2, 900)), Some(false));
        assert_eq!(sign(at(2, 900), at(2, 903)), None);
    }

    #[test]
    fn work_takes_processor_time() {
        let before = processor_time();
        let mut digest = vec![0u8; 1 << 20];
        while processor_time() < before + WORKING {
            digest.iter_mut().for_each(|byte| *byte = byte.wrapping_mul(7).wrapping_add(1));
        }
        assert!(std::hint::black_box(digest)[0] > 0 || processor_time() > before);
    }
}
