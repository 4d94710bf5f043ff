//! Asking for a passphrase at the terminal, without echo.
//!
//! The terminal is read byte by byte, with its line editing and its signals turned off: whatever is typed arrives here, and
//! the terminal is as it was before anything else happens. So Ctrl-C and Ctrl-Z do what they do everywhere, but after the
//! echo is back; a tab is a part of the passphrase; and bytes that are no UTF-8 are bytes. What erases is what erases at this
//! terminal anyway (stty(1)). SIGTERM and SIGHUP from elsewhere end the program as they always do, after the echo is back.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use nix::sys::signal::{SIGHUP, SIGTERM, SigSet, SigmaskHow};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use rustix::termios::{InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};

use crate::namespace::PASSPHRASE_BYTES_MAX;
use crate::secret::SecretBytes;

/// The terminal that this process belongs to, wherever its standard streams go.
const TERMINAL: &str = "/dev/tty";

/// The controlling terminal, which shows nothing of what is typed until this is dropped.
pub(super) struct Silent {
    terminal: File,
    before: Termios,
    ending: Ending,
}

/// SIGTERM and SIGHUP, which wait as long as this is there.
struct Ending {
    waiting: SignalFd,
    mask_before: SigSet,
}

impl Ending {
    fn hold() -> io::Result<Self> {
        let signals = SigSet::from_iter([SIGTERM, SIGHUP]);
        let waiting = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { waiting, mask_before: signals.thread_swap_mask(SigmaskHow::SIG_BLOCK)? })
    }

    /// Those that wait do what they do, which ends the program unless the command catches them.
    fn release(&self) -> io::Result<()> {
        Ok(self.mask_before.thread_set_mask()?)
    }
}

/// What a byte means at this terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Typed {
    Byte(u8),
    /// Enter, or the end of the input.
    End,
    EraseCharacter,
    EraseWord,
    EraseLine,
    Signal(Signal),
}

impl Silent {
    /// Turns the echo off. What was typed before nobody asked is dropped.
    pub(super) fn new() -> io::Result<Self> {
        let terminal = OpenOptions::new().read(true).write(true).open(TERMINAL)?;
        let before = tcgetattr(&terminal)?;
        let silent = Self { terminal, before, ending: Ending::hold()? };
        silent.turn_echo_off()?;
        Ok(silent)
    }

    fn turn_echo_off(&self) -> io::Result<()> {
        let mut modes = self.before.clone();
        modes.local_modes &= !(LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG);
        modes.local_modes &= !LocalModes::IEXTEN; // Ctrl-V would be taken away
        modes.input_modes &= !InputModes::ISTRIP;
        modes.special_codes[SpecialCodeIndex::VMIN] = 1;
        modes.special_codes[SpecialCodeIndex::VTIME] = 0;
        Ok(tcsetattr(&self.terminal, OptionalActions::Flush, &modes)?)
    }

    fn restore(&self) -> io::Result<()> {
        Ok(tcsetattr(&self.terminal, OptionalActions::Drain, &self.before)?)
    }

