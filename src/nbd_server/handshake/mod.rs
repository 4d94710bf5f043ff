//! The handshake as a machine without I/O: bytes in, bytes out, and in the end a chosen export.
//!
//! ```text
//!  ClientFlags --> Option <--> Skip (payload too large to parse)
//!                    |
//!                    +--> Done: Transmission | StartTls | Closed
//! ```
//!
//! Guards: whatever arrives, the machine stays in sync or ends; it holds at most the chosen context's export name,
//! and one step appends at most one option's replies. No export is read or written before it has been chosen.
//! It does not know sockets, clocks or how TLS works: the caller enforces the deadline and does the TLS handshake.

mod options;
mod payload;

use std::cell::Cell;
use std::sync::Arc;

use super::access::Peer;
use super::export::{Exports, Served};
use super::limits::{OPTION_PAYLOAD_BYTES_MAX, OPTION_SKIP_BYTES_MAX, OPTIONS_MAX};
use super::negotiated::{Negotiated, ReplyStyle};
use super::wire::{
    CLIENT_FLAGS_BYTES, GREETING_BYTES, NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES, NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES, NBD_IHAVEOPT, NBD_MAGIC, NBD_OPT_ABORT, NBD_OPT_EXPORT_NAME, OPTION_HEADER_BYTES, OptionHeader,
};

/// Whether clients have to use TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsMode {
    /// There is no TLS (the protocol's NOTLS).
    #[default]
    Off,
    /// Clients may use TLS; exports marked so need it (SELECTIVETLS).
    Allow,
    /// Nothing works before TLS (FORCEDTLS).
    Require,
}

/// What a step led to.
#[derive(Debug)]
pub enum Step {
    /// More bytes are needed before anything can happen.
    NeedMore,
    /// A message was processed; step again with the bytes that were not consumed.
    Continue,
    /// The handshake is over. Output has to be sent first.
    Done(Outcome),
}

/// How a handshake ends.
#[derive(Debug)]
pub enum Outcome {
    /// Requests follow.
    Transmission(Negotiated),
    /// Do the TLS handshake, then call [`Handshake::tls_started`]. Bytes that were received but not consumed came
    /// in plaintext behind the option and must end the connection.
    StartTls,
    /// Close the connection.
    Closed(CloseReason),
}

/// Why a handshake ended without an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client said so.
    Aborted,
    /// The client set a handshake flag that was not offered.
    UnknownClientFlags(u32),
    /// An option did not begin with `IHAVEOPT`.
    BadOptionMagic,
    /// An option's payload is too large even to be skipped.
    OptionTooLarge(u32),
    /// Too many options.
    TooManyOptions,
    /// `EXPORT_NAME` cannot be refused in any other way.
    ExportNameRefused,
    /// An option other than `EXPORT_NAME` from a client without fixed newstyle.
    NotFixedNewstyle,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    ClientFlags,
    Option,
    Skip { remaining_bytes: u32 },
}

/// The metadata contexts that were selected, and for which export.
#[derive(Debug)]
struct SelectedContexts {
    export_name: String,
    allocation: bool,
}

/// The machine.
#[derive(Debug)]
pub struct Handshake {
    exports: Arc<Exports>,
    tls_mode: TlsMode,
    tls_active: bool,
    peer: Peer,
    state: State,
    options_seen: u32,
    fixed_newstyle: bool,
    no_zeroes: bool,
    stopping: bool,
    replies: ReplyStyle,
    contexts: Option<SelectedContexts>,
    /// Whether the log has told that an export is not for this client.
    refusal_told: Cell<bool>,
}

impl Handshake {
    /// A machine at its beginning, for a client known as `peer`.
    pub fn new(exports: Arc<Exports>, tls_mode: TlsMode, peer: Peer) -> Self {
        Self {
            exports,
            tls_mode,
            tls_active: false,
            peer,
            state: State::ClientFlags,
            options_seen: 0,
            fixed_newstyle: false,
            no_zeroes: false,
            stopping: false,
            replies: ReplyStyle::Simple,
            contexts: None,
            refusal_told: Cell::new(false),
        }
    }

