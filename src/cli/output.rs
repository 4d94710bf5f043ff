//! What the program writes: results on standard output, warnings on standard error.
//!
//! A reader that has gone (`daxcrypt info vault.img | head -1`) ends the output and not the command, which does to the end
//! what it was asked to do. Any other failure to write a result is the command's error; a warning that cannot be written
//! has nobody to read it. A secret goes straight to the descriptor, because buffers keep copies.
//!
//! Much of what is printed was written by others: labels and partition names on media, messages that quote them, names of
//! files, what a server answers. A terminal takes some characters as commands (ECMA-48), so none of them gets through: each
//! is printed as `\u001b`, which JSON reads as the same character again. A line stays one line: what follows a line end that
//! was in a message is indented, so that it cannot pass for a message of its own. Nothing in the program writes to the
//! terminal by another way, save the bar of `progress` and the table of `status --watch`, whose lines pass here (`tests/tidy.rs`).

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;

use rustix::io::Errno;
use serde::Serialize;

use super::error::Error;

/// Writes a formatted result without a newline of its own: `out!("{text}")?`.
macro_rules! out {
    ($($part:tt)*) => { $crate::cli::output::print(format_args!($($part)*)) };
}

/// Writes a formatted line of the result: `outln!("{count} slots")?`.
macro_rules! outln {
    ($($part:tt)*) => { $crate::cli::output::print_line(format_args!($($part)*)) };
}

/// Writes a line to standard error that begins with `daxcrypt: warning: `.
macro_rules! warning {
    ($($part:tt)*) => { $crate::cli::output::complain(format_args!("warning: {}", format_args!($($part)*))) };
}

pub(crate) use {out, outln, warning};

/// Writes a part of the result, which may have lines; see `out!`.
pub(crate) fn print(text: fmt::Arguments<'_>) -> Result<(), Error> {
    finished(io::stdout().lock().write_all(shown(text, "\n").as_bytes()))
}

/// Writes a line of the result; see `outln!`.
pub(crate) fn print_line(text: fmt::Arguments<'_>) -> Result<(), Error> {
    finished(writeln!(io::stdout().lock(), "{}", shown(text, CONTINUED)))
}

/// One JSON value, for scripts.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::Io { doing: "cannot print JSON", source: error.into() })?;
    out!("{text}\n")
}

/// Writes bytes that must not stay in a buffer.
pub(crate) fn secret(bytes: &[u8]) -> Result<(), Error> {
    finished(write_unbuffered(bytes))
}

/// Writes a secret that is nowhere else, on a line of its own. Here a reader that has gone is an error, and so is a file that
/// does not keep what was written.
pub(crate) fn secret_to_keep(bytes: &[u8]) -> io::Result<()> {
    write_unbuffered(bytes)?;
    write_unbuffered(b"\n")?;
    match rustix::fs::fsync(io::stdout()) {
        Err(Errno::INVAL | Errno::ROFS | Errno::NOTSUP) => Ok(()), // a pipe, a terminal: nothing to be kept
        synced => Ok(synced?),
    }
}

fn write_unbuffered(bytes: &[u8]) -> io::Result<()> {
    io::stdout().flush()?;
    let descriptor = io::stdout().as_fd().try_clone_to_owned()?;
    File::from(descriptor).write_all(bytes)
}

/// Writes `daxcrypt: ` and a line to standard error.
pub(crate) fn complain(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "daxcrypt: {}", shown(text, CONTINUED));
}

/// Writes what to try next to standard error.
pub(crate) fn hint(text: &str) {
    let _ = writeln!(io::stderr().lock(), "  try: {}", shown(format_args!("{text}"), CONTINUED));
}

/// Writes a question to standard error, where the answer is typed behind it.
pub(crate) fn ask(text: fmt::Arguments<'_>) {
    let _ = write!(io::stderr().lock(), "{}", shown(text, CONTINUED));
}

/// The text as a terminal may show it in a question.
pub(crate) fn harmless(text: &str) -> String {
    shown(format_args!("{text}"), CONTINUED)
}

/// The end of a line within a message.
const CONTINUED: &str = "\n  ";

/// The text without a character that a terminal obeys; `line_end` stands for a line end.
fn shown(text: fmt::Arguments<'_>, line_end: &str) -> String {
    let text = text.to_string();
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => safe.push_str(line_end),
            '\t' => safe.push('\t'),
            _ if is_obeyed(character) => safe.push_str(&format!("\\u{:04x}", u32::from(character))),
            _ => safe.push(character),
        }
    }
    safe
}

/// Control characters (C0, DEL and C1), and those of Unicode that turn the direction of text or end lines: they show a name
/// as another one.
fn is_obeyed(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn finished(written: io::Result<()>) -> Result<(), Error> {
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::Io { doing: "cannot write to standard output", source: error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_shown_and_text_of_every_language_stays() {
        let plain = "\u{e4}\u{4f60}\u{1f512} \u{5e9}\u{5dc} tab\there";
        assert_eq!(shown(format_args!("{plain}"), CONTINUED), plain);
        for obeyed in ["\x1b[2J", "\u{9b}2J", "\r", "\x07", "\x7f", "\u{202e}", "\u{2066}", "\u{2028}", "\0"] {
            let shown = shown(format_args!("a{obeyed}b"), CONTINUED);
            assert!(shown.starts_with("a\\u") && !shown.contains(obeyed), "{shown:?}");
        }
        assert_eq!(shown(format_args!("\x1b[31mred\u{9b}0m"), CONTINUED), "\\u001b[31mred\\u009b0m");
    }

    #[test]
    fn a_message_cannot_pass_for_two() {
        assert_eq!(
            shown(format_args!("label x\ndaxcrypt: all is well"), CONTINUED),
            "label x\n  daxcrypt: all is well"
        );
    }

    #[test]
    fn json_means_the_same_after_it() {
        let label = "\u{9b}2J\u{202e}\x1b\n\"\\";
        let text = serde_json::json!({ "label": label }).to_string();
        let shown = shown(format_args!("{text}"), "\n");
        assert!(!shown.contains(is_obeyed), "{shown}");
        let read: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(read["label"], label);
    }
}
