//! What commands with `--control` say to a running server, and what that answers: both ends of the conversation.
//!
//! A request is one line of JSON and, behind it, the bytes of the credentials whose kinds and lengths the line tells; the
//! answer is one line of JSON. The socket has mode 0600: whoever may connect is the server's user or root.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::error::Error;
use super::export_options::ExportOptions;
use super::from_ops::slot_lines;
use crate::namespace::{Cipher, Credential, DataUnit, KdfCost, SlotInfo, TransformError, UpdateError};
use crate::ops::rekey::{self, Estimate};
use crate::ops::resize::{Resized, Wanted};
use crate::ops::{self, Location, Operation, SlotPolicy, Whereabouts};
use crate::secret::SecretBytes;
use crate::volume::TransformProgress;

/// How long an answer may take: Argon2id for every slot comes before it.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a command is sent that the server does not hear.
const TRIES: u32 = 5;
/// The longest answer that is read, in bytes.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// The line of a request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Request {
    pub(crate) what: What,
    /// The credentials behind the line.
    credentials: Vec<Shape>,
}

/// What is asked for, and of what.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum What {
    /// Of a namespace, which whoever asks has found on media.
    Namespace { namespace: Who, command: Command },
    /// Of an export, by its name.
    Export { name: String, command: ExportCommand },
    /// Of the server.
    Server(ServerCommand),
}

/// What a server is to do with an export.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ExportCommand {
    /// Wipe its key and plaintext; requests wait meanwhile, or fail.
    Lock { wait: bool },
    /// Go on with it, with the key of a slot or the volume key itself.
    Unlock { by_volume_key: bool },
    /// Close its clients, and serve it no more.
    Remove,
}

/// What a server is to do as a whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum ServerCommand {
    /// Lock all exports that can be.
    LockAll { wait: bool },
    /// Serve one more.
    AddExport(Box<NewExport>),
    /// Close the client of that number.
    KickClient(u64),
    /// Read lists, limits and certificates again.
    Reload,
}

/// A namespace that is to be served, too.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewExport {
    /// As the server finds it: absolute.
    pub(crate) path: PathBuf,
    pub(crate) header: Option<PathBuf>,
    pub(crate) accept_data: bool,
    pub(crate) options: ExportOptions,
    /// Whether the credential is the volume key itself.
    pub(crate) by_volume_key: bool,
}

/// The namespace that is meant: a copy of it has the same uuid, and lies elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Who {
    pub(crate) uuid: Uuid,
    pub(crate) at: Whereabouts,
}

/// What a server is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Command {
    /// Tell how a re-key stands.
    RekeyStatus,
    /// Tell what a re-key would cost.
    RekeyPreview(Change),
    /// Begin a re-key, with the credential of a slot.
    RekeyBegin { change: Change, max_rate: Option<u64> },
    /// Go on with one that rests.
    RekeyResume { max_rate: Option<u64> },
    /// Let it rest, also for later servers.
    RekeyPause,
    /// Let it rest until this server or a later one is asked, or a later one starts.
    RekeyStop,
    /// Give the volume another size.
    Resize(Wanted),
    /// Add a slot: the credential of a present one comes first, then that of the new one.
    KeyAdd { slot: Option<u32>, label: String, cost: KdfCost },
    /// Remove a slot, with the credential of one.
    KeyRemove { slot: u32, force: bool },
    /// Give a slot another credential, the present one comes first; what is not named of the cost stays as it is.
    KeyChange { slot: Option<u32>, memory_kib: Option<u32>, time: Option<u32> },
}

impl Command {
    /// What the gate knows it as.
    pub(crate) const fn operation(&self) -> Operation {
        match self {
            Self::RekeyStatus => Operation::RekeyStatus,
            Self::RekeyPreview(_) => Operation::RekeyPreview,
            Self::RekeyBegin { .. } => Operation::RekeyBegin,
            Self::RekeyResume { .. } => Operation::RekeyResume,
            Self::RekeyPause | Self::RekeyStop => Operation::RekeyPause,
            Self::Resize(_) => Operation::Resize,
            Self::KeyAdd { .. } => Operation::KeyAdd,
            Self::KeyRemove { .. } => Operation::KeyRemove,
            Self::KeyChange { .. } => Operation::KeyChange,
        }
    }
}

