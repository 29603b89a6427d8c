//! What each stage of a pipeline computes, and in which order: a list, made before the step begins.
//!
//! The model is cut into `stages × chunks` parts; part `chunk × stages + stage` lies on that stage. A forward pass hands its
//! result to the next part's stage, a backward pass its gradient to the one before.
//!
//! | schedule | idle, of the step, with equal parts | micro-batches whose activations a stage holds |
//! |---|---|---|
//! | GPipe (Huang et al., arXiv 1811.06965) | (p−1)/(m+p−1) | m |
//! | 1F1B (Narayanan et al., arXiv 1806.03377, 2104.04473) | the same | p at most |
//! | interleaved (2104.04473, section 2.2) | (p−1)/(v·m+p−1) | more, of smaller parts |

use super::layout::Schedule;

/// One pass of one micro-batch through the part `chunk` of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Action {
    pub pass: Direction,
    pub chunk: usize,
    pub micro: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    Forward,
    Backward,
}

/// A pipeline of `stages` with `chunks` parts each, and `micros` micro-batches a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pipeline {
    pub schedule: Schedule,
    pub stages: usize,
    /// 1, unless the schedule is interleaved.
    pub chunks: usize,
    /// A multiple of the stages, where the schedule is interleaved.
    pub micros: usize,
}

impl Pipeline {
    /// What `stage` computes in a step, in order.
    pub fn actions(&self, stage: usize) -> Vec<Action> {
        let passes = self.micros * self.chunks;
        let ahead = match self.schedule {
            Schedule::Gpipe => passes,
            // So many stages have yet to compute a micro-batch before its gradient comes back.
            Schedule::OneForwardOneBackward => self.stages - stage - 1,
            Schedule::Interleaved => 2 * (self.stages - stage - 1) + (self.chunks - 1) * self.stages,
        };
        let ahead = ahead.min(passes);
        let mut actions: Vec<Action> = (0..ahead).map(|number| self.forward(number)).collect();
        for number in 0..passes {
            if ahead + number < passes {
                actions.push(self.forward(ahead + number));
            }
            actions.push(self.backward(number));
        }
        actions
    }

    fn forward(&self, number: usize) -> Action {
        let (chunk, micro) = self.place(number);
        Action { pass: Direction::Forward, chunk, micro }
    }

    /// The last part comes first.
    fn backward(&self, number: usize) -> Action {
        let (chunk, micro) = self.place(number);
        Action { pass: Direction::Backward, chunk: self.chunks - 1 - chunk, micro }
    }

    /// Chunk and micro-batch of a stage's pass with this number: each chunk takes as many micro-batches in turn as there are
    /// stages.
    fn place(&self, number: usize) -> (usize, usize) {
        if self.chunks == 1 {
            return (0, number);
        }
        let round = self.stages * self.chunks;
        (number % round / self.stages, number / round * self.stages + number % self.stages)
    }

    /// The action on another stage whose result `action` on `stage` needs; `None` at the ends of the model.
    pub fn needs(&self, stage: usize, action: Action) -> Option<(usize, Action)> {
        let (part, last) = (action.chunk * self.stages + stage, self.stages * self.chunks - 1);
        let from = match action.pass {
            Direction::Forward => part.checked_sub(1)?,
            Direction::Backward if part == last => return None,
            Direction::Backward => part + 1,
        };
        Some((from % self.stages, Action { chunk: from / self.stages, ..action }))
    }

    /// The stage that needs what `action` on `stage` makes; `None` at the ends of the model.
    pub fn goes_to(&self, stage: usize, action: Action) -> Option<usize> {
        let part = action.chunk * self.stages + stage;
        let to = match action.pass {
            Direction::Forward => Some(part + 1).filter(|&part| part < self.stages * self.chunks),
            Direction::Backward => part.checked_sub(1),
        };
        to.map(|part| part % self.stages)
    }

    /// Micro-batches one after the other through all parts of the model, without a backward pass.
    pub fn forward_only(&self) -> Vec<Action> {
        let action = |micro, chunk| Action { pass: Direction::Forward, chunk, micro };
        (0..self.micros).flat_map(|micro| (0..self.chunks).map(move |chunk| action(micro, chunk))).collect()
    }

    /// A step in which each action of each stage takes `seconds`, and what it needs is there at once when it was computed.
    pub fn replay(&self, seconds: impl Fn(usize, Action) -> f64) -> Replay {
        let actions: Vec<Vec<Action>> = (0..self.stages).map(|stage| self.actions(stage)).collect();
        let mut ends = std::collections::HashMap::new();
        let mut next = vec![0; self.stages];
        let mut clock = vec![0.0f64; self.stages];
        let mut busy = vec![0.0; self.stages];
        loop {
            let before = ends.len();
            for stage in 0..self.stages {
                while let Some(&action) = actions[stage].get(next[stage]) {
                    let ready = match self.needs(stage, action) {
                        None => 0.0,
                        Some(needed) => match ends.get(&needed) {
                            Some(&end) => end,
                            None => break,
                        },
                    };
                    let took = seconds(stage, action);
                    clock[stage] = clock[stage].max(ready) + took;
                    busy[stage] += took;
                    ends.insert((stage, action), clock[stage]);
                    next[stage] += 1;
                }
            }
            if ends.len() == before {
                break;
            }
        }
        let finished = (0..self.stages).all(|stage| next[stage] == actions[stage].len());
        Replay { seconds: clock.iter().copied().fold(0.0, f64::max), busy, finished }
    }
}

/// How a step went.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    /// Of the whole step.
    pub seconds: f64,
    /// Seconds in which each stage computed.
    pub busy: Vec<f64>,
    /// Whether every action was computed; a schedule that stands still is a defect.
    pub finished: bool,
}

impl Replay {
    /// The share of the step in which a stage computes nothing, over all stages.
    pub fn idle(&self) -> f64 {
        1.0 - self.busy.iter().sum::<f64>() / (self.seconds * self.busy.len() as f64)
    }
}
