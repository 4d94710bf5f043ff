//! A key-value file that a direct map and an NBD client share: each sees at once what the other has written.
//!
//!     cargo run --example shared_kv -- FOLDER
//!
//! The file is an array of slots of 512 bytes (a sector, so that a client writes whole slots): a key of 32 bytes and a value
//! of 480, both filled up with zeroes. A key's slot is found by trying one after the other from its hash on.

#[path = "support/mod.rs"]
mod support;

use std::error::Error;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use daxcrypt::dax::{DaxMapping, MapOptions};
use daxcrypt::nbd_server::{ExportInfo, Exports, Limits, Listener, Options, Server};
use nbd::client::{NbdClient, handshake};

type Slot = [u8; 512];
type Outcome<T> = Result<T, Box<dyn Error>>;
const KEY_BYTES: usize = 32;

/// Where slots are read and written: the map, or an NBD connection.
trait Slots {
    fn count(&self) -> u64;
    fn read(&mut self, index: u64) -> Outcome<Slot>;
    fn write(&mut self, index: u64, slot: &Slot) -> Outcome<()>;

    /// The slot of `key`, or the free one where it would go.
    fn find(&mut self, key: &str) -> Outcome<(u64, Slot)> {
        let mut name = [0; KEY_BYTES];
        name.get_mut(..key.len()).ok_or("the key is too long")?.copy_from_slice(key.as_bytes());
        let hash = key.bytes().fold(5381_u64, |hash, byte| hash.wrapping_mul(33) ^ u64::from(byte));
        for step in 0..self.count() {
            let index = hash.wrapping_add(step) % self.count();
            let mut slot = self.read(index)?;
            if slot[0] == 0 {
                slot[..KEY_BYTES].copy_from_slice(&name);
                return Ok((index, slot));
            }
            if slot[..KEY_BYTES] == name {
                return Ok((index, slot));
            }
        }
        Err("the file is full".into())
    }

    fn set(&mut self, key: &str, value: &str) -> Outcome<()> {
        let (index, mut slot) = self.find(key)?;
        slot[KEY_BYTES..].fill(0);
        slot.get_mut(KEY_BYTES..KEY_BYTES + value.len())
            .ok_or("the value is too long")?
            .copy_from_slice(value.as_bytes());
        self.write(index, &slot)
    }

    fn value(&mut self, key: &str) -> Outcome<String> {
        let (_, slot) = self.find(key)?;
        Ok(String::from_utf8_lossy(&slot[KEY_BYTES..]).trim_end_matches('\0').to_owned())
    }
}

impl Slots for DaxMapping {
    fn count(&self) -> u64 {
        self.len() / 512
    }

    fn read(&mut self, index: u64) -> Outcome<Slot> {
        let mut slot = [0; 512];
        Self::read(self, index * 512, &mut slot)?;
        Ok(slot)
    }

    fn write(&mut self, index: u64, slot: &Slot) -> Outcome<()> {
        Self::write(self, index * 512, slot)?;
        Ok(self.persist(index * 512..(index + 1) * 512)?)
    }
}

struct Client(NbdClient<UnixStream>, u64);

impl Slots for Client {
    fn count(&self) -> u64 {
        self.1 / 512
    }

    fn read(&mut self, index: u64) -> Outcome<Slot> {
        let mut slot = [0; 512];
        self.0.seek(SeekFrom::Start(index * 512))?;
        self.0.read_exact(&mut slot)?;
        Ok(slot)
    }

    fn write(&mut self, index: u64, slot: &Slot) -> Outcome<()> {
        self.0.seek(SeekFrom::Start(index * 512))?;
        self.0.write_all(slot)?;
        Ok(self.0.flush()?)
    }
}

/// Writes from both sides and reads from the other one. What the map reads in the end.
pub fn share(folder: &Path) -> Outcome<Vec<String>> {
    let volume = support::open_or_create(folder)?;
    let mut map = volume.map(0..volume.size(), &MapOptions::new().writable())?;

    let socket = folder.join("nbd.sock");
    let mut exports = Exports::new();
    exports.add(ExportInfo { name: "kv".into(), ..ExportInfo::default() }, volume.clone())?;
    let server = Server::new(exports, Limits::default(), Options::default())?.listen(Listener::unix(&socket)?);
    let handle = server.handle();
    let serving = thread::spawn(|| server.run());

    let mut stream = UnixStream::connect(&socket)?;
    let export = handshake(&mut stream, b"kv")?;
    let mut client = Client(NbdClient::new(stream, &export), volume.size());
    map.set("colour", "red")?;
    map.set("fruit", "apple")?;
    assert_eq!(client.value("colour")?, "red", "the client sees what the map stored");
    client.set("colour", "blue")?;
    client.set("animal", "heron")?;
    let seen = ["colour", "fruit", "animal"].map(|key| map.value(key)).into_iter().collect();

    drop(client);
    handle.stop();
    serving.join().map_err(|_| "the server panicked")??;
    map.close()?;
    seen
}

#[allow(dead_code, reason = "the test calls `share`")]
fn main() -> Outcome<()> {
    let folder = std::env::args_os().nth(1).ok_or("usage: shared_kv FOLDER")?;
    println!("{:?}", share(Path::new(&folder))?);
    Ok(())
}
