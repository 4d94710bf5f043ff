//! One client from greeting to close: moves bytes between its socket and the two machines.
//!
//! Guards: the handshake ends by its deadline; replies that are due leave before the connection waits for more
//! bytes; a stopping server still answers what it receives, or what it has received if it hangs up. What a request does is in `execute`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::access::Peer;
use super::buffer::Buffers;
use super::handshake::{CloseReason, Handshake, Outcome, Step, TlsMode};
use super::limits::OPTION_PAYLOAD_BYTES_MAX;
use super::negotiated::Negotiated;
use super::server::{Client, Shared};
use super::socket::{self, Waited};
use super::tls::TlsSession;
use super::transmission::{OutOfSync, Transmission};
use super::wire::OPTION_HEADER_BYTES;

/// How long a stopping server waits for one more request of a client that is silent.
const STOP_GRACE: Duration = Duration::from_millis(100);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum End {
    #[error("the client disconnected")]
    Disconnected,
    #[error("the client closed the connection")]
    Closed,
    #[error("the server stops")]
    Stopped,
    #[error("no export was chosen in time")]
    HandshakeDeadline,
    #[error("the handshake ended: {0:?}")]
    Handshake(CloseReason),
    #[error(transparent)]
    OutOfSync(#[from] OutOfSync),
    #[error("payload of {0} bytes is too large")]
    PayloadTooLarge(u64),
    #[error("plaintext came behind STARTTLS")]
    PlaintextBehindTls,
    #[error("a read failed after its simple reply had begun")]
    FailedMidReply,
    #[error("socket error")]
    Io(#[from] io::Error),
}

/// Serves one client to its end.
pub(super) fn serve(client: &Client, shared: &Shared) -> End {
    let mut link = Link {
        client,
        shared,
        buffers: Buffers::small(&shared.pool),
        tls: None,
        spin: Spin::new(shared.options.poll),
        deadline: Some(Instant::now() + shared.limits.handshake_deadline),
    };
    let negotiated = match link.shake_hands() {
        Ok(negotiated) => negotiated,
        Err(end) => return end,
    };
    client.handshaking.store(false, Ordering::Relaxed);
    let chosen = shared.exports.iter().position(|served| Arc::ptr_eq(served, &negotiated.served));
    let _ = client.export.set(chosen.expect("the handshake chooses from the registry"));
    link.deadline = None;
    let mut session = Session { link, machine: Transmission::new(negotiated), failed: false };
    loop {
        if let Err(end) = session.turn() {
            // Replies to what came before the end, if the client still reads.
            let _ = session.link.send_replies();
            session.link.close();
            return end;
        }
    }
}

/// The socket and the buffers of a connection.
pub(super) struct Link<'a> {
    pub(super) client: &'a Client,
    pub(super) shared: &'a Shared,
    pub(super) buffers: Buffers<'a>,
    tls: Option<TlsSession>,
    spin: Spin,
    deadline: Option<Instant>,
}

/// A connection in its transmission phase.
pub(super) struct Session<'a> {
    pub(super) link: Link<'a>,
    pub(super) machine: Transmission,
    /// Whether the request that is being answered got an error.
    pub(super) failed: bool,
}

impl Session<'_> {
    /// Answers every request that is buffered, sends the replies, receives more.
    fn turn(&mut self) -> Result<(), End> {
        let header_bytes = self.machine.header_bytes();
        while let Some(header) = self.machine.parse_header(self.link.buffers.receive.unread())? {
            self.link.buffers.receive.consume(header_bytes);
            self.answer(&header)?;
        }
        self.link.send_replies()?;
        if self.link.hangs_up() {
            return Err(End::Stopped);
        }
        self.link.buffers.enlarge();
        self.link.receive_request(header_bytes)
    }
}

