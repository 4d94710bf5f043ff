//! What is done to namespaces as a whole: re-keyed, moved, resized, copied in and out, backed up, erased.
//!
//! This is the layer between those who ask (the command line, the control socket of a server, a program that uses the
//! library) and the volume. Nothing here knows arguments, terminals or sockets: an operation gets a [`Location`], a key and
//! its wishes, tells a [`Watch`] how far it is, looks at a stop flag between two pieces, and returns what it did or an
//! [`Error`]. Who asks decides what of that is printed.
//!
//! Every operation passes the [`gate`]: one table of operations and states, which says go on, finish the interrupted step
//! first, or why not and what helps.

pub mod compact;
pub mod erase;
mod error;
pub mod gate;
pub mod headers;
mod holes;
mod identity;
pub mod keys;
mod location;
pub mod lock;
mod new_place;
mod open;
mod pace;
pub mod rekey;
pub mod relocate;
pub mod resize;
mod slots;
pub mod transfer;
pub mod wipe;

pub use error::{Cause, Error, Kind, Leftover};
pub use gate::{Operation, Reach, State, Verdict};
pub use identity::Whereabouts;
pub use location::{Location, open_table, peek_table};
pub use new_place::{NewPlace, Prepared, remove_made};
pub use open::{Found, Key, also, also_in_use};
pub use pace::{Ended, Moved, Run, TokenBucket, Unwatched, Watch};
pub use slots::SlotPolicy;

#[cfg(test)]
mod detached_crash_tests;
#[cfg(test)]
mod story_parts;
