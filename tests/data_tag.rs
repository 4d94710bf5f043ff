//! Detached data knows its header: another namespace's data is refused before a byte of it changes, whatever it is opened for,
//! and the tag goes along with everything that may happen to a namespace.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Bench, Server, noise};
use daxcrypt::dax::MapOptions;
use daxcrypt::namespace::{
    Credential, DataUnit, FormatOptions, LockedNamespace, MovedNamespace, Namespace, RekeyOptions, Site, UnlockError,
    format,
};
use daxcrypt::pmem::{Access, Allocation, Backing, OpenError, OpenOptions};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;

const MIB: usize = 1 << 20;
const PAGE: u64 = 4096;
const KEY: [&str; 2] = ["--key-file", "vault.key"];

fn credential() -> Credential {
    Credential::KeyFile(SecretBytes::copy_of(&[7; 32]))
}

/// A namespace in two files.
struct Pair {
    folder: tempfile::TempDir,
}

impl Pair {
    fn new(data_bytes: u64, options: FormatOptions) -> Self {
        let pair = Self { folder: tempfile::tempdir().unwrap() };
        let create = |path: PathBuf, len| Arc::new(Backing::create(&path, len, Allocation::Sparse).unwrap());
        let header = Some(create(pair.header(), 2 << 20));
        let data = create(pair.data(), data_bytes);
        drop(format(data, FormatOptions { header, ..options }, &credential()).unwrap());
        pair
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data.img")
    }

    fn header(&self) -> PathBuf {
        self.folder.path().join("data.header")
    }

    fn bytes(&self) -> [Vec<u8>; 2] {
        [self.data(), self.header()].map(|path| fs::read(path).unwrap())
    }

    fn site(&self, access: Access) -> Site {
        // A program that another test starts has the files, and with them the locks, until it is another program.
        let deadline = Instant::now() + Duration::from_secs(10);
        let open = |path: PathBuf| loop {
            match Backing::open(&path, access) {
                Err(OpenError::Busy) if Instant::now() < deadline => std::thread::yield_now(),
                opened => break Arc::new(opened.unwrap()),
            }
        };
        let [data, header] = [self.data(), self.header()].map(open);
        Site::whole(data).with_header(Some(header))
    }

    fn open(&self) -> Namespace {
        unlock(self.site(Access::ReadWrite)).unwrap()
    }

    fn volume(&self) -> Volume {
        Volume::new(self.open(), Backend::detect())
    }

    fn tag_offset(&self) -> Option<u64> {
        LockedNamespace::open_in(self.site(Access::ReadOnly)).unwrap().header().tag_offset
    }

    fn set_len(&self, len: u64) {
        fs::File::options().write(true).open(self.data()).unwrap().set_len(len).unwrap();
    }

    /// Opening is refused, and has changed nothing.
    fn refuses(&self) {
        let before = self.bytes();
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let refused = unlock(self.site(access)).unwrap_err();
            assert!(matches!(refused, UnlockError::OtherData { .. }), "{refused}");
        }
        // Who only reads cannot accept it either: there would be no tag afterwards.
        let refused = unlock(self.site(Access::ReadOnly).accepting_data(true)).unwrap_err();
        assert!(matches!(refused, UnlockError::OtherData { .. }), "{refused}");
        assert!(self.bytes() == before);
    }

    fn accepts(&self) -> Namespace {
        unlock(self.site(Access::ReadWrite).accepting_data(true)).unwrap()
    }
}

fn unlock(site: Site) -> Result<Namespace, UnlockError> {
    LockedNamespace::open_in(site).unwrap().unlock_key(&credential())
}

fn of_size(size_bytes: u64) -> FormatOptions {
    FormatOptions { size_bytes: Some(size_bytes), ..FormatOptions::default() }
}

fn read(volume: &Volume) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(volume.size()).unwrap()];
    volume.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Where the page is for each size, and that there is none where there is no room.
