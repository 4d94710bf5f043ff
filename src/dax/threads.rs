//! The two threads of a map: one answers page faults, one syncs at intervals.
//!
//! The fault thread touches no mapped memory of its own and waits for nothing but the volume's range lock, whose holders
//! wait for no fault: so every fault is answered.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::core::{Core, Server};

/// A running fault thread; stopped and joined by [`FaultThread::stop`].
#[derive(Debug)]
pub(super) struct FaultThread {
    stop: Arc<OwnedFd>,
    thread: JoinHandle<()>,
}

impl FaultThread {
    pub(super) fn start(core: Arc<Core>) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let stopped = Arc::clone(&stop);
        let thread = Builder::new().name("daxcrypt-fault".into()).spawn(move || serve(&core, &stopped))?;
        Ok(Self { stop, thread })
    }

    pub(super) fn stop(self) {
        // An eventfd takes the first 1 at once.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_le_bytes());
        let _ = self.thread.join(); // a panic there has been reported by the panic hook
    }
}

fn serve(core: &Core, stop: &OwnedFd) {
    let Some(faults) = core.fault_fd() else { return };
    let mut server = Server::new();
    loop {
        let mut ready = [PollFd::from_borrowed_fd(faults, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return,
        }
        if !ready[1].revents().is_empty() || core.answer(&mut server).is_err() {
            return;
        }
    }
}

/// A running write-back thread; stopped and joined by [`WriteBackThread::stop`].
#[derive(Debug)]
pub(super) struct WriteBackThread {
    stop: Mutex<Sender<()>>,
    thread: JoinHandle<()>,
}

impl WriteBackThread {
    pub(super) fn start(core: Arc<Core>, interval: Duration) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let thread = Builder::new().name("daxcrypt-write-back".into()).spawn(move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                // What could not be written stays marked, and the next sync of the program or the close reports it.
                let _ = core.sync(core.view.range());
            }
        })?;
        Ok(Self { stop: Mutex::new(stop), thread })
    }

    pub(super) fn stop(self) {
        drop(self.stop);
        let _ = self.thread.join(); // a panic there has been reported by the panic hook
    }
}
