//! What the command line makes of the errors of `ops`: the same words, exit codes and hints, whoever found out.

use std::path::Path;

use super::error::Error;
use super::info::slot_line;
use super::output::warning;
use super::size::ByteSize;
use crate::namespace::SlotInfo;
use crate::ops::{self, Cause, Operation};

impl From<ops::Error> for Error {
    fn from(error: ops::Error) -> Self {
        for left in &error.left {
            warning!("{left}");
        }
        let ops::Error { operation, path, cause, .. } = error;
        match *cause {
            Cause::Refused(refusal) => Self::Gate { operation, path, refusal },
            Cause::OtherSlots(slots) => Self::OtherSlots { slots: slot_lines(&slots) },
            Cause::SizeNeeded => {
                let path = path.display();
                Self::Usage(format!("{path} does not exist: say how large it is to be, such as --size 4G"))
            }
            Cause::SizeTooLarge => Self::Usage("--size is too large".into()),
            Cause::SamePlace(reason) => Self::Usage(reason),
            Cause::WouldOverwrite(signature) => Self::WouldOverwrite { path, signature },
            Cause::ImageTooLong { size_bytes, .. } => {
                Self::Usage(format!("the image has more than {size_bytes} bytes, which {} has", path.display()))
            }
            Cause::NotInRegion => {
                Self::Usage(format!("{} is no namespace in a region: REGION#NAME is one", path.display()))
            }
            Cause::NoKeyGiven => Self::NoKeyGiven { path },
            Cause::AcceptsAndReads => {
                Self::Usage(format!("{}: {}, so open it for writing", path.display(), Cause::AcceptsAndReads))
            }
            Cause::OwnSlot { slot } => Self::OwnSlot { slot },
            Cause::SlotNeeded => Self::Usage("say which slot to change: --slot NUMBER".into()),
            Cause::Stopped { done_bytes, total_bytes } => stopped(operation, &path, done_bytes, total_bytes),
            Cause::NotVerified { written, found } => Self::NotVerified { path, written, found },
            Cause::Open(source) => Self::Open { path, source },
            Cause::Namespace(source) => Self::Namespace { path, source },
            Cause::Region(source) => Self::Region { path, source },
            Cause::Unlock(source) => Self::Unlock { path, source },
            Cause::Update(source) => Self::Update { path, source },
            Cause::Transform(source) => Self::Rekey { path, source },
            Cause::Adopt(source) => Self::Adopt { path, source },
            Cause::Slide(source) => Self::Slide { path, source },
            Cause::Format(source) => Self::Format { path, source },
            Cause::Erase(source) => Self::Erase { path, source },
            Cause::Restore(source) => Self::Restore { path, source },
            Cause::ExportLuks2(source) => Self::Luks2Export { path, source },
            Cause::Volume(source) => Self::Volume { path, source },
            Cause::Media(source) => Self::Media { path, source },
            Cause::Plain(source) => Self::Plain { path, source },
            Cause::Backend(source) => Self::Backend(source),
        }
    }
}

/// What moves the data of a namespace where it lies goes on later; what copies it begins again.
fn stopped(operation: Operation, path: &Path, done_bytes: u64, total_bytes: u64) -> Error {
    let (path, done, total) = (path.into(), ByteSize(done_bytes), ByteSize(total_bytes));
    match operation {
        Operation::Import | Operation::Export | Operation::RelocateSource | Operation::CopySource => {
            Error::TransferStopped { path, done, total }
        }
        Operation::FormatOver => Error::WipeStopped { path, done, total },
        _ => Error::RekeyStopped { path, done, total },
    }
}

/// Slots, each with its number, in one line.
pub(crate) fn slot_lines(slots: &[SlotInfo]) -> String {
    slots.iter().map(numbered_line).collect::<Vec<_>>().join("; ")
}

/// A slot with its number.
pub(crate) fn numbered_line(slot: &SlotInfo) -> String {
    format!("{}, {}", slot.id, slot_line(slot))
}