    /// What the server sends first.
    pub fn greeting() -> [u8; GREETING_BYTES] {
        let mut bytes = [0; GREETING_BYTES];
        bytes[0..8].copy_from_slice(&NBD_MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&NBD_IHAVEOPT.to_be_bytes());
        bytes[16..18].copy_from_slice(&(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes());
        bytes
    }

    /// Makes every later option be refused with `SHUTDOWN`.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Continues after a successful TLS handshake with a client known as `peer`. What was negotiated in plaintext
    /// is forgotten.
    pub fn tls_started(&mut self, peer: Peer) {
        self.tls_active = true;
        self.peer = peer;
        self.state = State::Option;
        self.replies = ReplyStyle::Simple;
        self.contexts = None;
    }

    /// Consumes at most one message from the front of `input` and appends its replies to `output`. Returns how
    /// many bytes were consumed.
    pub fn step(&mut self, input: &[u8], output: &mut Vec<u8>) -> (usize, Step) {
        match self.state {
            State::ClientFlags => self.step_client_flags(input),
            State::Option => self.step_option(input, output),
            State::Skip { remaining_bytes } => {
                let skipped = usize::try_from(remaining_bytes).map_or(input.len(), |n| n.min(input.len()));
                let remaining_bytes = remaining_bytes - u32::try_from(skipped).unwrap_or(remaining_bytes);
                self.state = if remaining_bytes == 0 { State::Option } else { State::Skip { remaining_bytes } };
                (skipped, if skipped == 0 { Step::NeedMore } else { Step::Continue })
            }
        }
    }

    fn step_client_flags(&mut self, input: &[u8]) -> (usize, Step) {
        let Some(bytes) = input.first_chunk::<CLIENT_FLAGS_BYTES>() else { return (0, Step::NeedMore) };
        let flags = u32::from_be_bytes(*bytes);
        if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) != 0 {
            return (bytes.len(), closed(CloseReason::UnknownClientFlags(flags)));
        }
        self.fixed_newstyle = flags & NBD_FLAG_C_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & NBD_FLAG_C_NO_ZEROES != 0;
        self.state = State::Option;
        (bytes.len(), Step::Continue)
    }

    fn step_option(&mut self, input: &[u8], output: &mut Vec<u8>) -> (usize, Step) {
        let Some((head, rest)) = input.split_first_chunk::<OPTION_HEADER_BYTES>() else { return (0, Step::NeedMore) };
        let Some(header) = OptionHeader::decode(head) else { return (0, closed(CloseReason::BadOptionMagic)) };
        if header.payload_bytes > OPTION_SKIP_BYTES_MAX {
            return (0, closed(CloseReason::OptionTooLarge(header.payload_bytes)));
        }
        if self.options_seen == OPTIONS_MAX {
            return (0, closed(CloseReason::TooManyOptions));
        }
        if !self.fixed_newstyle && !matches!(header.option, NBD_OPT_EXPORT_NAME | NBD_OPT_ABORT) {
            return (0, closed(CloseReason::NotFixedNewstyle));
        }
        if header.payload_bytes > OPTION_PAYLOAD_BYTES_MAX {
            self.options_seen += 1;
            self.state = State::Skip { remaining_bytes: header.payload_bytes };
            return (OPTION_HEADER_BYTES, self.refuse_too_big(header, output));
        }
        let payload = usize::try_from(header.payload_bytes).ok().and_then(|len_bytes| rest.get(..len_bytes));
        let Some(payload) = payload else { return (0, Step::NeedMore) };
        self.options_seen += 1;
        (OPTION_HEADER_BYTES + payload.len(), self.run_option(header.option, payload, output))
    }

    /// The export of that name as this client may see it now.
    fn lookup(&self, name: &str) -> Lookup {
        let exact = self.exports.iter().find(|served| served.info.name == name);
        let found = exact.or_else(|| {
            let default = || self.exports.iter().find(|served| self.admits(served));
            if name.is_empty() { default().or_else(|| self.exports.iter().next()) } else { None }
        });
        match found {
            None => Lookup::Unknown,
            Some(served) if self.admits(served) => Lookup::Found(Arc::clone(served)),
            Some(served) if self.tls_would_help(served) => Lookup::NeedsTls,
            Some(served) => {
                self.tell_refusal(served);
                Lookup::Unknown
            }
        }
    }

    /// To the log, once: the client itself does not learn that there is such an export.
    fn tell_refusal(&self, served: &Served) {
        if !self.refusal_told.replace(true) {
            let reason = match served.info.tls_required && !self.tls_active {
                true => "it came without TLS",
                false => "no rule admits it",
            };
            tracing::warn!(peer = %self.peer, export = served.info.name.as_str(), "client refused: {reason}");
        }
    }

    fn admits(&self, served: &Served) -> bool {
        (self.tls_active || !served.info.tls_required) && served.info.allowed.admits(&self.peer)
    }

    fn tls_would_help(&self, served: &Served) -> bool {
        let by_tls = served.info.tls_required || served.info.allowed.names_certificates();
        self.tls_mode == TlsMode::Allow && !self.tls_active && by_tls
    }

    fn negotiated(&self, served: Arc<Served>, name: &str) -> Negotiated {
        let contexts = self.contexts.as_ref().filter(|contexts| contexts.export_name == name);
        Negotiated {
            size_bytes: served.size_bytes(),
            read_only: served.is_read_only_for(&self.peer),
            served,
            replies: self.replies,
            allocation_context: contexts.is_some_and(|contexts| contexts.allocation),
        }
    }
}

enum Lookup {
    Found(Arc<Served>),
    Unknown,
    NeedsTls,
}

fn closed(reason: CloseReason) -> Step {
    Step::Done(Outcome::Closed(reason))
}
