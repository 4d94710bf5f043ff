//! The two places where a running server tells how it is: a control socket with JSON, and a Prometheus endpoint.
//!
//! Guards: one thread answers one question at a time, and no question holds it longer than [`PATIENCE`]; what a
//! questioner sends is read up to a limit and decides nothing but the path of an HTTP request.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::listener::Listener;
use super::server::Shared;
use super::socket::{self, Waited};

/// The longest time for one question and its answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest HTTP request, in bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// How long a questioner on the control socket may hesitate before the status is what it wants: longer than a busy machine
/// takes between its connecting and its writing. One that closes its side at once need not wait.
const HESITATION: Duration = Duration::from_millis(500);
/// The longest command, in bytes: a line, and a key file of 8 MiB.
const COMMAND_BYTES_MAX: usize = (8 << 20) + (4 << 10);

/// What answers commands on the control socket; to the server they are bytes.
#[derive(Clone)]
pub struct Commands {
    answer: Arc<Answer>,
    /// What the status tells besides, by name.
    besides: Option<(&'static str, Arc<Tell>)>,
}

type Answer = dyn Fn(&[u8]) -> String + Send + Sync;
type Tell = dyn Fn() -> serde_json::Value + Send + Sync;

impl Commands {
    /// `answer` gets a command as it was sent, which may hold secrets, and gives the answer.
    pub fn new(answer: impl Fn(&[u8]) -> String + Send + Sync + 'static) -> Self {
        Self { answer: Arc::new(answer), besides: None }
    }

    /// The status tells what `tell` gives, too, under `name`.
    #[must_use]
    pub fn besides(mut self, name: &'static str, tell: impl Fn() -> serde_json::Value + Send + Sync + 'static) -> Self {
        self.besides = Some((name, Arc::new(tell)));
        self
    }

    fn add_to(&self, status: &mut serde_json::Value) {
        if let (Some((name, tell)), Some(status)) = (&self.besides, status.as_object_mut()) {
            status.insert((*name).to_owned(), tell());
        }
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
    /// The Prometheus text over HTTP.
    Metrics,
}

/// Answers until the server stops.
pub(super) fn answer_all(
    kind: Kind,
    listener: &Listener,
    shared: &Shared,
    commands: Option<&Commands>,
) -> io::Result<()> {
    loop {
        match socket::wait(listener.as_fd(), Some(shared.stop.as_fd()), None)? {
            Waited::Readable => {}
            Waited::Stopping | Waited::TimedOut => return Ok(()),
        }
        // One questioner's failure is its own.
        let _ = listener.accept().and_then(|socket| answer(kind, &socket, shared, commands));
    }
}

fn answer(kind: Kind, socket: &OwnedFd, shared: &Shared, commands: Option<&Commands>) -> io::Result<()> {
    rustix::net::sockopt::set_socket_timeout(socket, rustix::net::sockopt::Timeout::Send, Some(PATIENCE))?;
    let command = match (kind, commands) {
        (Kind::Control, Some(commands)) => read_command(socket)?.map(|command| (commands.answer)(&command)),
        _ => None,
    };
    let status = shared.status();
    let text = match kind {
        Kind::Control if command.is_some() => command.unwrap_or_default(),
        Kind::Control => {
            let mut status = serde_json::to_value(&status).map_err(io::Error::from)?;
            if let Some(commands) = commands {
                commands.add_to(&mut status);
            }
            status.to_string() + "\n"
        }
        Kind::Metrics if asks_for_metrics(socket)? => http("200 OK", &status.to_prometheus()),
        Kind::Metrics => http("404 Not Found", "see /metrics\n"),
    };
    socket::send_all(socket.as_fd(), text.as_bytes())?;
    rustix::net::shutdown(socket, rustix::net::Shutdown::Write)?;
    Ok(())
}

/// A command, which ends where the questioner closes its side; nothing from one that only listens.
fn read_command(socket: &OwnedFd) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    let mut command = Zeroizing::new(Vec::new());
    let mut deadline = Instant::now() + HESITATION;
    let mut len_bytes = 0;
    loop {
        if socket::wait(socket.as_fd(), None, Some(deadline))? == Waited::TimedOut {
            return if len_bytes == 0 { Ok(None) } else { Err(io::ErrorKind::TimedOut.into()) };
        }
        if len_bytes == command.len() {
            // Grown by hand, so that no shorter copy of a secret is left behind.
            let mut larger = Zeroizing::new(vec![0; (2 * len_bytes).max(4096)]);
            larger[..len_bytes].copy_from_slice(&command[..len_bytes]);
            command = larger;
        }
        match socket::receive(socket.as_fd(), &mut command[len_bytes..])? {
            0 => break,
            received => len_bytes += received,
        }
        if len_bytes > COMMAND_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        deadline = Instant::now() + PATIENCE;
    }
    command.truncate(len_bytes);
    Ok((len_bytes > 0).then_some(command))
}

fn asks_for_metrics(socket: &OwnedFd) -> io::Result<bool> {
    let deadline = Instant::now() + PATIENCE;
    let (mut request, mut len_bytes) = (vec![0; REQUEST_BYTES_MAX], 0);
    while len_bytes < request.len() && !request[..len_bytes].windows(4).any(|end| end == b"\r\n\r\n") {
        if socket::wait(socket.as_fd(), None, Some(deadline))? == Waited::TimedOut {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match socket::receive(socket.as_fd(), &mut request[len_bytes..])? {
            0 => break,
            received => len_bytes += received,
        }
    }
    Ok(request.starts_with(b"GET /metrics ") || request.starts_with(b"GET / "))
}

fn http(status: &str, body: &str) -> String {
    let len_bytes = body.len();
    format!("HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len_bytes}\r\n\r\n{body}")
}
