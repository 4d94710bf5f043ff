//! The cells of the table of operations and states, as files: what `ops_table` and `ops_program` share.
//!
//! The states are real ones: operations that were begun and dropped, and a header copy from before its last update.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::common::{self, noise};
use daxcrypt::luks2::{ExportOptions, SlotKdf};
use daxcrypt::namespace::{
    self, Cipher, Credential, DataUnit, FormatOptions, HEADER_AREA_BYTES, KdfCost, LockedNamespace, MovedNamespace,
    Namespace, OtherSlots, Proof, Region, RekeyOptions, RepairKey, Site, begin_slide,
};
use daxcrypt::ops::compact::Compaction;
use daxcrypt::ops::erase::Doomed;
use daxcrypt::ops::gate::{self, Caller, KeyWay, Way};
use daxcrypt::ops::headers::{self, Repair, Restoration};
use daxcrypt::ops::rekey::Wish;
use daxcrypt::ops::relocate::{self, Adoption};
use daxcrypt::ops::resize::{self, Wanted};
use daxcrypt::ops::transfer::{self, Image};
use daxcrypt::ops::{
    self, Cause, Error, Key, Kind, Location, NewPlace, Operation, Run, SlotPolicy, State, Unwatched, keys,
};
use daxcrypt::pmem::{Access, Allocation, Backing};
use daxcrypt::secret::{SecretBytes, VolumeKey};
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;

const MIB: u64 = 1 << 20;
const SIZE: usize = 192 << 10;
const STEP: u64 = 64 << 10;
/// Where the partition `a` is in a region, behind a free place; and a file as long as it.
const START: u64 = 4 * MIB;
const PART: u64 = 4 * MIB;
const REGION: u64 = 10 * MIB;
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// Where a namespace was formatted that is somewhere else now.
const ELSEWHERE: u64 = 16 * MIB;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    File,
    Detached,
    Region,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    Slot,
    Escrow,
    Server,
    ReadOnlyServer,
}

/// Unit, cipher and discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant(pub usize);

impl Variant {
    fn options(self) -> FormatOptions {
        let [unit, cipher, discards] = [1, 2, 4].map(|bit| self.0 & bit != 0);
        FormatOptions {
            unit: if unit { DataUnit::Bytes512 } else { DataUnit::Bytes4096 },
            cipher: if cipher { Cipher::Aes128Xts } else { Cipher::Aes256Xts },
            allow_discards: discards,
            size_bytes: Some(SIZE as u64),
            label: "table".into(),
            ..FormatOptions::default()
        }
    }
}

fn credential(byte: u8) -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[byte; 32]))
}

fn own() -> Credential {
    credential(1)
}

fn content() -> Vec<u8> {
    noise(13, SIZE)
}

/// A folder that costs no disk, for the files of one cell.
pub fn folder() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("daxcrypt-table-").tempdir_in(folder_parent()).unwrap()
}

pub fn folder_parent() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}

fn create(path: &Path, len: u64) -> Arc<Backing> {
    Arc::new(Backing::create(path, len, Allocation::Sparse).unwrap())
}

fn open_rw(path: &Path) -> Arc<Backing> {
    Arc::new(common::open_when_free(path))
}

/// Where the files of a fixture are in a folder.
pub struct Files {
    place: Place,
    data: PathBuf,
    header: PathBuf,
}

impl Files {
    pub fn new(place: Place, folder: &Path) -> Self {
        Self { place, data: folder.join("data.img"), header: folder.join("header.img") }
    }

    pub fn location(&self) -> Location {
        match self.place {
            Place::File => Location::new(&self.data, None),
            Place::Detached => Location::new(&self.data, Some(self.header.clone())),
            Place::Region => Location::of_region(&self.data, "a"),
        }
    }

