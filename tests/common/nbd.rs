//! An export in memory, a server that serves it, and a raw client: what the NBD tests share.
//!
//! The raw client speaks bytes, so that it can be as rude as a test needs.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs, missing_debug_implementations)]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use daxcrypt::nbd_server::{
    Export, ExportError, ExportInfo, Exports, Extent, ExtentKind, Handle, Hole, Limits, Listener, Options, Server,
    ServerError,
};
use rustix::net::{AddressFamily, SocketType};

/// Bytes of a page that can be a hole.
pub const PAGE: u64 = 4096;

/// A device in memory with switchable faults.
pub struct MemoryExport {
    pub size: u64,
    pub bytes: RwLock<Vec<u8>>,
    pub flushes: AtomicU64,
    pub persists: AtomicU64,
    pub reads: AtomicU64,
    pub discards: bool,
    /// Reads that touch this byte fail.
    pub bad_byte: AtomicU64,
    pub full: AtomicBool,
    pub slow: AtomicU64,
}

impl MemoryExport {
    pub fn new(size: u64) -> Arc<Self> {
        Arc::new(Self::plain(size))
    }

    pub fn plain(size: u64) -> Self {
        Self {
            size,
            bytes: RwLock::new(vec![0; usize::try_from(size).unwrap()]),
            flushes: AtomicU64::new(0),
            persists: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            discards: false,
            bad_byte: AtomicU64::new(u64::MAX),
            full: AtomicBool::new(false),
            slow: AtomicU64::new(0),
        }
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.bytes.read().unwrap()[offset..offset + len].to_vec()
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), ExportError> {
        std::thread::sleep(Duration::from_millis(self.slow.load(Ordering::Relaxed)));
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "the server let a bad range through");
        let bad = self.bad_byte.load(Ordering::Relaxed);
        if (offset..offset + len).contains(&bad) { Err(ExportError::Media) } else { Ok(()) }
    }
}

fn at(offset: u64, len: u64) -> std::ops::Range<usize> {
    usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap()
}

impl Export for MemoryExport {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.check(offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.bytes.read().unwrap()[at(offset, buf.len() as u64)]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        self.check(offset, data.len() as u64)?;
        if self.full.load(Ordering::Relaxed) {
            return Err(ExportError::NoSpace);
        }
        self.bytes.write().unwrap()[at(offset, data.len() as u64)].copy_from_slice(data);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, _: Hole) -> Result<(), ExportError> {
        self.check(offset, len_bytes)?;
        self.bytes.write().unwrap()[at(offset, len_bytes)].fill(0);
        Ok(())
    }

    fn discard(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        assert!(self.discards, "an export without discards got one");
        self.write_zeroes(offset, len_bytes, Hole::Allowed)
    }

    fn persist(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        self.persists.fetch_add(1, Ordering::Relaxed);
        self.check(offset, len_bytes)
    }

    fn prefetches(&self) -> bool {
        true
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn fast_zero(&self) -> bool {
        self.discards
    }

    fn discards(&self) -> bool {
        self.discards
    }

    /// Pages of zeroes are holes.
    fn extents(&self, offset: u64, len_bytes: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        if !self.discards {
            return Ok(vec![Extent { len_bytes, kind: ExtentKind::Allocated }]);
        }
        let bytes = self.bytes.read().unwrap();
        let (mut from, mut extents) = (offset, Vec::<Extent>::new());
        while from < offset + len_bytes {
            let to = (from / PAGE * PAGE + PAGE).min(self.size);
            let hole = bytes[at(from, to - from)].iter().all(|byte| *byte == 0);
            let kind = if hole { ExtentKind::Hole } else { ExtentKind::Allocated };
            let count = extents.len();
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.len_bytes += to - from,
                _ if count == limit => break,
                _ => extents.push(Extent { len_bytes: to - from, kind }),
            }
            from = to;
        }
        Ok(extents)
    }
}

/// A running server on a Unix socket; dropping it stops it.
pub struct Running {
    pub handle: Handle,
    pub path: PathBuf,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
    _directory: tempfile::TempDir,
}

pub fn info(name: &str) -> ExportInfo {
    ExportInfo { name: name.into(), description: format!("the export {name}"), ..ExportInfo::default() }
}

