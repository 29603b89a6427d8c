//! The learning rate of a step: a pure function of the schedule and the step.

use crate::config::Schedule;

/// The learning rate of `step` (from 1) of `steps`. During the warm-up it grows linearly and reaches
/// the peak at the warm-up's last step; the floor is reached at the last step.
pub fn learning_rate(schedule: &Schedule, step: u64, steps: u64) -> f64 {
    let (peak, warmup, floor) = match *schedule {
        Schedule::Cosine { peak, warmup_steps, floor } | Schedule::Linear { peak, warmup_steps, floor } => {
            (peak, warmup_steps.unwrap_or(0), floor)
        }
        Schedule::Constant { peak, warmup_steps } => (peak, warmup_steps.unwrap_or(0), peak),
    };
    if step < warmup {
        return peak * step as f64 / warmup as f64;
    }
    let rest = steps.saturating_sub(warmup).max(1) as f64;
    let progress = (step.saturating_sub(warmup) as f64 / rest).min(1.0);
    match schedule {
        Schedule::Cosine { .. } => floor + (peak - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        Schedule::Linear { .. } => peak + (floor - peak) * progress,
        Schedule::Constant { .. } => peak,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_peaks_and_ends_at_the_floor() {
        for cosine in [true, false] {
            let (peak, warmup_steps, floor) = (1e-3, Some(10), 1e-4);
            let schedule = if cosine {
                Schedule::Cosine { peak, warmup_steps, floor }
            } else {
                Schedule::Linear { peak, warmup_steps, floor }
            };
            let at = |step| learning_rate(&schedule, step, 110);
            assert!((at(1) - 1e-4).abs() < 1e-12);
            assert!((at(10) - 1e-3).abs() < 1e-12);
            assert!((at(60) - 5.5e-4).abs() < 1e-12);
            assert!((at(110) - 1e-4).abs() < 1e-12);
        }
        let constant = Schedule::Constant { peak: 1e-3, warmup_steps: None };
        assert_eq!(learning_rate(&constant, 1, 10), 1e-3);
        assert_eq!(learning_rate(&constant, 10, 10), 1e-3);
    }
}
