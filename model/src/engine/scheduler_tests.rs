//! The scheduler by itself: cases by hand, and random histories against its promises.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn limits() -> Limits {
    Limits {
        max_sequences: 4,
        max_waiting: 3,
        context: 256,
        prefill_chunk: 16,
        prefill_budget: 32,
        cache_positions: 4 * 256,
        fixed_shape: false,
    }
}

fn request(prompt_tokens: usize, max_tokens: usize) -> Request {
    Request { prompt_tokens, max_tokens }
}

/// Submits with the next id.
fn submit(scheduler: &mut Scheduler, request: Request) -> Result<SequenceId, Refusal> {
    thread_local!(static NEXT: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
    let id = SequenceId(NEXT.get());
    scheduler.submit(id, request)?;
    NEXT.set(id.0 + 1);
    Ok(id)
}

/// Runs one step; every sequence that gets a token goes on. Returns what finished.
fn run(scheduler: &mut Scheduler) -> (Step, Vec<(SequenceId, Finish)>) {
    let step = scheduler.plan().unwrap();
    let mut finished = Vec::new();
    let sampled =
        step.prefill.iter().filter(|chunk| chunk.last).map(|chunk| chunk.id).chain(step.decode.iter().map(|decode| decode.id));
    for id in sampled {
        let finish = scheduler.prompt_done(id).or_else(|| scheduler.token(id, false));
        finished.extend(finish.map(|finish| (id, finish)));
    }
    (step, finished)
}

#[test]
fn one_sequence_from_prompt_to_length() {
    let mut scheduler = Scheduler::new(limits());
    let id = submit(&mut scheduler, request(20, 3)).unwrap();
    let (step, _) = run(&mut scheduler);
    assert_eq!(step.prefill, [Chunk { id, slot: 0, start: 0, length: 16, last: false }]);
    assert_eq!((step.cache, step.rows), ((1, 64), 0));
    let (step, _) = run(&mut scheduler);
    assert_eq!(step.prefill, [Chunk { id, slot: 0, start: 16, length: 4, last: true }]);
    let (step, finished) = run(&mut scheduler);
    assert_eq!(step.decode, [Decode { id, slot: 0, position: 20 }]);
    assert_eq!((step.rows, step.keys), (1, 21));
    assert!(finished.is_empty());
    let (step, finished) = run(&mut scheduler);
    assert_eq!(step.decode[0].position, 21);
    assert_eq!(finished, [(id, Finish::Length)]);
    assert!(scheduler.is_idle() && scheduler.plan().is_none());
}

#[test]
fn refusals_name_both_numbers() {
    let mut scheduler = Scheduler::new(limits());
    assert_eq!(submit(&mut scheduler, request(0, 1)), Err(Refusal::EmptyPrompt));
    assert_eq!(submit(&mut scheduler, request(300, 1)), Err(Refusal::PromptTooLong { prompt: 300, context: 256 }));
    assert_eq!(submit(&mut scheduler, request(256, 1)), Err(Refusal::PromptTooLong { prompt: 256, context: 256 }));
    assert!(Refusal::PromptTooLong { prompt: 300, context: 256 }.to_string().contains("300"));
    submit(&mut scheduler, request(256, 0)).unwrap();
    submit(&mut scheduler, request(10, usize::MAX / 2)).unwrap();
    let small = Limits { cache_positions: 100, ..limits() };
    assert_eq!(submit(&mut Scheduler::new(small), request(100, 20)), Err(Refusal::TooLong { length: 120, possible: 100 }));
}

#[test]
fn the_queue_is_bounded_and_nobody_overtakes() {
    let mut scheduler = Scheduler::new(limits());
    let ids: Vec<SequenceId> = (0..7).map(|_| submit(&mut scheduler, request(4, 10)).unwrap()).collect();
    assert_eq!(submit(&mut scheduler, request(4, 10)), Err(Refusal::QueueFull { waiting: 3 }));
    let (step, _) = run(&mut scheduler);
    assert_eq!(step.prefill.iter().map(|chunk| chunk.id).collect::<Vec<_>>(), ids[..4]);
    assert_eq!(submit(&mut scheduler, request(4, 10)), Err(Refusal::QueueFull { waiting: 3 }));
    assert!(scheduler.cancel(ids[1]) && !scheduler.cancel(ids[1]));
    let (step, _) = run(&mut scheduler);
    assert_eq!(step.moves, [(3, 1)]);
    assert_eq!(step.prefill.iter().map(|chunk| (chunk.id, chunk.slot)).collect::<Vec<_>>(), [(ids[4], 3)]);
    assert_eq!(step.decode.iter().map(|decode| decode.id).collect::<Vec<_>>(), [ids[0], ids[3], ids[2]]);
    assert_eq!(scheduler.cancel_all(), [ids[0], ids[2], ids[3], ids[4], ids[5], ids[6]]);
}

#[test]
fn long_prompts_take_turns_and_never_stop_decoding() {
    let mut scheduler = Scheduler::new(limits());
    let talking = submit(&mut scheduler, request(4, 100)).unwrap();
    run(&mut scheduler);
    let long: Vec<SequenceId> = (0..3).map(|_| submit(&mut scheduler, request(96, 4)).unwrap()).collect();
    let mut chunks: BTreeMap<SequenceId, usize> = BTreeMap::new();
    for _ in 0..6 {
        let (step, _) = run(&mut scheduler);
        assert_eq!(step.decode.iter().map(|decode| decode.id).collect::<Vec<_>>(), [talking]);
        assert_eq!(step.prefill.len(), 2);
        step.prefill.iter().for_each(|chunk| *chunks.entry(chunk.id).or_default() += 1);
    }
    assert_eq!(chunks, long.iter().map(|&id| (id, 4)).collect());
}

#[test]
fn the_cache_is_reserved_before_a_sequence_joins() {
    let mut scheduler = Scheduler::new(Limits { cache_positions: 256, ..limits() });
    let first = submit(&mut scheduler, request(100, 28)).unwrap();
    let second = submit(&mut scheduler, request(10, 10)).unwrap();
    let third = submit(&mut scheduler, request(4, 4)).unwrap();
    // Two slots of 128 fit, a third (rounded to four) does not.
    let (step, _) = run(&mut scheduler);
    assert_eq!(step.cache, (2, 128));
    assert_eq!(step.prefill.iter().map(|chunk| chunk.id).collect::<Vec<_>>(), [first, second]);
    scheduler.cancel(first);
    let (step, _) = run(&mut scheduler);
    assert_eq!(step.cache, (2, 64));
    assert_eq!(step.prefill[0].id, third);
}

#[test]
fn a_fixed_shape_stays_fixed() {
    let mut scheduler = Scheduler::new(Limits { fixed_shape: true, ..limits() });
    let ids: Vec<SequenceId> = (0..3).map(|_| submit(&mut scheduler, request(4, 100)).unwrap()).collect();
    run(&mut scheduler);
    scheduler.cancel(ids[0]);
    let (step, _) = run(&mut scheduler);
    assert_eq!((step.moves.len(), step.rows, step.keys, step.cache), (0, 4, 256, (4, 256)));
    assert_eq!(step.free_position, [0, 4, 4, 0]);
}

#[derive(Clone, Debug)]
enum Op {
    Submit(usize, usize),
    Cancel(usize),
    /// A step; the sequence with this index among those sampled stops.
    Step(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0usize..300, 0usize..40).prop_map(|(prompt, max)| Op::Submit(prompt, max)),
        (0usize..32).prop_map(Op::Cancel),
        (0usize..8).prop_map(Op::Step),
        (0usize..8).prop_map(Op::Step),
    ]
}

