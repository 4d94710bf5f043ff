//! The gate: what every operation may do in every state that a namespace can be in. One table, which everything that opens
//! a namespace for an operation asks, whatever the way in is.
//!
//! A state is what an opened header says. Several hold at once (in use, and being re-keyed): each has a column, and the
//! strictest verdict wins. An operation is a row. Rows are arrays of one cell for each state and are found by a `match`
//! without a wildcard, so neither a new operation nor a new state compiles before its row, or a cell in every row, is there.
//!
//! The table is asked twice: before the key is asked for, so that nobody types a passphrase for nothing, and with the
//! authenticated header after it, which is the answer that counts.

mod words;

use std::path::Path;

use crate::namespace::{CopyState, Header, LockedNamespace, Namespace, OpenError, TransformKind};

/// What is done to a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Its volume is served, for reading and writing.
    Serve,
    /// Its volume is served, for reading.
    ServeReadOnly,
    /// Its plaintext is read out.
    Export,
    /// Plaintext is written over it.
    Import,
    /// It is found out what a re-key would do.
    RekeyPreview,
    /// A re-key begins.
    RekeyBegin,
    /// A re-key goes on.
    RekeyResume,
    /// A re-key rests until it is resumed.
    RekeyPause,
    /// It is told how far a re-key is.
    RekeyStatus,
    /// It is moved to another place, and erased here.
    RelocateSource,
    /// It is copied to another place.
    CopySource,
    /// Another namespace is moved over it.
    RelocateDestination,
    /// It gets the tweaks of the place that its ciphertext was moved to.
    Adopt,
    /// It moves towards the start of its region, and its partition becomes as long as it is.
    Compact,
    /// Its data area gets another size.
    Resize,
    /// Discards punch holes from now on.
    AllowDiscards,
    /// Its header is copied to a file.
    HeaderBackup,
    /// A copy of a header becomes its header.
    HeaderRestore,
    /// One of its two header copies becomes its header.
    HeaderRepair,
    /// A LUKS2 header for the same data is made.
    ExportLuks2,
    /// Its key slots are listed.
    KeyList,
    /// It is found out whether a key opens it.
    KeyTest,
    /// It gets another key slot.
    KeyAdd,
    /// It loses a key slot.
    KeyRemove,
    /// A key slot gets another key.
    KeyChange,
    /// Its volume key is written out.
    KeyDump,
    /// Its key slots and headers are destroyed.
    Erase,
    /// As [`Self::Erase`], and its partition is given back.
    Remove,
    /// A line for dm-crypt is made.
    DmTable,
    /// A new namespace is made in its place.
    FormatOver,
    /// What its header says is shown.
    Info,
    /// Its key and all plaintext are wiped in the server that has it, until it is unlocked there again.
    Lock,
}

/// Whether an operation changes what it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It looks at the header, and takes no lock.
    Peek,
    /// It reads.
    Read,
    /// It writes.
    Write,
}

