//! The real program, killed with SIGKILL while it re-keys, offline and while it serves and somebody writes, and while it
//! relocates.
//!
//! `DAXCRYPT_KILLS` is how often each test kills (25 in the gate; `tools/soak rekey --kills 1000` for more).
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::{Bench, noise, open_when_free};
use daxcrypt::namespace::{Credential, LockedNamespace, Namespace, RekeyOptions};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;
use rustix::process::{Pid, Signal, kill_process};

const KEY: [&str; 2] = ["--key-file", "vault.key"];
const SIZE: usize = 64 << 20;

fn kills() -> u64 {
    std::env::var("DAXCRYPT_KILLS").map_or(25, |kills| kills.parse().unwrap())
}

fn credential(bench: &Bench) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&fs::read(bench.path("vault.key")).unwrap()))
}

fn namespace(bench: &Bench) -> Namespace {
    let backing = open_when_free(&bench.path("vault.img"));
    LockedNamespace::open(Arc::new(backing)).unwrap().unlock_key(&credential(bench)).unwrap()
}

fn volume(bench: &Bench) -> Volume {
    Volume::new(namespace(bench), Backend::detect())
}

fn content(volume: &Volume) -> Vec<u8> {
    let mut all = vec![0; SIZE];
    volume.read_at(&mut all, 0).unwrap();
    all
}

fn vault() -> (Bench, Vec<u8>) {
    let bench = Bench::under(std::path::Path::new("/dev/shm"));
    bench.format("vault.img", "64M", &[]);
    let bytes = noise(8, SIZE);
    volume(&bench).write_at(&bytes, 0).unwrap();
    (bench, bytes)
}

/// How long a process lives: different each time, from one that has hardly begun to one that is busy. A loaded machine
/// is slower, so the longest life grows as long as kills come too early, and shrinks when they come too late.
struct Patience {
    max_us: u64,
}

impl Patience {
    fn next(&self, round: u64) -> Duration {
        let word = u64::from_le_bytes(noise(round, 8).try_into().unwrap());
        Duration::from_micros(1000 + word % self.max_us)
    }

    fn learn(&mut self, too_early: bool) {
        self.max_us = if too_early { self.max_us * 5 / 4 } else { self.max_us * 9 / 10 }.clamp(10_000, 10_000_000);
    }
}

#[test]
fn offline_rekeys_survive_being_killed() {
    let (bench, mut bytes) = vault();
    let (mut begun, mut ended, mut mid_way) = (0, 0, 0);
    let mut patience = Patience { max_us: 70_000 };
    for round in 0..kills() {
        let under_way = namespace(&bench).pending_transform().is_some();
        begun += u64::from(!under_way);
        let more: &[&str] = if under_way { &["--resume"] } else { &[] };
        let args = [&["rekey", "vault.img"], &KEY[..], more].concat();
        let mut child = bench.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(patience.next(round));
        child.kill().unwrap();
        ended += u64::from(child.wait().unwrap().success());

        let volume = volume(&bench);
        let progress = volume.transform();
        let moved = progress.is_some_and(|progress| progress.done_bytes > 0);
        mid_way += u64::from(moved);
        patience.learn(!moved && progress.is_some());
        assert!(content(&volume) == bytes, "round {round}, at {progress:?}");
        // On both sides of wherever the boundary is.
        let at = usize::try_from(progress.map_or(0, |progress| progress.done_bytes)).unwrap();
        let at = at.saturating_sub(1000).min(SIZE - 3000);
        let data = noise(1000 + round, 3000);
        volume.write_at(&data, at as u64).unwrap();
        bytes[at..at + data.len()].copy_from_slice(&data);
    }
    if namespace(&bench).pending_transform().is_some() {
        bench.run(&[&["rekey", "vault.img", "--resume"], &KEY[..]].concat()).succeeds();
    }
    assert!(content(&volume(&bench)) == bytes);
    println!(
        "kills offline: {} kills, {begun} re-keys begun, {ended} ended by themselves, {mid_way} found mid way",
        kills()
    );
    assert!(mid_way > 0, "no kill has met a re-key mid way");
}

