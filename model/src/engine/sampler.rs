//! The next token from a row of logits.
//!
//! A choice is a pure function of the row, the [`Sampling`] and the position: the random number of a
//! position is hashed from (seed, position), so neighbours in a batch, retries and the order of
//! steps have no part in it. Reserved ids other than stop tokens are never chosen. Log probabilities
//! are the model's own, before temperature and truncation, over the whole vocabulary.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use crate::config::Sampling;

/// A chosen token, or one of a prompt, with what the model thought of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampled {
    pub token: u32,
    /// Natural logarithm. `None` for a prompt's first token, which nothing predicts, and where no
    /// log probabilities were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f32>,
    /// The likeliest tokens, best first, as many as were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<(u32, f32)>,
}

/// The row has no finite maximum: the model computed NaN or infinity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model computed logits that are not finite")]
pub struct NotFinite;

#[derive(Clone, Debug)]
pub struct Sampler {
    /// By id.
    allowed: Vec<bool>,
}

impl Sampler {
    /// `never`: ids that are never chosen, whatever the model thinks of them.
    pub fn new(vocabulary: usize, never: impl IntoIterator<Item = u32>) -> Sampler {
        let mut allowed = vec![true; vocabulary];
        for id in never {
            if let Some(allowed) = allowed.get_mut(id as usize) {
                *allowed = false;
            }
        }
        Sampler { allowed }
    }

    /// Chooses the token at `position` of its sequence. `logits` has one value an id, unpadded.
    pub fn sample(&self, logits: &[f32], sampling: &Sampling, position: u64) -> Result<Sampled, NotFinite> {
        let token = match sampling.temperature > 0.0 && sampling.top_k != 1 {
            true => self.draw(logits, sampling, position)?,
            false => self.best(logits)?,
        };
        let Some(alternatives) = sampling.logprobs else { return Ok(Sampled { token, logprob: None, top: Vec::new() }) };
        let normaliser = log_sum_exp(logits);
        let top = self.ranked(logits, usize::try_from(alternatives).unwrap_or(0));
        Ok(Sampled {
            token,
            logprob: Some(logits[token as usize] - normaliser),
            top: top.into_iter().map(|id| (id, logits[id as usize] - normaliser)).collect(),
        })
    }

    /// The log probability of a given token and the likeliest alternatives, for scoring prompts.
    /// Nothing is excluded here.
    pub fn score(&self, logits: &[f32], token: u32, alternatives: usize) -> Sampled {
        let normaliser = log_sum_exp(logits);
        let everything = Sampler { allowed: vec![true; self.allowed.len()] };
        let top = everything.ranked(logits, alternatives).into_iter().map(|id| (id, logits[id as usize] - normaliser));
        Sampled { token, logprob: logits.get(token as usize).map(|logit| logit - normaliser), top: top.collect() }
    }

    fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.allowed).filter_map(|(id, &allowed)| allowed.then_some(id))
    }

    /// The likeliest token; of equal ones the lowest id.
    fn best(&self, logits: &[f32]) -> Result<u32, NotFinite> {
        let mut best = None;
        for id in self.ids() {
            let logit = logits[id as usize];
            if logit.is_nan() {
                return Err(NotFinite);
            }
            if best.is_none_or(|(_, highest)| logit > highest) {
                best = Some((id, logit));
            }
        }
        best.filter(|(_, highest)| highest.is_finite()).map(|(id, _)| id).ok_or(NotFinite)
    }

    fn draw(&self, logits: &[f32], sampling: &Sampling, position: u64) -> Result<u32, NotFinite> {
        let highest = f64::from(logits[self.best(logits)? as usize]);
        let weight = |id: u32| ((f64::from(logits[id as usize]) - highest) / sampling.temperature).exp();
        let number = uniform(sampling.seed, position);
        let top_k = usize::try_from(sampling.top_k).unwrap_or(0);
        if top_k == 0 && sampling.top_p >= 1.0 {
            let total: f64 = self.ids().map(weight).sum();
            return Ok(pick(self.ids().map(|id| (id, weight(id))), number * total));
        }
        let candidates = self.truncated(logits, top_k, sampling.top_p, weight);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        Ok(pick(candidates.into_iter(), number * total))
    }

    /// The `top_k` likeliest tokens, and of these the fewest whose share reaches `top_p`; never none.
    fn truncated(&self, logits: &[f32], top_k: usize, top_p: f64, weight: impl Fn(u32) -> f64) -> Vec<(u32, f64)> {
        let mut count = if top_k > 0 { top_k } else { 256 };
        loop {
            let mut candidates: Vec<(u32, f64)> = self.ranked(logits, count).into_iter().map(|id| (id, weight(id))).collect();
            let total: f64 = match top_k {
                0 => self.ids().map(&weight).sum(),
                _ => candidates.iter().map(|(_, weight)| weight).sum(),
            };
            let mut reached = 0.0;
            let enough = candidates.iter().position(|(_, weight)| {
                reached += weight;
                reached >= top_p * total
            });
            if let Some(last) = enough {
                candidates.truncate(last + 1);
                return candidates;
            }
            if top_k > 0 || count >= self.allowed.len() {
                return candidates;
            }
            count *= 8;
        }
    }

    /// The `count` likeliest tokens, best first; of equal ones the lowest id first.
    fn ranked(&self, logits: &[f32], count: usize) -> Vec<u32> {
        let order = |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };
        let mut ids: Vec<u32> = self.ids().collect();
        let count = count.min(ids.len());
        if count == 0 {
            return Vec::new();
        }
        ids.select_nth_unstable_by(count - 1, order);
        ids.truncate(count);
        ids.sort_unstable_by(order);
        ids
    }
}

