//! What encryption costs a client of the NBD server: the same server, backing and transport, once with a volume and once
//! with plaintext, driven by fio in turns; medians and their ratio. `cargo bench --bench nbd [-- ROUNDS [SECONDS]]`.
//!
//! The plaintext export exists only here: the server has no way to serve plaintext.
#![allow(clippy::unwrap_used, missing_docs)]

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use daxcrypt::memory::Target;
use daxcrypt::namespace::{self, Credential, FormatOptions, HEADER_AREA_BYTES};
use daxcrypt::nbd_server::{Export, ExportError, ExportInfo, Exports, Hole, Limits, Listener, Options, Server};
use daxcrypt::pmem::{Allocation, Backing};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;

const SIZE_BYTES: u64 = 1 << 30;
/// What fio does: direction, block size, depth.
const WORKLOADS: [(&str, &str, u32); 6] = [
    ("read", "1M", 8),
    ("write", "1M", 8),
    ("randread", "4k", 32),
    ("randwrite", "4k", 32),
    ("randread", "4k", 1),
    ("randwrite", "4k", 1),
];

/// A backing as it is: what the volume does, without the cipher.
struct Plaintext(Backing);

impl Export for Plaintext {
    fn size_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ExportError> {
        let range = offset..offset + buf.len() as u64;
        self.0.read(range, |source| source.copy_to(buf)).map_err(|_| ExportError::Media)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        let range = offset..offset + data.len() as u64;
        self.0.write(range, |mut target: Target<'_>| target.copy_from(data)).map_err(|_| ExportError::Media)
    }

    fn write_zeroes(&self, offset: u64, len_bytes: u64, _: Hole) -> Result<(), ExportError> {
        self.write_at(offset, &vec![0; usize::try_from(len_bytes).unwrap()])
    }

    fn persist(&self, offset: u64, len_bytes: u64) -> Result<(), ExportError> {
        self.0.persist(offset..offset + len_bytes).map_err(|_| ExportError::Media)
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), ExportError> {
        Err(ExportError::Unsupported)
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.0.sync_all().map_err(|_| ExportError::Media)
    }
}

fn exports(folder: &Path) -> Exports {
    let create = |name: &str, len_bytes| Backing::create(&folder.join(name), len_bytes, Allocation::Full).unwrap();
    let credential = Credential::KeyFile(SecretBytes::random(64).unwrap());
    let backing = Arc::new(create("encrypted", SIZE_BYTES + HEADER_AREA_BYTES));
    let namespace = namespace::format(backing, FormatOptions::default(), &credential).unwrap();
    let volume = Volume::new(namespace, Backend::from_env().unwrap());
    let info = |name: &str| ExportInfo { name: name.into(), ..ExportInfo::default() };
    let mut exports = Exports::new();
    exports.add(info("encrypted"), Arc::new(volume)).unwrap();
    exports.add(info("plaintext"), Arc::new(Plaintext(create("plaintext", SIZE_BYTES)))).unwrap();
    exports
}

/// Requests a second, by fio.
fn fio(folder: &Path, export: &str, (rw, bs, depth): (&str, &str, u32), seconds: u32) -> f64 {
    let socket = folder.join("nbd.sock");
    let output = Command::new("fio")
        .current_dir(folder)
        .args(["--name=bench", "--ioengine=nbd", "--size=1G", "--time_based", "--output-format=json"])
        .arg(format!("--uri=nbd+unix:///{export}?socket={}", socket.display()))
        .args([
            format!("--rw={rw}"),
            format!("--bs={bs}"),
            format!("--iodepth={depth}"),
            format!("--runtime={seconds}"),
        ])
        .stderr(Stdio::inherit())
        .output()
        .expect("fio runs (apt-get install fio)");
    assert!(output.status.success(), "fio failed");
    let text = String::from_utf8(output.stdout).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let side = if rw.ends_with("read") { "read" } else { "write" };
    json["jobs"][0][side]["iops"].as_f64().unwrap()
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn main() {
    let mut numbers = env::args().skip(1).filter_map(|argument| argument.parse::<u32>().ok());
    let (rounds, seconds) = (numbers.next().unwrap_or(5), numbers.next().unwrap_or(1));
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let server = Server::new(exports(folder.path()), Limits::default(), Options::default()).unwrap();
    let server = server.listen(Listener::unix(&folder.path().join("nbd.sock")).unwrap());
    let handle = server.handle();
    let running = std::thread::spawn(move || server.run());
    let names = ["encrypted", "plaintext"];
    // Every page once, so that no round pays for its first use.
    for name in names {
        let _ = fio(folder.path(), name, ("write", "1M", 8), 2);
    }
    println!("requests a second, medians of {rounds} rounds of {seconds} s in turns");
    println!("{:<22} {:>10} {:>10} {:>6}", "", names[0], names[1], "ratio");
    for workload in WORKLOADS {
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (name, rates) in names.iter().zip(&mut rates) {
                rates.push(fio(folder.path(), name, workload, seconds));
            }
        }
        let [encrypted, plaintext] = rates.map(median);
        let (rw, bs, depth) = workload;
        let label = format!("{rw} {bs} depth {depth}");
        println!("{label:<22} {encrypted:>10.0} {plaintext:>10.0} {:>6.2}", encrypted / plaintext);
    }
    handle.stop();
    running.join().unwrap().unwrap();
}
