//! Which sequences take part in which step: a state machine without tensors, clocks or channels.
//!
//! A sequence waits in a bounded first-in-first-out queue, joins at a step's border when a slot and
//! room in the cache are free, has its prompt computed chunk by chunk, then takes part in every step
//! until it finishes. Promises: every running sequence that is past its prompt gets a token in every
//! step, however long others' prompts are; nobody overtakes in the queue; what a sequence may ever
//! need in the cache is reserved before it joins; every accepted sequence finishes exactly once.

use std::collections::VecDeque;

/// Names one sequence; given by whoever submits it, rising, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Slots: sequences that run at a time.
    pub max_sequences: usize,
    /// Sequences that wait beyond those that run.
    pub max_waiting: usize,
    /// Longest sequence, prompt and answer together, in tokens.
    pub context: usize,
    /// Tokens of one prompt in one step. A prompt is cut by this alone, whoever else is there.
    pub prefill_chunk: usize,
    /// Once this many prompt tokens are in a step, no further chunk joins it.
    pub prefill_budget: usize,
    /// Positions (slots × capacity) that the cache may hold.
    pub cache_positions: usize,
    /// Every step has `max_sequences` rows, and sequences keep their slot.
    pub fixed_shape: bool,
}

impl Limits {
    /// Slots and positions per slot of the cache that holds `rows` sequences of up to `length`.
    pub fn cache_shape(&self, rows: usize, length: usize) -> (usize, usize) {
        match self.fixed_shape {
            true => (self.max_sequences, self.context),
            false => {
                (rows.next_power_of_two().min(self.max_sequences), length.next_power_of_two().max(MIN_CAPACITY).min(self.context))
            }
        }
    }
}

/// The cache never has fewer positions per slot than this (or the context).
const MIN_CAPACITY: usize = 64;

#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub prompt_tokens: usize,
    /// 0 computes the prompt only.
    pub max_tokens: usize,
}

/// Why a sequence is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("the prompt has {prompt} tokens; this model's context has {context}, of which an answer needs at least one")]
    PromptTooLong { prompt: usize, context: usize },
    #[error(
        "a sequence of {length} tokens needs more memory for its keys and values than this engine may use, which is enough for {possible}"
    )]
    TooLong { length: usize, possible: usize },
    #[error("{waiting} requests are waiting already, the most that this engine queues")]
    QueueFull { waiting: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token came.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
    Cancelled,
    /// The engine failed.
    Error,
}

/// A piece of a prompt: positions `start .. start + length` of the sequence in `slot`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub id: SequenceId,
    pub slot: usize,
    pub start: usize,
    pub length: usize,
    /// The prompt ends here: the first token is sampled from the last position.
    pub last: bool,
}

/// A sequence whose newest token, at `position`, is to be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decode {
    pub id: SequenceId,
    pub slot: usize,
    pub position: usize,
}

/// One step. First `moves`, in order, then the chunks, then all decodes in one batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// `(from, to)`: the sequence in slot `from` moves to the free slot `to`.
    pub moves: Vec<(usize, usize)>,
    pub prefill: Vec<Chunk>,
    pub decode: Vec<Decode>,
    /// Rows of the decode batch: slots `0 .. rows`. Those not in `decode` are computed and ignored.
    pub rows: usize,
    /// The next free position of each of these slots; a row that is ignored may write there.
    pub free_position: Vec<usize>,
    /// Slots and positions per slot that the cache must have.
    pub cache: (usize, usize),
    /// Positions per slot that decoding looks at.
    pub keys: usize,
}

#[derive(Clone, Copy, Debug)]
struct Sequence {
    id: SequenceId,
    prompt: usize,
    max_tokens: usize,
    /// Prompt tokens computed.
    prefilled: usize,
    generated: usize,
}

impl Sequence {
    /// Longest that it may become.
    fn reserved(&self) -> usize {
        self.prompt + self.max_tokens
    }

    fn decodes(&self) -> bool {
        self.prefilled == self.prompt && self.generated > 0
    }

    /// Positions in the cache.
    fn cached(&self) -> usize {
        self.prefilled + self.generated.saturating_sub(1)
    }
}

