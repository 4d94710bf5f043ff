//! The two places where a running server tells how it is: a control socket with JSON and commands, and an HTTP endpoint for
//! Prometheus.
//!
//! ```text
//!  accepted --bytes--> Questioner --complete, or late--> Question --thread--> answer, close
//! ```
//!
//! Guards: one thread waits for all questioners at once, so a silent one delays nobody; every questioner has one deadline for
//! all it sends and one for all it is sent, however it dribbles; a question that takes long holds one answering thread of
//! several. What a questioner sends is read up to a limit.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use zeroize::Zeroizing;

use super::listener::Listener;
use super::metrics::CONTENT_TYPE;
use super::server::{ACCEPT_PAUSE, is_shortage};
use super::shared::Shared;
use super::socket;
use crate::spawn::without_signals;

/// The longest time for a question, and for its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest HTTP request, in bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// Headers of an HTTP request.
const HEADERS_MAX: usize = 64;
/// How long a questioner on the control socket may hesitate before the status is what it wants: longer than a busy machine
/// takes between its connecting and its writing. One that closes its side at once need not wait.
const HESITATION: Duration = Duration::from_millis(500);
/// The longest command, in bytes: a line, and a key file of 8 MiB.
const COMMAND_BYTES_MAX: usize = (8 << 20) + (4 << 10);
/// Questioners at a time that have not asked. One more ends the oldest of them.
const QUESTIONERS_MAX: usize = 64;
/// Questions that are answered at a time; others wait.
const ANSWERING_MAX: usize = 8;
/// Questions that wait to be answered. One more is closed.
const WAITING_MAX: usize = 64;
/// How often a question that waits looks for its turn.
const TURN_PAUSE: Duration = Duration::from_millis(20);

/// What answers commands on the control socket; to the server they are bytes.
#[derive(Clone)]
pub struct Commands {
    answer: Arc<Answer>,
}

type Answer = dyn Fn(&[u8]) -> String + Send + Sync;

impl Commands {
    /// `answer` gets a command as it was sent, which may hold secrets, and gives the answer. It is called from several
    /// threads at a time.
    pub fn new(answer: impl Fn(&[u8]) -> String + Send + Sync + 'static) -> Self {
        Self { answer: Arc::new(answer) }
    }
}

impl fmt::Debug for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Commands").finish_non_exhaustive()
    }
}

/// What a listener answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// JSON to whoever connects.
    Control,
    /// Metrics over HTTP.
    Metrics,
}

/// What is asked.
#[derive(Debug)]
enum Question {
    Status,
    Command(Zeroizing<Vec<u8>>),
    Http(HttpRequest),
}

/// What of an HTTP request decides the answer.
#[derive(Debug, PartialEq, Eq)]
enum HttpRequest {
    Metrics { with_body: bool },
    NotFound,
    NotAllowed,
    Malformed,
}

/// Somebody who has connected and not yet asked.
#[derive(Debug)]
struct Questioner {
    socket: OwnedFd,
    received: Zeroizing<Vec<u8>>,
    len_bytes: usize,
    since: Instant,
}

/// How far a questioner is.
enum Progress {
    NotYet,
    Asks(Question),
    Gone,
}

impl Questioner {
    fn new(socket: OwnedFd) -> Self {
        Self { socket, received: Zeroizing::new(Vec::new()), len_bytes: 0, since: Instant::now() }
    }

    fn deadline(&self, kind: Kind) -> Instant {
        let hesitates = kind == Kind::Control && self.len_bytes == 0;
        self.since + if hesitates { HESITATION } else { PATIENCE }
    }

    /// What time alone leads to.
    fn at_deadline(&self, kind: Kind) -> Progress {
        let hesitates = kind == Kind::Control && self.len_bytes == 0;
        if hesitates { Progress::Asks(Question::Status) } else { Progress::Gone }
    }

