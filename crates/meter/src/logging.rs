//! Structured logs on standard error.
//!
//! Standard output stays for results, so that a program's answer can be piped. What may be logged: routes, counts,
//! times and request ids. What may not, at any level above `trace`: prompts, answers and keys.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;

/// How a line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// Why logging could not start.
#[derive(Debug)]
pub enum LogError {
    /// The filter doesn't parse.
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The process logs already.
    AlreadySet,
}

impl std::fmt::Display for LogError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LogError::Filter { filter, reason } => {
                write!(
                    f,
                    "log filter {filter:?} is wrong ({reason}); like `info` or `warn,consort_server=debug`"
                )
            }
            LogError::AlreadySet => write!(f, "logging was already set up in this process"),
        }
    }
}

impl std::error::Error for LogError {}

/// Sends this process's logs to standard error. `filter` is a level (`info`) or directives
/// (`warn,consort_server=debug`). `colour`: text is wanted with colours, which it gets where standard error is a terminal;
/// whoever reads a file or a pipe has no use for escape sequences.
///
/// # Errors
/// [`LogError`] where the filter doesn't parse or the process logs already.
pub fn init_logging(format: LogFormat, filter: &str, colour: bool) -> Result<(), LogError> {
    let wrong = |reason: String| LogError::Filter { filter: filter.to_owned(), reason };
    let env_filter = EnvFilter::builder().parse(filter).map_err(|e| wrong(e.to_string()))?;
    let colour = colour && std::io::stderr().is_terminal();
    let builder =
        tracing_subscriber::fmt().with_env_filter(env_filter).with_ansi(colour).with_writer(std::io::stderr);
    let set = match format {
        LogFormat::Text => builder.with_target(false).finish().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).finish().try_init(),
    };
    set.map_err(|_| LogError::AlreadySet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_filter_is_named_and_logging_starts_once() {
        let error = init_logging(LogFormat::Text, "consort=loud", true).unwrap_err();
        assert!(error.to_string().contains("consort=loud"), "{error}");
        init_logging(LogFormat::Json, "warn,consort_server=debug", true).unwrap();
        assert!(matches!(init_logging(LogFormat::Text, "info", true), Err(LogError::AlreadySet)));
    }
}
