//! Where structured logs go: lines on standard error.
//!
//! What is logged is the layers' business: who comes and goes, never a key or contents.

use tracing_subscriber::filter::LevelFilter;

use super::error::Error;

/// The environment variable that stands in for `--log`.
const VARIABLE: &str = "DAXCRYPT_LOG";

/// Starts logging at the level that was asked for, or that the environment names; without either, who comes and goes, what failed and why.
pub(super) fn start(asked: Option<&str>) -> Result<(), Error> {
    let from_environment = std::env::var(VARIABLE).ok();
    let (origin, text) = match (asked, &from_environment) {
        (Some(text), _) => ("--log", text),
        (None, Some(text)) => (VARIABLE, text.as_str()),
        (None, None) => ("", "info"),
    };
    let level: LevelFilter = text
        .parse()
        .map_err(|_| Error::Usage(format!("{origin} {text}: not one of off, error, warn, info, debug, trace")))?;
    // A logger that is there already is a test's, and stays.
    let _ = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).try_init();
    Ok(())
}
