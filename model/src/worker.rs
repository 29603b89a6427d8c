//! `lathe worker`: one task, read from standard input, reported on descriptor 3.
//!
//! A worker never sees the database and holds no state beyond its task. Whoever starts it sets what
//! libraries read before `main`: `CUBLAS_WORKSPACE_CONFIG=:4096:8`, `MKL_CBWR=AUTO` (the host's own
//! level) and `GOMP_SPINCOUNT`, low, since jobs may share cores. The rest of what makes
//! equal numerics give equal bits (threads, deterministic algorithms) is set here, before the first
//! tensor.

use std::{
    any::Any,
    fs::File,
    io::{BufRead, BufReader},
    os::fd::FromRawFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use crate::{
    control::{Control, Reporter},
    failure,
    protocol::{
        Command, Exit, Failure, FailureCode, PROTOCOL_VERSION, REPORT_FD, Report, StatisticsTask, Task, TaskResult,
        TokenizerTask, WorkerSpec,
    },
    pulse,
    report_pipe::ReportPipe,
    shim,
    tokenizer::{self, Tokenizer},
    train::{self, Halt},
};

/// Runs ingestion, which is not tensor work and lives in another crate.
pub type Ingest<'a> = &'a mut dyn FnMut(serde_json::Value, &Control, &mut Reporter) -> Result<TaskResult, Failure>;

/// The whole of a worker process: reads the spec, runs its task, reports. Returns the exit code, one
/// of [`Exit`].
pub fn run(ingest: Ingest) -> i32 {
    // SAFETY: the runner opens this descriptor for the worker, and nothing else in the process uses it.
    let pipe = Arc::new(ReportPipe::new(unsafe { File::from_raw_fd(REPORT_FD) }));
    let control = Arc::new(Control::default());
    // Before there is another thread, since every thread inherits it.
    pause_on_sigterm(control.clone());
    let mut reporter = Reporter::new(|report| pipe.send(&report));
    let mut stdin = BufReader::new(std::io::stdin());
    let spec = match read_spec(&mut stdin) {
        Ok(spec) => spec,
        Err(message) => {
            tracing::error!(message, "the worker's spec cannot be used");
            return Exit::BadSpec as i32;
        }
    };
    let commands = control.clone();
    std::thread::spawn(move || follow(stdin, &commands));
    let alive = pipe.clone();
    std::thread::spawn(move || pulse::tell(|report| alive.send(&report)));
    let exit = run_task(spec, &control, &mut reporter, ingest);
    pipe.finish();
    exit as i32
}

/// SIGTERM is a pause: service managers send it to every process of a service, and what was trained is
/// not to be lost. Waited for in a thread, because almost nothing may be done in a signal handler.
fn pause_on_sigterm(control: Arc<Control>) {
    // SAFETY: the set is initialised by `sigemptyset` before it is used, and outlives the calls.
    let signals = unsafe {
        let mut signals = std::mem::zeroed();
        libc::sigemptyset(&mut signals);
        libc::sigaddset(&mut signals, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
        signals
    };
    std::thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: both pointers are valid for the call, which waits.
        while unsafe { libc::sigwait(&signals, &mut signal) } == 0 {
            control.command(Command::Pause);
        }
    });
}

fn read_spec(stdin: &mut impl BufRead) -> Result<WorkerSpec, String> {
    let mut line = String::new();
    stdin.read_line(&mut line).map_err(|error| error.to_string())?;
    let spec: WorkerSpec = serde_json::from_str(&line).map_err(|error| error.to_string())?;
    if spec.protocol != PROTOCOL_VERSION {
        return Err(format!("the runner speaks protocol {}, this worker {PROTOCOL_VERSION}", spec.protocol));
    }
    Ok(spec)
}

/// Takes commands until standard input ends, and with it the process: nobody is left to work for, and
/// what is half written has a temporary name.
fn follow(stdin: impl BufRead, control: &Control) -> ! {
    for line in stdin.lines() {
        let Ok(line) = line else { break };
        match serde_json::from_str(&line) {
            Ok(command) => control.command(command),
            Err(error) => tracing::warn!(%error, "a command that is not known was ignored"),
        }
    }
    control.orphan();
    // SAFETY: ends the process without running destructors under threads that still compute.
    unsafe { libc::_exit(Exit::Orphaned as i32) }
}

/// Runs a task and reports how it ended. Panics, such as tch's, become failures.
pub fn run_task(spec: WorkerSpec, control: &Control, reporter: &mut Reporter, ingest: Ingest) -> Exit {
    let ended = catch_unwind(AssertUnwindSafe(|| dispatch(spec, control, reporter, ingest)))
        .unwrap_or_else(|panic| Err(Halt::Failed(failure::from_message(&panic_message(panic.as_ref())))));
    match ended {
        _ if control.is_orphaned() => Exit::Orphaned,
        Ok(result) => {
            reporter.send(Report::Done { result });
            Exit::Done
        }
        Err(Halt::Stopped) => Exit::Stopped,
        Err(Halt::Failed(failure)) => {
            reporter.send(Report::Failed { failure });
            Exit::Failed
        }
    }
}

fn dispatch(spec: WorkerSpec, control: &Control, reporter: &mut Reporter, ingest: Ingest) -> Result<TaskResult, Halt> {
    match spec.task {
        Task::Train(task) => {
            shim::initialize(spec.threads)?;
            train::train(&task, spec.threads, control, reporter)
        }
        Task::Tokenizer(task) => Ok(make_tokenizer(&task)?),
        Task::Statistics(task) => Ok(statistics(&task)?),
        // Stopped ingestion fails in its own words; the runner wants to hear that it stopped.
        Task::Ingest(task) => ingest(task, control, reporter).map_err(|failure| match control.is_stopping() {
            true => Halt::Stopped,
            false => Halt::Failed(failure),
        }),
    }
}

fn make_tokenizer(task: &TokenizerTask) -> Result<TaskResult, Failure> {
    let made = match (&task.dataset, &task.file) {
        (Some(dataset), None) => tokenizer::train(dataset, task.vocabulary, &task.output)?,
        (None, Some(file)) => tokenizer::import(file, &task.output)?,
        _ => return Err(failure::new(FailureCode::Internal, "a tokenizer is made from a dataset or from a file, one of them")),
    };
    Ok(TaskResult::Tokenizer {
        folder: task.output.clone(),
        sha256: made.sha256().to_owned(),
        vocabulary: made.vocabulary(),
        added_roles: made.added_roles().to_vec(),
    })
}

fn statistics(task: &StatisticsTask) -> Result<TaskResult, Failure> {
    let tokenizer = Tokenizer::load(&task.tokenizer)?;
    Ok(TaskResult::Statistics { statistics: tokenizer::statistics(&task.dataset, &tokenizer)? })
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}