#[test]
fn format_places_the_tag_behind_the_data_where_there_is_room() {
    let unit_512 = || FormatOptions { unit: DataUnit::Bytes512, ..FormatOptions::default() };
    for (file, options, size, tag) in [
        (64 << 10, FormatOptions::default(), 60 << 10, Some(60 << 10)),
        ((64 << 10) + 1536, unit_512(), 60 << 10, Some(60 << 10)),
        (8191, unit_512(), 7680, None),
        (8192, FormatOptions::default(), PAGE, Some(PAGE)),
        (64 << 10, of_size(64 << 10), 64 << 10, None),
        ((64 << 10) + 4095, of_size(64 << 10), 64 << 10, None),
        ((64 << 10) + 4096, of_size(64 << 10), 64 << 10, Some(64 << 10)),
        (64 << 10, FormatOptions { size_bytes: Some(4608), ..unit_512() }, 4608, Some(8192)),
    ] {
        let pair = Pair::new(file, options);
        let namespace = pair.open();
        assert_eq!((namespace.geometry().size_bytes(), namespace.header().tag_offset), (size, tag), "{file}");
        assert_eq!(tag.is_some(), pair.bytes()[0].iter().any(|&byte| byte != 0), "{file}");
    }
    let ephemeral = Pair::new(64 << 10, FormatOptions::default());
    let site = ephemeral.site(Access::ReadWrite);
    let options = FormatOptions { header: Some(Arc::clone(site.header_place().0)), ..FormatOptions::default() };
    let made = daxcrypt::namespace::format_ephemeral(Arc::clone(site.data()), options).unwrap();
    assert_eq!((made.geometry().size_bytes(), made.header().tag_offset), (64 << 10, None));
}

#[test]
fn swapped_data_is_refused_and_accepted_only_when_asked() {
    let [a, b] = [0, 1].map(|_| Pair::new(64 << 10, FormatOptions::default()));
    a.volume().write_at(&[1; 5000], 0).unwrap();
    b.volume().write_at(&[2; 5000], 0).unwrap();
    let (of_a, of_b) = (a.bytes(), b.bytes());
    fs::write(a.data(), &of_b[0]).unwrap();
    a.refuses();
    fs::write(a.data(), &of_a[0]).unwrap();
    assert_eq!(read(&a.volume())[..5000], [1; 5000]);
    // No tag at all, and one that is half there.
    let page = of_a[0].len() - 4096;
    let mut none = of_a[0].clone();
    none[page..].fill(0);
    let mut torn = of_a[0].clone();
    torn[page + 31] ^= 1;
    for damaged in [none, torn] {
        fs::write(a.data(), damaged).unwrap();
        a.refuses();
        drop(a.accepts());
        assert_eq!(read(&a.volume())[..5000], [1; 5000], "the data is as it was, and opens as ever");
        assert_eq!(a.bytes()[0][..page], of_a[0][..page]);
    }
    // Cut off: there is no room for a tag, and the header knows of none from then on.
    a.set_len(page as u64);
    a.refuses();
    assert_eq!(a.accepts().header().tag_offset, None);
    assert_eq!(read(&a.volume())[..5000], [1; 5000]);
    // There is room again: who accepts the data binds it.
    a.set_len(page as u64 + PAGE);
    assert_eq!(a.open().header().tag_offset, None);
    assert_eq!(a.accepts().header().tag_offset, Some(page as u64));
    drop(a.open());
}

#[test]
fn the_tag_goes_along_with_every_resize() {
    for (unit, discards) in [(DataUnit::Bytes4096, false), (DataUnit::Bytes512, true)] {
        let options = FormatOptions { unit, allow_discards: discards, ..of_size(16 << 10) };
        let pair = Pair::new(128 << 10, options);
        let bytes = noise(3, 16 << 10);
        pair.volume().write_at(&bytes, 0).unwrap();
        let step = u64::from(unit.bytes());
        for size in [20 << 10, (20 << 10) + step, 124 << 10, 16 << 10, (16 << 10) + step, 16 << 10] {
            let former = pair.tag_offset().unwrap();
            pair.volume().resize(size, true).unwrap();
            let tag = size.next_multiple_of(PAGE);
            assert_eq!(pair.tag_offset(), Some(tag), "{size}");
            let volume = pair.volume();
            assert_eq!(read(&volume)[..16 << 10], bytes, "{size}");
            if former < size && discards {
                assert!(read(&volume)[usize::try_from(former).unwrap()..].iter().take(512).all(|&byte| byte == 0));
            }
        }
        let volume = pair.volume();
        assert!(volume.resize((124 << 10) + step, false).is_err(), "there is room for the data, and none for its tag");
        assert_eq!(volume.size(), 16 << 10);
        drop(volume);
        // Without a volume, as programs may do it.
        pair.open().resize(32 << 10, false).unwrap();
        pair.open().resize(16 << 10, true).unwrap();
        assert_eq!((pair.tag_offset(), &read(&pair.volume())), (Some(16 << 10), &bytes));
    }
}