    fn site(&self) -> Site {
        let data = open_rw(&self.data);
        match self.place {
            Place::File => Site::whole(data),
            Place::Detached => Site::whole(data).with_header(Some(open_rw(&self.header))),
            Place::Region => {
                let range = Region::open(Arc::clone(&data)).unwrap().find("a").unwrap().range;
                Site::part(data, range.start, range.end - range.start)
            }
        }
    }

    fn unlocked(&self) -> Namespace {
        LockedNamespace::open_in(self.site()).unwrap().unlock_key(&own()).unwrap()
    }

    pub fn bytes(&self) -> [Vec<u8>; 2] {
        [&self.data, &self.header].map(|path| fs::read(path).unwrap_or_default())
    }
}

/// A namespace in one state, as bytes.
pub struct Fixture {
    pub bytes: [Vec<u8>; 2],
    /// The volume key in force.
    volume_key: Vec<u8>,
    pub backup: Vec<u8>,
    pub states: Vec<State>,
}

/// Makes a settled namespace with content and two slots; or one that lies elsewhere than it was made for.
fn make(files: &Files, variant: Variant, moved: bool) {
    let header = (files.place == Place::Detached).then(|| create(&files.header, HEADER_AREA_BYTES));
    let (len, home) = match files.place {
        Place::File | Place::Detached => (PART, 0),
        Place::Region => (REGION, START),
    };
    let data = create(&files.data, len);
    if files.place == Place::Region {
        Region::create(Arc::clone(&data), 512).unwrap().add("a", START..START + PART).unwrap();
    }
    let old_path = files.data.with_extension("old");
    let (backing, base) = if moved { (create(&old_path, ELSEWHERE + PART), ELSEWHERE) } else { (data, home) };
    let options = FormatOptions { base, available_bytes: Some(PART), header, ..variant.options() };
    let mut namespace = namespace::format(Arc::clone(&backing), options, &own()).unwrap();
    namespace.add_slot(None, "spare", &credential(2), KdfCost::LEAST).unwrap();
    let volume = Volume::new(namespace, Backend::detect());
    volume.write_at(&content(), 0).unwrap();
    volume.flush().unwrap();
    drop((volume, backing));
    if moved {
        let range = |start: u64| usize::try_from(start).unwrap()..usize::try_from(start + PART).unwrap();
        let (old, mut new) = (fs::read(&old_path).unwrap(), fs::read(&files.data).unwrap());
        new[range(home)].copy_from_slice(&old[range(ELSEWHERE)]);
        fs::write(&files.data, new).unwrap();
        fs::remove_file(old_path).unwrap();
    }
}

/// Copy B of the header, which an update writes last or first.
fn copy_b(files: &Files, bytes: &mut [Vec<u8>; 2]) -> Vec<u8> {
    let start = if files.place == Place::Region { START } else { 0 };
    let at = usize::try_from(start + (256 << 10)).unwrap();
    let file = usize::from(files.place == Place::Detached);
    bytes[file][at..at + (64 << 10)].to_vec()
}

fn put_copy_b(files: &Files, bytes: &mut [Vec<u8>; 2], copy: &[u8]) {
    let start = if files.place == Place::Region { START } else { 0 };
    let at = usize::try_from(start + (256 << 10)).unwrap();
    bytes[usize::from(files.place == Place::Detached)][at..at + copy.len()].copy_from_slice(copy);
}