/// What an opened header says about its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing is under way.
    Settled,
    /// The two header copies differ: an update was cut short, or one is damaged.
    CutShort,
    /// It is being re-keyed where it lies.
    Rekeying,
    /// It is on its way to another place in its region.
    Sliding,
    /// It was adopted at the place that it was moved to, and its data gets the tweaks of that place.
    Adopted,
    /// What is under way (re-key, slide or adoption) rests until somebody asks for more.
    Paused,
    /// It lies elsewhere than its header says, and is not adopted yet.
    Moved,
    /// It is in use, or was not closed in order.
    Unclean,
    /// Its key, and with it its content, is new at each opening.
    Ephemeral,
    /// It is a LUKS2 volume.
    Luks2,
    /// Its data area was to be filled with noise, and is not full of it.
    Wiping,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 32] = [
        Self::Serve,
        Self::ServeReadOnly,
        Self::Export,
        Self::Import,
        Self::RekeyPreview,
        Self::RekeyBegin,
        Self::RekeyResume,
        Self::RekeyPause,
        Self::RekeyStatus,
        Self::RelocateSource,
        Self::CopySource,
        Self::RelocateDestination,
        Self::Adopt,
        Self::Compact,
        Self::Resize,
        Self::AllowDiscards,
        Self::HeaderBackup,
        Self::HeaderRestore,
        Self::HeaderRepair,
        Self::ExportLuks2,
        Self::KeyList,
        Self::KeyTest,
        Self::KeyAdd,
        Self::KeyRemove,
        Self::KeyChange,
        Self::KeyDump,
        Self::Erase,
        Self::Remove,
        Self::DmTable,
        Self::FormatOver,
        Self::Info,
        Self::Lock,
    ];

    /// What it does with what it opens.
    #[must_use]
    pub const fn reach(self) -> Reach {
        match self {
            Self::HeaderBackup | Self::KeyList | Self::KeyTest | Self::Info | Self::RekeyStatus => Reach::Peek,
            // Only the server that has it does it, with what it has open.
            Self::Lock => Reach::Peek,
            Self::ServeReadOnly | Self::Export | Self::RekeyPreview | Self::CopySource => Reach::Read,
            Self::ExportLuks2 | Self::KeyDump | Self::DmTable => Reach::Read,
            Self::Serve | Self::Import | Self::RekeyBegin | Self::RekeyResume | Self::RekeyPause => Reach::Write,
            Self::RelocateSource | Self::RelocateDestination | Self::Adopt | Self::Compact => Reach::Write,
            Self::Resize | Self::AllowDiscards | Self::HeaderRestore | Self::HeaderRepair => Reach::Write,
            Self::KeyAdd | Self::KeyRemove | Self::KeyChange => Reach::Write,
            Self::Erase | Self::Remove | Self::FormatOver => Reach::Write,
        }
    }
}

impl State {
    /// Every state, as the columns of the table stand.
    pub const ALL: [Self; 11] = [
        Self::Settled,
        Self::CutShort,
        Self::Rekeying,
        Self::Sliding,
        Self::Adopted,
        Self::Paused,
        Self::Moved,
        Self::Unclean,
        Self::Ephemeral,
        Self::Luks2,
        Self::Wiping,
    ];

    const fn column(self) -> usize {
        match self {
            Self::Settled => 0,
            Self::CutShort => 1,
            Self::Rekeying => 2,
            Self::Sliding => 3,
            Self::Adopted => 4,
            Self::Paused => 5,
            Self::Moved => 6,
            Self::Unclean => 7,
            Self::Ephemeral => 8,
            Self::Luks2 => 9,
            Self::Wiping => 10,
        }
    }
}

/// How it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// What unlocks it.
    pub key: KeyWay,
    /// Whether its backing can be read only.
    pub read_only: bool,
    /// Whether its header is in another file.
    pub detached: bool,
    /// Who asks.
    pub caller: Caller,
    /// Whether it was said that what is there may be lost.
    pub force: bool,
}

/// What unlocks a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyWay {
    /// Nothing, yet.
    None,
    /// A key slot.
    Slot,
    /// The volume key itself: an escrow file or a key specification.
    VolumeKey,
}

/// Who asks for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Whoever has opened the namespace for it.
    Opener,
    /// The control socket of the server that has it open.
    Control,
}

impl Way {
    /// As whoever opens a namespace for `operation` comes in before there is a key.
    #[must_use]
    pub fn before_the_key(operation: Operation) -> Self {
        let read_only = operation.reach() != Reach::Write;
        Self { key: KeyWay::None, read_only, detached: false, caller: Caller::Opener, force: false }
    }
}

/// What the gate says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may be done now.
    GoOn,
    /// It may be done when this is.
    FinishFirst(Step),
    /// It may not be done.
    Refuse(Refusal),
}

/// What is to be done before an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write the header to both copies, and destroy the header that was left behind elsewhere.
    CompleteHeader,
    /// Bring the data to where it is going.
    EndTransform,
}

/// Why an operation may not be done, and what helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// What helps.
    pub help: Help,
}

