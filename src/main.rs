//! The `daxcrypt` program: everything is in the library's `cli`.

use std::alloc::System;
use std::process::ExitCode;

use zeroizing_alloc::ZeroAlloc;

/// What is freed is overwritten. Our own buffers and keys are wiped in any case; this is for what libraries keep, TLS above
/// all, whose records pass through buffers of its own.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> ExitCode {
    daxcrypt::cli::main()
}
