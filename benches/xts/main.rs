//! AES-XTS speed in cache and out of cache, by backend, unit and key size, with memcpy beside it.
//!
//! Plain `cargo bench --bench xts` is criterion. With `--ratios` (or `--soft-ratios`, for a build with software AES) it
//! prints the table of `ratios` instead, whose rows were measured in turns; tools/bench-xts runs both.

mod calm;
mod ratios;
mod subject;

use std::env;
use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use daxcrypt::memory::{Source, Store, Target};
use daxcrypt::xts::{Backend, DataUnit, Span};

const IN_CACHE_BYTES: usize = 256 << 10;
const OUT_OF_CACHE_BYTES: usize = 256 << 20;

/// Every backend, key and unit size: name, expanded key, unit.
fn variants() -> Vec<(String, daxcrypt::xts::XtsKey, DataUnit)> {
    let mut variants = Vec::new();
    for backend in Backend::available() {
        for key_bits in [256, 128] {
            for unit in [DataUnit::Bytes4096, DataUnit::Bytes512] {
                let name = format!("{backend}/AES-{key_bits}/{}", unit.len_bytes());
                variants.push((name, subject::key(key_bits, backend), unit));
            }
        }
    }
    variants
}

fn in_cache(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("xts in cache");
    group.throughput(Throughput::Bytes(IN_CACHE_BYTES as u64));
    let source = vec![7_u8; IN_CACHE_BYTES];
    let mut target = vec![0_u8; IN_CACHE_BYTES];
    group.bench_function("memcpy", |bench| bench.iter(|| target.copy_from_slice(black_box(&source))));
    for (name, key, unit) in variants() {
        let span = Span { unit, tweak: 4096, skip_bytes: 0 };
        group.bench_function(BenchmarkId::new("encrypt", &name), |bench| {
            bench.iter(|| {
                let (src, dst) = (Source::from_slice(black_box(&source)), Target::from_slice(&mut target));
                key.encrypt(span, src, dst, Store::Cached);
            });
        });
        group.bench_function(BenchmarkId::new("decrypt", &name), |bench| {
            bench.iter(|| {
                let (src, dst) = (Source::from_slice(black_box(&source)), Target::from_slice(&mut target));
                key.decrypt(span, src, dst);
            });
        });
    }
    group.finish();
}

fn out_of_cache(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("xts out of cache");
    group.throughput(Throughput::Bytes(OUT_OF_CACHE_BYTES as u64));
    group.sample_size(10);
    let mut cold = subject::Cold::new(OUT_OF_CACHE_BYTES);
    group.bench_function("memcpy hot to cold", |bench| bench.iter(|| cold.copy_in()));
    group.bench_function("memcpy cold to hot", |bench| bench.iter(|| cold.copy_out()));
    for (name, key, unit) in variants() {
        group.bench_function(BenchmarkId::new("encrypt", &name), |bench| bench.iter(|| cold.encrypt(&key, unit)));
        group.bench_function(BenchmarkId::new("decrypt", &name), |bench| bench.iter(|| cold.decrypt(&key, unit)));
    }
    group.finish();
}

fn main() {
    let asked = |name: &str| env::args().any(|argument| argument == name);
    if asked("--ratios") {
        ratios::print();
    } else if asked("--soft-ratios") {
        ratios::print_soft();
    } else {
        let mut criterion = Criterion::default()
            .sample_size(20)
            .warm_up_time(Duration::from_millis(200))
            .measurement_time(Duration::from_millis(600))
            .configure_from_args();
        in_cache(&mut criterion);
        out_of_cache(&mut criterion);
        criterion.final_summary();
    }
}
