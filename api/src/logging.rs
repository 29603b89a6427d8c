//! Logs: lines on standard error, as text or JSON. Never on standard output, which is for what was
//! asked for.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, LogOptions};

/// Installs the process's log. A filter that cannot be read is an error in a sentence.
pub fn install(options: &LogOptions) -> Result<(), String> {
    let text = &options.log;
    let filter = EnvFilter::try_new(text).map_err(|error| format!("the log filter `{text}` cannot be read: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(true);
    let installed = match options.log_format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(|error| error.to_string())
}