impl Link<'_> {
    fn socket(&self) -> BorrowedFd<'_> {
        self.client.socket.as_fd()
    }

    fn stopping(&self) -> bool {
        self.shared.stop.is_set()
    }

    /// Whether the connection ends now, with whatever the client has not had answered.
    fn hangs_up(&self) -> bool {
        self.shared.options.hang_up && self.stopping()
    }

    /// Whether requests are refused because the server stops.
    pub(super) fn refuses(&self) -> bool {
        !self.shared.options.hang_up && self.stopping()
    }

    fn shake_hands(&mut self) -> Result<Negotiated, End> {
        self.send(&Handshake::greeting())?;
        let mode = match &self.shared.options.tls {
            None => TlsMode::Off,
            Some(tls) if tls.required => TlsMode::Require,
            Some(_) => TlsMode::Allow,
        };
        let mut machine = Handshake::new(self.shared.exports.clone(), mode, self.client.peer.clone());
        let option_bytes_max = OPTION_HEADER_BYTES + usize::try_from(OPTION_PAYLOAD_BYTES_MAX).unwrap_or(usize::MAX);
        let mut output = Vec::new();
        loop {
            if self.stopping() {
                machine.stop();
            }
            let (consumed, step) = machine.step(self.buffers.receive.unread(), &mut output);
            self.buffers.receive.consume(consumed);
            self.send(&output)?;
            output.clear();
            match step {
                Step::Continue => {}
                Step::NeedMore => {
                    self.buffers.receive.reserve_if_full(option_bytes_max);
                    self.receive_request(0)?;
                }
                Step::Done(Outcome::Transmission(negotiated)) => return Ok(negotiated),
                Step::Done(Outcome::Closed(reason)) => return Err(End::Handshake(reason)),
                Step::Done(Outcome::StartTls) => machine.tls_started(self.start_tls()?),
            }
        }
    }

    /// Does the TLS handshake and says who the client is.
    fn start_tls(&mut self) -> Result<Peer, End> {
        if !self.buffers.receive.unread().is_empty() {
            return Err(End::PlaintextBehindTls);
        }
        let tls = self.shared.options.tls.as_ref().expect("STARTTLS is granted only with TLS configured");
        let session = TlsSession::accept(tls, self.socket(), self.deadline)?;
        let peer = Peer { certificate_names: session.certificate_names(), ..self.client.peer.clone() };
        self.tls = Some(session);
        Ok(peer)
    }

    /// Tells a TLS client that nothing follows.
    fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.close(self.client.socket.as_fd());
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        let socket = self.client.socket.as_fd();
        match &mut self.tls {
            None => socket::send_all(socket, bytes)?,
            Some(tls) => tls.send_all(socket, bytes)?,
        }
        Ok(())
    }

    /// Sends the replies that wait.
    pub(super) fn send_replies(&mut self) -> Result<(), End> {
        if !self.buffers.reply.pending().is_empty() {
            let (socket, replies) = (self.client.socket.as_fd(), self.buffers.reply.pending());
            match &mut self.tls {
                None => socket::send_all(socket, replies)?,
                Some(tls) => tls.send_all(socket, replies)?,
            }
            self.buffers.reply.truncate(0);
        }
        Ok(())
    }

    /// Receives at least one byte of the next message. `lead_bytes` is where its payload will begin.
    fn receive_request(&mut self, lead_bytes: usize) -> Result<(), End> {
        if self.receive_now(lead_bytes)? || self.spin_for(lead_bytes)? {
            return Ok(());
        }
        self.buffers.rest();
        let asleep = Instant::now();
        loop {
            if self.hangs_up() {
                return Err(End::Stopped);
            }
            let stopping = self.stopping();
            let deadline = if stopping { Some(asleep + STOP_GRACE) } else { self.deadline };
            let stop = (!stopping).then(|| self.shared.stop.as_fd());
            match socket::wait(self.socket(), stop, deadline)? {
                Waited::Readable => break,
                Waited::Stopping => {}
                Waited::TimedOut if stopping => return Err(End::Stopped),
                Waited::TimedOut => return Err(End::HandshakeDeadline),
            }
        }
        self.spin.slept_for(asleep.elapsed());
        if self.deadline.is_none() {
            self.buffers.enlarge();
        }
        self.receive_more(lead_bytes)
    }

    /// Receives at least one byte of a message that has begun, however long that takes.
    pub(super) fn receive_more(&mut self, lead_bytes: usize) -> Result<(), End> {
        // A client that sends a payload is slower than the copy out of the socket, so this wait is short as well.
        if self.receive_now(lead_bytes)? || self.spin_for(lead_bytes)? {
            return Ok(());
        }
        let asleep = Instant::now();
        loop {
            if socket::wait(self.socket(), None, self.deadline)? == Waited::TimedOut {
                return Err(End::HandshakeDeadline);
            }
            if self.receive_now(lead_bytes)? {
                self.spin.slept_for(asleep.elapsed());
                return Ok(());
            }
        }
    }

    /// Receives what is there. `false` means nothing yet.
    fn receive_now(&mut self, lead_bytes: usize) -> Result<bool, End> {
        let room = self.buffers.receive.room(lead_bytes);
        let socket = self.client.socket.as_fd();
        let received = match &mut self.tls {
            None => socket::receive(socket, room),
            Some(tls) => tls.receive(socket, room),
        };
        match received {
            Ok(0) => Err(End::Closed),
            Ok(len_bytes) => {
                self.buffers.receive.received(len_bytes);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Asks the socket again and again for a short time, if that has been worth it lately.
    fn spin_for(&mut self, lead_bytes: usize) -> Result<bool, End> {
        if !self.spin.worthwhile || self.deadline.is_some() {
            return Ok(false);
        }
        let Some(_slot) = self.shared.spinners.enter() else { return Ok(false) };
        let start = Instant::now();
        while start.elapsed() < self.spin.limit {
            if self.receive_now(lead_bytes)? {
                self.spin.paid();
                return Ok(true);
            }
        }
        self.spin.in_vain();
        Ok(false)
    }
}

/// Whether to poll before sleeping.
///
/// One poll in vain ends it, so an idle connection polls once and then costs nothing. Bytes that come soon after
/// falling asleep start it again; each further poll in vain doubles how often that has to happen, so a client that
/// is always a little too slow costs next to nothing either.
#[derive(Debug)]
struct Spin {
    limit: Duration,
    worthwhile: bool,
    /// Short sleeps until polling is tried again.
    short_sleeps_left: u32,
    /// What `short_sleeps_left` starts from after the next poll in vain.
    short_sleeps_wanted: u32,
}

impl Spin {
    /// A sleep is short when it takes no more than this many poll limits: it contains two wake-ups, the client's and
    /// ours, and polling saves one of them.
    const SHORT_SLEEP_LIMITS: u32 = 4;
    /// The most short sleeps that polling waits for.
    const SHORT_SLEEPS_MAX: u32 = 64;

    fn new(limit: Duration) -> Self {
        Self { limit, worthwhile: !limit.is_zero(), short_sleeps_left: 1, short_sleeps_wanted: 1 }
    }

    fn paid(&mut self) {
        self.short_sleeps_wanted = 1;
    }

    fn in_vain(&mut self) {
        self.worthwhile = false;
        self.short_sleeps_left = self.short_sleeps_wanted;
        self.short_sleeps_wanted = (2 * self.short_sleeps_wanted).min(Self::SHORT_SLEEPS_MAX);
    }

    fn slept_for(&mut self, duration: Duration) {
        if !self.worthwhile && duration < self.limit * Self::SHORT_SLEEP_LIMITS {
            self.short_sleeps_left = self.short_sleeps_left.saturating_sub(1);
            self.worthwhile = self.short_sleeps_left == 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);

    #[test]
    fn polling_ends_in_vain_and_begins_again_after_short_sleeps() {
        let mut spin = Spin::new(LIMIT);
        assert!(spin.worthwhile);
        spin.in_vain();
        assert!(!spin.worthwhile);
        spin.slept_for(Duration::from_millis(1));
        assert!(!spin.worthwhile, "the client is idle");
        spin.slept_for(LIMIT);
        assert!(spin.worthwhile);
    }

    #[test]
    fn a_client_that_is_always_too_slow_is_polled_less_and_less() {
        let mut spin = Spin::new(LIMIT);
        let mut polls = 0;
        for _ in 0..1000 {
            if spin.worthwhile {
                polls += 1;
                spin.in_vain();
            }
            spin.slept_for(2 * LIMIT);
        }
        assert!((10..30).contains(&polls), "{polls} polls");
        spin.worthwhile = true;
        spin.paid();
        spin.in_vain();
        spin.slept_for(LIMIT);
        assert!(spin.worthwhile, "a poll that paid forgives those in vain");
    }

    #[test]
    fn polling_that_is_off_stays_off() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.slept_for(Duration::ZERO);
        assert!(!spin.worthwhile);
    }
}
