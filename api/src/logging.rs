//! Logs: lines on standard error, as text or JSON. Never on standard output, which is for what was
//! asked for. What is logged can be changed while the process runs.

use std::{io::IsTerminal, sync::OnceLock};

use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt};

use crate::config::{LogFormat, LogOptions};

/// The installed filter, and the one that the process was started with.
static FILTER: OnceLock<(reload::Handle<EnvFilter, Registry>, String)> = OnceLock::new();

/// A filter by module; the error is a sentence.
pub fn parse(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text).map_err(|error| format!("the log filter `{text}` cannot be read: {error}"))
}

/// Installs the process's log. A filter that cannot be read is an error in a sentence.
pub fn install(options: &LogOptions) -> Result<(), String> {
    let (filter, handle) = reload::Layer::new(parse(&options.log)?);
    let lines = fmt::layer().with_writer(std::io::stderr).with_target(true);
    let lines = match options.log_format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(|error| error.to_string())?;
    FILTER.get_or_init(|| (handle, options.log.clone()));
    Ok(())
}

/// Logs by another filter from now on; none: by the one that the process was started with. One that this
/// version cannot read changes nothing.
pub fn apply(filter: Option<&str>) {
    let Some((handle, started_with)) = FILTER.get() else { return };
    let text = filter.unwrap_or(started_with);
    let reloaded = parse(text).and_then(|filter| handle.reload(filter).map_err(|error| error.to_string()));
    match reloaded {
        Ok(()) => tracing::info!(filter = text, "what is logged was changed"),
        Err(error) => tracing::warn!(error, "what is logged stays as it is"),
    }
}
