//! The engine's thread: takes commands between steps, runs the steps, tells the clients.
//!
//! A panic in tensor code (tch's way to report an error) ends the thread: every open sequence
//! finishes with an error, and the handle reports that the engine is not alive.

use std::{
    collections::HashMap,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering, mpsc},
};

use super::{
    Command, Event, Finish, Generation, Place, Sampled, Shared, Sink,
    forward::{Computation, Forward, Logits},
    request,
    sampler::Sampler,
    scheduler::{Chunk, Scheduler, SequenceId, Step},
};
use crate::{nn::Row, shim::trim_backtrace};

struct Client {
    generation: Generation,
    sink: Sink,
    /// The newest token.
    last: u32,
    generated: usize,
    scores: Vec<Sampled>,
    _place: Place,
}

impl Client {
    fn finished(&self, reason: Finish) -> Event {
        Event::Finished { reason, prompt_tokens: self.generation.prompt.len(), completion_tokens: self.generated }
    }

    /// The position in the sequence of the token that comes next.
    fn next_position(&self) -> u64 {
        (self.generation.prompt.len() + self.generated) as u64
    }

    /// Scores the prompt's tokens that follow those of the chunk, whose logits begin at row `first`.
    fn score(&mut self, sampler: &Sampler, chunk: &Chunk, logits: &Logits, first: usize) {
        let Some(alternatives) = self.generation.prompt_logprobs else { return };
        let following = self.generation.prompt[chunk.start + 1..].iter().take(chunk.length);
        self.scores
            .extend(following.enumerate().map(|(row, &token)| sampler.score(logits.row(first + row), token, alternatives)));
    }
}

pub(super) struct Worker {
    scheduler: Scheduler,
    forward: Forward,
    sampler: Sampler,
    clients: HashMap<SequenceId, Client>,
    commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
}

impl Worker {
    pub(super) fn new(forward: Forward, sampler: Sampler, commands: mpsc::Receiver<Command>, shared: Arc<Shared>) -> Worker {
        Worker { scheduler: Scheduler::new(shared.limits), forward, sampler, clients: HashMap::new(), commands, shared }
    }