    /// Receives what is there.
    fn advance(&mut self, kind: Kind) -> Progress {
        let limit = match kind {
            Kind::Control => COMMAND_BYTES_MAX,
            Kind::Metrics => REQUEST_BYTES_MAX,
        };
        if self.len_bytes == self.received.len() {
            if self.len_bytes >= limit {
                return Progress::Gone;
            }
            // Grown by hand, so that no shorter copy of a secret is left behind.
            let mut larger = Zeroizing::new(vec![0; (2 * self.len_bytes).clamp(4096, limit)]);
            larger[..self.len_bytes].copy_from_slice(&self.received[..self.len_bytes]);
            self.received = larger;
        }
        let closed = match socket::receive(self.socket.as_fd(), &mut self.received[self.len_bytes..]) {
            Ok(received) => {
                self.len_bytes += received;
                received == 0
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::NotYet,
            Err(_) => return Progress::Gone,
        };
        match kind {
            Kind::Control if closed && self.len_bytes == 0 => Progress::Asks(Question::Status),
            Kind::Control if closed => {
                let mut command = std::mem::take(&mut self.received);
                command.truncate(self.len_bytes);
                Progress::Asks(Question::Command(command))
            }
            Kind::Control => Progress::NotYet,
            Kind::Metrics => match parse(&self.received[..self.len_bytes]) {
                Some(request) => Progress::Asks(Question::Http(request)),
                None if closed => Progress::Gone,
                None => Progress::NotYet,
            },
        }
    }
}

/// The request, if it is complete.
fn parse(received: &[u8]) -> Option<HttpRequest> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(received) {
        Ok(httparse::Status::Partial) => return None,
        Err(_) => return Some(HttpRequest::Malformed),
        Ok(httparse::Status::Complete(_)) => {}
    }
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    let with_body = match request.method {
        Some("GET") => true,
        Some("HEAD") => false,
        _ => return Some(HttpRequest::NotAllowed),
    };
    let known = matches!(path, "/metrics" | "/");
    Some(if known { HttpRequest::Metrics { with_body } } else { HttpRequest::NotFound })
}

/// A listener, those who came there, and what they asked.
struct Reporter<'scope, 'env> {
    kind: Kind,
    listener: &'env Listener,
    shared: &'scope Arc<Shared>,
    commands: Option<&'scope Commands>,
    questioners: Vec<Questioner>,
    waiting: VecDeque<(OwnedFd, Question)>,
    answering: Arc<AtomicUsize>,
    /// Until when nobody is accepted, for lack of resources.
    paused_until: Option<Instant>,
}

/// Answers until the server stops.
pub(super) fn answer_all<'scope>(
    (kind, listener): (Kind, &'scope Listener),
    shared: &'scope Arc<Shared>,
    commands: Option<&'scope Commands>,
    scope: &'scope Scope<'scope, '_>,
) -> io::Result<()> {
    let mut reporter = Reporter {
        kind,
        listener,
        shared,
        commands,
        questioners: Vec::new(),
        waiting: VecDeque::new(),
        answering: Arc::default(),
        paused_until: None,
    };
    while !shared.stop.is_set() {
        reporter.turn(scope)?;
    }
    Ok(())
}

impl<'scope> Reporter<'scope, '_> {
    /// Waits for something to happen, and sees to it.
    fn turn(&mut self, scope: &'scope Scope<'scope, '_>) -> io::Result<()> {
        self.paused_until = self.paused_until.filter(|until| *until > Instant::now());
        let ready = self.await_events()?;
        if ready.first() == Some(&true) {
            self.accept();
        }
        let (now, kind) = (Instant::now(), self.kind);
        let mut still = Vec::new();
        // Whoever was just accepted was not waited for yet.
        let ready = ready.into_iter().skip(1).chain(std::iter::repeat(false));
        for (mut questioner, ready) in std::mem::take(&mut self.questioners).into_iter().zip(ready) {
            let progress = if ready { questioner.advance(kind) } else { Progress::NotYet };
            let progress = match progress {
                Progress::NotYet if questioner.deadline(kind) <= now => questioner.at_deadline(kind),
                other => other,
            };
            match progress {
                Progress::NotYet => still.push(questioner),
                Progress::Asks(question) => self.waiting.push_back((questioner.socket, question)),
                Progress::Gone => {}
            }
        }
        self.questioners = still;
        self.waiting.truncate(WAITING_MAX);
        self.answer_waiting(scope);
        Ok(())
    }

    /// Whether the listener, and then which questioner, has something.
    fn await_events(&self) -> io::Result<Vec<bool>> {
        let listens = self.paused_until.is_none();
        let deadlines = self.questioners.iter().map(|questioner| questioner.deadline(self.kind));
        let turn = (!self.waiting.is_empty()).then(|| Instant::now() + TURN_PAUSE);
        let until = deadlines.chain(turn).chain(self.paused_until).min();
        // A listener that is not asked is watched for nothing.
        let wanted = if listens { PollFlags::IN } else { PollFlags::empty() };
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.shared.stop.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), wanted),
        ];
        let sockets = self.questioners.iter().map(|questioner| questioner.socket.as_fd());
        fds.extend(sockets.map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::IN)));
        socket::poll(&mut fds, until)?;
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(fds[1..].iter().enumerate().map(|(index, fd)| ready(fd) && (index > 0 || listens)).collect())
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok(socket) => {
                if self.questioners.len() == QUESTIONERS_MAX {
                    self.questioners.remove(0);
                }
                self.questioners.push(Questioner::new(socket));
            }
            Err(error) if is_shortage(&error) => {
                self.questioners.clear();
                self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
            }
            // Whoever it was is gone already.
            Err(_) => {}
        }
    }

    /// Gives questions to threads, as long as there may be more of these.
    fn answer_waiting(&mut self, scope: &'scope Scope<'scope, '_>) {
        while !self.waiting.is_empty() && self.answering.load(Ordering::Acquire) < ANSWERING_MAX {
            let Some((socket, question)) = self.waiting.pop_front() else { return };
            let (shared, commands) = (self.shared, self.commands);
            let busy = Busy::new(&self.answering);
            let thread = std::thread::Builder::new().name("daxcrypt-report".into());
            // Without a thread the questioner gets no answer, and asks again.
            let answer = move || {
                let _busy = busy;
                // One questioner's failure is its own.
                let _ = answer(&socket, &question, shared, commands);
            };
            let _ = without_signals(|| thread.spawn_scoped(scope, answer));
        }
    }
}

