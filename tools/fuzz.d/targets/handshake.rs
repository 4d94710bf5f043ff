//! Any bytes as a client's handshake: the machine consumes what it says, says a bounded amount, and never goes in circles.
//!
//! The first byte chooses the TLS mode, the second how the rest is cut.
#![no_main]

#[path = "../../../tests/common/nbd.rs"]
mod common;

use std::sync::{Arc, OnceLock};

use common::{MemoryExport, info};
use daxcrypt::nbd_server::handshake::{Handshake, Outcome, Step};
use daxcrypt::nbd_server::{Exports, Peer, TlsMode};
use libfuzzer_sys::fuzz_target;

static EXPORTS: OnceLock<Arc<Exports>> = OnceLock::new();

fn exports() -> Arc<Exports> {
    let mut exports = Exports::new();
    exports.add(info("disk"), MemoryExport::new(64 << 10)).unwrap();
    exports.add(info("other"), MemoryExport::new(4096)).unwrap();
    Arc::new(exports)
}

fuzz_target!(|data: &[u8]| {
    let [mode, cut, stream @ ..] = data else { return };
    let mode = [TlsMode::Off, TlsMode::Allow, TlsMode::Require][usize::from(*mode) % 3];
    let mut machine = Handshake::new(EXPORTS.get_or_init(exports).clone(), mode, Peer::default());
    let (mut from, mut visible, mut output) = (0, 0, Vec::new());
    for steps in 0.. {
        assert!(steps < 2 * stream.len() + 4, "the machine goes round in circles");
        output.clear();
        let (consumed, step) = machine.step(&stream[from..visible], &mut output);
        assert!(consumed <= visible - from, "more was consumed than there was");
        assert!(output.len() < 16 << 10, "{} bytes of output", output.len());
        from += consumed;
        match step {
            Step::Continue => assert!(consumed > 0, "a step without progress"),
            Step::NeedMore if visible == stream.len() => return,
            Step::NeedMore => visible = (visible + 1 + usize::from(*cut)).min(stream.len()),
            Step::Done(Outcome::StartTls) => machine.tls_started(Peer::default()),
            Step::Done(_) => return,
        }
    }
});
