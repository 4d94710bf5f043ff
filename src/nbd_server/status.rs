//! The two places where a running server tells how it is: a control socket with JSON, and a Prometheus endpoint.
//!
//! Guards: one thread answers one question at a time, and no question holds it longer than [`PATIENCE`]; what a
//! questioner sends is read up to a limit and decides nothing but the path of an HTTP request.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::listener::Listener;
use super::server::Shared;
use super::socket::{self, Waited};

/// The longest time for one question and its answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest HTTP request, in bytes.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// What a listener answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// JSON to whoever connects.
    Control,
    /// The Prometheus text over HTTP.
    Metrics,
}

/// Answers until the server stops.
pub(super) fn answer_all(kind: Kind, listener: &Listener, shared: &Shared) -> io::Result<()> {
    loop {
        match socket::wait(listener.as_fd(), Some(shared.stop.as_fd()), None)? {
            Waited::Readable => {}
            Waited::Stopping | Waited::TimedOut => return Ok(()),
        }
        // One questioner's failure is its own.
        let _ = listener.accept().and_then(|socket| answer(kind, &socket, shared));
    }
}

fn answer(kind: Kind, socket: &OwnedFd, shared: &Shared) -> io::Result<()> {
    rustix::net::sockopt::set_socket_timeout(socket, rustix::net::sockopt::Timeout::Send, Some(PATIENCE))?;
    let status = shared.status();
    let text = match kind {
        Kind::Control => serde_json::to_string(&status).map_err(io::Error::from)? + "\n",
        Kind::Metrics if asks_for_metrics(socket)? => http("200 OK", &status.to_prometheus()),
        Kind::Metrics => http("404 Not Found", "see /metrics\n"),
    };
    socket::send_all(socket.as_fd(), text.as_bytes())?;
    rustix::net::shutdown(socket, rustix::net::Shutdown::Write)?;
    Ok(())
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