/// Why an operation may not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// A re-key, slide or adoption is under way.
    #[error("a re-key is under way: it must end first")]
    UnderWay,
    /// None is.
    #[error("no re-key is under way")]
    NotUnderWay,
    /// It rests until somebody asks for more.
    #[error("its re-key is paused")]
    Paused,
    /// The namespace does not lie where its header says.
    #[error("it lies elsewhere than its header says")]
    Moved,
    /// It does.
    #[error("it lies where its header says: there is nothing to adopt")]
    NotMoved,
    /// There is no key to be kept, and no content either.
    #[error("it is ephemeral: it has a new key and new content at each opening")]
    Ephemeral,
    /// It is not a namespace.
    #[error("it is a LUKS2 volume")]
    Luks2,
    /// What is there would be lost.
    #[error("there is a namespace, which would be lost")]
    Overwrites,
    /// A re-key gives the slot that unlocked a successor, and none did.
    #[error("it was unlocked by its volume key: unlock it with the key of a slot")]
    NoSlot,
    /// It was opened for reading.
    #[error("it is open for reading only")]
    ReadOnly,
    /// What moves in a region takes its header along.
    #[error("its header is detached")]
    Detached,
    /// A server holds on to it.
    #[error("it is being served")]
    Served,
    /// Only a server can do it, with what it serves.
    #[error("no server has it")]
    NotServed,
}

/// What helps against a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Help {
    /// Let what is under way come to its end.
    Resume,
    /// Begin a re-key.
    Rekey,
    /// Adopt it where it lies.
    Adopt,
    /// Say that what is there may be lost.
    Force,
    /// Use cryptsetup, or serve it as what it is.
    Luks2,
    /// Unlock it with the key of a slot.
    Slot,
    /// Open it for writing.
    Write,
    /// Stop the server first.
    Stop,
    /// Ask a server that has it.
    Serve,
    /// Nothing.
    Nothing,
}

impl Help {
    /// The command that helps with the namespace at `path`, in words for people.
    #[must_use]
    pub fn command(self, path: &Path) -> Option<String> {
        let path = path.display();
        match self {
            Self::Resume => Some(format!("`daxcrypt rekey --resume {path}` goes on with it to its end")),
            Self::Rekey => Some(format!("`daxcrypt rekey {path}` begins one")),
            Self::Adopt => Some(format!("`daxcrypt relocate --in-place {path}` adopts it; or move it back")),
            Self::Force => Some("--force goes on, and what is there is then lost".into()),
            Self::Luks2 => Some("`serve --luks2` and `info --luks2` open LUKS2 volumes".into()),
            Self::Slot => Some("give the key of a slot; `daxcrypt key list` shows which there are".into()),
            Self::Write => Some("open it for writing".into()),
            Self::Stop => Some("stop the server first".into()),
            Self::Serve => Some("`daxcrypt lock NAME --control SOCKET` asks the server that has it".into()),
            Self::Nothing => None,
        }
    }
}

/// What may be done in one state.
#[derive(Clone, Copy, Debug)]
enum Cell {
    /// Go on.
    Go,
    /// Who writes completes the header first; who reads takes the newer copy.
    Header,
    /// The transform ends first.
    End,
    /// Only who says that what is there may be lost goes on.
    Unless(Reason, Help),
    No(Reason, Help),
}

/// The states that a header of ours can tell of; at least one.
#[must_use]
pub fn states_of(header: &Header, transform: Option<TransformKind>, paused: bool) -> Vec<State> {
    let mut states = vec![match transform {
        Some(TransformKind::Rekey) => State::Rekeying,
        Some(TransformKind::Slide) => State::Sliding,
        Some(TransformKind::Adoption) => State::Adopted,
        None if header.ephemeral => State::Ephemeral,
        None => State::Settled,
    }];
    if paused {
        states.push(State::Paused);
    }
    let agrees = |copy: &CopyState| *copy == CopyState::Good { sequence: header.sequence };
    if !header.copies.iter().all(agrees) && !header.ephemeral {
        states.push(State::CutShort);
    }
    if header.unclean {
        states.push(State::Unclean);
    }
    if header.wiping {
        states.push(State::Wiping);
    }
    states
}

