//! A volume's reads and writes beside a plain copy of the same shape, on a file in tmpfs.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use daxcrypt::memory::{Source, Target};
use daxcrypt::namespace::{self, Credential, FormatOptions, HEADER_AREA_BYTES};
use daxcrypt::pmem::{Allocation, Backing};
use daxcrypt::secret::SecretBytes;
use daxcrypt::volume::Volume;
use daxcrypt::xts::Backend;

const SIZE_BYTES: u64 = 256 << 20;

fn volume(folder: &Path) -> Volume {
    let backing = Backing::create(&folder.join("v"), SIZE_BYTES + HEADER_AREA_BYTES, Allocation::Full).unwrap();
    let credential = Credential::KeyFile(SecretBytes::random(64).unwrap());
    let namespace = namespace::format(Arc::new(backing), FormatOptions::default(), &credential).unwrap();
    Volume::new(namespace, Backend::from_env().unwrap())
}

fn read_and_write(criterion: &mut Criterion) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let volume = volume(folder.path());
    volume.write_zeroes(0, SIZE_BYTES).unwrap();
    for (name, len) in [("16 B", 16_usize), ("512 B", 512), ("4 KiB", 4096), ("128 KiB", 128 << 10), ("1 MiB", 1 << 20)]
    {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(len as u64));
        let mut buffer = vec![7_u8; len];
        let steps = SIZE_BYTES / len as u64;
        let mut step = 0;
        // A stride that visits everything and defeats no prefetcher within one request.
        let mut next = || {
            step = (step + 7919) % steps;
            step * len as u64
        };
        group.bench_function("read", |b| b.iter(|| volume.read_at(black_box(&mut buffer), next()).unwrap()));
        group.bench_function("write", |b| b.iter(|| volume.write_at(black_box(&buffer), next()).unwrap()));
        let start = volume.geometry().data_start();
        let at = |offset: u64| start + offset..start + offset + len as u64;
        group.bench_function("memcpy from media", |b| {
            b.iter(|| {
                volume.backing().read(at(next()), |source: Source<'_>| source.copy_to(black_box(&mut buffer))).unwrap();
            });
        });
        group.bench_function("memcpy to media", |b| {
            b.iter(|| {
                let copy = |mut target: Target<'_>| target.copy_from(black_box(&buffer));
                volume.backing().write(at(next()), copy).unwrap();
            });
        });
        group.finish();
    }
}

criterion_group!(benches, read_and_write);
criterion_main!(benches);
