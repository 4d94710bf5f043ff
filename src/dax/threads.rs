//! The two threads of a map: one answers page faults, one syncs at intervals.
//!
//! The fault thread touches no mapped memory of its own and waits for nothing but the volume's range lock, whose holders
//! wait for no fault: so every fault is answered. It has its memory before it begins. When it ends all the same (a panic
//! in a subscriber of logs), the map is [given up](Core::give_up): nobody waits for an answer that never comes.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;

use super::core::{Core, Server};
use crate::spawn::QuietThread;

const STOP: epoll::EventData = epoll::EventData::new_u64(0);
const FAULT: epoll::EventData = epoll::EventData::new_u64(1);
const NO_EVENT: epoll::Event = epoll::Event { flags: epoll::EventFlags::empty(), data: STOP };

/// A running fault thread; stopped and joined by [`FaultThread::stop`].
#[derive(Debug)]
pub(super) struct FaultThread {
    stop: OwnedFd,
    thread: QuietThread,
}

impl FaultThread {
    pub(super) fn start(core: Arc<Core>) -> io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
        let events = events(&core, &stop)?;
        let mut server = Server::new()?;
        let serve = move || {
            let served = catch_unwind(AssertUnwindSafe(|| serve(&core, &events, &mut server)));
            let cause = match served {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "it panicked".to_owned(),
            };
            core.give_up();
            // Who logs may panic once more; everybody has been told by then.
            let _ = catch_unwind(|| tracing::error!("a direct map is given up, its fault thread has ended: {cause}"));
        };
        let thread = QuietThread::spawn(c"daxcrypt-fault", serve)?;
        Ok(Self { stop, thread })
    }

    pub(super) fn stop(self) {
        // An eventfd takes the first 1 at once.
        let _ = rustix::io::write(&self.stop, &1_u64.to_le_bytes());
        self.thread.join();
    }
}

/// Answers faults until it is stopped.
fn serve(core: &Core, events: &OwnedFd, server: &mut Server) -> io::Result<()> {
    loop {
        let mut ready = [NO_EVENT; 2];
        let count = match epoll::wait(events, &mut ready, None) {
            Ok(count) => count,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        if ready[..count].iter().any(|event| { event.data } == STOP) {
            return Ok(());
        }
        core.answer(server)?;
    }
}

/// What a fault thread waits for. Not `poll`, which refuses when `RLIMIT_NOFILE` has come below the number of descriptors
/// that it is asked about.
fn events(core: &Core, stop: &OwnedFd) -> io::Result<OwnedFd> {
    let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&events, stop, STOP, epoll::EventFlags::IN)?;
    if let Some(faults) = core.fault_fd() {
        epoll::add(&events, faults, FAULT, epoll::EventFlags::IN)?;
    }
    Ok(events)
}

/// A running write-back thread; stopped and joined by [`WriteBackThread::stop`].
#[derive(Debug)]
pub(super) struct WriteBackThread {
    stop: Mutex<Sender<()>>,
    thread: QuietThread,
}

impl WriteBackThread {
    pub(super) fn start(core: Arc<Core>, interval: Duration) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let write_back = move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                // What could not be written stays marked, and the next sync of the program or the close reports it. A panic
                // (of a subscriber of logs) must not end what bounds the loss of a crash.
                let _ = catch_unwind(AssertUnwindSafe(|| core.sync(core.view.range())));
            }
        };
        let thread = QuietThread::spawn(c"daxcrypt-back", write_back)?;
        Ok(Self { stop: Mutex::new(stop), thread })
    }

    pub(super) fn stop(self) {
        drop(self.stop);
        self.thread.join();
    }
}
