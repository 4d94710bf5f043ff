//! An operator's day at random: a server that is killed, read again, locked, re-keyed and resized while fio writes and
//! verifies through it. Nothing is lost, and its memory stays flat.
//!
//! `DAXCRYPT_SOAK_SECONDS` is how long (a few in the gate; `tools/soak --seconds 3600 serve` for an hour), `DAXCRYPT_SOAK_SEED`
//! which order of events, so that one that has failed can be tried again.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Bench, Run, Server, noise, tool_command};
use serde_json::Value;

const CONTROL: [&str; 2] = ["--control", "control"];
/// Events of a server's life after which its memory should not grow any more.
const WARM: u32 = 8;
/// What it may grow by then, in KiB: buffers of requests that happen to be larger, and threads.
const GROWTH_KIB_MAX: u64 = 24 << 10;
/// What fio writes and reads; exports are never smaller.
const FIO_SIZE: &str = "32M";

/// Small numbers at random, and the same ones for the same seed.
struct Dice {
    seed: u64,
    thrown: u64,
}

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.thrown += 1;
        let bytes = noise(self.seed ^ (self.thrown << 20), 8);
        u64::from_le_bytes(bytes.try_into().unwrap()) % end
    }
}

/// Whoever keeps asking the server across its deaths: nbdkit repeats what was not answered.
struct Front {
    child: Child,
    uri: String,
}

impl Front {
    fn start(bench: &Bench) -> Self {
        let (front, back) = (bench.path("front.sock"), bench.path("vault.img.sock"));
        let args = ["--foreground", "--unix", front.to_str().unwrap(), "--filter=retry", "nbd"];
        let back = format!("socket={}", back.display());
        let retry = ["export=vault", "retries=100000", "retry-delay=1", "retry-exponential=no"];
        let said = File::create(bench.path("front.said")).unwrap();
        let mut command = tool_command("nbdkit", &[&args[..], &[back.as_str()], &retry].concat());
        let child = command.stdout(Stdio::null()).stderr(said).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while UnixStream::connect(&front).is_err() {
            assert!(Instant::now() < deadline, "nbdkit does not serve");
            thread::sleep(Duration::from_millis(10));
        }
        Self { child, uri: format!("nbd+unix:///?socket={}", front.display()) }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One pass of fio over everything.
fn fio(folder: &Path, uri: &str, seed: u32, more: &[&str]) -> Command {
    let (uri, seed) = (format!("--uri={uri}"), format!("--randseed={seed}"));
    let size = format!("--size={FIO_SIZE}");
    let args =
        ["--name=soak", "--ioengine=nbd", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=8", "--verify=crc32c"];
    let pace = ["--verify_fatal=1", "--fsync=64", "--rate=24m", "--output=fio.said"];
    let mut command =
        tool_command("fio", &[&args[..], &pace, &[uri.as_str(), seed.as_str(), size.as_str()], more].concat());
    command.current_dir(folder).stdout(Stdio::null());
    command
}

/// What it keeps in memory that is no file's, in KiB.
fn resident_kib(server: &Server) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A server and what has happened so far.
struct Day {
    bench: Bench,
    server: Option<Server>,
    dice: Dice,
    counts: BTreeMap<&'static str, u64>,
    /// Events of this server, its memory when it was warm, and the most of all servers.
    life: u32,
    warm_kib: u64,
    most_kib: u64,
    growth_kib: u64,
}

impl Day {
    fn new(seed: u64) -> Self {
        let bench = Bench::under(Path::new("/dev/shm"));
        bench.format("vault.img", "48M", &[]);
        let dice = Dice { seed, thrown: 0 };
        let mut day = Self {
            bench,
            server: None,
            dice,
            counts: BTreeMap::new(),
            life: 0,
            warm_kib: 0,
            most_kib: 0,
            growth_kib: 0,
        };
        day.start();
        day
    }

    fn start(&mut self) {
        let socket = self.bench.path("vault.img.sock");
        let args = ["serve", "vault.img", "--key-file", "vault.key", "--socket", socket.to_str().unwrap()];
        let mut command = self.bench.command(&[&args[..], &CONTROL, &["--rekey-max-rate", "16M"]].concat());
        command.stderr(File::create(self.bench.path("said")).unwrap());
        self.server = Some(Server::start(command, socket));
        (self.life, self.warm_kib) = (0, 0);
    }

    fn ask(&self, args: &[&str]) -> Run {
        self.bench.run(&[args, &CONTROL].concat())
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.ask(&["status", "--json"]).succeeds().stdout).unwrap()
    }

    fn count(&mut self, event: &'static str) {
        *self.counts.entry(event).or_default() += 1;
    }

    /// Something happens.
    fn event(&mut self) {
        match self.dice.below(20) {
            0 => {
                self.server.take().unwrap().kill();
                self.start();
                self.count("kills");
            }
            1..=4 => {
                self.ask(&["reload"]).succeeds();
                self.count("reloads");
            }
            5..=9 => {
                self.ask(&["lock", "vault", "--wait"]).succeeds();
                thread::sleep(Duration::from_millis(self.dice.below(50)));
                self.ask(&["unlock", "vault", "--key-file", "vault.key"]).succeeds();
                self.count("locks");
            }
            10..=14 => self.rekey(),
            _ => self.resize(),
        }
        self.note_memory();
    }

    fn rekey(&mut self) {
        let status = self.status();
        if status["rekeys"][0].is_null() {
            let begin = ["rekey", "vault.img", "--key-file", "vault.key", "--json"];
            let mut follower = self.bench.under_way(&[&begin[..], &CONTROL].concat());
            // The server goes on without whoever follows it.
            follower.kill().unwrap();
            follower.wait().unwrap();
            return self.count("re-keys begun");
        }
        assert!(status["rekeys"][0]["failed"].is_null(), "{status}");
        let (how, event) = if self.dice.below(4) == 0 { ("--pause", "pauses") } else { ("--resume", "resumes") };
        let mut child = self.bench.command(&[&["rekey", "vault.img", how, "--json"], &CONTROL[..]].concat());
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        if how == "--resume" {
            // It follows until the end; what counts is that it goes on.
            let deadline = Instant::now() + Duration::from_secs(30);
            let goes_on = |rekey: &Value| rekey.is_null() || rekey["running"] == true;
            while !goes_on(&self.status()["rekeys"][0]) && child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "the re-key does not go on");
                thread::sleep(Duration::from_millis(5));
            }
            let _ = child.kill();
        }
        child.wait().unwrap();
        self.count(event);
    }

