//! One client from greeting to close: moves bytes between its socket and the two machines.
//!
//! Guards: the handshake ends by its deadline, also for a client that sends and does not read; replies that are due leave
//! before the connection waits for more bytes, those of requests that run beside it included, which all end before it does;
//! a connection has large buffers only while small ones are not enough; a stopping server still answers what it receives, or
//! what it has received if it hangs up. What a request does is in `execute`.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::access::Peer;
use super::buffer::{Buffers, Changed};
use super::failures::Failures;
use super::fair::Turn;
use super::handshake::{CloseReason, Handshake, Outcome, Step, TlsMode};
use super::limits::{OPTION_PAYLOAD_BYTES_MAX, SMALL_BUFFER_BYTES};
use super::negotiated::Negotiated;
use super::shared::{Chosen, Client, Shared};
use super::slow::{Finished, Slow};
use super::socket::{self, KernelBuffers, Waited};
use super::spin::Spin;
use super::throttle::Seat;
use super::tls::TlsSession;
use super::transmission::{OutOfSync, Transmission};
use super::wire::{OPTION_HEADER_BYTES, RequestHeader};

/// How long a stopping server waits for one more request of a client that is silent.
const STOP_GRACE: Duration = Duration::from_millis(100);
/// How long a connection keeps large buffers that it does not need any more.
const LARGE_BUFFER_HOLD: Duration = Duration::from_millis(10);

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum End {
    #[error("the client disconnected")]
    Disconnected,
    #[error("the client closed the connection")]
    Closed,
    #[error("it is not admitted any more")]
    NotAdmitted,
    #[error("its export has as many connections as it may have, of all clients or of this one")]
    TooMany,
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
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
    #[error("socket error")]
    Io(#[from] io::Error),
}

/// Serves one client to its end.
pub(super) fn serve(client: &Arc<Client>, shared: &Arc<Shared>) -> End {
    let mut link = Link {
        client,
        shared,
        buffers: Buffers::small(&shared.pool),
        slow: Slow::default(),
        turn: shared.fair.join(client.peer.identity()),
        seat: None,
        tls: None,
        peer: None,
        spin: Spin::new(shared.options.poll),
        deadline: Some(Instant::now() + shared.limits().handshake_deadline),
        modest: None,
        wants_large: false,
        needs_large: false,
        needed_at: Instant::now(),
    };
    let negotiated = match link.shake_hands() {
        Ok(negotiated) => negotiated,
        Err(end) => return end,
    };
    client.handshaking.store(false, Ordering::Relaxed);
    let served = &negotiated.served;
    let peer = link.peer.as_ref().unwrap_or(&client.peer);
    tracing::info!(client = client.id, %peer, export = served.info.name.as_str(), "client has chosen an export");
    let _ = client.chosen.set(Chosen { index: served.index, peer: peer.clone(), read_only: negotiated.read_only });
    // What was changed since the client was admitted has not seen it.
    if !shared.still_admits(client) {
        return End::NotAdmitted;
    }
    link.seat = served.throttle.join(link.turn.identity(), &client.bell);
    if link.seat.is_none() {
        return End::TooMany;
    }
    link.deadline = None;
    if let Some(tls) = &mut link.tls {
        tls.set_deadline(None);
    }
    let mut session = Session::new(link, Transmission::new(negotiated));
    loop {
        if let Err(end) = session.turn() {
            session.finish();
            // Replies to what came before the end, if the client still reads.
            let _ = session.link.send_replies();
            session.link.close();
            return end;
        }
    }
}

/// The socket and the buffers of a connection.
pub(super) struct Link<'a> {
    pub(super) client: &'a Arc<Client>,
    pub(super) shared: &'a Arc<Shared>,
    pub(super) buffers: Buffers<'a>,
    /// Requests that run beside the connection.
    pub(super) slow: Slow,
    /// Its thread's share of the processors.
    pub(super) turn: Turn,
    /// Its place at the limits of its export, once it has chosen one.
    pub(super) seat: Option<Seat>,
    tls: Option<TlsSession>,
    /// Who the client is since TLS has begun.
    peer: Option<Peer>,
    spin: Spin,
    deadline: Option<Instant>,
    /// What the kernel's buffers were before they were enlarged.
    modest: Option<KernelBuffers>,
    /// Small buffers were not enough, so large ones are tried.
    wants_large: bool,
    /// Large buffers were needed since the connection slept last.
    needs_large: bool,
    /// When that was last so.
    needed_at: Instant,
}

