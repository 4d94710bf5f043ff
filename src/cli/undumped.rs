//! No core of a process that handles keys, and no look into it by other processes of the same user.
//!
//! Key memory is left out of cores anyway. This is for what is copied out of it for a moment: registers, the stack, buffers
//! of other code. The price: as long as a command runs, its user can neither attach a debugger to it nor see its open files
//! (`gdb -p`, `strace -p`, `fuser`, `lsof`); root can. A program that `--passphrase-command` starts is not concerned but for
//! the limit, which it inherits. The library leaves this to the program that uses it.

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use super::output::warning;

/// Makes the process one that is never dumped. A refusal is told, and no reason to stop: it would take the key away from who
/// needs it, and give it to nobody else.
pub(super) fn protect_process() {
    let no_core = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let not_dumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    if let Err(error) = no_core.and(not_dumpable) {
        warning!("core dumps of this process cannot be forbidden: {error}");
    }
}