/// What a cache and a model would know of each sequence.
#[derive(Default)]
struct World {
    open: BTreeMap<SequenceId, (Request, usize)>,
    slots: BTreeMap<usize, SequenceId>,
    finished: Vec<SequenceId>,
}

impl World {
    fn check_step(&mut self, limits: &Limits, step: &Step) -> Result<(), TestCaseError> {
        for &(from, to) in &step.moves {
            // A sequence that joined but has had no turn yet is not known here.
            prop_assert!(!self.slots.contains_key(&to));
            if let Some(moved) = self.slots.remove(&from) {
                self.slots.insert(to, moved);
            }
        }
        prop_assert!(step.cache.0 * step.cache.1 <= limits.cache_positions);
        prop_assert_eq!(step.free_position.len(), step.rows);
        prop_assert!(step.free_position.iter().all(|&position| position < step.cache.1));
        for chunk in &step.prefill {
            let (request, done) = self.open.get_mut(&chunk.id).unwrap();
            prop_assert_eq!(self.slots.entry(chunk.slot).or_insert(chunk.id), &chunk.id);
            prop_assert_eq!(chunk.start, *done);
            prop_assert_eq!(
                chunk.length,
                (request.prompt_tokens - chunk.start).min(limits.prefill_chunk),
                "cut by its own length alone"
            );
            *done += chunk.length;
            prop_assert!(*done <= step.cache.1 && chunk.slot < step.cache.0);
            prop_assert_eq!(chunk.last, *done == request.prompt_tokens);
        }
        for decode in &step.decode {
            prop_assert_eq!(self.slots.get(&decode.slot), Some(&decode.id));
            let (_, done) = self.open.get_mut(&decode.id).unwrap();
            prop_assert_eq!(decode.position, *done);
            *done += 1;
            prop_assert!(decode.slot < step.rows && decode.position < step.keys && step.keys <= step.cache.1);
        }
        // Whoever has had its prompt computed before this step takes part in it.
        let fresh: Vec<SequenceId> = step.prefill.iter().map(|chunk| chunk.id).collect();
        let due = self.slots.values().filter(|id| !fresh.contains(id) && self.open[id].1 >= self.open[id].0.prompt_tokens);
        prop_assert_eq!(due.count(), step.decode.len());
        Ok(())
    }