#[test]
fn a_rekey_has_the_tag_of_its_new_key_from_the_beginning_and_leaves_none_of_the_old_one() {
    let pair = Pair::new(128 << 10, FormatOptions::default());
    let bytes = noise(4, 124 << 10);
    pair.volume().write_at(&bytes, 0).unwrap();
    let tag_page = || pair.bytes()[0][124 << 10..].to_vec();
    for round in 0..3 {
        let before = pair.bytes();
        let mut namespace = pair.open();
        let (half, other) = before[0][124 << 10..].split_at(2048);
        let old = [half, other].map(|half| half[..32].to_vec());
        namespace.begin_rekey(&credential(), &RekeyOptions::default()).unwrap();
        let volume = Volume::new(namespace, Backend::detect());
        volume.transform_step(64 << 10).unwrap();
        assert!(!tag_page().windows(32).any(|part| old.iter().any(|old| part == old)), "round {round}");
        drop(volume);
        // In the middle: opened again, and with the data of before.
        assert_eq!(read(&pair.volume()), bytes);
        let middle = pair.bytes();
        fs::write(pair.data(), &before[0]).unwrap();
        pair.refuses();
        fs::write(pair.data(), &middle[0]).unwrap();
        let volume = pair.volume();
        while volume.transform_step(64 << 10).unwrap().is_some() {}
        drop(volume);
        assert_eq!((pair.tag_offset(), &read(&pair.volume())), (Some(124 << 10), &bytes));
        // Before and after do not mix.
        let after = pair.bytes();
        fs::write(pair.data(), &before[0]).unwrap();
        pair.refuses();
        fs::write(pair.header(), &before[1]).unwrap();
        assert_eq!(read(&pair.volume()), bytes);
        fs::write(pair.data(), &after[0]).unwrap();
        pair.refuses();
        fs::write(pair.header(), &after[1]).unwrap();
    }
}

/// Who looks without a lock while somebody re-keys it is not told that the data is other data.
#[test]
fn a_tag_that_goes_while_a_key_is_derived_is_told_apart_from_other_data() {
    let pair = Pair::new(64 << 10, FormatOptions::default());
    let peek = || {
        let options = OpenOptions::new(Access::ReadOnly).lock_range(0..0);
        let [data, header] = [pair.data(), pair.header()].map(|path| Arc::new(options.open(&path).unwrap()));
        LockedNamespace::open_in(Site::whole(data).with_header(Some(header))).unwrap()
    };
    let locked = peek();
    let volume = pair.volume();
    volume.begin_rekey(&credential(), &RekeyOptions::default()).unwrap();
    volume.transform_step(4096).unwrap();
    let refused = locked.unlock_key(&credential()).unwrap_err();
    assert!(matches!(refused, UnlockError::Changed), "{refused}");
    peek().unlock_key(&credential()).unwrap();
}

/// A map of all of it, whose last page holds less than a page of data, stays away from the tag.
#[test]
fn a_map_of_detached_data_leaves_its_tag_alone() {
    let options = FormatOptions { unit: DataUnit::Bytes512, ..of_size(20_992) };
    let pair = Pair::new(64 << 10, options);
    let tag_and_rest = || pair.bytes()[0][20_992..].to_vec();
    let before = tag_and_rest();
    let volume = Arc::new(pair.volume());
    let map = volume.map(0..20_992, &MapOptions::new().writable()).unwrap();
    map.write(0, &noise(6, 20_992)).unwrap();
    map.persist(0..20_992).unwrap();
    map.close().unwrap();
    drop(volume);
    assert!(tag_and_rest() == before);
    assert_eq!(read(&pair.volume()), noise(6, 20_992));
}