/// The states of a namespace that is not unlocked yet: as its header says, which nobody has authenticated.
#[must_use]
pub fn states_of_locked(locked: &LockedNamespace) -> Vec<State> {
    states_of(locked.header(), locked.transform_kind(), locked.transform_paused())
}

/// The states of whatever is in a place: none, if nobody can tell anything of it.
#[must_use]
pub fn states_of_place(found: &Result<LockedNamespace, OpenError>) -> Vec<State> {
    match found {
        Ok(locked) => states_of_locked(locked),
        Err(OpenError::NotANamespace { found: Some(found) }) if found.is_luks() => vec![State::Luks2],
        Err(OpenError::Relocated { .. } | OpenError::AddressChanged { .. }) => vec![State::Moved],
        Err(_) => Vec::new(),
    }
}

/// The states of a namespace that is unlocked.
#[must_use]
pub fn states_of_unlocked(namespace: &Namespace) -> Vec<State> {
    states_of(&namespace.header(), namespace.transform_kind(), namespace.transform_paused())
}

/// The strictest verdict of all states, by this way.
///
/// # Errors
///
/// [`Refusal`].
pub fn check(operation: Operation, states: &[State], way: Way) -> Result<Option<Step>, Refusal> {
    let mut first = None;
    for &state in states {
        match decide(operation, state, way) {
            Verdict::GoOn => {}
            // Ending a transform completes the header too.
            Verdict::FinishFirst(step) => first = if first == Some(Step::EndTransform) { first } else { Some(step) },
            Verdict::Refuse(refusal) => return Err(refusal),
        }
    }
    Ok(first)
}

/// What `operation` may do in `state` by `way`.
#[must_use]
pub fn decide(operation: Operation, state: State, way: Way) -> Verdict {
    if let Some(refusal) = refused_by_way(operation, way) {
        return Verdict::Refuse(refusal);
    }
    match row(operation)[state.column()] {
        Cell::Go => Verdict::GoOn,
        Cell::Header if way.read_only => Verdict::GoOn,
        Cell::Header => Verdict::FinishFirst(Step::CompleteHeader),
        Cell::End => Verdict::FinishFirst(Step::EndTransform),
        Cell::Unless(..) if way.force => Verdict::GoOn,
        Cell::Unless(reason, help) | Cell::No(reason, help) => Verdict::Refuse(Refusal { reason, help }),
    }
}

/// What no state allows by this way.
const fn refused_by_way(operation: Operation, way: Way) -> Option<Refusal> {
    let needs_slot = match operation {
        Operation::RekeyBegin | Operation::RelocateSource | Operation::CopySource => true,
        Operation::Adopt | Operation::Compact => true,
        Operation::Serve | Operation::ServeReadOnly | Operation::Export | Operation::Import => false,
        Operation::RekeyPreview | Operation::RekeyResume | Operation::RekeyPause | Operation::RekeyStatus => false,
        Operation::RelocateDestination | Operation::Resize | Operation::AllowDiscards => false,
        Operation::HeaderBackup | Operation::HeaderRestore | Operation::HeaderRepair | Operation::ExportLuks2 => false,
        Operation::KeyList | Operation::KeyTest | Operation::KeyAdd | Operation::KeyRemove => false,
        Operation::KeyChange | Operation::KeyDump | Operation::Erase | Operation::Remove => false,
        Operation::DmTable | Operation::FormatOver | Operation::Info | Operation::Lock => false,
    };
    let writes = matches!(operation.reach(), Reach::Write);
    let by_volume_key = matches!(way.key, KeyWay::VolumeKey);
    if writes && way.read_only {
        return Some(Refusal { reason: Reason::ReadOnly, help: Help::Write });
    }
    if needs_slot && by_volume_key {
        return Some(Refusal { reason: Reason::NoSlot, help: Help::Slot });
    }
    if matches!(operation, Operation::Compact) && way.detached {
        return Some(Refusal { reason: Reason::Detached, help: Help::Nothing });
    }
    match way.caller {
        Caller::Opener if matches!(operation, Operation::Lock) => {
            Some(Refusal { reason: Reason::NotServed, help: Help::Serve })
        }
        Caller::Opener => None,
        Caller::Control => refused_while_served(operation),
    }
}