/// What a re-key is to change.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Change {
    pub(crate) key_bits: Option<Cipher>,
    pub(crate) unit_bytes: Option<DataUnit>,
    pub(crate) slots: SlotPolicy,
}

impl Change {
    pub(crate) const fn wish(self) -> rekey::Wish {
        rekey::Wish { cipher: self.key_bits, unit: self.unit_bytes, slots: self.slots }
    }
}

/// A credential behind the line.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    passphrase: bool,
    len_bytes: usize,
}

/// How a re-key stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RekeyState {
    /// How far it has come; nothing when none is under way.
    pub(crate) progress: Option<TransformProgress>,
    /// Whether it rests until it is resumed.
    pub(crate) paused: bool,
    /// Whether the server is at it.
    pub(crate) running: bool,
    /// Why the server could not go on.
    pub(crate) failed: Option<String>,
}

/// An export that is locked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct LockedLine {
    pub(crate) name: String,
    /// Whether requests wait; otherwise they fail.
    pub(crate) waits: bool,
    /// What could not be made durable before.
    pub(crate) failed: Option<String>,
}

/// The line of an answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Rekey(RekeyState),
    Estimate(Estimate),
    Resized(Resized),
    /// The exports that are locked now.
    Locked(Vec<LockedLine>),
    /// The export is open again.
    Unlocked,
    /// The export of that name is served.
    Added(String),
    /// It has been done.
    Done,
    /// It would become smaller, and was not told that it may.
    Shrinks {
        old_bytes: u64,
        new_bytes: u64,
    },
    /// The number of the slot that was added, removed or changed.
    Slot(u32),
    /// The other slots, because it was not said what to do with them.
    OtherSlots(Vec<SlotInfo>),
    /// The credential opens no slot.
    WrongCredential,
    /// It is the slot of the credential.
    OwnSlot(u32),
    /// Why it was not done, and what helps.
    Refused {
        reason: String,
        help: Option<String>,
    },
}

impl Answer {
    pub(crate) fn refused(reason: impl Into<String>) -> Self {
        Self::Refused { reason: reason.into(), help: None }
    }

    /// The error that this answer is about the namespace at `path`, unless it is none: the same as without a server.
    pub(crate) fn or_error(self, path: &Path) -> Result<Self, Error> {
        let path = path.to_path_buf();
        match self {
            Self::OtherSlots(slots) => Err(Error::OtherSlots { slots: slot_lines(&slots) }),
            Self::WrongCredential => Err(Error::Rekey { path, source: TransformError::Credential.into() }),
            Self::OwnSlot(slot) => Err(Error::OwnSlot { slot }),
            Self::Shrinks { old_bytes, new_bytes } => {
                Err(Error::Update { path, source: UpdateError::Shrinks { old_bytes, new_bytes } })
            }
            Self::Refused { reason, help } => Err(Error::Refused { reason, help }),
            answer @ (Self::Rekey(_) | Self::Estimate(_) | Self::Resized(_) | Self::Slot(_)) => Ok(answer),
            answer @ (Self::Locked(_) | Self::Unlocked | Self::Added(_) | Self::Done) => Ok(answer),
        }
    }
}

/// A server to be asked about a namespace.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    socket: &'a Path,
    path: PathBuf,
    who: Who,
}

impl<'a> Asked<'a> {
    /// The server at `socket`, about what lies at `location`: found there without a lock, which the server has.
    pub(crate) fn new(socket: &'a Path, operation: Operation, location: &Location) -> Result<Self, Error> {
        let site = location.peek(operation)?;
        let failed = |cause| ops::Error::new(operation, location.path(), cause);
        let at = Whereabouts::of_site(&site).map_err(failed)?;
        let at = at.ok_or_else(|| Error::Usage("memory is not served".into()))?;
        let locked = location.locked(operation, site)?;
        Ok(Self { socket, path: location.path().into(), who: Who { uuid: locked.header().uuid, at } })
    }

