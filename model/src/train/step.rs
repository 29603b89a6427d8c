//! One optimiser step: the passes of its micro-batches, in the order that the layout asks for.
//!
//! Where one stage has the whole model, each micro-batch goes forward and back before the next one. In a pipeline a stage
//! receives what the part before has made of a micro-batch, and hands its own result on; gradients come the other way.

use std::{collections::HashMap, time::Instant};

use tch::{Kind, Tensor};

use super::{
    halt::Halt,
    run::{Pending, Run},
};
use crate::{
    config::Precision,
    control::Control,
    data::batch::{Batch, Example, Order},
    nn::{AttentionPlan, Dropout, Pass},
    optim::schedule,
    parallel::{
        Wire,
        schedule::{Action, Direction, Pipeline},
        tensor::{argmax, cross_entropy_sum},
    },
    random::{self, Stream},
    shim::{self, Autocast},
};

/// What a part of the model has made of a micro-batch.
struct Passed {
    /// What came from the part before.
    received: Option<Tensor>,
    /// The summed cross-entropy over the supervised targets, or, of a part that is not the last, what it hands on.
    made: Tensor,
    is_loss: bool,
}

/// What the gradients of a step are of.
pub struct Backward {
    /// The mean over the supervised tokens of the whole batch.
    pub loss: Tensor,
    pub supervised: u64,
    /// Inputs that are no padding.
    pub tokens: u64,
}

impl Run {
    /// One optimiser step over `batch_size` sequences. Nothing here waits for the device: the loss and the norm are read by
    /// [`Run::observe`] after the next step was begun.
    pub fn step(&mut self, control: &Control) -> Result<(), Halt> {
        let begun = Instant::now();
        let Backward { loss, supervised, tokens } = self.whole_backward(control)?;
        let (step, train) = (self.state.step + 1, &self.spec.train);
        let learning_rate = schedule::learning_rate(&train.schedule, step, self.steps());
        let grad_norm = self.gang.gradient_norm(&self.optimizer)?;
        self.optimizer.step(learning_rate, train.clip, &grad_norm)?;
        self.gang.finish_update()?;
        self.state.step = step;
        self.state.cursor += self.spec.train.batch_size;
        self.state.tokens += supervised;
        self.ledger.pending.push_back(Pending { step, loss, grad_norm, learning_rate, supervised, tokens, begun, took: None });
        Ok(())
    }

    /// The gradients of the next step, this rank's part of it in micro-batches.
    pub fn whole_backward(&self, control: &Control) -> Result<Backward, Halt> {
        let train = &self.spec.train;
        let (first, step) = (self.state.cursor, self.state.step + 1);
        let order = Order { shard: &self.data.shard, packing: &self.data.train, posing: self.posing() };
        let examples: Vec<Example> = order.examples(first..first + train.batch_size).collect();
        let supervised: u64 = examples.iter().map(Example::supervised).sum();
        let tokens = examples.iter().map(|example| example.tokens.len() as u64).sum();
        let own = self.gang.part(0..train.batch_size);
        let own = &examples[own.start as usize..own.end as usize];
        let micros: Vec<&[Example]> = own.chunks(self.micro_batch_size() as usize).collect();
        let pipeline = self.gang.pipeline(micros.len());
        let actions = pipeline.actions(self.gang.stage());
        let (mut loss, mut live) = (Tensor::zeros([], (Kind::Float, self.device)), HashMap::new());
        self.gang.begin_step()?;
        for (number, &action) in (1..).zip(&actions) {
            if self.stops(control) {
                self.optimizer.zero_gradients()?;
                return Err(Halt::Stopped);
            }
            match action.pass {
                Direction::Forward => {
                    let mut batch = Batch::of(micros[action.micro], self.gang.sequence_multiple(), self.device);
                    let dropout = self.dropout(step, &batch.sequences);
                    let mut passed = self.forward(&pipeline, action, &mut batch, dropout.as_ref())?;
                    if passed.is_loss {
                        passed.made = passed.made / supervised.max(1) as f64;
                        loss += passed.made.detach();
                    }
                    live.insert((action.chunk, action.micro), passed);
                }
                Direction::Backward => {
                    let Some(passed) = live.remove(&(action.chunk, action.micro)) else { continue };
                    self.backward(&pipeline, action, passed, number == actions.len())?;
                }
            }
        }
        self.gang.wire().map_or(Ok(()), Wire::finish)?;
        self.gang.finish_step(&self.optimizer)?;
        self.gang.sum(&loss)?;
        Ok(Backward { loss, supervised, tokens })
    }

    fn dropout(&self, step: u64, sequences: &[u64]) -> Option<Dropout> {
        let probability = self.spec.model.dropout;
        let seed = random::key(self.spec.train.seed, Stream::Dropout, b"");
        let part = self.gang.sequence_part();
        (probability > 0.0).then(|| Dropout { probability, seed, step, sequences: sequences.to_vec(), part })
    }