/// The first token at which the running sum passes `target`; the last if rounding hides it.
fn pick(candidates: impl Iterator<Item = (u32, f64)>, target: f64) -> u32 {
    let (mut sum, mut chosen) = (0.0, 0);
    for (id, weight) in candidates {
        if weight > 0.0 {
            chosen = id;
            sum += weight;
            if sum > target {
                break;
            }
        }
    }
    chosen
}

fn log_sum_exp(logits: &[f32]) -> f32 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - highest).exp())).sum();
    highest + sum.ln() as f32
}

/// A number in [0, 1) hashed from the seed and the position (the finaliser of SplitMix64, twice).
fn uniform(seed: u64, position: u64) -> f64 {
    fn mix(state: u64) -> u64 {
        let state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        state ^ (state >> 31)
    }
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
    let bits = mix(mix(seed.wrapping_add(STEP)).wrapping_add(position.wrapping_add(1).wrapping_mul(STEP)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sampling(temperature: f64) -> Sampling {
        Sampling { temperature, top_p: 1.0, top_k: 0, seed: 7, max_tokens: 1, logprobs: None }
    }

    fn frequencies(sampler: &Sampler, logits: &[f32], sampling: &Sampling) -> Vec<f64> {
        let draws = 20_000;
        let mut counts = vec![0.0; logits.len()];
        for position in 0..draws {
            counts[sampler.sample(logits, sampling, position).unwrap().token as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_ids_and_never_a_forbidden_one() {
        let sampler = Sampler::new(4, [3, 900]);
        assert_eq!(sampler.sample(&[1.0, 2.0, 2.0, 9.0], &sampling(0.0), 0).unwrap().token, 1);
        let one = Sampling { top_k: 1, ..sampling(5.0) };
        assert_eq!(sampler.sample(&[1.0, 2.0, 2.0, 9.0], &one, 0).unwrap().token, 1);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let sampler = Sampler::new(4, [3]);
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln(), 5.0];
        for (sampling, expected) in [
            (sampling(1.0), [0.5, 0.3, 0.2]),
            (sampling(0.5), [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
            (Sampling { top_k: 2, ..sampling(1.0) }, [0.625, 0.375, 0.0]),
            (Sampling { top_p: 0.6, ..sampling(1.0) }, [0.625, 0.375, 0.0]),
            (Sampling { top_p: 0.5, ..sampling(1.0) }, [1.0, 0.0, 0.0]),
            (Sampling { top_p: 0.0, ..sampling(1.0) }, [1.0, 0.0, 0.0]),
            (Sampling { top_k: 2, top_p: 0.6, ..sampling(1.0) }, [1.0, 0.0, 0.0]),
        ] {
            let found = frequencies(&sampler, &logits, &sampling);
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 0.015, "{sampling:?}: {found} for {expected}");
            }
            assert_eq!(found[3], 0.0);
        }
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let sampler = Sampler::new(64, []);
        let logits: Vec<f32> = (0..64).map(|id| (id % 7) as f32 * 0.1).collect();
        let tokens = |seed| {
            (0..50)
                .map(|position| sampler.sample(&logits, &Sampling { seed, ..sampling(1.0) }, position).unwrap().token)
                .collect::<Vec<_>>()
        };
        assert_eq!(tokens(1), tokens(1));
        assert_ne!(tokens(1), tokens(2));
        assert_ne!(tokens(1)[0..10], tokens(1)[10..20]);
    }

    #[test]
    fn log_probabilities_are_the_models_own() {
        let sampler = Sampler::new(3, [2]);
        let logits = [2.0, 1.0, 3.0];
        let normaliser = (2f32.exp() + 1f32.exp() + 3f32.exp()).ln();
        let sampled = sampler.sample(&logits, &Sampling { logprobs: Some(5), temperature: 0.1, ..sampling(0.1) }, 3).unwrap();
        assert!((sampled.logprob.unwrap() - (logits[sampled.token as usize] - normaliser)).abs() < 1e-6);
        assert_eq!(sampled.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [0, 1]);
        let scored = sampler.score(&logits, 1, 2);
        assert!((scored.logprob.unwrap() - (1.0 - normaliser)).abs() < 1e-6);
        assert_eq!(scored.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [2, 0]);
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        let sampler = Sampler::new(2, []);
        for logits in [[f32::NAN, 1.0], [f32::NEG_INFINITY; 2], [f32::INFINITY, 0.0]] {
            assert_eq!(sampler.sample(&logits, &sampling(0.0), 0), Err(NotFinite));
            assert_eq!(sampler.sample(&logits, &sampling(1.0), 0), Err(NotFinite));
        }
    }

    proptest! {
        #[test]
        fn any_setting_gives_an_allowed_token(
            logits in prop::collection::vec(-50f32..50.0, 300), temperature in 0.0f64..5.0, top_p in 0.0f64..1.2, top_k in -1i64..400, position: u64,
        ) {
            let sampler = Sampler::new(300, [0, 299]);
            let sampling = Sampling { top_p, top_k, logprobs: Some(3), ..sampling(temperature) };
            let sampled = sampler.sample(&logits, &sampling, position).unwrap();
            prop_assert!(sampled.token != 0 && sampled.token < 299);
            prop_assert!(sampled.logprob.unwrap() <= 0.0 && sampled.top.len() == 3);
            if top_k > 0 {
                prop_assert!(logits.iter().enumerate().filter(|&(id, &logit)| id != 0 && id != 299 && logit > logits[sampled.token as usize]).count() < top_k as usize);
            }
        }
    }
}