/// One answering thread, until it is dropped.
struct Busy(Arc<AtomicUsize>);

impl Busy {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn answer(socket: &OwnedFd, question: &Question, shared: &Shared, commands: Option<&Commands>) -> io::Result<()> {
    let text = match (question, commands) {
        (Question::Command(_), Some(_)) if !may_command(socket) => {
            let reason = "only the user of the server and root may command it";
            serde_json::json!({ "refused": { "reason": reason, "help": null } }).to_string() + "\n"
        }
        (Question::Command(command), Some(commands)) => (commands.answer)(command),
        (Question::Status | Question::Command(_), _) => {
            serde_json::to_string(&shared.status()).map_err(io::Error::from)? + "\n"
        }
        (Question::Http(HttpRequest::Metrics { with_body }), _) => {
            http("200 OK", CONTENT_TYPE, &shared.status().to_openmetrics(), *with_body)
        }
        (Question::Http(HttpRequest::NotFound), _) => http("404 Not Found", "text/plain", "see /metrics\n", true),
        (Question::Http(HttpRequest::NotAllowed), _) => {
            http("405 Method Not Allowed", "text/plain", "GET and HEAD\n", true)
        }
        (Question::Http(HttpRequest::Malformed), _) => http("400 Bad Request", "text/plain", "not HTTP/1\n", true),
    };
    socket::send_all(socket.as_fd(), text.as_bytes(), Some(Instant::now() + PATIENCE), None)?;
    rustix::net::shutdown(socket, rustix::net::Shutdown::Write)?;
    Ok(())
}

/// Whether whoever connected is the user of this process or root: the socket's mode says so already, unless somebody has
/// changed it.
fn may_command(socket: &OwnedFd) -> bool {
    let peer = rustix::net::sockopt::socket_peercred(socket);
    peer.is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

fn http(status: &str, kind: &str, body: &str, with_body: bool) -> String {
    let len_bytes = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len_bytes}\r\nConnection: close\r\n\r\n"
    );
    if with_body { head + body } else { head }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let metrics = |with_body| Some(HttpRequest::Metrics { with_body });
        for (text, request) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", metrics(true)),
            ("GET /metrics?name[]=up HTTP/1.0\r\n\r\n", metrics(true)),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", metrics(false)),
            ("GET / HTTP/1.1\r\n\r\n", metrics(true)),
            ("GET /metricsx HTTP/1.1\r\n\r\n", Some(HttpRequest::NotFound)),
            ("POST /metrics HTTP/1.1\r\n\r\n", Some(HttpRequest::NotAllowed)),
            ("\x16\x03\x01\x02\0\x01\0\x01", Some(HttpRequest::Malformed)),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n", None),
            ("", None),
        ] {
            assert_eq!(parse(text.as_bytes()), request, "{text:?}");
        }
    }
}