    /// Serves until the last handle is gone, a stop, or a failure.
    pub(super) fn run(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while self.take_commands() {
                self.step()
            }
        }));
        self.shared.alive.store(false, Ordering::Release);
        let reason = match outcome {
            Ok(()) => Finish::Cancelled,
            Err(panic) => {
                tracing::error!(reason = message(&*panic), "the engine failed");
                Finish::Error
            }
        };
        for id in self.scheduler.cancel_all() {
            self.finish(id, reason);
        }
        // What was submitted meanwhile hears of it too.
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit { generation, mut sink, .. } = command {
                sink(Event::Finished { reason, prompt_tokens: generation.prompt.len(), completion_tokens: 0 });
            }
        }
    }

    /// Takes every command that is there; waits for one when there is nothing to do. False: stop.
    fn take_commands(&mut self) -> bool {
        if self.scheduler.is_idle() {
            let Ok(command) = self.commands.recv() else { return false };
            if !self.take(command) {
                return false;
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    if !self.take(command) {
                        return false;
                    }
                }
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return !self.scheduler.is_idle(),
            }
        }
    }

    /// False: stop.
    fn take(&mut self, command: Command) -> bool {
        match command {
            Command::Submit { id, generation, sink, place } => {
                let mut client = Client { generation, sink, last: 0, generated: 0, scores: Vec::new(), _place: place };
                match self.scheduler.submit(id, request(&client.generation)) {
                    Ok(()) => {
                        self.clients.insert(id, client);
                    }
                    Err(refusal) => {
                        // The handle has looked at the same bounds, so this is a fault of ours.
                        tracing::error!(%refusal, "an accepted sequence was refused");
                        let event = client.finished(Finish::Error);
                        (client.sink)(event);
                    }
                }
            }
            Command::Cancel(id) => {
                if self.scheduler.cancel(id) {
                    self.finish(id, Finish::Cancelled);
                }
            }
            Command::Stop => return false,
        }
        true
    }

    fn finish(&mut self, id: SequenceId, reason: Finish) {
        if let Some(mut client) = self.clients.remove(&id) {
            let event = client.finished(reason);
            (client.sink)(event);
        }
    }

    fn step(&mut self) {
        let Some(step) = self.scheduler.plan() else { return };
        self.forward.prepare(&step);
        if self.shared.limits.fixed_shape {
            // Each by itself, so that no shape depends on who else is there.
            for chunk in &step.prefill {
                self.pass(std::slice::from_ref(chunk), None);
            }
            if !step.decode.is_empty() {
                self.pass(&[], Some(&step));
            }
        } else {
            self.pass(&step.prefill, Some(&step).filter(|step| !step.decode.is_empty()));
        }
        self.shared.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// One pass through the model, and what follows from its logits.
    fn pass(&mut self, chunks: &[Chunk], decode: Option<&Step>) {
        let mut computation = Computation::default();
        let mut places = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let Some(client) = self.clients.get(&chunk.id) else { continue };
            let tokens = &client.generation.prompt[chunk.start..chunk.start + chunk.length];
            let place = computation.add_chunk(chunk, tokens, client.generation.prompt_logprobs.is_some());
            places.push((*chunk, place));
        }
        let rows = decode.map(|step| self.add_rows(&mut computation, step));
        let logits = self.forward.pass(computation);
        for (chunk, place) in places {
            self.prefilled(&chunk, &logits, place);
        }
        if let (Some(step), Some(rows)) = (decode, rows) {
            for decode in &step.decode {
                self.sample(decode.id, decode.slot, logits.row(rows.start + decode.slot));
            }
        }
    }

    fn add_rows(&self, computation: &mut Computation, step: &Step) -> Range<usize> {
        let mut tokens = vec![0; step.rows];
        let idle = |&position: &usize| Row { position: position as i64, idle: true };
        let mut rows: Vec<Row> = step.free_position.iter().map(idle).collect();
        for decode in &step.decode {
            if let Some(client) = self.clients.get(&decode.id) {
                tokens[decode.slot] = client.last;
                rows[decode.slot] = Row { position: decode.position as i64, idle: false };
            }
        }
        computation.add_rows(&tokens, rows, step.keys)
    }

    /// A chunk was computed; its logits are the rows `place`.
    fn prefilled(&mut self, chunk: &Chunk, logits: &Logits, place: Range<usize>) {
        let Some(client) = self.clients.get_mut(&chunk.id) else { return };
        self.shared.prompt_tokens.fetch_add(chunk.length as u64, Ordering::Relaxed);
        client.score(&self.sampler, chunk, logits, place.start);
        if !chunk.last {
            return;
        }
        if client.generation.prompt_logprobs.is_some() {
            let scores = std::mem::take(&mut client.scores);
            if !(client.sink)(Event::Prompt(scores)) {
                self.leave(chunk.id);
                return;
            }
        }
        match self.scheduler.prompt_done(chunk.id) {
            Some(reason) => self.finish(chunk.id, reason),
            None => self.sample(chunk.id, chunk.slot, logits.row(place.end - 1)),
        }
    }

    /// Chooses the next token of a sequence and tells its client.
    fn sample(&mut self, id: SequenceId, slot: usize, logits: &[f32]) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Ok(sampled) = self.sampler.sample(logits, &client.generation.sampling, client.next_position()) else {
            tracing::error!("the model computed logits that are not finite");
            // Nothing of it may stay: hidden positions are multiplied by zero, and zero times NaN is NaN.
            self.forward.clear(slot);
            self.scheduler.cancel(id);
            self.finish(id, Finish::Error);
            return;
        };
        let is_stop = client.generation.stop_tokens.contains(&sampled.token);
        client.last = sampled.token;
        if !is_stop {
            client.generated += 1;
            self.shared.generated_tokens.fetch_add(1, Ordering::Relaxed);
            if !(client.sink)(Event::Token(sampled)) {
                self.leave(id);
                return;
            }
        }
        if let Some(reason) = self.scheduler.token(id, is_stop) {
            self.finish(id, reason);
        }
    }

    /// Takes a sequence out whose client is gone.
    fn leave(&mut self, id: SequenceId) {
        self.scheduler.cancel(id);
        self.clients.remove(&id);
    }
}

/// What a panic said, without the backtrace that libtorch appends.
pub(super) fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text =
        panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown");
    trim_backtrace(text)
}
