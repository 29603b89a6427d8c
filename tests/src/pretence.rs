//! What a stack is led to believe of the time and of its disk, while it runs: the tests' hand on things that
//! they cannot move.
//!
//! A library is loaded into the stack's processes (`pretence.c`, built by `build.rs`). The database keeps the
//! time, and workers and engines, which see little of the environment, know everything as it is.

use std::{fs, os::unix::fs::FileExt};

use crate::Builder;

const CLOCKS: [&str; 2] = ["clock-api", "clock-runner"];
const FREE: &str = "free";

#[derive(Debug)]
pub struct Pretence {
    folder: tempfile::TempDir,
}

impl Pretence {
    /// Everything is as it is.
    pub fn new() -> Pretence {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let pretence = Pretence { folder };
        pretence.reset();
        pretence
    }

    pub(crate) fn on(&self, builder: Builder) -> Builder {
        let folder = self.folder.path().to_str().expect("a path of text");
        builder.variable("LD_PRELOAD", env!("LATHE_TEST_PRETENCE")).variable("LATHE_TEST_PRETENCE", folder)
    }

    fn say(&self, name: &str, number: i64) {
        let path = self.folder.path().join(name);
        let file = fs::File::options().create(true).truncate(false).write(true).open(path).expect("the folder is ours");
        file.write_all_at(&number.to_ne_bytes(), 0).expect("the folder is ours");
    }

    /// The wall clock of `lathe api` is so many seconds ahead.
    pub fn move_clock_of_api(&self, seconds: i64) {
        self.say(CLOCKS[0], seconds);
    }

    /// That of every `lathe runner`.
    pub fn move_clock_of_runners(&self, seconds: i64) {
        self.say(CLOCKS[1], seconds);
    }

    /// So much of the disk is free for api and runners.
    pub fn leave_free(&self, bytes: u64) {
        self.say(FREE, i64::try_from(bytes).expect("a number of bytes"));
    }

    pub fn reset(&self) {
        CLOCKS.iter().for_each(|clock| self.say(clock, 0));
        self.say(FREE, -1);
    }
}

impl Default for Pretence {
    fn default() -> Pretence {
        Pretence::new()
    }
}
