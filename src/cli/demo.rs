//! `daxcrypt demo`: the main job on a temporary file, in a few seconds, with nothing but this program.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use nbd::client::{NbdClient, handshake};

use super::error::Error;
use super::info::cipher_name;
use super::output::outln;
use super::size::ByteSize;
use crate::namespace::{self, Credential, DataUnit, FormatOptions, KEY_FILE_BYTES_MIN, LockedNamespace};
use crate::nbd_server::{ExportInfo, Exports, Limits, Listener, Options, Server};
use crate::pmem::{Access, Allocation, Backing};
use crate::secret::SecretBytes;
use crate::volume::Volume;
use crate::xts::Backend;

const SIZE_BYTES: u64 = 64 << 20;
const UNIT_BYTES: usize = 4096;
/// Where the demo's line of text goes.
const TEXT_OFFSET: u64 = 1 << 20;
const TEXT: &[u8; 32] = b"attack at dawn, by way of pmem0.";

type Client = NbdClient<UnixStream>;

pub(crate) fn run() -> Result<(), Error> {
    let dir = tempfile::tempdir().map_err(|source| Error::Io { doing: "cannot make a temporary folder", source })?;
    let path = dir.path().join("demo.img");
    let key = SecretBytes::random(2 * KEY_FILE_BYTES_MIN)?;
    let credential = Credential::KeyFile(key);

    let volume = Arc::new(format_and_unlock(&path, &credential)?);
    outln!(
        "1. formatted {} and unlocked it: {} with {}, {} backend",
        path.display(),
        ByteSize(volume.size()),
        cipher_name(volume.header()),
        volume.xts_backend()
    )?;
    outln!("   durability: {}", volume.backing().granularity_reason())?;

    let socket = dir.path().join("demo.sock");
    let mut exports = Exports::new();
    let info = ExportInfo { name: "demo".into(), ..ExportInfo::default() };
    exports.add(info, Arc::<Volume>::clone(&volume)).map_err(|source| Error::Export { path: path.clone(), source })?;
    let server = Server::new(exports, Limits::default(), Options::default())?.listen(Listener::unix(&socket)?);
    let handle = server.handle();
    outln!("2. serving it over NBD at nbd+unix:///demo?socket={}", socket.display())?;
    let served = thread::spawn(move || server.run());
    let shown = show(&socket, &volume, &path);
    handle.stop();
    served.join().map_err(|_| Error::Demo("the server thread panicked"))??;
    shown?;
    // The backing stays locked as long as anybody holds the volume.
    drop(handle);
    drop(volume);

    reopen(&path, &credential)?;
    dir.close().map_err(|source| Error::Io { doing: "cannot remove the temporary folder", source })?;
    outln!("6. cleaned up: the folder and the key are gone")?;
    Ok(())
}

fn format_and_unlock(path: &Path, credential: &Credential) -> Result<Volume, Error> {
    let options = FormatOptions {
        label: "demo".into(),
        unit: DataUnit::Bytes4096,
        size_bytes: Some(SIZE_BYTES),
        ..FormatOptions::default()
    };
    let backing = Backing::create(path, namespace::HEADER_AREA_BYTES + SIZE_BYTES, Allocation::Full)
        .map_err(|source| Error::Open { path: path.into(), source })?;
    let namespace = namespace::format(Arc::new(backing), options, credential)
        .map_err(|source| Error::Format { path: path.into(), source })?;
    Ok(Volume::new(namespace, Backend::from_env()?))
}

fn show(socket: &Path, volume: &Volume, path: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io { doing: "the NBD client failed", source };
    let mut client = connect(socket).map_err(failed)?;
    let [write_rate, read_rate] = measure(&mut client).map_err(failed)?;
    outln!(
        "3. wrote and read back {} through the nbd crate's client, one request at a time: {write_rate:.0} and \
         {read_rate:.0} MiB/s",
        ByteSize(SIZE_BYTES)
    )?;

    write_at(&mut client, TEXT_OFFSET, TEXT).map_err(failed)?;
    let mut read = [0; TEXT.len()];
    read_at(&mut client, TEXT_OFFSET, &mut read).map_err(failed)?;
    if read != *TEXT {
        return Err(Error::Demo("what was read is not what was written"));
    }
    let on_media = ciphertext(volume, path, TEXT_OFFSET)?;
    outln!("4. through NBD   {}  {}", hex(&read), printable(&read))?;
    outln!("   in the file   {}  {}", hex(&on_media), printable(&on_media))?;
    if on_media == *TEXT {
        return Err(Error::Demo("the file holds plaintext"));
    }

    let moved_to = TEXT_OFFSET + 16 * UNIT_BYTES as u64;
    move_unit(volume, TEXT_OFFSET, moved_to)?;
    read_at(&mut client, moved_to, &mut read).map_err(failed)?;
    outln!("5. the same ciphertext, moved by {} units, reads as noise:", (moved_to - TEXT_OFFSET) / UNIT_BYTES as u64)?;
    outln!("   through NBD   {}  {}", hex(&read), printable(&read))?;
    if read == *TEXT {
        return Err(Error::Demo("moved ciphertext can still be read"));
    }
    Ok(())
}