    /// What it answers to `command`, and to the credentials that belong to it; a refusal is an error.
    pub(crate) fn about(&self, command: Command, credentials: &[&Credential]) -> Result<Answer, Error> {
        ask_for(self.socket, What::Namespace { namespace: self.who, command }, credentials)?.or_error(&self.path)
    }
}

/// What the server at `socket` answers to `what`, and to the credentials that belong to it.
pub(crate) fn ask_for(socket: &Path, what: What, credentials: &[&Credential]) -> Result<Answer, Error> {
    let shape = |credential: &&Credential| match credential {
        Credential::Passphrase(bytes) => Shape { passphrase: true, len_bytes: bytes.len() },
        Credential::KeyFile(bytes) => Shape { passphrase: false, len_bytes: bytes.len() },
    };
    let request = Request { what, credentials: credentials.iter().map(shape).collect() };
    let secrets: Vec<&[u8]> = credentials
        .iter()
        .map(|credential| match credential {
            Credential::Passphrase(bytes) | Credential::KeyFile(bytes) => &**bytes,
        })
        .collect();
    ask(socket, &request, &secrets).map_err(|source| Error::Control { path: socket.into(), source })
}

impl Request {
    /// The line, and the credentials behind it.
    pub(crate) fn parse(received: &[u8]) -> Option<(Self, Vec<Credential>)> {
        let end = received.iter().position(|&byte| byte == b'\n')?;
        let request: Self = serde_json::from_slice(&received[..end]).ok()?;
        let mut rest = &received[end + 1..];
        let mut credentials = Vec::new();
        for shape in &request.credentials {
            let (bytes, behind) = rest.split_at_checked(shape.len_bytes)?;
            let bytes = SecretBytes::copy_of(bytes);
            credentials.push(if shape.passphrase { Credential::Passphrase(bytes) } else { Credential::KeyFile(bytes) });
            rest = behind;
        }
        rest.is_empty().then_some((request, credentials))
    }
}