    fn close(&mut self, id: SequenceId) {
        self.open.remove(&id);
        self.slots.retain(|_, other| *other != id);
        self.finished.push(id);
    }
}

proptest! {
    #[test]
    fn promises_hold_in_every_history(ops in prop::collection::vec(op(), 1..120), fixed_shape: bool) {
        let limits = Limits { fixed_shape, cache_positions: if fixed_shape { 1024 } else { 600 }, ..limits() };
        let mut scheduler = Scheduler::new(limits);
        let mut world = World::default();
        let mut accepted = 0u64;
        for op in ops.into_iter().chain((0..600).map(|_| Op::Step(usize::MAX))) {
            match op {
                Op::Submit(prompt, max) => if let Ok(()) = scheduler.submit(SequenceId(accepted), request(prompt, max)) {
                    let id = SequenceId(accepted);
                    accepted += 1;
                    world.open.insert(id, (request(prompt, max), 0));
                },
                Op::Cancel(index) => {
                    let id = SequenceId(index as u64);
                    prop_assert_eq!(scheduler.cancel(id), world.open.contains_key(&id));
                    if world.open.contains_key(&id) { world.close(id); }
                }
                Op::Step(stops) => {
                    let Some(step) = scheduler.plan() else { prop_assert!(world.open.is_empty()); continue };
                    world.check_step(&limits, &step)?;
                    let last = step.prefill.iter().filter(|chunk| chunk.last).map(|chunk| chunk.id);
                    for (index, id) in last.chain(step.decode.iter().map(|decode| decode.id)).enumerate() {
                        if scheduler.prompt_done(id).or_else(|| scheduler.token(id, index == stops)).is_some() { world.close(id); }
                    }
                }
            }
            prop_assert!(scheduler.waiting() <= limits.max_waiting + limits.max_sequences - scheduler.running());
        }
        prop_assert!(scheduler.is_idle(), "everything finishes");
        world.finished.sort();
        world.finished.dedup();
        prop_assert_eq!(world.finished.len() as u64, accepted, "exactly once");
    }
}
