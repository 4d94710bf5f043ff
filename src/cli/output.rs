//! What the program writes: results on standard output, warnings on standard error.
//!
//! A reader that has gone (`daxcrypt info vault.img | head -1`) ends the output and not the command, which does to the end
//! what it was asked to do. Any other failure to write a result is the command's error; a warning that cannot be written
//! has nobody to read it. A secret goes straight to the descriptor, because buffers keep copies.

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;

use serde::Serialize;

use super::error::Error;

/// Writes a formatted result without a newline of its own: `out!("{text}")?`.
macro_rules! out {
    ($($part:tt)*) => { $crate::cli::output::print(format_args!($($part)*)) };
}

/// Writes a formatted line of the result: `outln!("{count} slots")?`.
macro_rules! outln {
    ($($part:tt)*) => { $crate::cli::output::print(format_args!("{}\n", format_args!($($part)*))) };
}

/// Writes a line to standard error that begins with `daxcrypt: warning: `.
macro_rules! warning {
    ($($part:tt)*) => { $crate::cli::output::complain(format_args!("warning: {}", format_args!($($part)*))) };
}

pub(crate) use {out, outln, warning};

/// Writes a part of the result; see `out!`.
pub(crate) fn print(text: fmt::Arguments<'_>) -> Result<(), Error> {
    finished(io::stdout().lock().write_fmt(text))
}

/// One JSON value, for scripts.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::Io { doing: "cannot print JSON", source: error.into() })?;
    outln!("{text}")
}

/// Writes bytes that must not stay in a buffer.
pub(crate) fn secret(bytes: &[u8]) -> Result<(), Error> {
    let written = io::stdout().flush().and_then(|()| {
        let descriptor = io::stdout().as_fd().try_clone_to_owned()?;
        File::from(descriptor).write_all(bytes)
    });
    finished(written)
}

/// Writes `daxcrypt: ` and a line to standard error.
pub(crate) fn complain(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "daxcrypt: {text}");
}

/// Writes to standard error without a newline, as a question or a hint.
pub(crate) fn ask(text: fmt::Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
}

fn finished(written: io::Result<()>) -> Result<(), Error> {
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::Io { doing: "cannot write to standard output", source: error })
        }
        _ => Ok(()),
    }
}