/// Sends a line and what belongs behind it, and waits for the answer.
fn ask(socket: &Path, line: &impl Serialize, secrets: &[&[u8]]) -> io::Result<Answer> {
    let mut tries = 1;
    loop {
        match ask_once(socket, line, secrets) {
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

fn ask_once(socket: &Path, line: &impl Serialize, secrets: &[&[u8]]) -> io::Result<Answer> {
    let line = serde_json::to_vec(line)?;
    // One write, so that the server finds the whole line as soon as it finds something.
    let secret_bytes: usize = secrets.iter().map(|secret| secret.len()).sum();
    let mut request = Zeroizing::new(Vec::with_capacity(line.len() + 1 + secret_bytes));
    request.extend_from_slice(&line);
    request.push(b'\n');
    secrets.iter().for_each(|secret| request.extend_from_slice(secret));
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

    /// The name of what is asked. What is new here needs an example in `json.md`.
    fn question(what: &What) -> &'static str {
        match what {
            What::Namespace { command, .. } => match command {
                Command::RekeyStatus => "rekey_status",
                Command::RekeyPreview(_) => "rekey_preview",
                Command::RekeyBegin { .. } => "rekey_begin",
                Command::RekeyResume { .. } => "rekey_resume",
                Command::RekeyPause => "rekey_pause",
                Command::RekeyStop => "rekey_stop",
                Command::Resize(_) => "resize",
                Command::KeyAdd { .. } => "key_add",
                Command::KeyRemove { .. } => "key_remove",
                Command::KeyChange { .. } => "key_change",
            },
            What::Export { command, .. } => match command {
                ExportCommand::Lock { .. } => "lock",
                ExportCommand::Unlock { .. } => "unlock",
                ExportCommand::Remove => "remove",
            },
            What::Server(command) => match command {
                ServerCommand::LockAll { .. } => "lock_all",
                ServerCommand::AddExport(_) => "add_export",
                ServerCommand::KickClient(_) => "kick_client",
                ServerCommand::Reload => "reload",
            },
        }
    }

    /// The same of answers.
    fn answer(answer: &Answer) -> &'static str {
        match answer {
            Answer::Rekey(_) => "rekey",
            Answer::Estimate(_) => "estimate",
            Answer::Resized(_) => "resized",
            Answer::Locked(_) => "locked",
            Answer::Unlocked => "unlocked",
            Answer::Added(_) => "added",
            Answer::Done => "done",
            Answer::Shrinks { .. } => "shrinks",
            Answer::Slot(_) => "slot",
            Answer::OtherSlots(_) => "other_slots",
            Answer::WrongCredential => "wrong_credential",
            Answer::OwnSlot(_) => "own_slot",
            Answer::Refused { .. } => "refused",
        }
    }

    /// Every line of a block of examples, read as `T` and written again: neither has a field that the other has not.
    fn examples<T: Serialize + serde::de::DeserializeOwned>(
        block: &str,
        name: impl Fn(&T) -> &'static str,
    ) -> Vec<String> {
        let known = |line: &str| {
            let read: T = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            let (written, documented) = (serde_json::to_value(&read).unwrap(), serde_json::from_str(line).unwrap());
            let documented: serde_json::Value = documented;
            assert_eq!(written, documented);
            name(&read).to_owned()
        };
        block.lines().map(known).collect()
    }

    #[test]
    fn the_documentation_has_an_example_of_everything_that_is_said() {
        let document = include_str!("json.md");
        let (_, conversation) = document.split_once("# The control socket\n").unwrap();
        let blocks: Vec<_> =
            conversation.split("```").skip(1).step_by(2).map(|block| &block["json\n".len()..]).collect();
        let [questions, answers] = blocks[..] else { panic!("{} blocks", blocks.len()) };
        let questions = examples::<Request>(questions, |request| question(&request.what));
        let answers = examples::<Answer>(answers, answer);
        // Every name in `question` and `answer` is in the document: as an example, and in the table.
        let source = include_str!("control.rs");
        let (_, functions) = source.split_once("    fn question(").unwrap();
        let (functions, _) = functions.split_once("    /// Every line of a block").unwrap();
        let names: Vec<_> =
            functions.lines().filter_map(|line| line.split_once("=> \"")?.1.split('"').next()).collect();
        assert_eq!(names.len(), 17 + 13, "{names:?}");
        let (table, _) = conversation.split_once("Questions:").unwrap();
        for name in names {
            assert!(questions.iter().chain(&answers).any(|example| example == name), "no example of {name}");
            assert!(table.contains(&format!("`{name}`")), "{name} is not in the table");
        }
    }

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
        let answer = ask(&socket, &serde_json::json!({"it": 1}), &[b"sec", b"ret"]);
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

    #[test]
    fn a_request_arrives_as_it_was_sent_and_nothing_else_is_one() {
        let shapes = vec![Shape { passphrase: true, len_bytes: 3 }, Shape { passphrase: false, len_bytes: 5 }];
        let at = Whereabouts { backing: crate::pmem::BackingId::Device { device: 259 }, start: 1 << 20 };
        let namespace = Who { uuid: Uuid::from_u128(7), at };
        let cost = KdfCost::LEAST;
        let command = Command::KeyAdd { slot: None, label: "desk".into(), cost };
        let what = What::Namespace { namespace, command };
        let line = serde_json::to_vec(&Request { what, credentials: shapes }).unwrap();
        let sent = |behind: &[u8]| [&line, &b"\n"[..], behind].concat();
        let (request, credentials) = Request::parse(&sent(b"abcdefgh")).unwrap();
        let What::Namespace { namespace: sent_namespace, command } = request.what else { panic!() };
        assert_eq!(sent_namespace, namespace);
        assert!(matches!(command, Command::KeyAdd { slot: None, cost: found, .. } if found == cost));
        let [Credential::Passphrase(first), Credential::KeyFile(second)] = &credentials[..] else { panic!() };
        assert_eq!((&**first, &**second), (&b"abc"[..], &b"defgh"[..]));
        for behind in [&b""[..], b"abc", b"abcdefg", b"abcdefghi"] {
            assert!(Request::parse(&sent(behind)).is_none(), "{behind:?}");
        }
        let huge = String::from_utf8(sent(b"abcdefgh")).unwrap();
        let huge = huge.replace("\"len_bytes\":3", "\"len_bytes\":18446744073709551615");
        assert!(Request::parse(huge.as_bytes()).is_none() && Request::parse(&line).is_none());
    }
}