/// A connection in its transmission phase.
pub(super) struct Session<'a> {
    pub(super) link: Link<'a>,
    pub(super) machine: Transmission,
    /// The request that is being answered, and what became of it.
    pub(super) header: RequestHeader,
    pub(super) fate: Fate,
    pub(super) failures: Failures,
    /// What ended beside the connection because the export was locked, and is done again.
    pub(super) interrupted: Vec<Finished>,
    /// How often the export had been locked when the buffers were wiped last.
    pub(super) tidy_rounds: u64,
    /// A run of data that a status query has found, so that the next query need not look again.
    pub(super) known_data: Range<u64>,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Succeeded,
    Failed,
    /// It runs beside the connection.
    Deferred,
}

impl<'a> Session<'a> {
    fn new(link: Link<'a>, machine: Transmission) -> Self {
        let header = RequestHeader { flags: 0, command: 0, cookie: 0, offset: 0, len_bytes: 0 };
        Self {
            link,
            machine,
            header,
            fate: Fate::Succeeded,
            failures: Failures::default(),
            interrupted: Vec::new(),
            tidy_rounds: 0,
            known_data: 0..0,
        }
    }

    /// Answers every request that is buffered, sends the replies, receives more.
    fn turn(&mut self) -> Result<(), End> {
        let header_bytes = self.machine.header_bytes();
        while let Some(header) = self.machine.parse_header(self.link.buffers.receive.unread())? {
            self.link.buffers.receive.consume(header_bytes);
            self.answer(&header)?;
        }
        self.collect()?;
        self.do_again()?;
        self.link.send_replies()?;
        if self.link.hangs_up() {
            return Err(End::Stopped);
        }
        self.tidy();
        if self.link.turn.is_crowded() && self.link.buffers.are_too_many(&self.link.turn) {
            self.link.rest();
        }
        self.link.receive_request(header_bytes)
    }

    /// Answers the requests that have ended beside the connection.
    pub(super) fn collect(&mut self) -> Result<(), End> {
        if self.link.slow.any_finished() {
            self.link.client.bell.silence();
            for finished in self.link.slow.take_finished() {
                if self.is_to_wait(&finished) {
                    self.interrupted.push(finished);
                } else {
                    self.answer_finished(finished)?;
                }
            }
        }
        Ok(())
    }

    /// Receives more of a message that has begun, or finds that another request has ended.
    pub(super) fn receive_more(&mut self) -> Result<(), End> {
        self.collect()?;
        self.link.send_replies()?;
        self.tidy();
        self.link.receive_more(0)
    }

    /// Waits until one of the requests beside the connection has ended.
    pub(super) fn await_one(&mut self) -> Result<(), End> {
        self.link.send_replies()?;
        self.link.await_one()?;
        self.collect()
    }

