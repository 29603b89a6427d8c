//! Training: the loop, on one screen.
//!
//! A run is (spec, data, model, optimiser, [`TrainState`](state::TrainState)); every number that it
//! computes is a function of these, so a run resumed from a checkpoint equals an uninterrupted one
//! bit for bit on equal [`Numerics`](crate::protocol::Numerics). The loop knows no database: it reports, and looks
//! at [`Control`] between micro-batches.

mod divergence;
mod evaluate;
mod gang;
mod halt;
mod prepare;
mod resolve;
mod run;
pub mod state;
mod step;

use std::time::Instant;

use crate::{
    control::{Control, Reporter},
    protocol::{Level, Phase, Report, TaskResult, TrainTask},
};
pub use halt::Halt;
use run::Run;

/// Trains to the last step. Stopped by a pause, it saves the last finished step first.
///
/// # Errors
/// [`Halt::Stopped`] after a pause, a cancellation or the runner's end; [`Halt::Failed`] with what to do.
pub fn train(task: &TrainTask, threads: usize, control: &Control, report: &mut Reporter) -> Result<TaskResult, Halt> {
    let report = &mut report.of_rank(task.gang.as_ref().map_or(0, |gang| gang.rank));
    report.send(Report::Phase { phase: Phase::Preparing });
    let mut run = prepare::prepare(task, threads, report)?;
    run.rehearse_saving(report)?;
    report.send(Report::Phase { phase: Phase::Training });
    let begun = Instant::now();
    match take_steps(&mut run, control, report) {
        Err(Halt::Stopped) if control.is_pausing() => {
            run.save(false, report)?;
            return Err(Halt::Stopped);
        }
        taken => taken?,
    }
    run.save(false, report)?;
    tracing::info!(step = run.state.step, seconds = begun.elapsed().as_secs_f64(), "trained");
    report.send(Report::Phase { phase: Phase::Publishing });
    run.publish()
}

/// The steps that are left, and what is due after each. A run that was stopped in an evaluation
/// resumes with it.
fn take_steps(run: &mut Run, control: &Control, report: &mut Reporter) -> Result<(), Halt> {
    loop {
        let agreed = run.gang.agree(control, run.checkpoint_is_due())?;
        let best = run.evaluation_is_due() && evaluate(run, control, report)?;
        if run.samples_are_due() {
            sample(run, report)?;
        }
        if best || agreed.save {
            run.save(best, report)?;
        }
        if run.is_done() {
            return run.observe(0, None, report);
        }
        if agreed.stop {
            return Err(Halt::Stopped);
        }
        run.step(control)?;
        run.observe(1, None, report)?;
    }
}

/// Validates the newest step; whether it is the best so far.
fn evaluate(run: &mut Run, control: &Control, report: &mut Reporter) -> Result<bool, Halt> {
    let loss = evaluate::validation_loss(run, control, report)?;
    run.observe(0, loss, report)?;
    if let Some(row) = run.state.newest.as_mut().filter(|row| row.step == run.state.step && row.validation_loss.is_none()) {
        // The step was reported before the stop that broke off its evaluation.
        row.validation_loss = loss.map(f64::from);
        report.send(Report::Metric { row: row.clone() });
    }
    run.state.evaluated = run.state.step;
    run.state.validation_loss = loss;
    let Some(loss) = loss.filter(|loss| loss.is_finite()) else { return Ok(false) };
    let best = run.state.best.is_none_or(|(_, lowest)| loss < lowest);
    if best {
        run.state.best = Some((run.state.step, loss));
    }
    Ok(best)
}

fn sample(run: &mut Run, report: &mut Reporter) -> Result<(), Halt> {
    run.state.sampled = run.state.step;
    for prompt in &run.spec.train.sample_prompts {
        let text = evaluate::sample(run, prompt)?;
        let data = serde_json::json!({ "step": run.state.step, "prompt": prompt, "text": text });
        report.event(Level::Info, "sample", &format!("{prompt} → {text}"), data);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
