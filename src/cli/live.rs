//! Text that is drawn again and again in one place of a terminal, until Ctrl-C; a block after the other where there is none.
//!
//! The only state of the terminal that is changed is the echo, so that keys do not spoil the picture; it comes back however
//! this ends, and the last picture stays on the screen.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::error::Error;
use super::output::harmless;

/// Shows what `tell` gives, each `interval`, until SIGINT, SIGTERM or SIGHUP comes, the reader has gone, or `tell` fails.
pub(crate) fn show(
    interval: Duration,
    redraws: bool,
    tell: impl FnMut() -> Result<String, Error> + Send + 'static,
) -> Result<(), Error> {
    let failed = |source| Error::Io { doing: "cannot wait for signals", source };
    let (signalled, sender) = UnixStream::pair().map_err(failed)?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        let sender = sender.try_clone().map_err(failed)?;
        signal_hook::low_level::pipe::register(signal, sender).map_err(failed)?;
    }
    let screen = (redraws && io::stdout().is_terminal()).then(Quiet::new);
    // Whoever is asked may be slow, and Ctrl-C is not.
    let on_terminal = screen.is_some();
    let (ended, end) = UnixStream::pair().map_err(failed)?;
    let showing = thread::spawn(move || {
        let _end = end; // is closed with the thread
        repeat(interval, on_terminal, tell)
    });
    let mut fds = [PollFd::new(&signalled, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
    while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
    drop(screen);
    if showing.is_finished() || !fds[1].revents().is_empty() {
        return showing.join().unwrap_or(Ok(()));
    }
    Ok(())
}

/// Shows until it cannot be told, or cannot be shown.
fn repeat(interval: Duration, on_terminal: bool, mut tell: impl FnMut() -> Result<String, Error>) -> Result<(), Error> {
    let (mut next, mut drawn) = (Instant::now(), 0);
    loop {
        let text = tell()?;
        let shown = if on_terminal {
            let (picture, lines) = picture(&text, drawn, window());
            drawn = lines;
            write_all(&picture)
        } else {
            write_all(&plain(&text))
        };
        match shown {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            Err(source) => return Err(Error::Io { doing: "cannot write to standard output", source }),
            Ok(()) => {}
        }
        // What took too long does not make the following ones come at once.
        next = (next + interval).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn write_all(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Columns and rows of the terminal, as far as it tells.
fn window() -> (usize, usize) {
    let size = tcgetwinsize(io::stdout()).ok().filter(|size| size.ws_col > 0 && size.ws_row > 0);
    size.map_or((80, 24), |size| (size.ws_col.into(), size.ws_row.into()))
}

/// Each line harmless by itself.
fn plain(text: &str) -> String {
    text.lines().map(|line| harmless(line) + "\n").collect()
}

/// What draws `text` over the `drawn` lines that were drawn before, cut to the window, and how many lines it has.
fn picture(text: &str, drawn: usize, (columns, rows): (usize, usize)) -> (String, usize) {
    let mut picture = String::new();
    if drawn > 0 {
        let _ = write!(picture, "\x1b[{drawn}A");
    }
    picture.push('\r');
    // The cursor stands below the last line.
    let lines: Vec<_> = text.lines().take(rows.saturating_sub(1).max(1)).collect();
    for line in &lines {
        picture.extend(harmless(line).chars().take(columns));
        picture.push_str("\x1b[K\n");
    }
    picture.push_str("\x1b[J");
    (picture, lines.len())
}

/// A terminal without echo, until it is dropped.
#[derive(Debug)]
struct Quiet {
    before: Option<Termios>,
}

impl Quiet {
    fn new() -> Self {
        let before = tcgetattr(io::stdout()).ok();
        if let Some(before) = &before {
            let mut quiet = before.clone();
            quiet.local_modes.remove(LocalModes::ECHO);
            // A program in the background would be stopped for this; it draws with the echo, then.
            let _ = tcsetattr(io::stdout(), OptionalActions::Now, &quiet);
        }
        Self { before }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // What was typed meanwhile was not meant for a shell.
            let _ = tcsetattr(io::stdout(), OptionalActions::Flush, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_covers_the_one_before_and_stays_in_the_window() {
        let (first, lines) = picture("one\ntwo", 0, (80, 24));
        assert_eq!((first.as_str(), lines), ("\rone\x1b[K\ntwo\x1b[K\n\x1b[J", 2));
        let (second, lines) = picture("a long line\nb\nc\nd", 2, (6, 4));
        assert_eq!((second.as_str(), lines), ("\x1b[2A\ra long\x1b[K\nb\x1b[K\nc\x1b[K\n\x1b[J", 3));
        // Nothing of a name reaches the terminal as a command.
        assert_eq!(picture("\x1b[31m", 0, (80, 24)).0, "\r\\u001b[31m\x1b[K\n\x1b[J");
        assert_eq!(plain("a\nb\x1b"), "a\nb\\u001b\n");
    }
}