    /// Waits for what runs beside the connection. What of it takes long looks whether the client is still there.
    fn finish(&mut self) {
        while self.link.slow.in_flight() > 0 {
            // The client may be gone, or even the socket broken: the work has to end all the same, whether or not replies leave.
            let _ = self.link.send_replies();
            if self.link.await_one().is_err() {
                std::thread::yield_now();
            }
            let _ = self.collect();
        }
        for finished in std::mem::take(&mut self.interrupted) {
            let _ = self.answer_finished(finished);
        }
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
    pub(super) fn hangs_up(&self) -> bool {
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
            Some(tls) if tls.required() => TlsMode::Require,
            Some(_) => TlsMode::Allow,
        };
        let mut machine = Handshake::new(self.shared.exports(), mode, self.client.peer.clone());
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
        let accepted = TlsSession::accept(tls, self.client.socket.as_fd(), self.deadline, &mut self.turn);
        let session = accepted.map_err(|error| match self.of_deadline(error) {
            End::Io(error) => End::Tls(error),
            late => late,
        })?;
        let peer = Peer { certificate_names: session.certificate_names(), ..self.client.peer.clone() };
        self.tls = Some(session);
        self.turn = self.shared.fair.join(peer.identity());
        self.peer = Some(peer.clone());
        Ok(peer)
    }

    /// Waits until one of the requests beside the connection has ended.
    fn await_one(&mut self) -> io::Result<()> {
        self.turn.rest();
        while self.slow.in_flight() > 0 && !self.slow.any_finished() {
            let bell = &self.client.bell;
            socket::wait(bell.as_fd(), None, None, None)?;
            bell.silence();
        }
        Ok(())
    }

