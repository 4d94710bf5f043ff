//! What `daxcrypt rekey --control` says to a running server, and what that answers: both ends of the conversation.
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

use crate::namespace::{Cipher, Credential, DataUnit, OtherSlots, RekeyOptions};
use crate::secret::SecretBytes;

/// How long an answer may take: Argon2id for every slot comes before it.
const PATIENCE: Duration = Duration::from_secs(120);
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

/// The line of a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    pub(crate) rekey: Action,
    /// The namespace.
    pub(crate) uuid: Uuid,
    pub(crate) key_bits: Option<Cipher>,
    pub(crate) unit_bytes: Option<DataUnit>,
    /// What happens to other slots; none is refused when there are some.
    pub(crate) keep_slots: Option<bool>,
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
    /// The other slots, because it was not said what to do with them.
    OtherSlots(String),
    /// The credential opens no slot.
    WrongCredential,
    /// Why it was not done.
    Refused(String),
}

impl Request {
    pub(crate) fn options(&self) -> RekeyOptions {
        let other_slots = if self.keep_slots == Some(true) { OtherSlots::Keep } else { OtherSlots::Drop };
        RekeyOptions { cipher: self.key_bits, unit: self.unit_bytes, other_slots }
    }

    /// The request and the credential in what was received.
    pub(crate) fn parse(received: &[u8]) -> Option<(Self, Credential)> {
        let end = received.iter().position(|&byte| byte == b'\n')?;
        let request: Self = serde_json::from_slice(&received[..end]).ok()?;
        let bytes = SecretBytes::copy_of(&received[end + 1..]);
        let credential = if request.passphrase { Credential::Passphrase(bytes) } else { Credential::KeyFile(bytes) };
        Some((request, credential))
    }

    /// Asks the server at `socket`.
    pub(crate) fn ask(&self, socket: &Path, credential: Option<&Credential>) -> io::Result<Answer> {
        let secret: &[u8] = match credential {
            Some(Credential::Passphrase(bytes) | Credential::KeyFile(bytes)) => bytes,
            None => &[],
        };
        let line = serde_json::to_vec(self)?;
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
}