/// Writes until the server is gone; every write that was answered is in `bytes`. The range of the one that was not, which
/// is empty when the server was gone before the first.
fn write_until_killed(socket: &std::path::Path, round: u64, bytes: &mut [u8]) -> (usize, Vec<u8>) {
    let Ok(mut stream) = UnixStream::connect(socket) else { return (0, Vec::new()) };
    let Ok(chosen) = nbd::client::handshake(&mut stream, b"vault") else { return (0, Vec::new()) };
    let mut client = nbd::client::NbdClient::new(&mut stream, &chosen);
    for write in 0.. {
        let word = usize::try_from(u64::from_le_bytes(noise(round << 32 | write, 8).try_into().unwrap()) >> 1).unwrap();
        let (at, data) = (word % (SIZE - 20_000), noise(word as u64, 1 + word % 20_000));
        let mut request = || {
            client.seek(SeekFrom::Start(at as u64))?;
            client.write_all(&data)?;
            // Now and then what was answered is read back, too.
            let mut found = vec![0; if write % 8 == 0 { data.len() } else { 0 }];
            client.seek(SeekFrom::Start(at as u64))?;
            client.read_exact(&mut found)?;
            assert!(found.is_empty() || found == data, "round {round}, write {write}");
            std::io::Result::Ok(())
        };
        if request().is_err() {
            return (at, data);
        }
        bytes[at..at + data.len()].copy_from_slice(&data);
    }
    unreachable!("the server is killed")
}

#[test]
fn rekeys_of_a_served_namespace_survive_being_killed_while_somebody_writes() {
    let (bench, mut bytes) = vault();
    let (mut begun, mut mid_way) = (0, 0);
    let mut patience = Patience { max_us: 120_000 };
    for round in 0..kills() {
        let mut namespace = namespace(&bench);
        if namespace.pending_transform().is_none() {
            namespace.begin_rekey(&credential(&bench), &RekeyOptions::default()).unwrap();
            begun += 1;
        }
        drop(namespace);
        let server = bench.serve("vault.img", &["--rekey-max-rate", "200M"]);
        let pid = Pid::from_child(&server.child);
        let life = patience.next(round);
        let killer = thread::spawn(move || {
            thread::sleep(life);
            kill_process(pid, Signal::KILL).unwrap();
        });
        let (at, data) = write_until_killed(&server.socket, round, &mut bytes);
        killer.join().unwrap();
        server.kill();
        fs::remove_file(bench.path("vault.img.sock")).unwrap();

        let volume = volume(&bench);
        let found = content(&volume);
        let progress = volume.transform();
        let moved = progress.is_some_and(|progress| progress.done_bytes > 0);
        mid_way += u64::from(moved);
        patience.learn(!moved && progress.is_some());
        // The write that was not answered may have happened, in part; every block of it is old or new.
        for (index, byte) in data.iter().enumerate() {
            if found[at + index] == *byte {
                bytes[at + index] = *byte;
            }
        }
        assert!(found == bytes, "round {round}, at {progress:?}");
    }
    println!("kills while serving: {} kills, {begun} re-keys begun, {mid_way} found mid way", kills());
    assert!(mid_way > 0, "no kill has met a re-key mid way");
}

/// The content of `name`, if a namespace opens there.
fn content_if_it_opens(bench: &Bench, name: &str) -> Option<Vec<u8>> {
    let path = bench.path(name);
    if !path.exists() {
        return None;
    }
    let locked = LockedNamespace::open(Arc::new(open_when_free(&path))).ok()?;
    Some(content(&locked.unlock(&credential(bench)).unwrap()))
}

#[test]
fn relocations_survive_being_killed() {
    let (bench, bytes) = vault();
    let mut patience = Patience { max_us: 150_000 };
    let (mut source, mut destination) = ("vault.img", "other.img");
    let (mut stayed, mut arrived, mut half_way) = (0, 0, 0);
    for round in 0..kills() {
        let args = [&["relocate", source, destination, "--force"], &KEY[..]].concat();
        let mut child = bench.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(patience.next(round));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = [source, destination].map(|name| content_if_it_opens(&bench, name));
        assert!(found.iter().flatten().all(|found| *found == bytes), "round {round}: something else opens");
        match found {
            [Some(_), other] => {
                stayed += 1;
                half_way += u64::from(bench.path(destination).exists() && other.is_none());
                patience.learn(true);
                fs::remove_file(bench.path(destination)).ok();
            }
            [None, Some(_)] => {
                arrived += 1;
                patience.learn(false);
                fs::remove_file(bench.path(source)).unwrap();
                (source, destination) = (destination, source);
            }
            [None, None] => panic!("round {round}: neither opens"),
        }
    }
    println!(
        "kills while relocating: {} kills, {stayed} stayed, {half_way} of them half way, {arrived} arrived",
        kills()
    );
    assert!(half_way > 0, "no kill has met a relocation half way");
}