/// Begins what `state` is the middle of. What it takes to get there is what people do.
fn bring_into(state: State, files: &Files, variant: Variant) {
    let options = RekeyOptions { other_slots: OtherSlots::Keep, ..RekeyOptions::default() };
    let step_and_drop = |namespace: Namespace, steps: usize| {
        let volume = Volume::new(namespace, Backend::detect());
        for _ in 0..steps {
            volume.transform_step(STEP).unwrap();
        }
        volume.into_namespace().unwrap()
    };
    match state {
        State::Settled | State::Moved => {}
        State::CutShort => {
            let mut before = files.bytes();
            files.unlocked().remove_slot(1, false).unwrap();
            let mut after = files.bytes();
            let old = copy_b(files, &mut before);
            put_copy_b(files, &mut after, &old);
            fs::write(&files.data, &after[0]).unwrap();
            if files.place == Place::Detached {
                fs::write(&files.header, &after[1]).unwrap();
            }
        }
        State::Rekeying | State::Paused => {
            let mut namespace = files.unlocked();
            namespace.begin_rekey(&own(), &options).unwrap();
            let mut namespace = step_and_drop(namespace, 2);
            if state == State::Paused {
                namespace.set_transform_paused(true).unwrap();
            }
        }
        State::Sliding => {
            let namespace = files.unlocked();
            let mut region = Region::open(Arc::clone(namespace.backing())).unwrap();
            let sliding = begin_slide(&mut region, "a", namespace, 2 * MIB, &own(), &options).unwrap();
            // With nothing moved the old header is there, too.
            step_and_drop(sliding, variant.0 % 2);
        }
        State::Adopted => {
            let moved = MovedNamespace::open_in(files.site()).unwrap();
            step_and_drop(moved.adopt(&own(), &options).unwrap(), 1 + variant.0 % 2);
        }
        State::Unclean => files.unlocked().set_unclean(true).unwrap(),
        State::Wiping => files.unlocked().set_wiping(true).unwrap(),
        State::Ephemeral => {
            let site = files.site();
            let (header, base) = (site.is_detached().then(|| Arc::clone(site.header_place().0)), site.start());
            let available_bytes = Some(site.available_bytes());
            let options = FormatOptions { header, base, available_bytes, ..variant.options() };
            drop(namespace::format_ephemeral(Arc::clone(site.data()), options).unwrap());
        }
        State::Luks2 => {
            let detached = folder();
            let other = Files::new(Place::Detached, detached.path());
            make(&other, variant, false);
            let kdf = SlotKdf::Pbkdf2 { iterations: 1000 };
            let options = ExportOptions { kdf };
            let bytes = headers::export_luks2(&other.location(), &other.unlocked(), &own(), options).unwrap();
            let site = files.site();
            let (backing, start) = site.header_place();
            let len = (bytes.len() as u64).min(HEADER_AREA_BYTES);
            let bytes = &bytes[..usize::try_from(len).unwrap()];
            backing.write(start..start + len, |mut target| target.copy_from(bytes)).unwrap();
            backing.sync_all().unwrap();
        }
    }
}

pub fn fixture(state: State, place: Place, variant: Variant) -> Fixture {
    let folder = folder();
    let files = Files::new(place, folder.path());
    make(&files, variant, matches!(state, State::Moved | State::Adopted));
    let first = namespace::present_header(&files.site()).unwrap().unwrap_or_default();
    bring_into(state, &files, variant);
    let locked = LockedNamespace::open_in(files.site());
    let (states, backup) = match &locked {
        Ok(locked) => (gate::states_of_locked(locked), locked.backup().unwrap()),
        Err(_) => (gate::states_of_place(&locked), first),
    };
    assert!(states.contains(&state), "{state:?} {place:?} {variant:?}: {states:?}");
    let unlocked = locked.ok().and_then(|locked| locked.unlock_key(&own()).ok());
    let volume_key = unlocked.map(|namespace| namespace.volume_key().bytes().to_vec()).unwrap_or_default();
    Fixture { bytes: files.bytes(), volume_key, backup, states }
}

/// One cell, with its files.
pub struct Cell<'a> {
    pub operation: Operation,
    pub state: State,
    pub entry: Entry,
    pub files: &'a Files,
    pub fixture: &'a Fixture,
}

/// What has become of the namespace.
#[derive(Debug, PartialEq, Eq)]
pub enum After {
    /// It is here, with this content.
    Here(Vec<u8>),
    /// It is somewhere else.
    At(PathBuf),
    /// It is gone.
    Gone,
}

