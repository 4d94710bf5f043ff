//! What `daxcrypt rekey --control` and `daxcrypt resize --control` say to a running server, and what that answers: both ends of
//! the conversation.
//!
//! A request is one line of JSON and, behind it, the bytes of a credential where one is needed; the answer is one line of
//! JSON. The socket has mode 0600: whoever may connect is the server's user or root.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::namespace::{Cipher, Credential, DataUnit, SlotInfo};
use crate::ops::SlotPolicy;
use crate::ops::rekey::Wish;
use crate::ops::resize::{Resized, Wanted};
use crate::secret::SecretBytes;

/// How long an answer may take: Argon2id for every slot comes before it.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a command is sent that the server does not hear.
const TRIES: u32 = 5;
/// The longest answer that is read, in bytes.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// What a server is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    Begin,
    Resume,
    Pause,
    Status,
}

/// What came in on the control socket.
#[derive(Debug)]
pub(crate) enum Command {
    Rekey(RekeyRequest, Credential),
    Resize(ResizeRequest),
}

impl Command {
    /// The line, and the credential behind it where one belongs there.
    pub(crate) fn parse(received: &[u8]) -> Option<Self> {
        let end = received.iter().position(|&byte| byte == b'\n')?;
        let line = &received[..end];
        if let Ok(request) = serde_json::from_slice(line) {
            return Some(Self::Resize(request));
        }
        let request: RekeyRequest = serde_json::from_slice(line).ok()?;
        let bytes = SecretBytes::copy_of(&received[end + 1..]);
        let credential = if request.passphrase { Credential::Passphrase(bytes) } else { Credential::KeyFile(bytes) };
        Some(Self::Rekey(request, credential))
    }

    pub(crate) const fn uuid(&self) -> Uuid {
        match self {
            Self::Rekey(request, _) => request.uuid,
            Self::Resize(request) => request.uuid,
        }
    }
}

/// The line of a request for another size.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResizeRequest {
    pub(crate) resize: Wanted,
    /// The namespace.
    pub(crate) uuid: Uuid,
}

impl ResizeRequest {
    /// Asks the server at `socket`.
    pub(crate) fn ask(&self, socket: &Path) -> io::Result<Answer> {
        ask(socket, self, &[])
    }
}

/// The line of a request about a re-key.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RekeyRequest {
    pub(crate) rekey: Action,
    /// The namespace.
    pub(crate) uuid: Uuid,
    pub(crate) key_bits: Option<Cipher>,
    pub(crate) unit_bytes: Option<DataUnit>,
    pub(crate) slots: SlotPolicy,
    pub(crate) max_rate: Option<u64>,
    /// Whether the credential behind the line is a passphrase or the bytes of a key file.
    pub(crate) passphrase: bool,
}

/// The line of an answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// How the namespace is now; no bytes when no re-key is under way.
    State { progress: Option<(u64, u64)>, paused: bool },
    /// The namespace has another size, in bytes.
    Resized(Resized),
    /// It would become smaller, and was not told that it may.
    Shrinks { old_bytes: u64, new_bytes: u64 },
    /// The other slots, because it was not said what to do with them.
    OtherSlots(Vec<SlotInfo>),
    /// The credential opens no slot.
    WrongCredential,
    /// Why it was not done.
    Refused(String),
}

impl RekeyRequest {
    pub(crate) const fn wish(&self) -> Wish {
        Wish { cipher: self.key_bits, unit: self.unit_bytes, slots: self.slots }
    }

    /// Asks the server at `socket`.
    pub(crate) fn ask(&self, socket: &Path, credential: Option<&Credential>) -> io::Result<Answer> {
        let secret: &[u8] = match credential {
            Some(Credential::Passphrase(bytes) | Credential::KeyFile(bytes)) => bytes,
            None => &[],
        };
        ask(socket, self, secret)
    }
}

/// Sends a line and what belongs behind it, and waits for the answer.
fn ask(socket: &Path, line: &impl Serialize, secret: &[u8]) -> io::Result<Answer> {
    let mut tries = 1;
    loop {
        match ask_once(socket, line, secret) {
            Err(error) if tries < TRIES && was_not_heard(&error) => tries += 1,
            answered => return answered,
        }
    }
}

/// Whether the server has taken the silence before the command for a question, and told its status instead. What it has not
/// read to the end it has not done.
fn was_not_heard(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, InvalidData, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | InvalidData | NotConnected)
}

fn ask_once(socket: &Path, line: &impl Serialize, secret: &[u8]) -> io::Result<Answer> {
    let line = serde_json::to_vec(line)?;
    // One write, so that the server finds the whole line as soon as it finds something.
    let mut request = Zeroizing::new(Vec::with_capacity(line.len() + 1 + secret.len()));
    request.extend_from_slice(&line);
    request.push(b'\n');
    request.extend_from_slice(secret);
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&request)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    serde_json::from_str(&answer).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// A server that closes the first connections as `early` says, and answers the next one.
    fn asked(early: &'static [&'static [u8]]) -> (io::Result<Answer>, usize) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let mut heard = 0;
            for answer in early.iter().copied().map(Some).chain([None]) {
                let (mut stream, _) = listener.accept().unwrap();
                match answer {
                    Some(answer) => stream.write_all(answer).unwrap(),
                    None => {
                        let mut request = Vec::new();
                        stream.read_to_end(&mut request).unwrap();
                        heard += usize::from(request == b"{\"it\":1}\nsecret");
                        stream.write_all(br#"{"resized":{"old_bytes":1,"new_bytes":2}}"#).unwrap();
                    }
                }
            }
            heard
        });
        let answer = ask(&socket, &serde_json::json!({"it": 1}), b"secret");
        (answer, server.join().unwrap())
    }

    #[test]
    fn a_command_that_was_taken_for_silence_is_sent_again_and_done_once() {
        const STATUS: &[u8] = b"{\"uptime_seconds\": 3, \"exports\": []}\n";
        for early in [&[][..], &[STATUS], &[STATUS; 4]] {
            let (answer, heard) = asked(early);
            assert!(matches!(answer, Ok(Answer::Resized(Resized { old_bytes: 1, new_bytes: 2 }))), "{answer:?}");
            assert_eq!(heard, 1);
        }
    }
}