/// What a server does not do with a namespace that it serves.
const fn refused_while_served(operation: Operation) -> Option<Refusal> {
    match operation {
        Operation::RekeyPreview | Operation::RekeyBegin | Operation::RekeyResume => None,
        Operation::RekeyPause | Operation::RekeyStatus | Operation::Resize => None,
        Operation::KeyList | Operation::KeyAdd | Operation::KeyRemove | Operation::KeyChange => None,
        Operation::Lock => None,
        Operation::Serve | Operation::ServeReadOnly | Operation::Export | Operation::Import => SERVED,
        Operation::RelocateSource | Operation::CopySource | Operation::RelocateDestination => SERVED,
        Operation::Adopt | Operation::Compact | Operation::AllowDiscards | Operation::HeaderBackup => SERVED,
        Operation::HeaderRestore | Operation::HeaderRepair | Operation::ExportLuks2 => SERVED,
        Operation::KeyTest | Operation::KeyDump => SERVED,
        Operation::Erase | Operation::Remove | Operation::DmTable | Operation::FormatOver | Operation::Info => SERVED,
    }
}

const SERVED: Option<Refusal> = Some(Refusal { reason: Reason::Served, help: Help::Stop });

/// The table.
#[rustfmt::skip]
const fn row(operation: Operation) -> [Cell; State::ALL.len()] {
    use Cell::{End, Go, Header};
    const LOSS: Cell = Cell::Unless(Reason::Overwrites, Help::Force);
    const LAST: Cell = Cell::Unless(Reason::UnderWay, Help::Resume);
    const GONE: Cell = Cell::Unless(Reason::Moved, Help::Adopt);
    const BUSY: Cell = Cell::No(Reason::UnderWay, Help::Resume);
    const IDLE: Cell = Cell::No(Reason::NotUnderWay, Help::Rekey);
    const REST: Cell = Cell::No(Reason::Paused, Help::Resume);
    const AWAY: Cell = Cell::No(Reason::Moved, Help::Adopt);
    const HOME: Cell = Cell::No(Reason::NotMoved, Help::Rekey);
    const NONE: Cell = Cell::No(Reason::Ephemeral, Help::Nothing);
    const LUKS: Cell = Cell::No(Reason::Luks2, Help::Luks2);
    match operation {
        //                               settled  cut      re-key   slide    adopted  paused   moved    unclean  ephem.   LUKS2    wipe
        Operation::Serve =>             [Go,      Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      Go,      Go,     Go],
        Operation::ServeReadOnly =>     [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      Go,      Go,     Go],
        Operation::Export =>            [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::Import =>            [Go,      Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::RekeyPreview =>      [Go,      Go,      BUSY,    BUSY,    BUSY,    BUSY,    AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::RekeyBegin =>        [Go,      Header,  BUSY,    BUSY,    BUSY,    BUSY,    AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::RekeyResume =>       [IDLE,    Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::RekeyPause =>        [IDLE,    Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::RekeyStatus =>       [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      Go,      LUKS,   Go],
        Operation::RelocateSource =>    [Go,      Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::CopySource =>        [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::RelocateDestination => [LOSS,  LOSS,    LOSS,    LOSS,    LOSS,    LOSS,    LOSS,    LOSS,    LOSS,    LOSS,   LOSS],
        Operation::Adopt =>             [HOME,    Go,      BUSY,    BUSY,    BUSY,    BUSY,    Go,      Go,      NONE,    LUKS,   Go],
        Operation::Compact =>           [Go,      Header,  End,     End,     End,     REST,    AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::Resize =>            [Go,      Header,  BUSY,    BUSY,    BUSY,    BUSY,    AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::AllowDiscards =>     [Go,      Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        // A backup from within a transform is worth nothing after its end, nor without its journal.
        Operation::HeaderBackup =>      [Go,      Go,      BUSY,    BUSY,    BUSY,    BUSY,    AWAY,    Go,      Go,      LUKS,   Go],
        // No backup tells of a transform, so its end would be lost; the header that is there is the only one that can tell.
        Operation::HeaderRestore =>     [Go,      Go,      LAST,    LAST,    LAST,    LAST,    GONE,    Go,      NONE,    LOSS,   Go],
        Operation::HeaderRepair =>      [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::ExportLuks2 =>       [Go,      Go,      BUSY,    BUSY,    BUSY,    BUSY,    AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::KeyList =>           [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      Go,      LUKS,   Go],
        Operation::KeyTest =>           [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      Go,      LUKS,   Go],
        Operation::KeyAdd =>            [Go,      Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::KeyRemove =>         [Go,      Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::KeyChange =>         [Go,      Header,  Go,      Header,  Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::KeyDump =>           [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      NONE,    LUKS,   Go],
        Operation::Erase =>             [Go,      Go,      Go,      Go,      Go,      Go,      Go,      Go,      Go,      LOSS,   Go],
        Operation::Remove =>            [Go,      Go,      Go,      Go,      Go,      Go,      Go,      Go,      Go,      Go,     Go],
        Operation::DmTable =>           [Go,      Go,      BUSY,    BUSY,    BUSY,    BUSY,    AWAY,    Go,      Go,      LUKS,   Go],
        Operation::FormatOver =>        [LOSS,  LOSS,    LOSS,    LOSS,    LOSS,    LOSS,    LOSS,    LOSS,    LOSS,    LOSS,   LOSS],
        Operation::Info =>              [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      Go,      Go,     Go],
        // An ephemeral namespace has no key that could come back.
        Operation::Lock =>              [Go,      Go,      Go,      Go,      Go,      Go,      AWAY,    Go,      NONE,    Go,     Go],
    }
    // `End` would be wrong for an operation that reads; nothing but `Compact` has it.
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(read_only: bool) -> Way {
        Way { key: KeyWay::Slot, read_only, detached: false, caller: Caller::Opener, force: false }
    }

    #[test]
    fn all_lists_every_state_in_the_order_of_its_column() {
        assert!(State::ALL.iter().enumerate().all(|(index, state)| state.column() == index));
        let distinct: std::collections::HashSet<_> = Operation::ALL.into_iter().collect();
        assert_eq!(distinct.len(), Operation::ALL.len());
    }

    #[test]
    fn nothing_is_written_by_who_reads_and_a_reader_needs_no_step() {
        for operation in Operation::ALL {
            for state in State::ALL {
                let verdict = decide(operation, state, way(true));
                if operation.reach() == Reach::Write {
                    assert!(matches!(verdict, Verdict::Refuse(_)), "{operation:?} {state:?}");
                } else {
                    assert!(!matches!(verdict, Verdict::FinishFirst(_)), "{operation:?} {state:?}");
                }
            }
        }
    }

    #[test]
    fn the_strictest_verdict_wins_in_every_order() {
        let states = [State::Rekeying, State::Paused, State::CutShort, State::Unclean];
        for turn in 0..states.len() {
            let mut states = states;
            states.rotate_left(turn);
            let refused = check(Operation::Compact, &states, way(false)).unwrap_err();
            assert_eq!(refused.reason, Reason::Paused);
            let mut without: Vec<_> = states.into_iter().filter(|&state| state != State::Paused).collect();
            assert_eq!(check(Operation::Compact, &without, way(false)), Ok(Some(Step::EndTransform)));
            without.retain(|&state| state != State::Rekeying);
            assert_eq!(check(Operation::Compact, &without, way(false)), Ok(Some(Step::CompleteHeader)));
        }
    }

    #[test]
    fn who_writes_completes_what_was_cut_short() {
        for operation in Operation::ALL.into_iter().filter(|operation| operation.reach() == Reach::Write) {
            let verdict = decide(operation, State::CutShort, way(false));
            let overwrites = match operation {
                Operation::RelocateDestination | Operation::FormatOver => true,
                // They take what they find from both copies, and leave none of it.
                Operation::Erase | Operation::Remove | Operation::Adopt => true,
                Operation::HeaderRestore | Operation::HeaderRepair => true,
                _ => false,
            };
            assert_eq!(overwrites, verdict != Verdict::FinishFirst(Step::CompleteHeader), "{operation:?}");
        }
    }
}