    /// Tells a TLS client that nothing follows.
    fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.close(self.client.socket.as_fd());
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), End> {
        let socket = self.client.socket.as_fd();
        let sent = match &mut self.tls {
            None => socket::send_all(socket, bytes, self.deadline, Some(&mut self.turn)),
            Some(tls) => tls.send_all(socket, bytes, &mut self.turn),
        };
        sent.map_err(|error| self.of_deadline(error))
    }

    /// A send that took too long is the handshake's end, not the socket's.
    fn of_deadline(&self, error: io::Error) -> End {
        let late = error.kind() == io::ErrorKind::TimedOut && self.deadline.is_some();
        if late { End::HandshakeDeadline } else { End::Io(error) }
    }

    /// Sends the replies that wait. Those that cannot be sent are dropped: after an error nobody can be answered any more.
    pub(super) fn send_replies(&mut self) -> Result<(), End> {
        let mut sent = Ok(());
        if !self.buffers.reply.pending().is_empty() {
            let (socket, replies) = (self.client.socket.as_fd(), self.buffers.reply.pending());
            self.needs_large |= replies.len() > SMALL_BUFFER_BYTES;
            sent = match &mut self.tls {
                None => socket::send_all(socket, replies, self.deadline, Some(&mut self.turn)),
                Some(tls) => tls.send_all(socket, replies, &mut self.turn),
            };
            self.buffers.reply.truncate(0);
        }
        if let Some(seat) = &mut self.seat {
            seat.sent();
        }
        Ok(sent?)
    }

    /// Changes to large buffers, and has the kernel enlarge its own, as far as the budget allows it.
    pub(super) fn enlarge(&mut self) {
        self.wants_large = false;
        let socket = self.client.socket.as_fd();
        let larger = KernelBuffers::enlarged(socket, self.shared.options.socket_buffer_bytes);
        let changed = self.buffers.enlarge(larger.bytes(), &self.turn);
        self.needs_large |= changed != Changed::No;
        if changed == Changed::MemoryAndSockets {
            self.modest.get_or_insert_with(|| KernelBuffers::of(socket));
            larger.set(socket);
        }
    }

    /// Gives large buffers back.
    fn rest(&mut self) {
        if let (Changed::MemoryAndSockets, Some(modest)) = (self.buffers.rest(), self.modest) {
            modest.set(self.client.socket.as_fd());
        }
    }

    /// Wipes what no request needs any more.
    pub(super) fn wipe_spent(&mut self) {
        self.rest();
        self.buffers.wipe_spent();
    }

    /// When large buffers go back if they are not needed before.
    fn rest_at(&mut self, now: Instant) -> Option<Instant> {
        if std::mem::take(&mut self.needs_large) {
            self.needed_at = now;
        }
        self.buffers.are_large().then(|| self.needed_at + LARGE_BUFFER_HOLD)
    }

    /// Receives at least one byte of the next message, or finds that a request beside the connection has ended.
    /// `lead_bytes` is where the message's payload will begin.
    fn receive_request(&mut self, lead_bytes: usize) -> Result<(), End> {
        if self.receive_soon(lead_bytes)? {
            return Ok(());
        }
        let asleep = Instant::now();
        loop {
            if self.hangs_up() {
                return Err(End::Stopped);
            }
            let stopping = self.stopping();
            let deadline = if stopping { Some(asleep + STOP_GRACE) } else { self.deadline };
            match self.sleep(asleep, !stopping, deadline)? {
                Waited::Readable => break,
                Waited::Stopping => {}
                Waited::Other => return Ok(()),
                Waited::TimedOut if stopping => return Err(End::Stopped),
                Waited::TimedOut => return Err(End::HandshakeDeadline),
            }
        }
        self.spin.slept_for(asleep.elapsed());
        self.receive_more(lead_bytes)
    }

    /// Receives at least one byte of a message that has begun, however long that takes, or finds that a request beside the
    /// connection has ended.
    fn receive_more(&mut self, lead_bytes: usize) -> Result<(), End> {
        // A client that sends a payload is slower than the copy out of the socket, so this wait is short as well.
        if self.receive_soon(lead_bytes)? {
            return Ok(());
        }
        let asleep = Instant::now();
        loop {
            match self.sleep(asleep, false, self.deadline)? {
                Waited::TimedOut => return Err(End::HandshakeDeadline),
                Waited::Other => return Ok(()),
                Waited::Readable | Waited::Stopping => {}
            }
            if self.receive_now(lead_bytes)? {
                self.spin.slept_for(asleep.elapsed());
                return Ok(());
            }
        }
    }

    /// Receives what is there or comes while the socket is polled.
    fn receive_soon(&mut self, lead_bytes: usize) -> Result<bool, End> {
        if self.receive_now(lead_bytes)? {
            return Ok(true);
        }
        self.turn.rest();
        self.spin_for(lead_bytes)
    }

    /// Waits, and gives large buffers back when they were not needed for a while.
    fn sleep(&mut self, since: Instant, for_stop: bool, deadline: Option<Instant>) -> io::Result<Waited> {
        self.turn.rest();
        loop {
            let rest_at = self.rest_at(since);
            let until = [deadline, rest_at].into_iter().flatten().min();
            let stop = for_stop.then(|| self.shared.stop.as_fd());
            let bell = &self.client.bell;
            let waited = socket::wait(self.socket(), stop, Some(bell.as_fd()), until)?;
            if waited == Waited::Other {
                bell.silence();
            }
            match rest_at {
                Some(at) if waited == Waited::TimedOut && deadline.is_none_or(|deadline| at < deadline) => {
                    self.rest();
                    if self.buffers.are_large() {
                        // They hold a message that small ones do not: it is still needed.
                        self.needed_at = Instant::now();
                    }
                }
                _ => return Ok(waited),
            }
        }
    }

    /// Receives what is there. `false` means nothing yet.
    fn receive_now(&mut self, lead_bytes: usize) -> Result<bool, End> {
        if self.wants_large {
            self.enlarge();
        }
        let room = self.buffers.receive.room(lead_bytes);
        let room_bytes = room.len();
        let socket = self.client.socket.as_fd();
        let received = match &mut self.tls {
            None => socket::receive(socket, room),
            Some(tls) => tls.receive(socket, room),
        };
        match received {
            Ok(0) => Err(End::Closed),
            Ok(len_bytes) => {
                self.buffers.receive.received(len_bytes);
                self.needs_large |= len_bytes > SMALL_BUFFER_BYTES;
                self.wants_large = len_bytes == room_bytes && self.deadline.is_none() && !self.buffers.are_large();
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(self.of_deadline(error)),
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
            if self.receive_now(lead_bytes)? || self.slow.any_finished() {
                self.spin.paid();
                return Ok(true);
            }
        }
        self.spin.in_vain();
        Ok(false)
    }
}
