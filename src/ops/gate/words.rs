//! What operations are called in sentences for people: "cannot ... it".

use std::fmt;

use super::Operation;

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serve | Self::ServeReadOnly => "serve",
            Self::Export => "export",
            Self::Import => "import into",
            Self::RekeyPreview | Self::RekeyBegin => "re-key",
            Self::RekeyResume => "go on with the re-key of",
            Self::RekeyPause => "pause the re-key of",
            Self::RekeyStatus => "tell the re-key of",
            Self::RelocateSource => "relocate",
            Self::CopySource => "copy",
            Self::RelocateDestination => "relocate to",
            Self::Adopt => "adopt",
            Self::Compact => "move",
            Self::Resize => "resize",
            Self::AllowDiscards => "allow discards in",
            Self::HeaderBackup => "back up the header of",
            Self::HeaderRestore => "restore the header of",
            Self::HeaderRepair => "repair the header of",
            Self::ExportLuks2 => "export a LUKS2 header of",
            Self::KeyList => "list the key slots of",
            Self::KeyTest => "test a key of",
            Self::KeyAdd => "add a key slot to",
            Self::KeyRemove => "remove a key slot of",
            Self::KeyChange => "change a key slot of",
            Self::KeyDump => "write out the volume key of",
            Self::Erase => "erase",
            Self::Remove => "remove",
            Self::DmTable => "make a dm-crypt table of",
            Self::FormatOver => "format",
            Self::Info => "show",
            Self::Lock => "lock",
        })
    }
}