impl Cell<'_> {
    fn location(&self) -> Location {
        self.files.location()
    }

    fn key<'k>(&self, own: &'k Credential) -> Key<'k> {
        match self.entry {
            _ if self.state == State::Ephemeral => Key::Ephemeral,
            Entry::Escrow => Key::VolumeKey(VolumeKey::new(SecretBytes::copy_of(&self.fixture.volume_key)).unwrap()),
            _ => Key::Credential(own),
        }
    }

    fn open(&self, operation: Operation) -> Result<Namespace, Error> {
        self.location().find(operation)?.unlock(self.key(&own()))
    }

    fn volume(&self) -> Result<Volume, Error> {
        Ok(Volume::new(self.open(self.operation)?, Backend::detect()))
    }

    fn failed(&self, cause: impl Into<Cause>) -> Error {
        Error::new(self.operation, self.location().path(), cause)
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.files.data.with_file_name(name)
    }

    fn do_it(&self) -> Result<After, Error> {
        match self.operation {
            Operation::Serve | Operation::ServeReadOnly | Operation::Export | Operation::Import => self.use_it(),
            Operation::RekeyPreview | Operation::RekeyBegin | Operation::RekeyResume => self.rekey(),
            Operation::RekeyPause | Operation::RekeyStatus => self.rekey(),
            Operation::RelocateSource | Operation::CopySource | Operation::RelocateDestination => self.move_it(),
            Operation::Adopt | Operation::Compact => self.move_it(),
            Operation::KeyList | Operation::KeyTest | Operation::KeyAdd => self.keys(),
            Operation::KeyRemove | Operation::KeyChange | Operation::KeyDump => self.keys(),
            Operation::Resize | Operation::AllowDiscards | Operation::HeaderBackup => self.header(),
            Operation::HeaderRestore | Operation::HeaderRepair => self.header(),
            Operation::ExportLuks2 | Operation::DmTable => self.header(),
            Operation::FormatOver | Operation::Info | Operation::Erase | Operation::Remove => self.header(),
            Operation::Lock => self.header(),
        }
    }

    fn use_it(&self) -> Result<After, Error> {
        let (stop, mut watch) = (AtomicBool::new(false), Unwatched);
        let mut run = Run::new(&mut watch, &stop, None);
        let (volume, mut bytes) = (self.volume()?, content());
        match self.operation {
            Operation::Serve => {
                volume.mark_in_use().unwrap();
                volume.write_at(b"served", 77_777).unwrap();
                bytes[77_777..][..6].copy_from_slice(b"served");
                volume.mark_closed().unwrap();
            }
            Operation::Export => {
                let mut out = Vec::new();
                transfer::export_to_stream(&volume, &self.location(), &mut out, &mut run)?;
                assert!(out == bytes, "exported");
            }
            Operation::Import => {
                let new = noise(99, 100_000);
                bytes[..new.len()].copy_from_slice(&new);
                let mut image = Image::stream(std::io::Cursor::new(new));
                transfer::import(&mut image, &volume, &self.location(), &mut run)?;
            }
            _ => {
                let mut found = vec![0; SIZE];
                volume.read_at(&mut found, 0).unwrap();
                assert!(found == bytes || self.state == State::Ephemeral, "served read-only");
            }
        }
        Ok(After::Here(bytes))
    }

    fn rekey(&self) -> Result<After, Error> {
        let (stop, mut watch) = (AtomicBool::new(false), Unwatched);
        let mut run = Run::new(&mut watch, &stop, None);
        let mut namespace = self.open(self.operation)?;
        let wish = Wish { slots: SlotPolicy::Keep, ..Wish::default() };
        match self.operation {
            Operation::RekeyPreview => {
                let volume = Volume::new(namespace, Backend::detect());
                assert_eq!(ops::rekey::estimate(&volume, wish).unwrap().size_bytes, SIZE as u64);
            }
            Operation::RekeyBegin => {
                ops::rekey::begin(&mut namespace, &own(), wish).map_err(|cause| self.failed(cause))?;
                run.end_transform(&Volume::new(namespace, Backend::detect())).unwrap();
            }
            Operation::RekeyResume => {
                namespace.set_transform_paused(false).map_err(|error| self.failed(error))?;
                run.end_transform(&Volume::new(namespace, Backend::detect())).unwrap();
            }
            Operation::RekeyPause => namespace.set_transform_paused(true).map_err(|error| self.failed(error))?,
            _ => {
                let tells = self
                    .fixture
                    .states
                    .iter()
                    .any(|state| matches!(state, State::Rekeying | State::Sliding | State::Adopted));
                assert_eq!(namespace.pending_transform().is_some(), tells);
            }
        }
        Ok(After::Here(content()))
    }

    fn move_it(&self) -> Result<After, Error> {
        let (stop, mut watch) = (AtomicBool::new(false), Unwatched);
        let mut run = Run::new(&mut watch, &stop, None);
        let slots = SlotPolicy::Keep;
        let keep_source = self.operation == Operation::CopySource;
        let options = relocate::Options { keep_source, slots, sparse: true, force: false };
        match self.operation {
            Operation::RelocateDestination => {
                let path = self.beside("other.img");
                let format = FormatOptions { size_bytes: Some(SIZE as u64), ..FormatOptions::default() };
                let backing = create(&path, HEADER_AREA_BYTES + SIZE as u64);
                let source = namespace::format(backing, format, &own()).unwrap();
                let (from, backend) = (Location::new(&path, None), Backend::detect());
                relocate::relocate(source, &from, &self.location(), &own(), options, backend, &mut run)?;
            }
            Operation::Adopt => {
                Adoption::find(&self.location())?.adopt(&own(), slots, Backend::detect(), &mut run)?;
            }
            Operation::Compact => {
                let compaction = Compaction::new(&self.files.data, slots, Backend::detect());
                compaction.one("a", Some(&own()), &mut run)?;
                let range = Region::open(open_rw(&self.files.data)).unwrap().find("a").unwrap().range;
                assert_eq!(range, 2 * MIB..6 * MIB, "at the start, and as long as it is");
            }
            _ => {
                let (source, to) = (self.open(self.operation)?, self.beside("to.img"));
                let (from, to_location) = (self.location(), Location::new(&to, None));
                let backend = Backend::detect();
                relocate::relocate(source, &from, &to_location, &own(), options, backend, &mut run)?;
                return Ok(After::At(to));
            }
        }
        Ok(After::Here(content()))
    }

    fn keys(&self) -> Result<After, Error> {
        let location = self.location();
        if self.operation == Operation::KeyList {
            let found = location.find(self.operation)?;
            assert!(self.state == State::Ephemeral || !found.header().slots.is_empty());
            return Ok(After::Here(content()));
        }
        let mut namespace = self.open(self.operation)?;
        let failed = |cause| self.failed(cause);
        match self.operation {
            Operation::KeyAdd => {
                let id = keys::add(&mut namespace, None, "new", &credential(5), KdfCost::LEAST).map_err(failed)?;
                drop(namespace);
                location.find(Operation::KeyTest)?.unlock(Key::Slot(&credential(5), id))?;
            }
            Operation::KeyRemove => {
                let removed = keys::remove(&mut namespace, 1, false);
                drop(namespace);
                // The update that was cut had removed it; both copies know that now.
                assert_eq!(removed.is_err(), self.state == State::CutShort);
                assert!(location.find(Operation::KeyTest)?.unlock(Key::Credential(&credential(2))).is_err());
                let copies = location.find(Operation::Info)?.header().copies.clone();
                assert_eq!(copies[0], copies[1]);
            }
            Operation::KeyChange => {
                keys::change(&mut namespace, Some(0), &credential(6), KdfCost::LEAST).map_err(failed)?;
                drop(namespace);
                let changed = location.find(Operation::KeyChange)?.unlock(Key::Credential(&credential(6)));
                keys::change(&mut changed?, Some(0), &own(), KdfCost::LEAST).map_err(failed)?;
            }
            Operation::KeyDump => assert_eq!(keys::dump(&namespace).bytes(), &self.fixture.volume_key[..]),
            _ => {}
        }
        Ok(After::Here(content()))
    }

    fn header(&self) -> Result<After, Error> {
        let location = self.location();
        match self.operation {
            Operation::Resize => {
                let volume = self.volume()?;
                let size_bytes = Some(SIZE as u64 + (64 << 10));
                let wanted = Wanted { size_bytes, even_smaller: false, sparse: true };
                assert_eq!(resize::apply(&location, &volume, wanted)?.old_bytes, SIZE as u64);
            }
            Operation::AllowDiscards => {
                let mut namespace = self.open(Operation::Serve)?;
                ops::also(self.operation, &location, &namespace)?;
                namespace.allow_discards().map_err(|error| self.failed(error))?;
                assert!(namespace.header().discards);
            }
            Operation::HeaderBackup => assert_eq!(headers::backup(&location)?.bytes.len(), 65536),
            Operation::HeaderRestore => {
                Restoration::open(&location, &self.fixture.backup)?.restore(self.key(&own()), true)?;
            }
            Operation::HeaderRepair => {
                let proofs = Repair::open(&location)?.prove(&RepairKey::Credential(&own()))?;
                let genuine = proofs.iter().find(|copy| matches!(copy.proof, Proof::Genuine { .. })).unwrap();
                Repair::open(&location)?.choose(genuine.name, self.key(&own()))?;
            }
            Operation::ExportLuks2 => {
                let namespace = self.open(self.operation)?;
                let options = ExportOptions { kdf: SlotKdf::Pbkdf2 { iterations: 1000 } };
                assert!(!headers::export_luks2(&location, &namespace, &own(), options)?.is_empty());
            }
            Operation::FormatOver => {
                let (operation, size_bytes) = (self.operation, Some(SIZE as u64));
                let allocation = Allocation::Sparse;
                let place = NewPlace { operation, location: &location, size_bytes, allocation, force: false };
                drop(place.prepare()?);
            }
            Operation::Info => assert_eq!(location.find(self.operation)?.header().size_bytes, SIZE as u64),
            Operation::Erase => {
                Doomed::find(&location, false)?.erase()?;
                return Ok(After::Gone);
            }
            Operation::Remove => {
                Doomed::find_in_region(&location)?.remove()?;
                return Ok(After::Gone);
            }
            _ => drop(self.open(self.operation)?),
        }
        Ok(After::Here(content()))
    }

    /// What a server does with what it has open.
    fn ask_server(&self, volume: &Volume) -> Result<After, Error> {
        ops::also_in_use(self.operation, volume).map_err(|cause| self.failed(cause))?;
        let (stop, mut watch) = (AtomicBool::new(false), Unwatched);
        let mut run = Run::new(&mut watch, &stop, None);
        let wish = Wish { slots: SlotPolicy::Keep, ..Wish::default() };
        let done = match self.operation {
            Operation::RekeyPreview => ops::rekey::estimate(volume, wish).map(drop),
            Operation::RekeyBegin => {
                ops::rekey::begin_in_use(volume, &own(), wish).and_then(|()| run.end_transform(volume).map(drop))
            }
            Operation::RekeyResume => {
                volume.set_transform_paused(false).unwrap();
                run.end_transform(volume).map(drop)
            }
            Operation::RekeyPause => volume.set_transform_paused(true).map_err(Cause::from),
            Operation::Lock => {
                let site = ops::lock::check(volume).map_err(|cause| self.failed(cause))?;
                ops::lock::lock_in_use(volume).map_err(|cause| self.failed(cause))?;
                assert!(volume.locked() && volume.read_at(&mut [0], 0).is_err());
                ops::lock::unlock_in_use(&self.location(), site, Key::Credential(&own()), volume)?;
                volume.read_at(&mut [0], 0).map_err(Cause::from)
            }
            Operation::Resize => {
                let size_bytes = Some(SIZE as u64 + (64 << 10));
                let wanted = Wanted { size_bytes, even_smaller: false, sparse: true };
                resize::apply(&self.location(), volume, wanted).map(drop).map_err(|error| *error.cause)
            }
            Operation::KeyAdd => {
                keys::add_in_use(volume, &own(), None, "new", &credential(5), KdfCost::LEAST).map(drop)
            }
            Operation::KeyRemove if self.state == State::CutShort => Ok(()),
            Operation::KeyRemove => keys::remove_in_use(volume, &own(), 1, false),
            Operation::KeyChange => keys::change_in_use(volume, &own(), Some(0), &own(), |_| KdfCost::LEAST).map(drop),
            Operation::RekeyStatus | Operation::KeyList => Ok(()),
            other => panic!("{other:?} is nothing that a server does"),
        };
        done.map_err(|cause| self.failed(cause))?;
        Ok(After::Here(content()))
    }

    /// Whether this combination exists at all.
    pub fn exists(&self) -> bool {
        let Self { operation, state, entry, .. } = *self;
        let place = self.files.place;
        let by_server = matches!(entry, Entry::Server | Entry::ReadOnlyServer);
        let has_key = !self.fixture.volume_key.is_empty();
        match operation {
            // Regions have partitions to move and to remove, and detached headers can be LUKS2's.
            Operation::Compact | Operation::Remove if place != Place::Region => false,
            Operation::ExportLuks2 if place != Place::Detached && state != State::Luks2 => false,
            // They take the credential of a slot, or no key at all.
            Operation::Adopt | Operation::Compact if entry == Entry::Escrow => false,
            // `--luks2` opens those.
            Operation::Serve | Operation::ServeReadOnly | Operation::Info if state == State::Luks2 => false,
            _ if by_server => !matches!(state, State::Moved | State::Luks2 | State::Ephemeral),
            _ => entry != Entry::Escrow || has_key || matches!(state, State::Moved | State::Luks2) && !by_server,
        }
    }

    pub fn way(&self) -> Way {
        let (detached, force) = (self.files.place == Place::Detached, false);
        let key = match self.entry {
            Entry::Escrow => KeyWay::VolumeKey,
            _ => KeyWay::Slot,
        };
        let (caller, read_only) = match self.entry {
            Entry::Slot | Entry::Escrow => (Caller::Opener, self.operation.reach() != ops::Reach::Write),
            Entry::Server => (Caller::Control, false),
            Entry::ReadOnlyServer => (Caller::Control, true),
        };
        Way { key, read_only, detached, caller, force }
    }

    /// Does it, and looks at what is there afterwards. Whether it was permitted.
    pub fn check(&self) -> bool {
        let what =
            format!("{:?} in {:?} of {:?} by {:?}", self.operation, self.fixture.states, self.files.place, self.entry);
        let server = match self.entry {
            Entry::Slot | Entry::Escrow => None,
            Entry::Server => Some(Operation::Serve),
            Entry::ReadOnlyServer => Some(Operation::ServeReadOnly),
        };
        let volume = server.map(|serve| Volume::new(self.open(serve).unwrap(), Backend::detect()));
        let mut states = self.fixture.states.clone();
        if self.entry == Entry::Server {
            states.retain(|&state| state != State::CutShort); // opening it has completed it
        }
        let permitted = gate::check(self.operation, &states, self.way()).is_ok();
        let before = volume.as_ref().map(|_| self.files.bytes()); // opening it may have completed its header
        let before = before.as_ref().unwrap_or(&self.fixture.bytes);
        let done = match &volume {
            Some(volume) => self.ask_server(volume),
            None => self.do_it(),
        };
        drop(volume);
        match (&done, permitted) {
            (Ok(after), true) => self.look(&what, after),
            (Err(error), false) => {
                assert!(!matches!(error.kind(), Kind::Io | Kind::Busy | Kind::Stopped), "{what}: {error:?}");
                let after = self.files.bytes();
                assert!(before[0] == after[0] && before[1] == after[1], "{what}: refused, and yet something changed");
            }
            (Ok(_), false) => panic!("{what}: done, though the table refuses it"),
            (Err(error), true) => panic!("{what}: refused, though the table permits it: {error:?}"),
        }
        permitted
    }

    /// Whether it needs the key, or the data for itself, so that it finds out whose data it is.
    pub fn looks_at_the_data(&self) -> bool {
        let by_the_header = matches!(
            self.operation,
            Operation::Info
                | Operation::KeyList
                | Operation::HeaderBackup
                | Operation::Erase
                | Operation::FormatOver
                | Operation::RelocateDestination
        );
        let has_tag = !matches!(self.state, State::Ephemeral | State::Luks2);
        self.exists() && has_tag && !by_the_header && matches!(self.entry, Entry::Slot | Entry::Escrow)
    }

    /// Tries it beside the data of another namespace: it is refused, and no byte of any file changes.
    pub fn check_other_data(&self, other: &[u8]) {
        let what = format!("{:?} in {:?} by {:?} with other data", self.operation, self.state, self.entry);
        fs::write(&self.files.data, other).unwrap();
        let before = self.files.bytes();
        let Err(refused) = self.do_it() else { panic!("{what}: done") };
        assert!(!matches!(refused.kind(), Kind::Io | Kind::Busy | Kind::Stopped), "{what}: {refused:?}");
        assert!(self.files.bytes() == before, "{what}: refused, and yet something changed");
        assert!(!self.beside("to.img").exists(), "{what}: something is left");
    }

    fn is_here(&self) -> bool {
        let site = self.location().peek(Operation::Info);
        site.is_ok_and(|site| LockedNamespace::open_in(site).is_ok())
    }

    fn look(&self, what: &str, after: &After) {
        match after {
            After::Gone => {
                assert!(!self.is_here(), "{what}: a header is left");
            }
            After::At(path) => {
                let moved = LockedNamespace::open(Arc::new(Backing::open(path, Access::ReadOnly).unwrap())).unwrap();
                assert!(read(moved.unlock_key(&own()).unwrap()) == content(), "{what}: other content there");
                let is_here = self.is_here();
                assert_eq!(is_here, self.operation == Operation::CopySource, "{what}");
            }
            After::Here(_) if self.state == State::Ephemeral => {}
            After::Here(expected) => {
                let opened = self.location().find(Operation::ServeReadOnly);
                let opened = opened.and_then(|found| found.unlock(Key::Credential(&own())));
                let namespace = opened.unwrap_or_else(|error| panic!("{what}: does not open afterwards: {error:?}"));
                let states = gate::states_of_unlocked(&namespace);
                let was_written = self.operation.reach() == ops::Reach::Write || self.entry == Entry::Server;
                assert!(!was_written || !states.contains(&State::CutShort), "{what}: an update is still cut short");
                let found = read(namespace);
                assert!(found[..SIZE] == expected[..], "{what}: other content");
            }
        }
    }
}

fn read(namespace: Namespace) -> Vec<u8> {
    let volume = Volume::new(namespace, Backend::detect());
    let mut found = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut found, 0).unwrap();
    found
}

pub fn put_back(files: &Files, fixture: &Fixture) {
    use std::os::unix::fs::FileExt;
    for (path, bytes) in [&files.data, &files.header].into_iter().zip(&fixture.bytes) {
        if bytes.is_empty() {
            continue;
        }
        let file = fs::File::create_new(path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (index, chunk) in bytes.chunks(64 << 10).enumerate() {
            if *chunk != ZEROES[..chunk.len()] {
                file.write_all_at(chunk, (index as u64) << 16).unwrap();
            }
        }
    }
}