/// Serves `export` under the name "disk".
pub fn serve(export: Arc<dyn Export>) -> Running {
    let mut exports = Exports::new();
    exports.add(info("disk"), export).unwrap();
    serve_with(exports, Limits::default(), Options::default())
}

pub fn serve_with(exports: Exports, limits: Limits, options: Options) -> Running {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let server = Server::new(exports, limits, options).unwrap().listen(Listener::unix(&path).unwrap());
    let handle = server.handle();
    let thread = Some(std::thread::spawn(|| server.run()));
    Running { handle, path, thread, _directory: directory }
}

impl Running {
    /// Stops the server and returns what it says.
    pub fn stop(&mut self) -> Result<(), ServerError> {
        self.handle.stop();
        self.thread.take().map_or(Ok(()), |thread| thread.join().unwrap())
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path.display())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let stopped = self.stop();
        assert!(std::thread::panicking() || stopped.is_ok(), "{stopped:?}");
    }
}

/// Waits until `condition` holds, or fails.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what} did not happen in 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An option reply.
#[derive(Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub option: u32,
    pub kind: u32,
    pub payload: Vec<u8>,
}

/// A reply or chunk.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    Simple { error: u32, cookie: u64 },
    Chunk { flags: u16, kind: u16, cookie: u64, offset: Option<u64>, payload: Vec<u8> },
}