    /// Asks `question` and gives what is typed up to Enter.
    pub(super) fn ask(&mut self, question: &str) -> io::Result<SecretBytes> {
        self.terminal.write_all(question.as_bytes())?;
        let mut line = Line::new();
        loop {
            let mut byte = [0];
            self.wait()?;
            if self.terminal.read(&mut byte)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into()); // it was hung up
            }
            match self.meaning(byte[0]) {
                Typed::Byte(byte) => line.push(byte)?,
                Typed::End => break,
                Typed::EraseCharacter => line.erase_character(),
                Typed::EraseWord => line.erase_word(),
                Typed::EraseLine => line.erase_to(0),
                Typed::Signal(signal) => {
                    self.obey(signal)?;
                    self.terminal.write_all(question.as_bytes())?;
                    line.erase_to(0);
                }
            }
        }
        self.terminal.write_all(b"\n")?;
        Ok(line.into_secret())
    }

    /// Waits for something typed. Whatever ends the program instead does so with the terminal as it was.
    fn wait(&self) -> io::Result<()> {
        let watched = [self.terminal.as_fd(), self.ending.waiting.as_fd()];
        let mut fds = watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        while let Err(errno) = rustix::event::poll(&mut fds, None) {
            if errno != Errno::INTR {
                return Err(errno.into());
            }
        }
        if fds[1].revents().is_empty() {
            return Ok(());
        }
        self.terminal.try_clone()?.write_all(b"\n")?;
        self.restore()?;
        self.ending.release()?;
        Err(io::ErrorKind::Interrupted.into())
    }

    /// Does what the terminal would have done, with the terminal as it was. Whoever comes back was stopped and goes on; or
    /// the signal is caught by the command, which is to end.
    fn obey(&self, signal: Signal) -> io::Result<()> {
        self.terminal.try_clone()?.write_all(b"\n")?;
        self.restore()?;
        kill_process(getpid(), signal)?;
        if signal != Signal::TSTP {
            return Err(io::ErrorKind::Interrupted.into());
        }
        self.turn_echo_off()
    }

    fn meaning(&self, byte: u8) -> Typed {
        let code = |index| self.before.special_codes[index] == byte && byte != 0; // 0 turns a function off
        let signals = self.before.local_modes.contains(LocalModes::ISIG);
        match byte {
            b'\n' | b'\r' => Typed::End,
            _ if signals && code(SpecialCodeIndex::VINTR) => Typed::Signal(Signal::INT),
            _ if signals && code(SpecialCodeIndex::VQUIT) => Typed::Signal(Signal::QUIT),
            _ if signals && code(SpecialCodeIndex::VSUSP) => Typed::Signal(Signal::TSTP),
            _ if code(SpecialCodeIndex::VEOF) => Typed::End,
            _ if code(SpecialCodeIndex::VERASE) => Typed::EraseCharacter,
            _ if code(SpecialCodeIndex::VWERASE) => Typed::EraseWord,
            _ if code(SpecialCodeIndex::VKILL) => Typed::EraseLine,
            byte => Typed::Byte(byte),
        }
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.restore(); // a terminal that is gone needs nothing
        let _ = self.ending.release(); // it was a mask before
    }
}

/// What has been typed so far.
struct Line {
    bytes: SecretBytes,
    len: usize,
}

impl Line {
    fn new() -> Self {
        Self { bytes: SecretBytes::zeroed(PASSPHRASE_BYTES_MAX), len: 0 }
    }

    fn push(&mut self, byte: u8) -> io::Result<()> {
        let room = self.bytes.get_mut(self.len);
        *room.ok_or_else(|| io::Error::other("it is longer than 64 KiB, which no passphrase is"))? = byte;
        self.len += 1;
        Ok(())
    }

    fn erase_to(&mut self, len: usize) {
        self.bytes[len..self.len].fill(0);
        self.len = len;
    }

    /// The last character: of UTF-8, with the bytes that continue it.
    fn erase_character(&mut self) {
        let is_continued = |byte: &u8| byte & 0xc0 == 0x80;
        let continued = self.bytes[..self.len].iter().rev().take(3).take_while(|byte| is_continued(byte)).count();
        self.erase_to(self.len.saturating_sub(continued + 1));
    }

    /// The last word, and spaces behind it.
    fn erase_word(&mut self) {
        let typed = &self.bytes[..self.len];
        let word = typed.iter().rposition(|&byte| byte != b' ').map_or(0, |last| last + 1);
        let start = typed[..word].iter().rposition(|&byte| byte == b' ').map_or(0, |space| space + 1);
        self.erase_to(start);
    }

    fn into_secret(mut self) -> SecretBytes {
        self.bytes.truncate(self.len);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(text: &[u8]) -> Line {
        let mut line = Line::new();
        text.iter().for_each(|&byte| line.push(byte).unwrap());
        line
    }

    #[test]
    fn a_character_and_a_word_are_erased_whole() {
        for (before, character, word) in [
            (&b"abc"[..], &b"ab"[..], &b""[..]),
            ("a\u{e4}".as_bytes(), b"a", b""),
            ("a b\u{20ac}".as_bytes(), b"a b", b"a "),
            ("\u{1f512}".as_bytes(), b"", b""),
            (b"caf\xe9", b"caf", b""), // Latin-1
            (b"one two  ", b"one two ", b"one "),
            (b"\x80\x80\x80\x80\x80", b"\x80", b""),
            (b"", b"", b""),
        ] {
            let mut line = typed(before);
            line.erase_character();
            assert_eq!(&*line.into_secret(), character, "{before:?}");
            let mut line = typed(before);
            line.erase_word();
            assert_eq!(&*line.into_secret(), word, "{before:?}");
        }
    }

    #[test]
    fn what_is_too_long_is_refused_and_not_cut() {
        let mut line = typed(&vec![b'x'; PASSPHRASE_BYTES_MAX]);
        assert!(line.push(b'x').is_err());
    }
}
