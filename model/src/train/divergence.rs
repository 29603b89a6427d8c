//! When a run counts as diverged. The window is part of the training state, so a resumed run decides
//! as an uninterrupted one.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::{
    config::Divergence,
    failure,
    protocol::{Failure, FailureCode},
};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// The newest losses, oldest first.
    recent: VecDeque<f32>,
    /// The lowest average over a full window.
    minimum: Option<f32>,
    /// Steps running with the average too high.
    above: u64,
    /// Steps running with a gradient norm that is not finite.
    non_finite: u64,
}

impl Window {
    /// Takes in one step.
    ///
    /// # Errors
    /// If the run has diverged, with the step and the value in the message.
    pub fn observe(&mut self, rule: &Divergence, step: u64, loss: f32, grad_norm: f32) -> Result<(), Failure> {
        if !loss.is_finite() || !grad_norm.is_finite() {
            self.non_finite += 1;
            if self.non_finite < rule.non_finite_steps {
                return Ok(());
            }
            let message = format!(
                "the gradient norm was not finite for {} steps running, up to step {step} (loss {loss}): lower the learning rate's peak, lengthen the warm-up, or use fp32",
                self.non_finite
            );
            return Err(failure::new(FailureCode::NonFiniteLoss, message));
        }
        self.non_finite = 0;
        self.recent.push_back(loss);
        if self.recent.len() as u64 > rule.window {
            self.recent.pop_front();
        }
        if (self.recent.len() as u64) < rule.window {
            return Ok(());
        }
        let average = (self.recent.iter().map(|&loss| f64::from(loss)).sum::<f64>() / self.recent.len() as f64) as f32;
        let minimum = self.minimum.map_or(average, |minimum| minimum.min(average));
        self.minimum = Some(minimum);
        let limit = minimum * rule.factor as f32;
        self.above = if average > limit { self.above + 1 } else { 0 };
        if self.above < rule.patience {
            return Ok(());
        }
        let message = format!(
            "at step {step} the loss averages {average:.4} over {} steps and has stood above {limit:.4} ({} times its minimum) for {} steps: lower the learning rate's peak or lengthen the warm-up",
            rule.window, rule.factor, self.above
        );
        Err(failure::new(FailureCode::Diverged, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> Divergence {
        Divergence { window: 4, factor: 3.0, patience: 5, non_finite_steps: 3 }
    }

    #[test]
    fn a_lasting_rise_diverges_and_a_spike_does_not() {
        let mut window = Window::default();
        for step in 1..=20 {
            let loss = if step == 10 { 20.0 } else { 1.0 };
            window.observe(&rule(), step, loss, 1.0).unwrap();
        }
        let failed = (21..60).find_map(|step| window.observe(&rule(), step, 10.0, 1.0).err().map(|failure| (step, failure)));
        let (step, failure) = failed.expect("a tenfold loss diverges");
        assert_eq!(failure.code, FailureCode::Diverged);
        // The average of four exceeds 3 at the first bad step.
        assert_eq!(step, 25);
        assert!(failure.message.contains("step 25"), "{}", failure.message);
    }

    #[test]
    fn non_finite_steps_count_only_when_running() {
        let mut window = Window::default();
        for (step, norm) in [(1, f32::NAN), (2, f32::INFINITY), (3, 1.0), (4, f32::NAN), (5, f32::NAN)] {
            window.observe(&rule(), step, 1.0, norm).unwrap();
        }
        let failure = window.observe(&rule(), 6, f32::NAN, f32::NAN).unwrap_err();
        assert_eq!(failure.code, FailureCode::NonFiniteLoss);
    }

    #[test]
    fn json_keeps_every_bit() {
        let mut window = Window::default();
        for step in 1..=9 {
            window.observe(&rule(), step, 1.0 / (step as f32 + 0.3), 1.0).unwrap();
        }
        let text = serde_json::to_string(&window).unwrap();
        assert_eq!(serde_json::from_str::<Window>(&text).unwrap(), window);
    }
}