    fn resize(&mut self) {
        let size = format!("{}M", 40 + self.dice.below(17));
        let run = self.ask(&["resize", "vault.img", "--size", &size, "--force"]);
        if run.status.success() {
            self.count("resizes");
        } else {
            run.fails(1, &["a re-key is under way"]);
            self.count("resizes refused");
        }
    }

    fn note_memory(&mut self) {
        let now_kib = resident_kib(self.server.as_ref().unwrap());
        self.life += 1;
        self.most_kib = self.most_kib.max(now_kib);
        if self.life <= WARM {
            self.warm_kib = self.warm_kib.max(now_kib);
        } else {
            self.growth_kib = self.growth_kib.max(now_kib.saturating_sub(self.warm_kib));
            assert!(self.growth_kib <= GROWTH_KIB_MAX, "it has grown from {} to {now_kib} KiB", self.warm_kib);
        }
    }
}

#[test]
fn a_day_of_random_events_loses_nothing() {
    let seconds: u64 = std::env::var("DAXCRYPT_SOAK_SECONDS").map_or(4, |seconds| seconds.parse().unwrap());
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = std::env::var("DAXCRYPT_SOAK_SEED").map_or(clock.as_secs(), |seed| seed.parse().unwrap());
    println!("seed {seed}, {seconds} s");
    let mut day = Day::new(seed);
    let front = Front::start(&day.bench);
    let (stop, passes) = (AtomicBool::new(false), AtomicU32::new(0));
    let folder = day.bench.dir.path().to_path_buf();
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let pass = passes.load(Ordering::SeqCst);
                let status = fio(&folder, &front.uri, pass, &["--do_verify=1"]).status().unwrap();
                let said = fs::read_to_string(folder.join("fio.said")).unwrap_or_default();
                // nbdkit repeats requests, and not the greeting of a client that comes while there is no server.
                let unmet = said.contains("nbd_connect_uri: handshake");
                assert!(status.success() || unmet, "pass {pass}: {said}");
                passes.fetch_add(u32::from(status.success()), Ordering::SeqCst);
            }
        });
        let deadline = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < deadline && !writer.is_finished() {
            day.event();
            thread::sleep(Duration::from_millis(day.dice.below(200)));
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap();
    });
    // What is written now is looked at after everything has happened once more, by a program that was not there before.
    Run::of(fio(&folder, &front.uri, 4711, &["--do_verify=0", "--end_fsync=1"])).succeeds();
    day.server.take().unwrap().kill();
    day.start();
    (0..10).for_each(|_| day.event());
    Run::of(fio(&folder, &front.uri, 4711, &["--verify_only"])).succeeds();
    drop(front);
    day.server.take().unwrap().stop();
    let info = day.bench.run(&["info", "vault.img"]).succeeds().stdout;
    assert!(info.lines().any(|line| line.starts_with("closed") && line.ends_with("in order")), "{info}");
    let passes = passes.load(Ordering::SeqCst);
    println!("fio wrote and verified {FIO_SIZE} {passes} times; events: {:?}", day.counts);
    println!("most resident: {} KiB, most growth of a warm server: {} KiB", day.most_kib, day.growth_kib);
    println!("VERDICT: nothing lost, memory flat");
}