/// Moved as ciphertext, to a place where the data begins later, earlier or at the same distance from the base; the tag is
/// never where data still is.
#[test]
fn an_adopted_namespace_keeps_its_tag_wherever_its_data_goes() {
    const ROOM: u64 = 7 << 20;
    for (from, to) in [(4, 8), (4, 9), (9, 12)] {
        let [from, to] = [from << 20, to << 20];
        let pair = Pair::new(24 << 20, FormatOptions { base: from, available_bytes: Some(ROOM), ..of_size(4 << 20) });
        let at = |base: u64, access| {
            let site = pair.site(access);
            Site::part(Arc::clone(site.data()), base, ROOM).with_header(Some(Arc::clone(site.header_place().0)))
        };
        let bytes = noise(5, 4 << 20);
        Volume::new(unlock(at(from, Access::ReadWrite)).unwrap(), Backend::detect()).write_at(&bytes, 0).unwrap();
        let mut data = pair.bytes()[0].clone();
        let range = |start: u64| usize::try_from(start).unwrap()..usize::try_from(start + ROOM).unwrap();
        data.copy_within(range(from), range(to).start);
        data[..range(to).start].fill(0);
        data[range(to).end..].fill(0);
        fs::write(pair.data(), &data).unwrap();

        let adopt = |site: Site| MovedNamespace::open_in(site).unwrap().adopt(&credential(), &RekeyOptions::default());
        // Without its tag nothing is written.
        let tag = usize::try_from(to).unwrap() + if from == 9 << 20 { 5 * MIB } else { 4 * MIB };
        let mut untagged = data.clone();
        untagged[tag..tag + 4096].fill(0);
        fs::write(pair.data(), &untagged).unwrap();
        let before = pair.bytes();
        assert!(adopt(at(to, Access::ReadWrite)).unwrap_err().to_string().contains("the tag of this header"));
        assert!(pair.bytes() == before);
        fs::write(pair.data(), &data).unwrap();

        let volume = Volume::new(adopt(at(to, Access::ReadWrite)).unwrap(), Backend::detect());
        volume.transform_step(1 << 20).unwrap();
        drop(volume);
        let volume = Volume::new(unlock(at(to, Access::ReadWrite)).unwrap(), Backend::detect());
        while volume.transform_step(1 << 20).unwrap().is_some() {}
        drop(volume);
        let namespace = unlock(at(to, Access::ReadWrite)).unwrap();
        let data_offset = namespace.geometry().data_offset();
        assert_eq!(namespace.header().tag_offset, Some(data_offset + (4 << 20)), "from {from} to {to}");
        assert!(read(&Volume::new(namespace, Backend::detect())) == bytes, "from {from} to {to}");
    }
}

#[test]
fn moved_detached_data_that_begins_as_something_else_is_not_adopted() {
    let pair = Pair::new(24 << 20, FormatOptions { base: 4 << 20, ..of_size(4 << 20) });
    let mut data = vec![0; 24 << 20];
    data[8 << 20..][..8].copy_from_slice(b"DAXCRYPT");
    fs::write(pair.data(), data).unwrap();
    let site = pair.site(Access::ReadWrite);
    let moved =
        Site::part(Arc::clone(site.data()), 8 << 20, 8 << 20).with_header(Some(Arc::clone(site.header_place().0)));
    let refused = MovedNamespace::open_in(moved).unwrap_err().to_string();
    assert!(refused.contains("the data begins with a daxcrypt namespace"), "{refused}");
}

/// Two namespaces of one key, and all files by their names.
fn bench() -> Bench {
    let bench = Bench::new();
    for name in ["a", "b"] {
        let (data, header) = (format!("{name}.img"), format!("{name}.header"));
        bench.format(&data, "4M", &["--header", &header]);
    }
    bench.secret("second.key", &[8; 32]);
    fs::write(bench.path("plain.img"), noise(9, MIB)).unwrap();
    bench
}

fn all_bytes(bench: &Bench) -> Vec<Vec<u8>> {
    ["a.img", "a.header", "b.img", "b.header"].map(|name| fs::read(bench.path(name)).unwrap()).to_vec()
}