    /// A micro-batch through one part of the model.
    fn forward(&self, pipeline: &Pipeline, action: Action, batch: &mut Batch, dropout: Option<&Dropout>) -> Result<Passed, Halt> {
        let bf16 = self.spec.train.precision == Some(Precision::Bf16);
        let inputs = [&batch.tokens_bt, &batch.positions_bt];
        let received = self.receive(pipeline, action, inputs[0])?;
        let autocast = bf16.then(|| Autocast::bf16(self.device)).transpose()?;
        let mut pass = Pass { dropout, received: received.as_ref(), ..Pass::plain(&mut batch.plan) };
        let hidden_btc = self.model.hidden_of(action.chunk, inputs[0], inputs[1], &mut pass);
        let is_loss = pipeline.goes_to(self.gang.stage(), action).is_none();
        let made = if is_loss { self.cross_entropy(&hidden_btc, batch, autocast)? } else { hidden_btc };
        self.hand_on(pipeline, action, &made)?;
        Ok(Passed { received, made, is_loss })
    }

    /// What the part before has made of these tokens; in a backward pass its gradient is what that part wants.
    fn receive(&self, pipeline: &Pipeline, action: Action, tokens_bt: &Tensor) -> Result<Option<Tensor>, Halt> {
        let Some(wire) = self.gang.wire() else { return Ok(None) };
        let size = tokens_bt.size();
        let shape = [size[0], size[1] / self.gang.sequence_multiple() as i64, self.spec.model.width];
        Ok(wire.receive(pipeline, action, &shape, self.device)?.map(|tensor| tensor.set_requires_grad(true)))
    }

    fn hand_on(&self, pipeline: &Pipeline, action: Action, made: &Tensor) -> Result<(), Halt> {
        self.gang.check()?;
        self.gang.wire().map_or(Ok(()), |wire| Ok(wire.send(pipeline, action, made)?))
    }

    fn backward(&self, pipeline: &Pipeline, action: Action, passed: Passed, last: bool) -> Result<(), Halt> {
        let Passed { received, made, .. } = passed;
        let Some(wire) = self.gang.wire() else { return self.gang.backward(&made, last) };
        match wire.receive(pipeline, action, &made.size(), self.device)? {
            None => self.gang.backward(&made, last)?,
            // A number whose gradient by what was made is the one that came.
            Some(gradient) => self.gang.backward(&(&made * gradient).sum(Kind::Float), last)?,
        }
        received.map_or(Ok(()), |received| Ok(wire.send(pipeline, action, &received.grad())?))
    }

    /// The summed fp32 cross-entropy over a batch's supervised targets.
    fn cross_entropy(&self, hidden_btc: &Tensor, batch: &Batch, autocast: Option<Autocast>) -> Result<Tensor, Halt> {
        let width = *hidden_btc.size().last().unwrap_or(&0);
        let hidden_tc = hidden_btc.view([-1, width]);
        // Where all positions are supervised there is nothing to choose.
        let hidden_nc = match &batch.chosen {
            None => hidden_tc,
            Some(chosen) => shim::move_rows(&hidden_tc, &chosen.places, &chosen.back, &chosen.unused)?,
        };
        let logits_nv = self.model.logits(&hidden_nc).to_kind(Kind::Float);
        drop(autocast);
        Ok(cross_entropy_sum(self.parameters.axis(), &logits_nv, &batch.targets_n, self.spec.model.vocabulary))
    }

    /// The summed cross-entropy over micro-batches, without a backward pass; zero but on the last stage.
    pub fn loss_sum(&self, micros: &mut [Batch]) -> Result<Tensor, Halt> {
        let pipeline = self.gang.pipeline(micros.len());
        let mut sum = Tensor::zeros([], (Kind::Float, self.device));
        for action in pipeline.forward_only() {
            let passed = self.forward(&pipeline, action, &mut micros[action.micro], None)?;
            if passed.is_loss {
                sum += passed.made;
            }
        }
        self.gang.wire().map_or(Ok(()), Wire::finish)?;
        Ok(sum)
    }

    /// The most likely token after these, which all ranks then know.
    pub fn most_likely(&self, tokens: &[u32]) -> Result<u32, Halt> {
        let (count, pipeline) = (tokens.len(), self.gang.pipeline(1));
        let mut padded: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        // What is behind does not change what is before.
        padded.resize(count.next_multiple_of(self.gang.sequence_multiple()), 0);
        let tokens_bt = Tensor::from_slice(&padded).unsqueeze(0).to_device(self.device);
        let positions_bt = Tensor::arange(padded.len() as i64, (Kind::Int64, self.device)).unsqueeze(0);
        let mut found = 0;
        for action in pipeline.forward_only() {
            let received = self.receive(&pipeline, action, &tokens_bt)?;
            let mut plan = AttentionPlan::Causal;
            let mut pass = Pass { received: received.as_ref(), ..Pass::plain(&mut plan) };
            let hidden_btc = self.model.hidden_of(action.chunk, &tokens_bt, &positions_bt, &mut pass);
            if pipeline.goes_to(self.gang.stage(), action).is_none() {
                let logits_v = self.model.logits(&hidden_btc.select(1, count as i64 - 1)).squeeze_dim(0);
                found = argmax(self.parameters.axis(), &logits_v, self.spec.model.vocabulary);
            }
            self.hand_on(&pipeline, action, &hidden_btc)?;
        }
        self.gang.wire().map_or(Ok(()), Wire::finish)?;
        let found = Tensor::from_slice(&[found]);
        self.gang.sum_over_stages(&found)?;
        Ok(found.int64_value(&[0]) as u32)
    }
}