pub struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Sequence>,
    slots: Vec<Option<Sequence>>,
    /// Where the next step begins to look for prompts, so that long ones take turns.
    turn: usize,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Scheduler {
        Scheduler { slots: vec![None; limits.max_sequences], limits, waiting: VecDeque::new(), turn: 0 }
    }

    /// Whether a request could ever run, and with how many tokens: an answer that would pass the
    /// context is cut there.
    pub fn admissible(limits: &Limits, request: Request) -> Result<Request, Refusal> {
        let Request { prompt_tokens, max_tokens } = request;
        if prompt_tokens == 0 {
            return Err(Refusal::EmptyPrompt);
        }
        if prompt_tokens > limits.context || (prompt_tokens == limits.context && max_tokens > 0) {
            return Err(Refusal::PromptTooLong { prompt: prompt_tokens, context: limits.context });
        }
        let max_tokens = max_tokens.min(limits.context - prompt_tokens);
        let length = prompt_tokens + max_tokens;
        let (slots, capacity) = limits.cache_shape(1, length);
        if slots * capacity > limits.cache_positions {
            return Err(Refusal::TooLong { length, possible: limits.cache_positions });
        }
        Ok(Request { prompt_tokens, max_tokens })
    }

    /// Puts a request at the queue's end.
    pub fn submit(&mut self, id: SequenceId, request: Request) -> Result<(), Refusal> {
        let Request { prompt_tokens, max_tokens } = Scheduler::admissible(&self.limits, request)?;
        // Those that will join at the next border do not count as waiting.
        let free = self.slots.iter().filter(|slot| slot.is_none()).count();
        if self.waiting.len() >= self.limits.max_waiting + free {
            return Err(Refusal::QueueFull { waiting: self.waiting.len() - free });
        }
        self.waiting.push_back(Sequence { id, prompt: prompt_tokens, max_tokens, prefilled: 0, generated: 0 });
        Ok(())
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn running(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running() == 0
    }

    /// Takes a sequence out, wherever it is. False if it finished before.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|sequence| sequence.id != id);
        let slot = self.slots.iter_mut().find(|slot| slot.is_some_and(|sequence| sequence.id == id));
        before != self.waiting.len() || slot.and_then(Option::take).is_some()
    }

    /// Takes everything out, in the order of submission.
    pub fn cancel_all(&mut self) -> Vec<SequenceId> {
        let running = self.slots.iter_mut().filter_map(Option::take);
        let mut ids: Vec<SequenceId> = running.chain(self.waiting.drain(..)).map(|sequence| sequence.id).collect();
        ids.sort();
        ids
    }

    /// Lets sequences join and says what the next step computes; `None` when nothing runs or waits.
    /// Prompt chunks count as computed from here on.
    pub fn plan(&mut self) -> Option<Step> {
        let moves = if self.limits.fixed_shape { Vec::new() } else { self.close_gaps() };
        self.admit();
        let running: Vec<Sequence> = self.slots.iter().flatten().copied().collect();
        if running.is_empty() {
            return None;
        }
        let decode: Vec<Decode> = self
            .enumerate()
            .filter(|(_, sequence)| sequence.decodes())
            .map(|(slot, sequence)| Decode { id: sequence.id, slot, position: sequence.cached() })
            .collect();
        let prefill = self.take_chunks();
        let rows = match self.limits.fixed_shape {
            true => self.limits.max_sequences,
            false => decode.last().map_or(0, |decode| decode.slot + 1),
        };
        let longest = running.iter().map(Sequence::reserved).max().unwrap_or(0);
        let last_slot = self.enumerate().map(|(slot, _)| slot + 1).max().unwrap_or(0);
        let cache = self.limits.cache_shape(last_slot, longest);
        // A full slot has no free position, but then its sequence ends with this step.
        let free = |slot: &Option<Sequence>| slot.map_or(0, |sequence| sequence.cached().min(cache.1 - 1));
        let free_position: Vec<usize> = self.slots[..rows].iter().map(free).collect();
        let keys = match self.limits.fixed_shape {
            true => self.limits.context,
            false => decode.iter().map(|decode| decode.position + 1).max().unwrap_or(0),
        };
        Some(Step { moves, prefill, decode, rows, free_position, cache, keys })
    }

    /// A token was sampled for a sequence of the step. `Some` when it finishes, which frees its slot.
    pub fn token(&mut self, id: SequenceId, is_stop: bool) -> Option<Finish> {
        let slot = self.slots.iter_mut().find(|slot| slot.is_some_and(|sequence| sequence.id == id))?;
        let sequence = slot.as_mut()?;
        if !is_stop {
            sequence.generated += 1;
        }
        let finish = match is_stop {
            true => Some(Finish::Stop),
            false if sequence.generated >= sequence.max_tokens => Some(Finish::Length),
            false => None,
        };
        if finish.is_some() {
            *slot = None;
        }
        finish
    }

    /// The prompt of a sequence that wants no token was computed: it finishes.
    pub fn prompt_done(&mut self, id: SequenceId) -> Option<Finish> {
        let slot =
            self.slots.iter_mut().find(|slot| slot.is_some_and(|sequence| sequence.id == id && sequence.max_tokens == 0))?;
        *slot = None;
        Some(Finish::Length)
    }

    fn enumerate(&self) -> impl Iterator<Item = (usize, &Sequence)> {
        self.slots.iter().enumerate().filter_map(|(slot, sequence)| sequence.as_ref().map(|sequence| (slot, sequence)))
    }

    /// Moves the last sequences into free slots before them, so that a batch has no empty rows.
    fn close_gaps(&mut self) -> Vec<(usize, usize)> {
        let mut moves = Vec::new();
        let running = self.running();
        for to in 0..running {
            if self.slots[to].is_none()
                && let Some(from) = self.slots.iter().rposition(Option::is_some)
            {
                self.slots.swap(from, to);
                moves.push((from, to));
            }
        }
        moves
    }

    /// First in, first out, while there are slots and room for the longest that anyone may become.
    fn admit(&mut self) {
        while let Some(&next) = self.waiting.front() {
            let Some(slot) = self.slots.iter().position(Option::is_none) else { return };
            let longest = self.slots.iter().flatten().map(Sequence::reserved).chain([next.reserved()]).max().unwrap_or(0);
            let (slots, capacity) = self.limits.cache_shape(self.running() + 1, longest);
            if slots * capacity > self.limits.cache_positions {
                return;
            }
            self.slots[slot] = Some(next);
            self.waiting.pop_front();
        }
    }

    fn take_chunks(&mut self) -> Vec<Chunk> {
        let count = self.slots.len();
        let mut chunks = Vec::new();
        let mut tokens = 0;
        for slot in (0..count).map(|offset| (self.turn + offset) % count) {
            let Some(sequence) = self.slots[slot].as_mut().filter(|sequence| sequence.prefilled < sequence.prompt) else {
                continue;
            };
            if tokens >= self.limits.prefill_budget && !chunks.is_empty() {
                // The next step begins with whoever did not get a turn in this one.
                self.turn = slot;
                return chunks;
            }
            let start = sequence.prefilled;
            let length = (sequence.prompt - start).min(self.limits.prefill_chunk);
            sequence.prefilled += length;
            tokens += length;
            chunks.push(Chunk { id: sequence.id, slot, start, length, last: sequence.prefilled == sequence.prompt });
        }
        chunks
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
