//! What the demo shows while it works: bars where there is a terminal, plain lines otherwise.
//!
//! Nothing here prints a percentage, so that the last one on the screen is the score.

use std::{
    io::{IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Plain lines of one stage are at least this far apart.
const PLAIN_PERIOD: Duration = Duration::from_secs(10);

/// One stage of the run, from its title to its result.
pub struct Stage {
    title: &'static str,
    begun: Instant,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Stage {
    pub fn begin(title: &'static str) -> Stage {
        let now = Instant::now();
        let bar = std::io::stdout().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
            bar.set_style(style("{spinner} {prefix:<22} {elapsed:>4} {msg}"));
            bar.set_prefix(title);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            say(&format!("{title} …"));
        }
        Stage { title, begun: now, bar, last_line: now }
    }

    /// `done` of `total`, where the total is known, and a few words on how it goes.
    pub fn progress(&mut self, done: u64, total: Option<u64>, note: &str) {
        match &self.bar {
            Some(bar) => {
                if let Some(total) = total
                    && bar.length() != Some(total)
                {
                    bar.set_style(
                        style("{spinner} {prefix:<22} {elapsed:>4} [{bar:28}] {pos}/{len} {msg}").progress_chars("=> "),
                    );
                    bar.set_length(total);
                }
                bar.set_position(done);
                bar.set_message(note.to_owned());
            }
            None if self.last_line.elapsed() >= PLAIN_PERIOD => {
                self.last_line = Instant::now();
                let of = total.map_or(String::new(), |total| format!("{done}/{total} "));
                say(&format!("  {}: {of}{note}", self.title));
            }
            None => {}
        }
    }

    /// Ends the stage with its result.
    pub fn finish(self, result: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        say(&format!("{:<22} {:>5.1} s  {result}", self.title, self.begun.elapsed().as_secs_f64()));
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A line on standard output. A reader that has gone away is no reason to stop.
pub fn say(line: &str) {
    piece(line);
    piece("\n");
}

/// A part of a line, shown at once.
pub fn piece(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// `1m 05s`, or `12s`.
pub fn seconds(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m {:02}s", seconds / 60, seconds % 60) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        assert_eq!(seconds(59.4), "59s");
        assert_eq!(seconds(65.0), "1m 05s");
        assert_eq!(seconds(-1.0), "0s");
    }
}