fn connect(socket: &Path) -> std::io::Result<Client> {
    let mut stream = UnixStream::connect(socket)?;
    let export = handshake(&mut stream, b"demo")?;
    Ok(NbdClient::new(stream, &export))
}

/// Writes and reads a pattern over the whole volume, compares every byte, and gives both rates in MiB/s.
fn measure(client: &mut Client) -> std::io::Result<[f64; 2]> {
    const CHUNK_BYTES: usize = 1 << 20;
    let pattern: Vec<u8> = (0..=250).cycle().take(CHUNK_BYTES).collect();
    let mut found = vec![0; CHUNK_BYTES];
    let started = Instant::now();
    for offset in (0..SIZE_BYTES).step_by(CHUNK_BYTES) {
        write_at(client, offset, &pattern)?;
    }
    let written = started.elapsed();
    let started = Instant::now();
    for offset in (0..SIZE_BYTES).step_by(CHUNK_BYTES) {
        read_at(client, offset, &mut found)?;
        if found != pattern {
            return Err(std::io::Error::other("the pattern did not come back"));
        }
    }
    let read = started.elapsed();
    let rate = |elapsed: std::time::Duration| SIZE_BYTES as f64 / elapsed.as_secs_f64() / f64::from(1 << 20);
    Ok([written, read].map(rate))
}

/// Unlocks the namespace again, as after a restart, and reads the text directly.
fn reopen(path: &Path, credential: &Credential) -> Result<(), Error> {
    let backing = Backing::open(path, Access::ReadOnly).map_err(|source| Error::Open { path: path.into(), source })?;
    let locked =
        LockedNamespace::open(Arc::new(backing)).map_err(|source| Error::Namespace { path: path.into(), source })?;
    let namespace = locked.unlock_key(credential).map_err(|source| Error::Unlock { path: path.into(), source })?;
    let mut read = [0; TEXT.len()];
    Volume::new(namespace, Backend::from_env()?)
        .read_at(&mut read, TEXT_OFFSET)
        .map_err(|source| Error::Volume { path: path.into(), source })?;
    if read != *TEXT {
        return Err(Error::Demo("the text did not survive reopening"));
    }
    outln!("   stopped the server, unlocked the file again: the text is still there")?;
    Ok(())
}

fn ciphertext(volume: &Volume, path: &Path, offset: u64) -> Result<[u8; TEXT.len()], Error> {
    let failed = |source| Error::Io { doing: "cannot read the demo's file", source };
    let mut bytes = [0; TEXT.len()];
    let file = File::open(path).map_err(failed)?;
    file.read_exact_at(&mut bytes, volume.geometry().data_start() + offset).map_err(failed)?;
    Ok(bytes)
}

/// Copies the ciphertext of one unit to another unit's place, as a filesystem or a thief might.
fn move_unit(volume: &Volume, from: u64, to: u64) -> Result<(), Error> {
    let failed = |source| Error::Media { path: volume.backing().path().into(), source };
    let start = volume.geometry().data_start();
    let mut unit = [0; UNIT_BYTES];
    let at = |offset: u64| start + offset..start + offset + UNIT_BYTES as u64;
    volume.backing().read(at(from), |source| source.copy_to(&mut unit)).map_err(failed)?;
    volume.backing().write(at(to), |mut target| target.copy_from(&unit)).map_err(failed)
}

fn write_at(client: &mut Client, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    client.seek(SeekFrom::Start(offset))?;
    client.write_all(bytes)
}

fn read_at(client: &mut Client, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
    client.seek(SeekFrom::Start(offset))?;
    client.read_exact(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(16).map(|byte| format!("{byte:02x} ")).collect()
}

fn printable(bytes: &[u8]) -> String {
    bytes.iter().take(16).map(|&byte| if (0x20..0x7f).contains(&byte) { char::from(byte) } else { '.' }).collect()
}