/// A client that sends and receives exactly what it is told.
pub struct Raw {
    pub stream: UnixStream,
    pub extended: bool,
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self { stream, extended: false }
    }

    /// Connects over TCP from an address of its own, which is a client of its own, and exchanges the flags.
    pub fn from_address(source: [u8; 4], server: SocketAddr) -> Self {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from((source, 0))).unwrap();
        rustix::net::connect(&socket, &server).unwrap();
        rustix::net::sockopt::set_tcp_nodelay(&socket, true).unwrap();
        // The same reads and writes do for any stream.
        Self::greeted_over(UnixStream::from(socket))
    }

    /// Connects and exchanges the flags.
    pub fn greeted(path: &Path) -> Self {
        Self::greeted_over(UnixStream::connect(path).unwrap())
    }

    fn greeted_over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut raw = Self { stream, extended: false };
        assert_eq!(raw.take(18), b"NBDMAGICIHAVEOPT\x00\x03");
        raw.send(&3u32.to_be_bytes());
        raw
    }

    /// In transmission on "disk", in the dialect `simple`, `structured` or `extended`, with `base:allocation` unless simple.
    pub fn in_transmission(path: &Path, dialect: &str) -> Self {
        let mut raw = Self::greeted(path);
        let option = match dialect {
            "structured" => Some(8),
            "extended" => Some(11),
            _ => None,
        };
        if let Some(option) = option {
            assert_eq!(raw.ask(option, &[]).kind, 1);
            raw.option(10, &meta_payload("disk", &["base:allocation"]));
            assert_eq!(raw.option_reply().kind, 4);
            assert_eq!(raw.option_reply().kind, 1);
        }
        raw.go("disk");
        raw.extended = dialect == "extended";
        raw
    }

    /// Chooses an export and returns its size and flags.
    pub fn go(&mut self, name: &str) -> (u64, u16) {
        self.option(7, &info_payload(name, &[]));
        let info = self.option_reply();
        assert_eq!(info.kind, 3, "{info:?}");
        assert_eq!(self.option_reply().kind, 1);
        let size = u64::from_be_bytes(info.payload[2..10].try_into().unwrap());
        (size, u16::from_be_bytes(info.payload[10..12].try_into().unwrap()))
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Whether the server has closed the connection and sent nothing before.
    pub fn is_closed(&mut self) -> bool {
        !matches!(self.stream.read(&mut [0; 1]), Ok(1))
    }

    pub fn option(&mut self, option: u32, payload: &[u8]) {
        self.send(&option_bytes(option, payload));
    }

    pub fn option_reply(&mut self) -> OptionReply {
        assert_eq!(self.u64(), 0x0003_e889_0455_65a9);
        let (option, kind, len) = (self.u32(), self.u32(), self.u32());
        assert!(len <= 8192, "option reply of {len} bytes");
        OptionReply { option, kind, payload: self.take(len as usize) }
    }

    /// Sends an option that has one reply.
    pub fn ask(&mut self, option: u32, payload: &[u8]) -> OptionReply {
        self.option(option, payload);
        let reply = self.option_reply();
        assert_eq!(reply.option, option);
        reply
    }

    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, len: u64) {
        let bytes = request_bytes(self.extended, command, flags, cookie, offset, len);
        self.send(&bytes);
    }

    /// The next reply; `data` is the length of a simple reply's data, which the caller takes.
    pub fn reply(&mut self) -> Reply {
        match self.u32() {
            0x6744_6698 => Reply::Simple { error: self.u32(), cookie: self.u64() },
            0x668e_33ef => {
                let (flags, kind, cookie, len) = (self.u16(), self.u16(), self.u64(), self.u32());
                Reply::Chunk { flags, kind, cookie, offset: None, payload: self.take(len as usize) }
            }
            0x6e8a_278c => {
                let (flags, kind, cookie, offset, len) = (self.u16(), self.u16(), self.u64(), self.u64(), self.u64());
                Reply::Chunk { flags, kind, cookie, offset: Some(offset), payload: self.take(len.try_into().unwrap()) }
            }
            magic => panic!("reply magic {magic:#x}"),
        }
    }

    /// The error of the next reply, which has to be a whole one; 0 is success.
    pub fn errno(&mut self) -> u32 {
        match self.reply() {
            Reply::Simple { error, .. } => error,
            Reply::Chunk { flags, kind, payload, .. } => {
                assert_eq!(flags & 1, 1, "chunk is not the last");
                if kind & 0x8000 == 0 { 0 } else { u32::from_be_bytes(payload[..4].try_into().unwrap()) }
            }
        }
    }

    /// Sends a request without payload and returns its error.
    pub fn run(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> u32 {
        self.request(command, flags, 77, offset, len);
        self.errno()
    }

    /// Writes and returns the error.
    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let flags = if self.extended { flags | 1 << 5 } else { flags };
        let mut bytes = request_bytes(self.extended, 1, flags, 78, offset, data.len() as u64);
        bytes.extend_from_slice(data);
        self.send(&bytes);
        self.errno()
    }

    /// Reads through whatever chunks come; the error or the data.
    pub fn read(&mut self, flags: u16, offset: u64, len: usize) -> Result<Vec<u8>, u32> {
        self.request(0, flags, 79, offset, len as u64);
        let mut data = vec![0xee; len];
        let mut covered = 0;
        loop {
            match self.reply() {
                Reply::Simple { error: 0, cookie: 79 } => return Ok(self.take(len)),
                Reply::Simple { error, .. } => return Err(error),
                Reply::Chunk { flags, kind, cookie, payload, .. } => {
                    assert_eq!(cookie, 79);
                    match kind {
                        0 => assert!(payload.is_empty()),
                        2 => {
                            let from = usize::try_from(u64::from_be_bytes(payload[..8].try_into().unwrap()) - offset);
                            let (from, hole) = (from.unwrap(), u32::from_be_bytes(payload[8..].try_into().unwrap()));
                            data[from..from + hole as usize].fill(0);
                            covered += hole as usize;
                        }
                        1 => {
                            let from = u64::from_be_bytes(payload[..8].try_into().unwrap()) - offset;
                            let from = usize::try_from(from).unwrap();
                            data[from..from + payload.len() - 8].copy_from_slice(&payload[8..]);
                            covered += payload.len() - 8;
                        }
                        _ => {
                            assert_eq!(flags & 1, 1);
                            return Err(u32::from_be_bytes(payload[..4].try_into().unwrap()));
                        }
                    }
                    if flags & 1 == 1 {
                        assert_eq!(covered, len, "chunks do not cover the request");
                        return Ok(data);
                    }
                }
            }
        }
    }
}

pub fn option_bytes(option: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

pub fn request_bytes(extended: bool, command: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    if extended {
        bytes.extend_from_slice(&len.to_be_bytes());
    } else {
        bytes.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
    }
    bytes
}

pub fn info_payload(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut bytes = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(&u16::try_from(infos.len()).unwrap().to_be_bytes());
    infos.iter().for_each(|info| bytes.extend_from_slice(&info.to_be_bytes()));
    bytes
}

pub fn meta_payload(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        bytes.extend_from_slice(&u32::try_from(query.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(query.as_bytes());
    }
    bytes
}