#[test]
fn the_program_refuses_swapped_data_in_every_command_and_changes_nothing() {
    let bench = bench();
    bench.run(&["header", "backup", "a.img", "--header", "a.header", "a.backup"]).succeeds();
    let swapped = [&["b.img", "--header", "a.header"][..], &KEY].concat();
    let before = all_bytes(&bench);
    let commands: [&[&str]; 14] = [
        &["serve", "--socket", "s"],
        &["serve", "--socket", "s", "--read-only"],
        &["serve", "--socket", "s", "--allow-discards"],
        &["import", "plain.img", "--force"],
        &["export", "out.img"],
        &["rekey"],
        &["rekey", "--dry-run"],
        &["key", "change", "--new-key-file", "second.key"],
        &["resize", "--size", "8M"],
        &["key", "add", "--new-key-file", "second.key"],
        &["key", "test"],
        &["dmtable"],
        &["header", "export", "--luks2", "out.luks"],
        &["relocate", "to.img"],
    ];
    for command in commands {
        let (verb, rest) = match command {
            ["key" | "header", ..] => command.split_at(2),
            _ => command.split_at(1),
        };
        let args = match command {
            ["import", ..] => [verb, &rest[..1], &swapped, &rest[1..]].concat(),
            _ => [verb, &swapped[..1], rest, &swapped[1..]].concat(),
        };
        let words = ["the tag of this header is not at byte 4194304 of the data", "--accept-data"];
        bench.run(&args).fails(3, &words);
        assert!(all_bytes(&bench) == before, "{args:?}");
        assert!(!bench.path("out.img").exists() && !bench.path("to.img").exists(), "{args:?}");
    }
    // A backup is not restored beside other data either.
    let restore = [&["header", "restore", "b.img", "a.backup", "--header", "c.header"][..], &KEY].concat();
    bench.run(&restore).fails(3, &["the tag of this header"]);
    assert!(all_bytes(&bench) == before && !bench.path("c.header").exists());
    let restore = [&["header", "restore", "a.img", "a.backup", "--header", "c.header"][..], &KEY].concat();
    bench.run(&restore).succeeds();
    // Opened for reading there is nothing to be accepted by.
    let read_only = [&["export", "b.img", "out.img", "--header", "a.header", "--accept-data"][..], &KEY].concat();
    bench.run(&read_only).fails(1, &["writes a tag", "open it for writing"]);
    assert!(all_bytes(&bench) == before);
}

#[test]
fn accept_data_binds_what_the_user_vouches_for() {
    let bench = bench();
    let header = ["--header", "a.header"];
    let info = || bench.run(&[&["info", "a.img"][..], &header].concat()).succeeds().stdout;
    assert!(
        info().contains("bound to the header by the tag at byte 4194304") && !info().contains("warning"),
        "{}",
        info()
    );
    let import = [&["import", "plain.img", "a.img", "--force"][..], &header, &KEY].concat();
    bench.run(&import).succeeds();
    // Somebody has cut the file to the data.
    let file = fs::File::options().write(true).open(bench.path("a.img")).unwrap();
    file.set_len(4 << 20).unwrap();
    let serve = [&["serve", "a.img", "--socket", "s"][..], &header, &KEY].concat();
    bench.run(&serve).fails(3, &["the tag of this header"]);
    bench.run(&["info", "a.img", "--accept-data"]).fails(1, &["--header"]);
    let socket = bench.path("data.sock");
    let accept = |more: &[&str]| {
        let args = [&["serve", "a.img", "--socket", socket.to_str().unwrap()][..], &header, &KEY, more].concat();
        Server::start(bench.command(&args), socket.clone()).stop();
    };
    accept(&["--accept-data"]);
    assert!(
        info().contains("not bound to the header") && info().contains("nothing tells whether the data"),
        "{}",
        info()
    );
    accept(&[]);
    file.set_len((4 << 20) + PAGE).unwrap();
    accept(&["--accept-data"]);
    assert!(
        info().contains("bound to the header by the tag at byte 4194304") && !info().contains("warning"),
        "{}",
        info()
    );
    let export = [&["export", "a.img", "out.img"][..], &header, &KEY].concat();
    bench.run(&export).succeeds();
    assert!(fs::read(bench.path("out.img")).unwrap()[..MIB] == fs::read(bench.path("plain.img")).unwrap());
    let json = bench.run(&[&["info", "a.img", "--json"][..], &header].concat()).succeeds().stdout;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["tag_offset"], 4 << 20);
}

/// Wiping the data of an erased namespace leaves no tag behind either.
#[test]
fn a_wipe_of_erased_data_takes_the_tag_along() {
    let bench = bench();
    bench.run(&["erase", "a.img", "--header", "a.header", "--yes", "--wipe-data"]).succeeds();
    let bytes = all_bytes(&bench);
    assert!(bytes[0].iter().chain(&bytes[1]).all(|&byte| byte == 0));
}
